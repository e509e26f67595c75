"""Updates by kernels and by XLA come to what Keras's own come to."""

import cases
import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import optimizers

from keras_clones import clone_model, deployment
from keras_clones.devices.homes import Homes
from keras_clones.devices.naming import canonical_device
from keras_clones.exchange.beside_data import beside_data
from keras_clones.model_deploy import DeploymentConfig, deploy
from keras_clones.update import compiled, rows, update
from keras_clones.update.update import faster

SHAPE = (64, 8)
STEPS = 200
OPTIMIZERS = {
    "Adadelta": lambda: optimizers.Adadelta(0.1),
    "Adagrad": lambda: optimizers.Adagrad(0.01),
    "Adam": lambda: optimizers.Adam(),
    "Adam(amsgrad=True)": lambda: optimizers.Adam(amsgrad=True),
    "AdamW": lambda: optimizers.AdamW(weight_decay=0.1),
    "Adamax": lambda: optimizers.Adamax(),
    "Ftrl": lambda: optimizers.Ftrl(
        l1_regularization_strength=0.01,
        l2_regularization_strength=0.02,
        l2_shrinkage_regularization_strength=0.01,
        beta=0.1,
    ),
    "Lion": lambda: optimizers.Lion(),
    "Nadam": lambda: optimizers.Nadam(),
    "RMSprop": lambda: optimizers.RMSprop(),
    "RMSprop(centered=True)": lambda: optimizers.RMSprop(centered=True),
    "RMSprop(momentum=0.9)": lambda: optimizers.RMSprop(momentum=0.9),
    "RMSprop(momentum=0.9, centered=True)": lambda: optimizers.RMSprop(
        momentum=0.9, centered=True
    ),
    "SGD": lambda: optimizers.SGD(),
    "SGD(momentum=0.9)": lambda: optimizers.SGD(momentum=0.9),
    "SGD(momentum=0.9, nesterov=True)": lambda: optimizers.SGD(
        momentum=0.9, nesterov=True
    ),
}
# The kernel takes 0.999 in float32 from 1, and 1.3e-5 of the rest is lost.
WIDER = {"Adam", "Adam(amsgrad=True)", "AdamW"}


@pytest.fixture
def all_large(monkeypatch):
    """Let XLA compile the updates of small variables, too."""
    monkeypatch.setattr(compiled, "LARGE", 1)


@pytest.fixture
def ways(monkeypatch):
    """Return a list of how variables are updated, which grows."""
    found, own = [], update.way_of

    def way_of(*args):
        way = own(*args)
        found.append(way and way.__module__.rpartition(".")[2])
        return way

    monkeypatch.setattr(update, "way_of", way_of)
    return found


def gradients(by_rows, dtype, steps=STEPS):
    """Return gradients, in which rows are there more than once if by rows."""
    rng = np.random.default_rng(0)
    for _ in range(steps):
        values = tf.constant(rng.normal(size=(80, SHAPE[1])), dtype)
        ids = tf.constant(rng.integers(0, 48, size=80), tf.int64)
        yield (values, ids) if by_rows else (values[: SHAPE[0]], ids)


def gradient_of(values, ids, by_rows):
    if by_rows:
        return tf.IndexedSlices(values, ids, tf.constant(SHAPE))
    return values


def trained(make, how, dtype, by_rows, steps=STEPS):
    """Return a variable and its slots after some steps."""
    rng = np.random.default_rng(1)
    optimizer = make()
    variable = keras.Variable(
        rng.normal(size=SHAPE), dtype=dtype, trainable=True
    )
    optimizer.build([variable])

    @tf.function(autograph=False)
    def step(values, ids):
        gradient = gradient_of(values, ids, by_rows)
        with faster([optimizer], how):
            optimizer.apply([gradient], [variable])

    swapped = ("update_step", "_apply_weight_decay")
    held = [vars(optimizer).get(name) for name in swapped]
    for values, ids in gradients(by_rows, dtype, steps):
        step(values, ids)
    assert held == [vars(optimizer).get(name) for name in swapped]
    return [np.array(v) for v in (variable, *optimizer.variables)]


def worst(expected, received):
    return max(map(cases.difference, expected, received))


QUICK = (
    *("float32-dense-Adam", "float64-rows-Adam", "float64-dense-Nadam"),
    *("float64-dense-Lion", "float32-rows-RMSprop", "float64-dense-Ftrl"),
    "float64-rows-Adadelta",
)


