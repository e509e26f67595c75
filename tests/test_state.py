"""Statistics, seeds and counters merge by their stated policies."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_clones.clone import state


@pytest.mark.parametrize(
    ("policy", "kind", "expected"),
    [
        ("mean", "averaged", 1.5),
        ("sum", "added", 1.0),
        ("first", "first", 2.0),
        ("max", "largest", 2.0),
        ("min", "smallest", 2.0),
    ],
)
def test_changes_of_a_clone(policy, kind, expected):
    changes = state.clone_changes(
        [policy],
        [tf.constant(1.0)],
        [tf.constant(2.0)],
        lambda value: 0.75 * value,
        lambda value: value,
    )
    found = {k: v for k, v in changes._asdict().items() if v}
    assert found.keys() == {kind}
    assert float(found[kind][0]) == expected


def test_policies_honour_aggregation():
    def variable(**kwargs):
        return keras.Variable(kwargs.pop("value", 0.0), **kwargs)

    layer = keras.layers.BatchNormalization()
    model = keras.Sequential([keras.Input((3,)), layer])
    variables = [
        variable(),
        variable(aggregation="sum"),
        variable(aggregation="only_first_replica"),
        variable(value=1, dtype="int32"),
        variable(),
        variable(name="of_a_library"),
        layer.moving_mean,
    ]
    alike = [False, False, False, False, True, False, False]
    named = {"*library": "max"}
    policies = state.Policies("first", named)
    found = state.merge_policies(model, variables, policies, alike)
    assert [(policy.name, policy.known) for policy in found] == [
        ("mean", False),
        ("sum", True),
        ("first", True),
        ("first", False),
        ("first", True),
        ("max", True),
        ("first", True),
    ]
    policies = state.Policies("mean", named)
    found = state.merge_policies(model, variables, policies, alike)
    assert found[-1].name == "mean"
    del variables[4:6]

    def names(model, alike=False, **kwargs):
        found = state.merge_policies(
            model, variables, state.Policies(**kwargs), [alike] * 5
        )
        return [policy.name for policy in found], [p.known for p in found]

    first = {"batch_norm": "first"}
    assert names(model, **first) == (
        ["mean", "sum", "first", "first", "first"],
        [False, True, True, False, True],
    )
    assert names(model)[0][-1] == "mean"
    assert names(model, alike=True)[0] == [
        *("first", "sum", "first", "first", "mean")
    ]
    assert names(model, alone=True)[0] == ["first"] * 5
    # What a function's clones do that nobody wrote down.
    known = [True] * 5
    own = ["first", "sum", "first", "first", "first"]
    assert names(None, otherwise="first") == (own, known)


def test_seeds_differ_by_clone_and_the_first_is_kept():
    seeds = [tf.constant([7, 3], tf.uint32), tf.constant([1, 0], tf.uint32)]
    kept = state.offset_seeds(seeds, 0)
    moved = state.offset_seeds(seeds, 2)
    np.testing.assert_array_equal(kept, seeds)
    np.testing.assert_array_equal(moved, [[9, 3], [3, 0]])


def test_every_variable_once_and_in_its_place():
    inner = keras.Sequential(
        [keras.layers.Dense(2), keras.layers.BatchNormalization()]
    )
    model = keras.Sequential(
        [keras.Input((2,)), inner, keras.layers.Dropout(0.5), inner]
    )
    frozen = keras.layers.Dense(1, trainable=False)
    model.add(frozen)
    groups = state.model_variables(model)
    ids = [id(v) for group in groups for v in group]
    assert len(ids) == len(set(ids))
    assert {id(v) for v in model.variables} <= set(ids)
    assert [v.path for v in groups.trainable] == [
        v.path for v in model.trainable_weights
    ]
    assert all("seed" in v.path for v in groups.seeds)
    assert any(frozen.kernel is v for v in groups.others)
