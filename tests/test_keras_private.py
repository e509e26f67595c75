"""Every private name that this package reaches does what it is used for."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_clones import _keras


def small():
    model = keras.Sequential(
        [
            keras.Input((2,)),
            keras.layers.Dense(3, activity_regularizer="l2"),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(1, kernel_regularizer="l1"),
        ]
    )
    model.compile("adam", "mse", metrics=["mae"])
    return model


def test_masks():
    tensor, mask = tf.zeros((2, 3)), tf.ones((2, 3), bool)
    assert _keras.get_mask(tensor) is None
    _keras.set_mask(tensor, None)
    assert _keras.get_mask(tensor) is None
    _keras.set_mask(tensor, mask)
    assert _keras.get_mask(tensor) is mask
    embedded = keras.layers.Embedding(4, 2, mask_zero=True)(tf.ones((1, 2)))
    assert _keras.get_mask(embedded) is not None


def test_a_variable_gets_another_place():
    variable = keras.Variable([1.0, 2.0])
    new = tf.Variable([3.0, 4.0])
    _keras.set_tf_variable(variable, new)
    assert variable.value is new
    np.testing.assert_array_equal(variable.numpy(), [3.0, 4.0])


@pytest.mark.parametrize("scaled", [True, False])
def test_an_optimizer_finds_moved_variables(scaled):
    variable = keras.Variable([1.0, 2.0])
    optimizer = keras.optimizers.SGD(1.0)
    if scaled:
        optimizer = keras.optimizers.LossScaleOptimizer(
            optimizer, initial_scale=1.0
        )
    optimizer.build([variable])
    _keras.set_tf_variable(variable, tf.Variable([1.0, 2.0]))
    with pytest.raises(ValueError, match="Unknown variable"):
        optimizer.apply([tf.ones(2)], [variable])
    _keras.reindex_optimizer(optimizer)
    optimizer.apply([tf.ones(2)], [variable])
    np.testing.assert_array_equal(variable.numpy(), [0.0, 1.0])


def test_what_a_model_is_made_of():
    model = small()
    assert _keras.distribution_strategy(model) is None
    assert set(map(id, model.layers)) < set(map(id, _keras.layers(model)))
    dropout = model.layers[1]
    states = _keras.seed_states(model)
    assert any(s is dropout.seed_generator.state for s in states)
    assert states[-1] is _keras._global_seed_state()
    assert _keras.layer_metrics(model) == []
    assert _keras.loss_tracker(model).name == "loss"
    assert _keras.has_compiled_metrics(model)
    assert _keras.num_weight_regularizers(model) == 1


def test_what_compile_made_of_its_losses():
    model = small()
    assert not _keras.is_built(model)
    model.train_on_batch(np.ones((4, 2)), np.ones((4, 1)))
    assert _keras.is_built(model)
    (loss,) = _keras.compiled_losses(model)
    function, arguments = _keras.loss_function(loss)
    assert function is keras.losses.mean_squared_error
    assert arguments == {}
    assert _keras.loss_trackers(model) == []

    class Own(keras.losses.MeanSquaredError):
        def call(self, y_true, y_pred):
            return super().call(y_true, y_pred)

    assert _keras.loss_function(Own()) is None
    assert _keras.loss_function(keras.losses.CTC()) is not None


def test_losses_of_outputs_have_trackers():
    inputs = keras.Input((2,))
    outputs = [keras.layers.Dense(1)(inputs) for _ in range(2)]
    model = keras.Model(inputs, outputs)
    model.compile("sgd", "mse")
    target = np.ones((4, 1))
    model.train_on_batch(np.ones((4, 2)), [target, target])
    assert len(_keras.loss_trackers(model)) == 2
    total, count = _keras.loss_trackers(model)[0].variables
    assert "total" in total.path and "count" in count.path


def test_losses_are_overridden():
    model = small()
    _keras.call(model, tf.ones((2, 2)), training=True)
    assert len(model.losses) == 2
    with _keras.overriding_losses(model, [tf.constant(3.0)]):
        assert [float(loss) for loss in model.losses] == [3.0]
    assert len(model.losses) == 1  # the weight regularizer is always there