@pytest.mark.full_but(*QUICK)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["dense", "rows"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_it_is_the_update_of_keras(
    name, kind, dtype, all_large, ways, record_property
):
    make, by_rows = OPTIMIZERS[name], kind == "rows"
    expected = trained(make, "keras", dtype, by_rows)
    assert not ways
    received = trained(make, "auto", dtype, by_rows)
    found = float(worst(expected, received))
    wide = 2e-5 if name in WIDER else 1e-5
    assert found < (1e-10 if dtype == "float64" else wide)
    # The weights themselves are as near as ever.
    assert cases.difference(expected[0], received[0]) < 1e-5
    way = {"compiled": "XLA", "kernels": "kernel", "rows": "rows, XLA"}
    record_property(
        "update", [name, kind, way.get(ways[0], "Keras's"), dtype, found]
    )


@pytest.mark.full_but("auto-Adadelta", "auto-RMSprop(centered=True)")
@pytest.mark.parametrize("name", [*OPTIMIZERS, "Adafactor", "Lamb"])
@pytest.mark.parametrize("how", ["auto", "keras"])
def test_it_is_known_who_writes_rows(name, how, all_large):
    """What reads of the table cost goes by it, in plain Keras, too."""
    make = OPTIMIZERS.get(name) or getattr(optimizers, name)
    variable, optimizer = keras.Variable(np.ones(SHAPE, "float32")), make()
    optimizer.build([variable])

    @tf.function(autograph=False)
    def step(values, ids):
        with faster([optimizer], how):
            optimizer.apply([gradient_of(values, ids, True)], [variable])

    specs = tf.TensorSpec([80, SHAPE[1]]), tf.TensorSpec([80], tf.int64)
    graph = step.get_concrete_function(*specs).graph
    handles = {
        id(inner)
        for outer, inner in graph.captures
        if outer is variable.value.handle
    }
    writes = {
        operation.type
        for operation in graph.get_operations()
        if not handles.isdisjoint(map(id, operation.inputs))
    }
    by_rows = any(kind.startswith("ResourceScatter") for kind in writes)
    assert writes and by_rows == rows.writes_rows(optimizer)


OPTIONS = {
    "accumulation": lambda: optimizers.Adam(gradient_accumulation_steps=3),
    "clipnorm_ema": lambda: optimizers.Adam(
        clipnorm=0.1, use_ema=True, ema_overwrite_frequency=2
    ),
    "decay": lambda: optimizers.Nadam(weight_decay=0.1),
    "global_clipnorm": lambda: optimizers.Lion(global_clipnorm=0.1),
    "loss_scale": lambda: optimizers.LossScaleOptimizer(
        optimizers.Adam(), initial_scale=4.0
    ),
    "schedule": lambda: optimizers.RMSprop(
        optimizers.schedules.ExponentialDecay(0.01, 1, 0.9), clipvalue=0.5
    ),
}


@pytest.mark.full_but("accumulation", "decay", "loss_scale")
@pytest.mark.parametrize("name", OPTIONS)
def test_all_around_the_update_is_kept(name, all_large, ways):
    make = OPTIONS[name]
    for by_rows in (False, True):
        if by_rows and name == "accumulation":
            continue  # Keras adds up no gradients by rows.
        ways.clear()
        expected = trained(make, "keras", "float64", by_rows, 7)
        received = trained(make, "auto", "float64", by_rows, 7)
        assert worst(expected, received) < 1e-10
        assert ways and (by_rows or all(ways))


def test_weights_that_are_excluded_do_not_decay(all_large):
    one, other = keras.Variable(np.ones(4)), keras.Variable(np.ones(4))
    optimizer = optimizers.AdamW(0.5, weight_decay=0.5)
    optimizer.exclude_from_weight_decay([other])
    optimizer.build([one, other])

    @tf.function(autograph=False)
    def step():
        with faster([optimizer], "auto"):
            optimizer.apply([tf.zeros(4)] * 2, [one, other])

    step()
    np.testing.assert_allclose(one.numpy(), 0.75)
    np.testing.assert_allclose(other.numpy(), 1.0)


def doubled(self, gradient, variable, learning_rate):
    return optimizers.SGD.update_step(
        self, 2.0 * gradient, variable, learning_rate
    )


def subclass():
    return type("Doubled", (optimizers.SGD,), {})(0.1)


def with_own_step():
    optimizer = optimizers.SGD(0.1)
    optimizer.update_step = doubled.__get__(optimizer)
    return optimizer


def with_a_number_of_its_own():
    optimizer = optimizers.Adam(0.1)
    optimizer.beta_1 = tf.constant(0.5, tf.float64)
    return optimizer


@pytest.mark.parametrize(
    "make", [subclass, with_own_step, with_a_number_of_its_own]
)
def test_an_optimizer_of_the_users_own_updates_as_it_does(make, ways):
    trained(make, "auto", "float64", False, 1)
    assert not ways


def test_a_class_that_was_changed_updates_as_it_does(monkeypatch, ways):
    own = optimizers.SGD(0.1)
    monkeypatch.setattr(optimizers.SGD, "assign_sub", lambda *_: None)
    assert (
        worst(
            trained(lambda: own, "auto", "float64", False, 1)[:1],
            trained(lambda: optimizers.SGD(0.0), "keras", "float64", False, 1)[
                :1
            ],
        )
        < 1e-10
    )
    assert not ways


@pytest.mark.parametrize("beta", [0.999, 0.9999])
def test_a_decay_that_float32_does_not_hold_is_left_to_keras(beta, ways):
    trained(lambda: optimizers.Adam(beta_2=beta), "auto", "float32", False, 1)
    assert ways == ["kernels" if beta == 0.999 else None]


def test_two_updates_of_one_step_count_as_two():
    def after(how):
        variable = keras.Variable(np.ones(4), dtype="float64")
        optimizer = optimizers.Adam(0.1)
        optimizer.build([variable])

        @tf.function(autograph=False)
        def step():
            with faster([optimizer], how):
                for factor in (1.0, -3.0):
                    gradient = tf.fill([4], tf.constant(factor, tf.float64))
                    optimizer.apply([gradient], [variable])

        step()
        return variable.numpy()

    np.testing.assert_allclose(after("auto"), after("keras"), rtol=1e-12)


@pytest.mark.parametrize("by_rows", [False, True])
def test_what_was_read_before_the_update_stays(by_rows, all_large):
    optimizer = optimizers.Adam(0.5)
    variable = keras.Variable(np.ones((64, 1024)))
    optimizer.build([variable])

    @tf.function(autograph=False)
    def step():
        before = variable.value.read_value()
        gradient = tf.ones((64, 1024))
        if by_rows:
            gradient = tf.IndexedSlices(
                gradient, tf.range(64), tf.constant([64, 1024])
            )
        with faster([optimizer], "auto"):
            optimizer.apply([gradient], [variable])
        return before, variable.value.read_value()

    kept = variable.value.read_value()
    before, after = step()
    np.testing.assert_allclose(kept, 1.0)
    np.testing.assert_allclose(before, 1.0)
    np.testing.assert_allclose(after, 0.5, rtol=1e-5)


def needs(operation):
    """Return the names of all operations that one waits for."""
    found, left = set(), [operation]
    while left:
        one = left.pop()
        for other in [*(t.op for t in one.inputs), *one.control_inputs]:
            if other.name not in found:
                found.add(other.name)
                left.append(other)
    return found


def test_an_update_waits_for_its_own_gradient_only():
    names = ("first", "second")
    pair = [keras.Variable(np.ones(4), name=name) for name in names]
    optimizer = optimizers.Adam()
    optimizer.build(pair)

    @tf.function(autograph=False)
    def step(first, second):
        with faster([optimizer], "auto"):
            optimizer.apply([first, second], pair)

    spec = tf.TensorSpec([4])
    graph = step.get_concrete_function(spec, spec).graph
    updates = [
        o for o in graph.get_operations() if o.type == "ResourceApplyAdam"
    ]
    waits = [needs(operation) & set(names) for operation in updates]
    assert sorted(waits, key=str) == [{"first"}, {"second"}]


@pytest.mark.parametrize("name", ["Adam", "Lion"])
@pytest.mark.parametrize("by_rows", [False, True])
def test_an_update_runs_beside_its_variable(name, by_rows, all_large):
    here, there = "/device:CPU:0", "/device:CPU:1"
    homes = Homes(here, [here, there])
    optimizer = OPTIMIZERS[name]()
    with tf.device(there):
        variable = keras.Variable(np.ones(SHAPE), trainable=True)
        optimizer.build([variable])

    @tf.function(autograph=False)
    def step(values, ids):
        gradient = gradient_of(values, ids, by_rows)
        with faster([optimizer], "auto"), beside_data(optimizer, homes):
            optimizer.apply([gradient], [variable])

    with tf.device(here):
        values, ids = next(gradients(by_rows, "float32"))
        graph = step.get_concrete_function(values, ids).graph
    kinds = ("ResourceApplyAdam", "StatefulPartitionedCall", "PartitionedCall")
    updates = [o for o in graph.get_operations() if o.type in kinds]
    assert updates
    assert {canonical_device(o.device) for o in updates} == {there}


def fitted(num_clones, **options):
    model = cases.make("mlp")
    clone_model(model, num_clones, **options)
    model.compile("adam", **cases.DEFAULT_COMPILE)
    x, y = cases.arrays(24)["mlp"]
    model.fit(x, y, batch_size=8, verbose=0)


def test_a_model_says_how_it_updates_and_does_so(ways):
    fitted(2, update="keras")
    assert not ways
    fitted(2)
    assert ways and set(ways) == {"kernels"}
    model = clone_model(cases.make("mlp"), 2, update="keras")
    assert deployment(model).update == "keras"


@pytest.mark.parametrize("value", ["fused", None, 3])
def test_update_is_one_of_two(value):
    model = cases.make("mlp")
    with pytest.raises(ValueError, match="`update` must be one of"):
        clone_model(model, 2, update=value)
    assert deployment(model) is None
    with pytest.raises(ValueError, match="`update` must be one of"):
        deploy(DeploymentConfig(), lambda: 0.0, update=value)
