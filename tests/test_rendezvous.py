"""Functions that run side by side meet, and fail together."""

import threading

import pytest
import tensorflow as tf

from keras_clones import PlacedClone
from keras_clones.exchange.meeting import current_clone, meet, run_side_by_side

CLONES = [PlacedClone(f"clone_{i}", f"/device:CPU:{i}") for i in range(3)]


def everyone(values):
    return [tuple(values)] * len(values)


def test_they_take_turns_in_order():
    log = []

    def function(i):
        assert current_clone() == i
        log.append(("before", i))
        seen = meet("here", i * i, everyone)
        log.append(("after", i))
        return seen

    assert run_side_by_side(CLONES, function) == [(0, 1, 4)] * 3
    assert log == [(when, i) for when in ("before", "after") for i in range(3)]
    assert current_clone() is None


def test_they_build_one_graph_each_on_its_device():
    @tf.function
    def run():
        def function(i):
            total = meet("sum", tf.constant(float(i)), lambda v: [sum(v)] * 3)
            return total + 1

        results = run_side_by_side(CLONES, function)
        assert [r.device for r in results] == [c.device for c in CLONES]
        assert [r.name.split("/")[0] for r in results] == [
            c.scope for c in CLONES
        ]
        return results

    assert [float(r) for r in run()] == [4.0] * 3


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda i: 1 / (i - 1), ZeroDivisionError, "zero"),
        (lambda i: meet(f"point {i}", 0, everyone), ValueError, "'point 2'"),
        (lambda i: i and meet("here", 0, everyone), ValueError, "'its end'"),
        (lambda i: meet("here", 0, lambda v: 1 / 0), ZeroDivisionError, "zero"),
    ],
)
def test_they_fail_together(function, error, message):
    with pytest.raises(error, match=message):
        run_side_by_side(CLONES, function)
    names = [t.name for t in threading.enumerate() if "_run" in t.name]
    assert not names


def test_there_is_no_meeting_alone():
    with pytest.raises(RuntimeError, match="only where they run"):
        meet("here", 0, everyone)
