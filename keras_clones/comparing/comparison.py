"""What `compare` returns."""

import os
from typing import Any

from keras_clones.comparing import drawing, page
from keras_clones.comparing.records import Findings
from keras_clones.look import picture
from keras_clones.look.page import show


class Comparison:
    """How clones of a model compare with plain Keras, as `compare` found.

    Attributes:
        same: Boolean, whether every number of clones that ran trained the
            same model as plain Keras, up to rounding.
        runs: Tuple of records, that of plain Keras first, then one a number
            of clones, each with `num_clones` (0 for plain Keras), `same`,
            `differences`, `seconds` (of a step), `first_seconds`, `memory`
            (bytes by device), `received` and `sent` (a clone a step),
            `bound_by`, `warnings` and `failed`.
        first: The first variable or log that differs by more than rounding,
            with its `name`, `kind`, `first` step and `largest` difference,
            of the fewest clones that differ, or `None`.
        causes: Tuple of what is known to let it differ: `layers`, `why`, the
            options that mend it in `mends`, and whether they did in `tried`.
        explained: Boolean, whether these explain the difference.
        advice: Which number of clones and options to use: `num_clones` (0
            for plain Keras), `options`, `gain` (how many times as fast as
            plain Keras) and `text`.
        dtype: String, the type of numbers that differences were judged in.
        judged: String, what counts as rounding.
        notes: Tuple of strings, what else to know.
    """

    def __init__(self, findings: Findings) -> None:
        self._findings = findings
        self.same = findings.same
        self.runs = findings.runs
        differing = findings.differing
        self.first = differing.wrong[0] if differing else None
        self.causes = findings.causes
        self.explained = findings.explained
        self.advice = findings.advice
        self.dtype = findings.dtype
        self.judged = findings.judged
        self.notes = findings.notes

    def summary(self) -> None:
        """Print what it came to; in a notebook it shows as HTML."""
        show(page.page(self._findings))

    def plot(self, path: str | os.PathLike[str] = "comparison.png") -> None:
        """Draw the difference by step, and the time by number of clones.

        Args:
            path: String or path, the file to write. Its extension says in
                which format, such as `".png"`, `".svg"` or `".pdf"`.
                Defaults to `"comparison.png"`.

        Raises:
            ImportError: If there is no matplotlib.
            TypeError: If `path` is no path.
            ValueError: If the extension is not one that matplotlib knows, or
                the file cannot be written.
        """
        path = picture.check_path(path)
        drawing.draw(self._findings).savefig(path)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as dicts, lists, strings and numbers, for JSON."""
        return page.as_dict(self._findings)

    def _repr_html_(self) -> str:
        return page.page(self._findings)._repr_html_()

    def __repr__(self) -> str:
        return repr(page.page(self._findings))
