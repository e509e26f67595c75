"""Statistics, seeds and counters merge by their stated policies."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_clones import state


@pytest.mark.parametrize(
    ("policy", "expected"), [("mean", 3.5), ("first", 2.0), ("sum", 9.0)]
)
def test_merge(policy, expected):
    merged = state.merge(
        policy,
        tf.constant(1.0),
        [tf.constant(2.0), tf.constant(8.0)],
        [tf.constant(0.75), tf.constant(0.25)],
    )
    assert float(merged) == expected


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
