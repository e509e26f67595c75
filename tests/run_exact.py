"""Train every case of `test_equivalence.py` with `exact=True`, all ways.

As it is and with dropout before each `Dense`, in float64 and float32, on 1 to
4 clones, and compare all that it comes to with plain Keras. It takes an hour
on two cores, so that `test_exact.py` runs three clones in float64 only.

    python tests/run_exact.py [part of a name ...]
"""

import collections
import sys

import conftest  # noqa: F401
import keras
import pytest
import test_equivalence as equivalence
import test_exact

NUM_CLONES = (1, 2, 3, 4)


def run(name, floatx, drops):
    """Return the largest difference by number of clones, or what is wrong."""
    keras.backend.clear_session()
    keras.config.set_floatx(floatx)
    tolerance = getattr(equivalence.CASES[name](), floatx)
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        dropping = test_exact.drop_in_dense(patch) if drops else None
        expected = equivalence.train(equivalence.CASES[name](), None)
        if dropping == []:
            return {}
        for num_clones in NUM_CLONES:
            keras.backend.clear_session()
            try:
                received = test_exact.exactly(name, num_clones)
                worst = equivalence.compare(expected, received, tolerance)
                found[num_clones] = f"{worst:.1e}"
            except Exception as error:
                found[num_clones] = f"{type(error).__name__}: {error}"[:300]
    return found


def main():
    wanted = sys.argv[1:]
    names = [
        name
        for name in equivalence.CASES
        if not wanted or any(part in name for part in wanted)
    ]
    counts = collections.Counter()
    for floatx in ("float32", "float64"):
        for drops in (False, True):
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
