"""Reach a private name of a library in whichever place its version has it."""

import importlib
from typing import Any


def reach(*places: str, library: str, installed: str, known: str) -> Any:
    """Return a private module, class or function by its full name.

    Args:
        *places: Strings, the full names it has had, such as
            `"keras.src.backend.common.global_state"`, that of the newest
            version first.
        library: String, the library's name.
        installed: String, its version here.
        known: String, its versions that are known to have them, such as
            `"3.12 to 3.15"`.

    Returns:
        What the first place that there is holds.

    Raises:
        ImportError: If there is none of the places.
    """
    for place in places:
        outer, _, name = place.rpartition(".")
        try:
            return getattr(importlib.import_module(outer), name)
        except (AttributeError, ModuleNotFoundError):
            pass
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError:
            continue
    looked = ", ".join(f"`{place}`" for place in places)
    raise ImportError(
        f"Expected {library} to have a private name that keras_clones needs, "
        f"{looked}. Received: {library} {installed}, which has it no longer. "
        f"Versions of {library} that are known to work: {known}. Install one "
        "of these, or a newer keras_clones."
    )
