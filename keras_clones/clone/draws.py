"""Random draws of the global batch: what a clone draws for its own rows.

Within `of_global_batch`, what draws for the rows of a batch draws for those of
the global batch, and a clone keeps its own. So it draws what plain Keras draws
on one device. What does not draw for rows draws what it always does.
"""

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from keras_clones import _tf
from keras_clones.clone.global_rows import (
    GlobalRows,
    draw_rows,
    is_inside,
    locate,
    tell,
)
from keras_clones.clone.swaps import Swaps

# What draws by a seed alone, and which of its arguments may have a row for
# each row that it draws.
_BY_SEED: dict[str, tuple[str, ...]] = {
    "stateless_random_uniform_v2": (),
    "stateless_random_normal_v2": (),
    "stateless_truncated_normal_v2": (),
    "stateless_random_uniform_int_v2": (),
    "stateless_random_uniform_full_int_v2": (),
    "stateless_random_gamma_v3": ("alpha",),
    "stateless_random_uniform": (),
    "stateless_random_normal": (),
    "stateless_truncated_normal": (),
    "stateless_random_uniform_int": (),
    "stateless_random_uniform_full_int": (),
    "stateless_random_gamma_v2": ("alpha",),
    "stateless_random_poisson": ("lam",),
    "stateless_random_binomial": ("counts", "probs"),
    "stateless_parameterized_truncated_normal": (
        *("means", "stddevs", "minvals", "maxvals"),
    ),
    "stateless_multinomial": ("logits",),
}
# What draws by a state of its own, which every clone goes on with by itself.
_BY_STATE = (
    *("random_uniform", "random_uniform_int", "random_standard_normal"),
    *("truncated_normal", "parameterized_truncated_normal", "multinomial"),
    *("random_gamma", "random_poisson", "random_poisson_v2", "random_shuffle"),
    *("non_deterministic_ints", "rng_read_and_skip", "rng_skip"),
    *("stateful_random_binomial", "stateful_standard_normal"),
    *("stateful_standard_normal_v2", "stateful_truncated_normal"),
    *("stateful_uniform", "stateful_uniform_full_int", "stateful_uniform_int"),
    *("all_candidate_sampler", "fixed_unigram_candidate_sampler"),
    *("learned_unigram_candidate_sampler", "log_uniform_candidate_sampler"),
    *("thread_unsafe_unigram_candidate_sampler", "uniform_candidate_sampler"),
)
_REMEDY = (
    "Draw with `keras.random` and a `keras.random.SeedGenerator` that the "
    "layer keeps."
)


class _Active(threading.local):
    rows: GlobalRows | None = None


_active = _Active()


@contextlib.contextmanager
def of_global_batch(
    leaves: Sequence[Any], total: tf.Tensor, begin: tf.Tensor, exact: bool
) -> Iterator[None]:
    """Let a clone draw what one device draws for the clone's rows.

    Args:
        leaves: Sequence of the tensors of the clone that have its rows.
        total: Tensor of shape `(rows, 0)`, the rows of the global batch.
        begin: Scalar tensor, which of them is the first of the clone.
        exact: Boolean, whether to refuse what cannot be had.
    """
    held = _active.rows
    _active.rows = locate(leaves, total, begin, exact)
    with _swaps.made():
        try:
            yield
        finally:
            _active.rows = held


@functools.cache
def _functions() -> dict[tuple[Any, str], tuple[Any, Any]]:
    """Return what is swapped by its place, and what takes its place."""
    drawing = _tf.drawing_functions()
    found: dict[tuple[Any, str], tuple[Any, Any]] = {}
    for name in (*_BY_SEED, *_BY_STATE):
        module, function = drawing[name]
        found[module, name] = function, _asking(name, function)
    module, name = _tf.maker_of_context()
    make = getattr(module, name)
    found[module, name] = make, _marking(make)
    return found


# What draws asks for whom.
_swaps = Swaps(_functions)


def _marking(make: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function by which each clone traces functions of its own.

    A `tf.function` that was traced before draws for no global batch, and one
    that a clone traces draws for no other.
    """

    @functools.wraps(make)
    def marked(*args: Any, **kwargs: Any) -> Any:
        made, where = make(*args, **kwargs), _active.rows
        if where is None:
            return made
        return made._replace(context=(made.context, where.mark))

    return marked


def _asking(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that draws for the global batch where one is drawn for.

    Args:
        name: String, the name of a function that makes operations which draw.
        function: That function.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def draw(*args: Any, **kwargs: Any) -> Any:
        where = _active.rows
        if where is None or not is_inside(where):
            return function(*args, **kwargs)
        if name in _BY_STATE:
            tell(where, f"draws by a state of TensorFlow's ({name})", _REMEDY)
            return function(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        _active.rows = None
        try:
            return draw_rows(where, function, given, _BY_SEED[name])
        finally:
            _active.rows = where

    return draw
