"""Plain Python values as JSON and arrays, and back: no pickles."""

from typing import Any

import numpy as np


class NotPlainError(TypeError):
    """Raised for a value that is no number, text, array, or list of these."""


def encode(value: Any, arrays: list[np.ndarray]) -> Any:
    """Return a value for JSON, with its arrays put aside.

    Args:
        value: The value, of numbers, strings, lists, tuples, dicts and arrays.
        arrays: List that the arrays in it are appended to, copied.

    Raises:
        NotPlainError: If there is anything else in it.
    """
    # Subclasses, such as enumerations, would come back as something else.
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, (np.ndarray, np.generic)):
        held = np.array(value)
        if held.dtype.kind not in "biufcSUmM":
            raise NotPlainError(f"{held.dtype}")
        arrays.append(held)
        kind = "array" if isinstance(value, np.ndarray) else "scalar"
        return {kind: len(arrays) - 1}
    if type(value) is list:
        return [encode(one, arrays) for one in value]
    if type(value) is tuple:
        return {"tuple": [encode(one, arrays) for one in value]}
    if type(value) is dict:
        items = [[k, v] for k, v in value.items()]
        return {"dict": encode(items, arrays)}
    raise NotPlainError(f"{type(value)}")


def decode(value: Any, arrays: list[np.ndarray]) -> Any:
    """Return the value that `encode` was given."""
    if isinstance(value, list):
        return [decode(one, arrays) for one in value]
    if not isinstance(value, dict):
        return value
    [(kind, inner)] = value.items()
    if kind in ("array", "scalar"):
        return arrays[inner].copy() if kind == "array" else arrays[inner][()]
    held = decode(inner, arrays)
    if kind == "tuple":
        return tuple(held)
    # A list of lists: keys that are tuples are tuples again.
    return dict(held)
