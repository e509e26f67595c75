"""Let mkdocstrings read docstrings in Keras's grammar.

There, `Example:` and `Reference:` stand above text that is not indented, and
examples are doctests: they become bold titles and blocks of code.
"""

import re
from typing import Any

import griffe

_TITLE = re.compile(r"^(Example|Reference):[ ]*$", re.MULTILINE)
_DOCTEST = re.compile(r"(?:^>>> .*\n(?:^.*\S.*(?:\n|\Z))*\n?)+", re.MULTILINE)


class KerasDocstrings(griffe.Extension):
    """Rewrite docstrings as they are collected."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = readable(obj.docstring.value)


def readable(docstring: str) -> str:
    """Return a docstring as Markdown within Google's grammar."""
    text = _TITLE.sub(r"**\1**", docstring + "\n")
    return _DOCTEST.sub(_fence, text).rstrip("\n")


def _fence(found: re.Match) -> str:
    return f"```pycon\n{found[0].rstrip()}\n```\n\n"
