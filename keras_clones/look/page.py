"""Tables and notes, as text and as HTML."""

import html
import sys
from collections.abc import Sequence
from typing import NamedTuple


class Table(NamedTuple):
    """A table of strings."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


class Page(NamedTuple):
    """Tables and lines below them, which a notebook shows as HTML."""

    tables: Sequence[Table]
    notes: Sequence[str] = ()

    def __repr__(self) -> str:
        parts = [_text(table) for table in self.tables]
        return "\n\n".join([*parts, *filter(None, ["\n".join(self.notes)])])

    def _repr_html_(self) -> str:
        parts = [_html(table) for table in self.tables]
        return "".join(
            [*parts, *(f"<p>{html.escape(note)}</p>" for note in self.notes)]
        )


def show(page: Page) -> None:
    """Print a page, or show it as HTML in a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    # A shell in a terminal has no kernel, and would not show HTML.
    if getattr(shell, "kernel", None) is not None:
        from IPython.display import display

        display(page)
    else:
        print(page)


def readable(size: int) -> str:
    """Return a number of bytes with three digits and a unit: 1 KiB is 1024 B.

    It is the only unit of what is printed.
    """
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} TiB"


def _text(table: Table) -> str:
    lines = [table.header, *table.rows]
    widths = [max(len(cell) for cell in c) for c in zip(*lines, strict=True)]
    text = [
        "  ".join(
            cell.ljust(width) for cell, width in zip(line, widths, strict=True)
        ).rstrip()
        for line in lines
    ]
    text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(text)


def _html(table: Table) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        inside = (f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
        return f"<tr>{''.join(inside)}</tr>"

    body = "".join(line("td", row) for row in table.rows)
    return (
        f"<table><thead>{line('th', table.header)}</thead>"
        f"<tbody>{body}</tbody></table>"
    )
