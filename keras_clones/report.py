"""What a user looks at: the placement table."""

from collections.abc import Sequence

from keras_clones.placement import Clone


def placement_table(
    clones: Sequence[Clone], homes: dict[str, str], rows: Sequence[int] | None
) -> str:
    """Return a table of clones and devices as text.

    Args:
        clones: Sequence of `Clone`s.
        homes: Dict of device strings, by what lives there.
        rows: Sequence of integers, the rows of a batch that each clone gets,
            or `None` to leave the column out.
    """
    lines = [["clone", "device"]]
    lines += [[clone.scope or "clone_0", clone.device] for clone in clones]
    if rows is not None:
        column = ["rows", *map(str, rows)]
        lines = [[*line, n] for line, n in zip(lines, column, strict=True)]
    lines += [[name, device] for name, device in homes.items()]
    widths = [
        max(len(line[i]) for line in lines if i < len(line))
        for i in range(len(lines[0]))
    ]
    table = [
        "  ".join(
            cell.ljust(width) for cell, width in zip(line, widths, strict=False)
        ).rstrip()
        for line in lines
    ]
    table.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(table)
