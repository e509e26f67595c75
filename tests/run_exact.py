"""Train every case of `test_equivalence.py` with `exact=True`, all ways.

As it is and with dropout before each `Dense`, in float64 and float32, on 1 to
4 clones, and compare all that it comes to with plain Keras. It takes an hour
on two cores, so that `test_exact.py` runs three clones in float64 only.

    python tests/run_exact.py [--floatx float64] [--no-dropout] [name ...]

where a name is a part of a case's. What is beyond the tolerance in float32 is
right if plain Keras comes as far from itself when the last bits of its inputs
are others.
"""

import argparse
import collections
import gc
import math

import conftest  # noqa: F401
import keras
import numpy as np
import pytest
import test_equivalence as equivalence
import test_exact

NUM_CLONES = (1, 2, 3, 4)


def own_rounding(name, expected):
    """Return how far plain Keras is from itself, by its inputs' last bits."""
    found = []
    for seed in range(3):
        keras.backend.clear_session(free_memory=False)
        made = equivalence.CASES[name]()
        x, *rest = made.data
        last = np.random.default_rng(seed).choice([-1, 0, 1], x.shape)
        x = (x * (1 + last * np.finfo(x.dtype).eps)).astype(x.dtype)
        nudged = equivalence.train(made._replace(data=(x, *rest)), None)
        found.append(equivalence.compare(expected, nudged, math.inf))
    return max(found)


def judge(name, floatx, expected, received):
    """Return the largest difference, or raise what `compare` does."""
    tolerance = getattr(equivalence.CASES[name](), floatx)
    try:
        return f"{equivalence.compare(expected, received, tolerance):.1e}"
    except AssertionError:
        if floatx != "float32":
            raise
        worst = equivalence.compare(expected, received, math.inf)
        own = own_rounding(name, expected)
        if worst > own:
            raise
        return f"{worst:.1e} (plain Keras {own:.1e})"


def run(name, floatx, drops):
    """Return the largest difference by number of clones, or what is wrong."""
    keras.backend.clear_session(free_memory=False)
    keras.config.set_floatx(floatx)
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        dropping = test_exact.drop_in_dense(patch) if drops else None
        expected = equivalence.train(equivalence.CASES[name](), None)
        if dropping == []:
            return {}
        for num_clones in NUM_CLONES:
            keras.backend.clear_session(free_memory=False)
            gc.collect()
            try:
                received = test_exact.exactly(name, num_clones)
                found[num_clones] = judge(name, floatx, expected, received)
            except Exception as error:
                found[num_clones] = f"{type(error).__name__}: {error}"[:300]
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*")
    parser.add_argument("--floatx", action="append")
    parser.add_argument("--dropout", action=argparse.BooleanOptionalAction)
    options = parser.parse_args()
    names = [
        name
        for name in equivalence.CASES
        if not options.names or any(part in name for part in options.names)
    ]
    ways = [False, True] if options.dropout is None else [options.dropout]
    counts = collections.Counter()
    for floatx in options.floatx or ["float64", "float32"]:
        for drops in ways:
            for name in names:
                found = run(name, floatx, drops)
                right = [worst[:1].isdigit() for worst in found.values()]
                counts[floatx, drops, "right"] += sum(right)
                counts[floatx, drops, "of"] += len(right)
                label = f"{name}{' with dropout' if drops else ''}"
                print(floatx, label, *found.values(), sep=" | ", flush=True)
    for (floatx, drops, kind), number in counts.items():
        print(floatx, "with dropout" if drops else "as it is", kind, number)


if __name__ == "__main__":
    main()
