"""Every private name that this package reaches does what it is used for."""

import contextlib
import functools
import importlib.util
import pathlib
import sys
import types

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_clones import _keras, _private, _tf
from keras_clones.tensors.by_host import HostBatch


def loaded_again(door):
    """Run a door's file once more, beside the module that is in use."""
    spec = importlib.util.spec_from_file_location("again", door.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def take_away(monkeypatch, place):
    outer, _, name = place.rpartition(".")
    monkeypatch.delattr(sys.modules.get(outer), name, raising=False)
    monkeypatch.setitem(sys.modules, place, None)


@pytest.mark.parametrize("door", [_keras, _tf], ids=["keras", "tensorflow"])
def test_a_missing_name_is_an_error_at_import(door, monkeypatch):
    found, reach = [], _private.reach

    def noting(*places, **about):
        found.append((places, about))
        return reach(*places, **about)

    with monkeypatch.context() as patch:
        patch.setattr("keras_clones._private.reach", noting)
        loaded_again(door)
    assert found
    for places, about in found:
        with monkeypatch.context() as patch:
            for place in places:
                take_away(patch, place)
            with pytest.raises(ImportError) as error:
                loaded_again(door)
        message = str(error.value)
        assert all(f"`{place}`" in message for place in places)
        assert about["known"] in message
        assert f"Received: {about['library']} {about['installed']}" in message
    assert found[0][1]["installed"] in (keras.__version__, tf.__version__)


def test_a_name_is_reached_where_it_is(monkeypatch):
    reach = functools.partial(
        _private.reach, library="Keras", installed="4.0", known="3.12 to 3.15"
    )
    new, old = types.ModuleType("new"), types.ModuleType("old")
    monkeypatch.setitem(sys.modules, "new", new)
    monkeypatch.setitem(sys.modules, "old", old)
    old.name = 1
    assert reach("new.name", "old.name") == 1
    assert reach("nowhere.at.all.name", "old.name") == 1
    new.name = 2
    assert reach("new.name", "old.name") == 2
    assert reach("importlib.util") is importlib.util
    assert reach("importlib.resources.abc", "importlib.abc")
    with pytest.raises(ImportError, match="has it no longer"):
        reach("new.other", "old.other")


@pytest.mark.parametrize("door", [_keras, _tf], ids=["keras", "tensorflow"])
def test_every_name_is_tested_here(door):
    """Add a test of what a new function reaches, which may move."""
    source = pathlib.Path(__file__).read_text()
    module = pathlib.Path(door.__file__).stem
    for name, value in vars(door).items():
        # A module has no `__module__`, and a string no `__name__`.
        home = getattr(value, "__module__", getattr(value, "__name__", ""))
        own = home.startswith((door.__name__, "tensorflow.python"))
        if own and not name.startswith("_"):
            assert f"{module}.{name}" in source, name


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


def test_the_state_of_a_thread():
    held = _keras.thread_state()
    assert held.keys() == {
        *("global_seed_generator", "dtype_policy", "current_call_ctx")
    }
    policy = keras.config.dtype_policy()
    other = keras.DTypePolicy("mixed_bfloat16")
    try:
        with _keras.thread_state_of({"dtype_policy": other}):
            assert keras.config.dtype_policy() is other
    finally:
        keras.config.set_dtype_policy(policy)


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


# How many variables each of Keras's optimizers keeps of a weight at most.
SLOTS = {
    "Adadelta": ({}, 2),
    "Adagrad": ({}, 1),
    "Adam": ({"amsgrad": True}, 3),
    "AdamW": ({"amsgrad": True}, 3),
    "Adamax": ({}, 2),
    "Ftrl": ({}, 2),
    "Lion": ({}, 1),
    "Nadam": ({}, 2),
    "RMSprop": ({"momentum": 0.5, "centered": True}, 3),
    "SGD": ({"momentum": 0.5}, 1),
}


@pytest.mark.parametrize("name", SLOTS)
def test_what_an_optimizer_keeps_of_a_weight(name):
    options, number = SLOTS[name]
    kind = getattr(keras.optimizers, name)
    weights = keras.Variable([1.0]), keras.Variable([1.0, 2.0])
    for optimizer, there in ((kind(**options), number), (kind(), None)):
        assert _keras.updates_as_made(optimizer)
        optimizer.build(weights)
        kept = {id(v.value) for v in optimizer.variables if v.shape == (2,)}
        slots = _keras.slots_of(optimizer, weights[1].value)
        assert len(slots) == number
        found = {id(slot) for slot in slots if slot is not None}
        assert found == kept and len(found) == (there or len(kept))


def test_whose_update_an_optimizer_has(monkeypatch):
    plain = keras.optimizers.SGD(0.1)
    assert not _keras.updates_as_made(keras.optimizers.Lamb())
    assert not _keras.updates_as_made(type("Own", (type(plain),), {})(0.1))
    plain.update_step = plain.update_step
    assert not _keras.updates_as_made(plain)
    assert _keras.updates_as_made(keras.optimizers.SGD(0.1))
    monkeypatch.setattr(keras.optimizers.SGD, "update_step", lambda *_: None)
    assert not _keras.updates_as_made(keras.optimizers.SGD(0.1))


def test_an_update_begins_with_the_decay_and_goes_by_one_step_a_weight():
    one, other = keras.Variable([1.0]), keras.Variable([1.0])
    optimizer = keras.optimizers.Nadam(0.1, weight_decay=0.5)
    optimizer.exclude_from_weight_decay([other])
    optimizer.build([one, other])
    seen = []

    def update_step(own, gradient, variable, rate):
        assert isinstance(variable, tf.Variable)
        seen.append(float(gradient[0]))
        seen.append(float(_keras.momentum_product(optimizer)) < 1)

    def decay(own, variables):
        seen.append([_keras.decays(optimizer, v.value) for v in variables])

    for _ in range(2):
        with _keras.updating(optimizer, update_step, decay):
            optimizer.apply([tf.ones(1), 2 * tf.ones(1)], [one, other])
    assert seen == 2 * [[True, False], 1.0, True, 2.0, True]
    assert _keras.updates_as_made(optimizer)
    optimizer.weight_decay = None
    with _keras.updating(optimizer, update_step, decay):
        optimizer.apply([tf.ones(1), 2 * tf.ones(1)], [one, other])
    assert len(seen) == 15


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_optimizer_updates_parts_in_place_of_a_weight(wrapped):
    one, other = keras.Variable([[1.0], [2.0]]), keras.Variable([3.0])
    inner = keras.optimizers.SGD(1.0, momentum=0.5, weight_decay=0.1)
    inner.exclude_from_weight_decay([one])
    optimizer = inner
    if wrapped:
        optimizer = keras.optimizers.LossScaleOptimizer(inner, 1.0)
    optimizer.build([one, other])
    (slot,) = (v for v in inner.variables if v.shape == (2, 1))
    parts = {
        id(v): [keras.Variable(v[:1]), keras.Variable(v[1:])]
        for v in (one, slot)
    }
    gradients = [tf.constant([[g]]) for g in (1.0, 2.0)], tf.constant([4.0])
    kept = dict(vars(inner))
    for _ in range(2):
        with _keras.in_parts(optimizer, lambda v: parts.get(id(v))):
            optimizer.apply(
                [*gradients[0], gradients[1]], [*parts[id(one)], other]
            )
        assert all(vars(inner)[name] is kept[name] for name in kept)
    found = np.concatenate(parts[id(one)]), np.concatenate(parts[id(slot)])
    # Two steps with a momentum of a half: g, then 1.5 g.
    np.testing.assert_allclose(found[0], [[1 - 2.5], [2 - 5.0]])
    np.testing.assert_allclose(found[1], [[-1.5], [-3.0]])
    np.testing.assert_allclose(one, [[1.0], [2.0]])
    np.testing.assert_allclose(other, [(3 * 0.9 - 4) * 0.9 - 6])
    with _keras.replaced(inner, "apply", len):
        assert inner.apply([1, 2]) == 2
    assert "apply" not in vars(inner)
    swapped = [(inner, "apply", len), (optimizer, "build", sum)]
    with _keras.all_replaced(swapped):
        assert inner.apply([1, 2]) == 2 and optimizer.build([1, 2]) == 3
    assert "apply" not in vars(inner) and "build" not in vars(optimizer)


def test_weights_that_do_not_decay_are_found_after_they_have_moved():
    one, other = keras.Variable([1.0, 2.0]), keras.Variable([1.0, 2.0])
    optimizer = keras.optimizers.AdamW(1.0, weight_decay=0.5)
    optimizer.exclude_from_weight_decay([other])
    optimizer.build([one, other])
    for variable in (one, other):
        _keras.set_tf_variable(variable, tf.Variable([1.0, 2.0]))
    _keras.reindex_optimizer(optimizer)
    optimizer.apply([tf.zeros(2), tf.zeros(2)], [one, other])
    np.testing.assert_allclose(one.numpy(), [0.5, 1.0])
    np.testing.assert_allclose(other.numpy(), [1.0, 2.0])


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
    (penalty,) = _keras.weight_regularizers(model)
    kernel = model.layers[-1].kernel
    assert float(penalty) == float(model.layers[-1].kernel_regularizer(kernel))


def test_what_compile_made_of_its_losses():
    model = small()
    assert not _keras.is_built(model)
    assert not any(part.built for part in _keras.compiled_parts(model))
    model.train_on_batch(np.ones((4, 2)), np.ones((4, 1)))
    assert _keras.is_built(model)
    assert all(part.built for part in _keras.compiled_parts(model))
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


@pytest.mark.parametrize("valid", [1, 2])
def test_a_masked_loss_divides_by_what_it_keeps(valid):
    """Keras 3.12 adds an epsilon to the number of entries, later ones none."""
    y_pred = tf.ones([2, 1], "float64")
    _keras.set_mask(y_pred, tf.constant([True, valid == 2]))
    loss = keras.losses.MeanSquaredError(dtype="float64")
    expected = valid / (valid + _keras.masked_epsilon())
    np.testing.assert_allclose(loss(np.zeros([2, 1]), y_pred), expected, 1e-15)


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
    tensors = [tf.zeros(()), tf.ones((), tf.int32)]
    assert [_keras.as_loss(t).dtype for t in tensors] == 2 * [tf.float32]


@pytest.mark.parametrize("in_graph", [True, False])
def test_losses_are_overridden_in_a_scope(in_graph):
    model = small()

    def overridden():
        with keras.StatelessScope(collect_losses=True):
            model(tf.ones((2, 2)), training=True)
            assert len(_keras.own_losses(model.layers[0])) == 1
            with _keras.overriding_losses(model, [tf.constant(3.0)]):
                return keras.ops.stack(model.losses)

    run = tf.function(overridden) if in_graph else overridden
    assert run().numpy().tolist() == [3.0]


def test_activity_losses_are_what_they_are_said_to_be():
    layer = keras.layers.Activation("linear", activity_regularizer="l2")

    def loss_of(rows):
        layer(tf.ones((rows, 2)))
        return float(layer.losses[0])

    ratio = {"mean": 1, "sum": 3}[_keras.kind_of_activity_losses()]
    np.testing.assert_allclose(loss_of(6) / loss_of(2), ratio, rtol=1e-6)


def test_losses_of_layers():
    model = small()
    layer = model.layers[0]
    model(tf.ones((2, 2)), training=True)
    assert _keras.own_losses(model) == []
    (regularizer,) = _keras.own_losses(layer)
    added = tf.constant(3.0)
    _keras.add_own_loss(layer, added)
    assert _keras.own_losses(layer) == [regularizer, added]
    assert any(loss is added for loss in model.losses)
    _keras.clear_losses(model)
    assert _keras.own_losses(layer) == []
    assert len(model.losses) == len(_keras.weight_regularizers(model)) == 1


@pytest.mark.parametrize("in_graph", [True, False])
def test_losses_are_cleared_in_a_scope(in_graph):
    model = small()

    def cleared():
        with keras.StatelessScope(collect_losses=True):
            for _ in range(2):
                model(tf.ones((2, 2)), training=True)
                model.layers[0].add_loss(tf.ones(()))
                assert len(_keras.own_losses(model.layers[0])) == 2
                _keras.clear_losses(model)
                assert _keras.own_losses(model.layers[0]) == []
        return tf.ones(())

    (tf.function(cleared) if in_graph else cleared)()


class Notes(keras.layers.Layer):
    """Notes what its calls know of those outside of them."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def call(self, x):
        context = dict(_keras.call_context())
        self.seen.append((context, _keras.in_scope_without_state()))
        return x


def test_what_outer_calls_say():
    notes = Notes()
    model = keras.Sequential([notes])
    assert _keras.call_context() == ()
    model(tf.ones((2, 2)), training=True)
    model(tf.ones((2, 2)), training=False)
    assert [c["training"] for c, _ in notes.seen[-2:]] == [True, False]
    assert all("entry_layer" not in context for context, _ in notes.seen)
    assert _keras.call_context() == ()


def test_scopes_without_state():
    assert not _keras.in_scope_without_state()
    with keras.StatelessScope():
        assert _keras.in_scope_without_state()
    notes = Notes()
    notes(tf.ones((2, 2)))
    notes(keras.Input((2,)))
    assert [without for _, without in notes.seen] == [False, True]


def test_the_variable_behind_one_that_is_cast():
    seen = []

    class Reads(keras.layers.Layer):
        def build(self, shape):
            self.weight = self.add_weight(shape=())

        def call(self, x):
            seen.append((self.weight.value, _keras.tf_variable(self.weight)))
            return x

    layer = Reads(dtype="mixed_bfloat16")
    layer(tf.ones((2, 2)))
    ((cast, behind),) = seen
    assert cast.dtype == tf.bfloat16
    assert isinstance(behind, tf.Variable) and behind.dtype == tf.float32
    assert behind is layer.weight.value


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_logits(activation):
    outputs = keras.layers.Activation(activation)(tf.constant([[1.0, 2.0]]))
    np.testing.assert_array_equal(_keras.get_logits(outputs), [[1.0, 2.0]])
    plain = tf.identity(outputs)
    _keras.set_logits(plain, None)
    assert _keras.get_logits(plain) is None
    logits = tf.constant([[5.0, 1.0]])
    _keras.set_logits(plain, logits)
    assert _keras.get_logits(plain) is logits
    loss = {
        "softmax": keras.losses.categorical_crossentropy,
        "sigmoid": keras.losses.binary_crossentropy,
    }[activation]
    target = tf.constant([[0.0, 1.0]])
    np.testing.assert_allclose(
        loss(target, plain), loss(target, logits, from_logits=True)
    )


def test_what_a_call_changes():
    def changed(layer, function, argument):
        plain = (bool, int, float, str, type(None))
        before = dict(vars(layer))
        function(argument)
        return {
            name
            for name, value in vars(layer).items()
            if isinstance(value, plain) and value != before.get(name, value)
        }

    layer = keras.layers.Dense(2, activity_regularizer="l2")
    built = changed(layer, layer.build, (1, 2))
    called = changed(layer, layer, tf.ones((1, 2)))
    assert "built" in built
    assert called == {"_called"}
    assert changed(layer, layer, tf.ones((1, 2))) == set()
    assert set(_keras.CHANGING) == {"built", *called}


def test_steps_are_counted():
    variable = keras.Variable(1.0)
    optimizer = keras.optimizers.SGD(1.0)
    optimizer.build([variable])
    optimizer.apply([tf.ones(())], [variable])
    assert int(_keras.iterations(optimizer)) == 1
    _keras.iterations(optimizer).assign(5)
    assert int(optimizer.iterations) == 5
    # It does not count a step whose gradients are not finite.
    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(1.0))
    scaled.build([variable])
    assert _keras.iterations(scaled) is None
    assert _keras.iterations(None) is None


def test_an_optimizer_that_passes_gradients_by_themselves():
    weights = [keras.Variable(np.ones(n, "float32")) for n in (2, 3)]
    adam = keras.optimizers.Adam()
    adam.build(weights)
    scaled = keras.optimizers.LossScaleOptimizer(adam)

    @tf.function(autograph=False)
    def step():
        adam.apply([tf.ones(2), tf.ones(3)], weights)

    def joint():
        graph = tf.function(step.python_function, autograph=False)
        operations = graph.get_concrete_function().graph.get_operations()
        return "IdentityN" in [operation.type for operation in operations]

    assert joint()
    with _keras.unreduced(scaled):
        assert not joint()
    assert joint()


def test_slots_of_an_optimizer():
    weights = [keras.Variable(np.ones(n, "float32")) for n in (2, 2)]
    adam = keras.optimizers.Adam(use_ema=True, amsgrad=True)
    scaled = keras.optimizers.LossScaleOptimizer(adam)
    assert _keras.slots(scaled) == []
    scaled.build(weights)
    found = _keras.slots(scaled)
    assert len(found) == 2 * 4
    for i, weight in enumerate(weights):
        slots = [slot for slot, of in found if of is weight]
        assert adam._momentums[i] is next(
            s for s in slots if "momentum" in s.path
        )
        assert len(slots) == 4


def test_optimizers():
    model = small()
    assert _keras.optimizers(model) == [model.optimizer]
    model.optimizer.build(model.trainable_variables)
    updated = _keras.optimized_variables(model.optimizer)
    assert list(map(id, updated)) == list(map(id, model.trainable_variables))
    variable = keras.Variable(1.0)
    assert not _keras.overwrites_with_gradient(variable)
    variable.overwrite_with_gradient = True
    assert _keras.overwrites_with_gradient(variable)


def test_seed_states_are_told_from_other_variables():
    model = small()
    states = [v for v in model.variables if _keras.is_seed_state(v)]
    assert len(states) == 1
    assert states[0] is model.layers[1].seed_generator.state


def test_compiled_metrics():
    model = small()
    x, y = np.ones((4, 2), "float32"), np.zeros((4, 1), "float32")
    model.train_on_batch(x, y)
    (metric,) = _keras.compiled_metrics(model)
    assert isinstance(metric, keras.metrics.MeanMetricWrapper)
    function, arguments = _keras.metric_function(metric)
    assert function is keras.metrics.mean_absolute_error
    assert arguments == {}
    variables = _keras.metric_variables(model)
    assert list(map(id, variables)) == list(map(id, metric.variables))
    metric.reset_state()
    _keras.update_compiled_metrics(model, y, y + 2, None)
    assert float(metric.result()) == 2.0


@pytest.mark.parametrize("takes_training", [True, False])
def test_compute_loss(takes_training):
    class Own(keras.Sequential):
        def compute_loss(self, x, y, y_pred, sample_weight, training=False):
            assert training
            return super().compute_loss(x, y, y_pred, sample_weight)

    class Older(keras.Sequential):
        def compute_loss(self, x, y, y_pred, sample_weight):
            return super().compute_loss(x, y, y_pred, sample_weight)

    model = (Own if takes_training else Older)([keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    y = tf.zeros((2, 1))
    loss = _keras.compute_loss(model, y, y, y + 3, None, True)
    assert float(loss) == 9.0


def test_moments_of_batch_normalization():
    layer = keras.layers.BatchNormalization(momentum=0.0, epsilon=0.0)
    x = tf.constant([[1.0], [3.0]])
    given = tf.constant([0.0]), tf.constant([4.0])
    seen = []

    def moments(inputs, mask):
        seen.append(mask)
        return given

    _keras.set_moments(layer, moments)
    np.testing.assert_allclose(layer(x, training=True), x / 2, rtol=1e-6)
    assert seen
    _keras.unset_moments(layer)
    np.testing.assert_allclose(layer(x, training=True), x - 2, rtol=1e-6)


def test_the_table_of_an_embedding():
    layer = keras.layers.Embedding(4, 2)
    layer.build()
    assert _keras.embedding_table(layer) is layer.trainable_variables[0]


def test_devices_of_tensorflow_tell_their_memory():
    (*_, device) = _tf.list_local_devices()
    assert device.name.startswith("/device:")
    assert device.memory_limit > 0


def test_graphs_that_ran_are_reported():
    _tf.ensure_initialized()
    _tf.enable_graph_collection()
    try:
        tf.function(lambda x: x + 1)(tf.ones(2))
        report = _tf.export_run_metadata()
    finally:
        _tf.disable_graph_collection()
    assert report.function_graphs
    assert all(graphs.partition_graphs for graphs in report.function_graphs)


def test_what_draws_can_be_swapped():
    """Keras and `tf.random` call it where it is found."""
    seen = []
    module, function = _tf.drawing_functions()["stateless_random_normal_v2"]

    def drawn(*args, **kwargs):
        seen.append("stateless")
        return function(*args, **kwargs)

    module.stateless_random_normal_v2 = drawn
    try:
        keras.random.normal((2, 3), seed=1)
        tf.random.stateless_normal((2, 3), seed=(1, 2))
    finally:
        module.stateless_random_normal_v2 = function
    assert len(seen) == 2


def test_a_function_is_traced_again_in_another_context():
    traces = []

    @tf.function
    def count(x):
        traces.append(x)
        return x

    module, name = _tf.maker_of_context()
    make = getattr(module, name)
    mark = [None]
    setattr(module, name, lambda *a: make(*a)._replace(context=mark[0]))
    try:
        for mark[0] in ("one", "one", "other"):
            count(tf.ones(2))
    finally:
        setattr(module, name, make)
    assert len(traces) == 2


def test_a_composite_of_a_type_of_its_own_is_an_argument():
    parts = ((tf.constant(2),), ((tf.ones((2, 2)),),))
    batch = HostBatch({"x": tf.TensorSpec([None, 2])}, ("CPU:0",), parts)
    traces = []

    @tf.function
    def total(batch):
        traces.append(batch)
        return tf.reduce_sum(batch.joined()["x"])

    assert total(batch) == 4
    assert total(batch) == 4
    (traced,) = traces
    assert isinstance(traced, _tf.CompositeTensor)
    assert traced.devices == ("CPU:0",)


def test_a_dataset_is_a_tensor():
    handle = _tf.dataset_handle(tf.data.Dataset.range(3))
    assert handle.dtype == tf.variant


def test_all_that_was_asked_for_is_waited_for():
    assert _tf.wait_for_all() is None


def test_fit_waits_by_another_function():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    waited = []
    held = _keras._TFEpochIterator.tf_sync
    try:
        _keras.wait_by(lambda: waited.append(1))
        model.fit(np.ones((4, 2)), np.ones((4, 1)), epochs=2, verbose=0)
    finally:
        _keras._TFEpochIterator.tf_sync = held
    assert len(waited) >= 2


def test_functions_are_read_as_graphs():
    double = tf.function(lambda x: x * 2).get_concrete_function(tf.ones(2))
    graph, names = _tf.function_def_to_graph_def(double.function_def)
    assert any(node.op == "Mul" for node in graph.node)
    assert set(double.function_def.ret.values()) <= set(names)


def test_tapes_are_stopped():
    x = tf.constant(2.0)
    with (
        tf.GradientTape(persistent=True) as outer,
        tf.GradientTape(persistent=True) as inner,
    ):
        outer.watch(x)
        inner.watch(x)
        with _tf.stop_recording():
            y = x * 3
        z = x * 3
    for tape in (outer, inner):
        assert tape.gradient(y, x) is None
        assert float(tape.gradient(z, x)) == 3.0


@pytest.mark.parametrize("in_graph", [True, False])
def test_tapes_are_told_of_an_operation(in_graph):
    def gradients():
        x, other = tf.constant(2.0), tf.constant(1.0)
        given = []

        def backward(*upstream):
            given.append(upstream)
            return 7 * upstream[0] + upstream[1], None

        with (
            tf.GradientTape() as outer,
            tf.GradientTape(persistent=True) as inner,
        ):
            outer.watch(x)
            inner.watch([x, other])
            with _tf.stop_recording():
                y, z = x * 3, x * 5
            _tf.record_operation("Own", [y, z], [x, other], backward)
            total = y * 2 + z
        assert inner.gradient(total, other) is None
        found = outer.gradient(total, x), inner.gradient(z, x)
        assert all(len(upstream) == 2 for upstream in given)
        return found

    run = tf.function(gradients) if in_graph else gradients
    assert [float(g) for g in run()] == [15.0, 1.0]


def test_tapes_that_watch_are_counted():
    x, other = tf.constant(2.0), tf.constant(1.0)
    assert _tf.num_watching([x]) == 0
    with tf.GradientTape() as one:
        one.watch(x)
        assert _tf.num_watching([other]) == 0
        assert _tf.num_watching([other, x]) == 1
        assert _tf.num_watching([x * 2]) == 1
        with tf.GradientTape() as two:
            assert _tf.num_watching([x]) == 1
            two.watch(x)
            assert _tf.num_watching([x]) == 2
        with _tf.stop_recording():
            assert _tf.num_watching([x]) == 0
    with tf.GradientTape(persistent=True) as one:
        one.watch(x)
        assert _tf.num_watching([x]) == 2


def test_tapes_are_told_of_a_variable():
    variable = tf.Variable(1.0)
    fixed = tf.Variable(1.0, trainable=False)
    with tf.GradientTape() as outer, tf.GradientTape() as inner:
        assert _tf.num_watching([variable.handle]) == 0
        _tf.variable_accessed(variable)
        _tf.variable_accessed(fixed)
        assert _tf.num_watching([variable.handle]) == 2
        assert _tf.num_watching([fixed.handle]) == 0
    for tape in (outer, inner):
        (watched,) = tape.watched_variables()
        assert watched is variable


def test_custom_gradients_ask_for_a_tensor_that_watchers_are_told_of():
    """What runs a function is looked up in its module, eagerly or not."""
    asked, ran = [], []

    def run():
        x = tf.constant(3.0)

        @tf.custom_gradient
        def function(y):
            _tf.tell_watchers(x)

            def gradient(upstream, variables=None):
                asked.extend(one is x for one in variables)
                return upstream, [upstream * 5.0]

            return x * y, gradient

        with tf.GradientTape() as tape:
            tape.watch(x)
            z = function(tf.constant(2.0))
        return tape.gradient(z, x)

    module = _tf.custom_gradients
    held = {name: getattr(module, name) for name in _tf.DECORATORS}
    for name, decorator in held.items():
        setattr(module, name, lambda *a, d=decorator: ran.append(d) or d(*a))
    try:
        assert float(run()) == 5.0
        assert float(tf.function(run)()) == 5.0
    finally:
        for name, decorator in held.items():
            setattr(module, name, decorator)
    assert asked == [True, True]
    assert {*ran} == {*held.values()}


def test_tapes_are_told_of_a_tensor_as_if_it_were_a_variable():
    x = tf.constant(3.0)
    with tf.GradientTape() as tape:
        _tf.tell_tapes(x)
        y = x * x
    assert float(tape.gradient(y, x)) == 6.0


def test_a_scope_can_be_gone_by_once_more():
    variable = keras.Variable(1.0)
    scope = keras.StatelessScope([(variable, tf.constant(2.0))])
    with scope:
        assert _keras.stateless_scope() is scope
        again = _keras.in_this_scope_again()
    with keras.StatelessScope() as other:
        with again():
            assert float(variable.value) == 2.0
        assert _keras.stateless_scope() is other
    assert _keras.stateless_scope() is None


def test_writes_are_counted():
    variable, table = tf.Variable(1.0), tf.Variable(tf.ones((2, 2)))
    counts = []

    @tf.function
    def reads():
        return variable + 1.0

    @tf.function
    def writes():
        return variable.assign(2.0)

    @tf.function
    def run(flag):
        value = tf.identity(variable.read_value())
        rows = table.read_value()

        def count():
            counts.append((_tf.num_writes(value), _tf.num_writes(rows)))

        count()
        variable.read_value(), tf.gather(table, [0]), tf.shape(table)
        reads()
        tf.cond(flag, lambda: variable + 1.0, lambda: variable * 2.0)
        count()
        variable.assign_add(1.0)
        count()
        writes()
        count()
        tf.cond(flag, lambda: variable.assign(1.0), lambda: variable + 0.0)
        count()
        table.scatter_update(tf.IndexedSlices(tf.ones((1, 2)), [0]))
        count()
        return value

    run(tf.constant(True))
    assert counts == [(0, 0), (0, 0), (1, 0), (2, 0), (3, 0), (3, 1)]


def test_assignments_change_the_mark_of_a_variable():
    variable, marks = tf.Variable(1.0), []

    def mark():
        marks.append(_tf.mark_of_writes(variable))

    def run(value):
        mark()
        variable.assign_add(value)
        mark()
        variable.read_value()
        mark()

    for function in (run, tf.function(run)):
        function(tf.constant(1.0))
        before, after, read = marks
        assert before != after == read
        marks.clear()


def test_what_keras_keeps_beside_models_is_restored():
    keras.utils.set_random_seed(5)
    keras.random.normal((2,))
    state, held = _keras.global_seed_state(), keras.config.floatx()
    before, name = state.numpy(), keras.layers.Dense(1).name
    with pytest.raises(KeyboardInterrupt), _keras.global_state_kept():
        np.testing.assert_array_equal(_keras.global_seed_state(), before)
        keras.random.normal((2,))
        keras.layers.Dense(1)
        keras.config.set_floatx("float16")
        keras.config.set_dtype_policy("float64")
        raise KeyboardInterrupt
    assert _keras.global_seed_state() is state
    np.testing.assert_array_equal(state, before)
    assert keras.config.floatx() == held
    assert keras.layers.Dense(1).dtype_policy.name == held
    assert (name, keras.layers.Dense(1).name) == ("dense", "dense_2")


def test_models_are_made_in_another_type():
    with _keras.made_in("float64"):
        assert keras.layers.Dense(1).compute_dtype == "float64"
        assert keras.losses.MeanSquaredError().dtype == "float64"
    assert keras.layers.Dense(1).compute_dtype == "float32"
    with _keras.made_in(None):
        assert keras.layers.Dense(1).compute_dtype == "float32"


def test_what_compile_got_is_told():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    assert _keras.compile_arguments(model) is None

    def loss(y, y_pred):
        return keras.ops.mean(y - y_pred)

    model.compile("sgd", loss, metrics=["mae"])
    found = _keras.compile_arguments(model)
    assert found["loss"] is loss and found["metrics"] == ["mae"]


def test_own_seed_states_are_those_of_one_layer():
    drop = keras.layers.Dropout(0.5)
    model = keras.Sequential([keras.Input((2,)), drop])
    [state] = _keras.own_seed_states(drop)
    assert state is drop.seed_generator.state
    assert _keras.own_seed_states(model) == []


@pytest.mark.parametrize("steps", [1, 2])
def test_whether_a_batch_is_taken_before_a_step_is_traced(steps):
    class Failing(keras.Model):
        def train_step(self, data):
            raise RuntimeError("traced")

    model = Failing()
    model.compile("sgd", steps_per_execution=steps)
    model.make_train_function()
    data = iter(tf.data.Dataset.range(3).batch(1))
    with pytest.raises(RuntimeError, match="traced"):
        model.train_function(data)
    [taken] = next(data)
    assert int(taken) == int(_keras.takes_batch_first(model))


def test_own_variables_and_metrics_are_those_of_one_layer():
    dense = keras.layers.Dense(1)
    dense.seen = keras.metrics.Mean()
    norm = keras.layers.BatchNormalization()
    model = keras.Sequential([keras.Input((2,)), dense, norm])
    assert _keras.own_variables(model) == []
    assert {id(v) for v in _keras.own_variables(dense)} == {
        id(dense.kernel),
        id(dense.bias),
    }
    assert norm.moving_mean in _keras.own_variables(norm)
    assert _keras.own_metrics(model) == []
    assert _keras.own_metrics(dense) == [dense.seen]
    assert _keras.layer_metrics(model) == [dense.seen]


def test_living_models_are_found_without_asking_what_they_are():
    inner = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    outer = keras.Sequential([keras.Input((2,)), inner])
    found = [id(model) for model in _keras.living_models(outer)]
    assert {id(inner), id(outer)} <= set(found)
    assert len(found) == len(set(found))


def test_metrics_to_build_are_those_that_keras_has_not_resolved():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    mine = keras.metrics.MeanSquaredError("of_mine")
    model.compile("sgd", "mse", metrics=["mae", mine])
    found = _keras.metrics_to_build(model)
    assert found[0] is keras.metrics.MeanAbsoluteError
    assert found[1] is mine
    x = tf.ones((2, 2))
    model.train_on_batch(x, tf.ones((2, 1)))
    assert _keras.metrics_to_build(model) == []


def test_nodes_of_operations():
    inputs = keras.Input((4,))
    x = keras.layers.Dense(4)(inputs)
    x = x - keras.ops.mean(x, axis=0)
    model = keras.Model(inputs, keras.layers.Dense(1)(x))
    mean, subtract = _keras.operation_nodes(model)
    assert mean.operation.name == "mean"
    assert subtract.operation.name == "subtract"
    (spec,) = mean.input_tensors
    args, kwargs = mean.arguments.fill_in({id(spec): np.ones((3, 4))})
    assert mean.operation(*args, **kwargs).shape == (4,)


def test_calls_are_made_again_as_inner_ones():
    found = []

    class Outer(keras.layers.Layer):
        def call(self, x):
            found.append(_keras.call_again())
            return x

    class Inner(keras.layers.Layer):
        def call(self, x):
            found.append(dict(_keras.call_context()).get("training"))
            self.add_loss(keras.ops.sum(x))
            return x

    Outer()(np.ones((1, 2)), training=True)
    inner = Inner()
    with found.pop()():
        inner(np.ones((1, 2)))
        inner(np.ones((1, 2)))
        assert "current_call_ctx" in _keras.thread_state()
    assert found == [True, True]
    # An outermost call clears the losses there are.
    assert len(inner.losses) == 2
    assert _keras.call_context() == ()


def test_server_definition_is_none_without_a_cluster():
    assert _tf.server_definition() is None


def test_devices_that_a_server_offers_are_those_of_this_process():
    tf.zeros(1)
    assert _tf.has_devices()
    count = len(tf.config.list_logical_devices("CPU"))
    assert _tf.session_config().device_count["CPU"] == count


def test_operations_that_run_apart():
    apart = _tf.Apart()
    with pytest.raises(tf.errors.InvalidArgumentError):
        apart.run(lambda: tf.reshape(tf.ones(3), [2]))
    assert float(apart.run(lambda: tf.constant(1.0) + 1.0)) == 2.0


class Looks(keras.callbacks.Callback):
    """Calls a function as an epoch begins."""

    def __init__(self, look):
        super().__init__()
        self.look = look

    def on_train_begin(self, logs=None):
        self.look(self, *_keras.fit_of(self))


def batches(look, **data):
    """Return the fits that a function has looked at, with a small model."""
    arguments = {"x": np.ones((6, 2)), "y": np.ones((6, 1)), "batch_size": 2}
    model = small()
    arguments = data or arguments
    model.fit(**arguments, verbose=0, callbacks=[Looks(look)])
    return model


def test_the_callbacks_and_batches_of_a_fit():
    def look(callback, callbacks, epochs):
        assert callback in callbacks.callbacks
        assert epochs.num_batches == _keras.known_batches(epochs) == 3
        assert epochs.steps_per_execution == 1
        assert epochs.steps_per_epoch is None
        assert _keras.is_of_arrays(epochs)
        assert _keras.py_dataset_of(epochs) is None
        assert _keras.shuffles_py_dataset(epochs) is None
        spec = _keras.dataset_of(epochs).element_spec
        _keras.build_all(callback.model, spec)
        assert _keras.is_built(callback.model)
        assert callback.model.optimizer.built
        looked.append(epochs)

    looked = []
    batches(look)
    assert looked
    assert _keras.fit_of(keras.callbacks.Callback()) is None


def test_a_fit_that_begins_later():
    model = small()
    _keras.set_initial_epoch(model, 2)
    history = model.fit(np.ones((2, 2)), np.ones((2, 1)), epochs=3, verbose=0)
    assert history.epoch == [2]
    _keras.set_initial_epoch(model, None)
    history = model.fit(np.ones((2, 2)), np.ones((2, 1)), verbose=0)
    assert history.epoch == [0]


def test_batches_of_a_fit_are_replaced():
    def look(callback, callbacks, epochs):
        dataset = _keras.dataset_of(epochs)
        _keras.build_all(callback.model, dataset.element_spec)
        _keras.replace_batches(epochs, dataset.take(2), wrap)
        _keras.begin_with_logs(callback.model, {"other": 1.0})

    def wrap(steps):
        # With no steps left, an epoch has the logs that it is given.
        for begin, end, iterator in steps():
            next(iterator)
            seen.append((begin, end))
        return iter(())

    seen = []
    data = tf.data.Dataset.from_tensors((np.ones((2, 2)), np.ones((2, 1))))
    model = batches(look, x=data.repeat(2))
    assert seen == [(0, 0), (1, 1)]
    assert model.history.history == {"other": [1.0]}


def test_a_fit_goes_on_with_an_iterator():
    def look(callback, callbacks, epochs):
        assert _keras.open_iterator(epochs) is None
        iterator = iter(_keras.dataset_of(epochs))
        next(iterator)
        _keras.set_open_iterator(epochs, iterator, 1)
        assert _keras.open_iterator(epochs) is iterator
        _keras.set_known_batches(epochs, 7)
        assert _keras.known_batches(epochs) == 4

    data = tf.data.Dataset.from_tensors((np.ones((2, 2)), np.ones((2, 1))))
    batches(look, x=data.repeat(4), steps_per_epoch=2)


def test_arrays_are_shuffled_by_a_function():
    def look(callback, callbacks, epochs):
        data = _keras.shuffle_arrays(epochs, lambda rows: rows[::-1])
        held.extend(x.numpy()[0, 0] for x, y in data)

    held, x = [], np.repeat(np.arange(4.0), 2).reshape(4, 2)
    shuffle = tf.random.shuffle
    batches(look, x=x, y=np.ones((4, 1)), batch_size=1)
    assert held == [3, 2, 1, 0]
    assert tf.random.shuffle is shuffle


def test_batches_of_a_py_dataset_are_ordered_by_a_function():
    class Data(keras.utils.PyDataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return np.full((1, 2), index), np.ones((1, 1))

    def look(callback, callbacks, epochs):
        assert isinstance(_keras.py_dataset_of(epochs), Data)
        drawn.append(_keras.shuffles_py_dataset(epochs))
        _keras.order_py_dataset(epochs, lambda number: range(number)[::-1])
        found = [int(x[0, 0]) for x, y in _keras.dataset_of(epochs)]
        assert found == ([2, 1, 0] if drawn[-1] != "workers" else found)

    drawn = []
    batches(look, x=Data())
    batches(look, x=Data(), shuffle=False)
    batches(look, x=Data(workers=2))
    assert drawn == ["Keras", None, "workers"]


def test_variables_that_are_added_to_at_once():
    total = keras.Variable(1.0)
    with _keras.adding_at_once([total]):
        with keras.StatelessScope() as scope:
            total.assign_add(2.0)
        assert float(scope.get_current_value(total)) == 3.0
        graph = tf.function(lambda: total.assign_add(2.0))
        operations = graph.get_concrete_function().graph.get_operations()
    assert "AssignAddVariableOp" in [one.type for one in operations]
    assert float(total.value) == 1.0


def test_a_task_is_forgotten(monkeypatch):
    spec = tf.train.ClusterSpec({"worker": ["a:1", "b:1", "c:1"]})
    definition = tf.train.ServerDef(
        cluster=spec.as_cluster_def(), job_name="worker", task_index=0
    )
    seen = []
    context = type("Context", (), {"update_server_def": seen.append})
    monkeypatch.setattr(_tf, "_get_server_def", lambda: definition)
    monkeypatch.setattr(_tf, "_context", lambda: context)
    _tf.forget_task("worker", 1)
    (changed,) = seen
    assert sorted(changed.cluster.job[0].tasks) == [0, 2]
    assert sorted(definition.cluster.job[0].tasks) == [0, 1, 2]
    assert hasattr(type(tf_context()), "update_server_def")


def tf_context():
    from tensorflow.python.eager import context

    return context.context()


def test_losses_are_wrapped_and_put_back():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(loss="mse")
    x, y = keras.ops.ones((3, 2)), keras.ops.zeros((3, 1))
    model.evaluate(x, y, verbose=0)
    [held] = _keras.compiled_losses(model)
    seen = []

    def wrap(i, loss):
        seen.append((i, loss))
        return lambda y, y_pred, sample_weight: loss(y, y_pred) * 0 + 7

    with _keras.wrapping_losses(model, wrap):
        assert float(model.compute_loss(x, y, model(x))) == 7
    assert seen == [(0, held)]
    assert _keras.compiled_losses(model) == [held]
    assert float(model.compute_loss(x, y, model(x))) != 7


def test_what_keras_keeps_on_every_layer_is_known():
    known = _keras.names_of_layers()
    assert {"_losses", "_metrics", "train_function", "_functional"} <= known
    given = keras.Input((2,))
    made = keras.layers.Identity()(given)
    for one in (keras.layers.Layer(), keras.Model(given, made)):
        assert vars(one).keys() <= known
    assert not _keras.is_of_user(keras.layers.Dense(1))
    assert not _keras.is_of_user([tf.constant(1)])
    assert _keras.is_of_user(type("Own", (), {"__module__": "own"})())


def test_a_function_that_xla_compiles_is_known():
    found = []

    @tf.function(jit_compile=True)
    def compiled(x):
        graph = tf.compat.v1.get_default_graph()
        found.append(_tf.is_within_xla(graph.outer_graph))
        return x + 1

    @tf.function
    def step(x):
        found.append(_tf.is_within_xla(tf.compat.v1.get_default_graph()))
        return compiled(x)

    step(tf.constant(1.0))
    assert found[0] is False
    assert found[-1] is True


def test_tapes_record_where_all_are_stopped():
    x = tf.constant(2.0)
    found = []
    with tf.init_scope():
        for scope in (contextlib.nullcontext, _tf.recording):
            with scope(), tf.GradientTape() as tape:
                tape.watch(x)
                y = x * x
            found.append(tape.gradient(y, x))
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = x * x
        found.append(tape.gradient(y, x))
    assert found[0] is None and found[2] is None
    assert float(found[1]) == 4.0
