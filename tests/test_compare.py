"""`compare` tells clones that train the same from others, and says why."""

import gc
import importlib
import json
import pathlib
import random
import sys

import cases
import keras
import matplotlib.image
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_clones import Comparison, clone_model, compare, deployment
from keras_clones.__main__ import main
from keras_clones.clone import layer_losses, state
from keras_clones.comparing import (
    advice,
    comparing,
    history,
    kept_batches,
    timing,
    training,
)
from keras_clones.comparing.records import Run
from keras_clones.devices import placement
from keras_clones.tensors import sharding

ROWS = 26


def classifier(*between, optimizer="sgd", **compiled):
    model = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, "tanh", name="hidden"),
            *between,
            layers.Dense(3, "softmax", name="head"),
        ]
    )
    options = {"loss": "sparse_categorical_crossentropy", **compiled}
    model.compile(optimizer, **options)
    return model


def arrays(rows=ROWS):
    return cases.arrays(rows)["mlp"]


@pytest.fixture
def untimed(monkeypatch):
    """Leave the timing out: it takes as long as all else."""
    monkeypatch.setattr(
        timing,
        "time_runs",
        lambda source, batches, runs, options: runs,
    )


def compared(model, x=None, y=None, **kwargs):
    """Compare on batches of 9, 9 and 8 rows."""
    if x is None:
        x, y = arrays()
        kwargs = {"batch_size": 9, **kwargs}
    kwargs = {"num_clones": [2], "steps": 3, "verbose": 0, **kwargs}
    return compare(model, x, y, **kwargs)


def values(model):
    found = [*model.variables, *model.optimizer.variables]
    return [v.numpy().copy() for v in found]


def test_the_same_model_is_the_same(capsys, tmp_path):
    model = classifier(optimizer="adam", metrics=["accuracy"])
    found = compared(model, num_clones=[1, 2], verbose=1)
    assert isinstance(found, Comparison)
    assert found.same and found.first is None and found.causes == ()
    assert found.dtype == "float64"
    plain, one, two = found.runs
    names = [d.name for d in two.differences]
    variables = [v.path for v in model.variables]
    assert names[: len(variables)] == variables
    assert names[-2:] == ["accuracy", "loss"] or names[-2:] == [
        *("loss", "accuracy"),
    ]
    kinds = [d.kind for d in two.differences]
    assert kinds.count("optimizer variable") == 2 * len(variables) + 2
    assert {d.largest for d in one.differences} == {0.0}
    assert 0 <= max(d.largest for d in two.differences) < 1e-13
    for run in (plain, one, two):
        assert run.seconds > 0 and run.first_seconds > run.seconds
        # Without a GPU, by what the process has grown, where that is known.
        if pathlib.Path("/proc/self/clear_refs").exists():
            assert 0 <= run.memory["process"] < 2**31
        assert run.bound_by
    assert len(two.by_step) == len(two.limits) == 3
    assert two.received[0] == "0 B" and two.received[1].startswith("about")
    progress = capsys.readouterr().out
    assert "2 clones: the same as plain Keras." in progress
    found.summary()
    text = capsys.readouterr().out
    assert "Same: 1 clone and 2 clones train what plain Keras trains" in text
    assert "Use " in text and "memory" in text
    found.plot(tmp_path / "comparison.png")
    assert matplotlib.image.imread(tmp_path / "comparison.png").shape[1] > 900
    written = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert written["same"] and len(written["runs"]) == 3
    assert written["versions"]["keras"] == keras.__version__
    assert "<table>" in found._repr_html_()


@pytest.mark.full
def test_batch_normalization_is_named_and_mended(untimed):
    model = classifier(layers.BatchNormalization(name="norm"))
    found = compared(model, num_clones=[1, 2, 3])
    _, one, two, three, *mended = found.runs
    assert one.same and not two.same and not three.same and not found.same
    assert [run.name for run in mended] == [
        "2 clones with batch_norm='sync'",
        "3 clones with batch_norm='sync'",
    ]
    assert all(run.same for run in mended)
    [cause] = found.causes
    assert cause.layers == ("norm",) and cause.tried
    assert cause.mends == {"batch_norm": "sync"}
    assert found.explained
    assert found.first.name.endswith("hidden/kernel") and found.first.first == 1
    text = repr(found)
    assert "With `batch_norm='sync'` it is the same: tried." in text
    assert "mends it" in text and "different" in text


@pytest.mark.full
def test_dropout_is_named(untimed):
    model = classifier(layers.Dropout(0.4, name="drop"))
    found = compared(model)
    assert not found.same
    [cause] = found.causes
    assert cause.layers == ("drop",) and cause.mends == {"random": "global"}
    assert cause.tried is not None
    assert "each row in its place" in found.judged


class AddsSum(layers.Layer):
    def call(self, x):
        self.add_loss(0.1 * keras.ops.sum(x * x))
        return x


@pytest.mark.full
def test_scalar_losses_are_named_and_mended(untimed):
    model = classifier(AddsSum(name="adds"))
    assert compared(model).runs[1].whole == ("adds",)
    found = compared(model, check_rows=False)
    cause = found.causes[0]
    assert cause.layers == ("adds",) and cause.tried
    assert cause.mends == {"layer_losses": {"adds": "sum"}}
    assert found.explained
    said = compared(classifier(AddsSum(name="adds")), layer_losses="sum")
    assert said.same


class CountsRows(layers.Layer):
    def build(self, shape):
        self.count = self.add_weight(
            name="count", shape=(), dtype="int32", trainable=False
        )

    def call(self, x):
        self.count.assign_add(keras.ops.shape(x)[0])
        return x


@pytest.mark.full
def test_state_is_named_and_mended(untimed):
    model = classifier(CountsRows(name="counts"))
    found = compared(model, check_rows=False)
    assert found.first.name.endswith("counts/count")
    assert found.causes[0].tried
    assert list(found.causes[0].mends["state"].values()) == ["sum"]


@pytest.mark.full
def test_two_causes_are_mended_together(untimed):
    model = classifier(
        layers.BatchNormalization(name="norm"), AddsSum(name="adds")
    )
    found = compared(model, check_rows=False)
    mended = {c.layers for c in found.causes if c.tried}
    assert mended == {("norm",), ("adds",)}
    assert set(found.runs[-1].options) == {"batch_norm", "layer_losses"}
    assert found.runs[-1].same


class PairsRows(layers.Layer):
    def call(self, x):
        return x + keras.ops.roll(x, 1, axis=0)


@pytest.mark.full
def test_layers_that_clones_call_whole_are_named(untimed):
    found = compared(classifier(PairsRows(name="pairs")))
    assert found.same and not found.causes
    text = "Called whole, since shards would let them differ: ['pairs']."
    assert text in repr(found)


@pytest.mark.full
def test_layers_that_are_not_looked_at_are_suspected(untimed):
    model = classifier(PairsRows(name="pairs"))
    found = compared(model, check_rows=False)
    [cause] = found.causes
    assert cause.layers == ("pairs",) and cause.suspected
    assert cause.mends == {"whole": ["pairs"]}
    assert cause.tried is not None
    assert "by the order of" in cause.why


@pytest.mark.full
def test_noise_is_no_difference(untimed):
    """A bias before a normalization has a gradient of rounding alone."""
    norm = layers.BatchNormalization(synchronized=True)
    model = classifier(norm, optimizer="adam")
    found = compared(model, dtype="float32")
    assert found.same, found
    assert found.dtype == "float32"
    [bias] = [
        d for d in found.runs[1].differences if d.name.endswith("hidden/bias")
    ]
    assert bias.limit > 1e-5


@pytest.mark.full
def test_mixed_precision_is_judged_in_its_own_type(untimed):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        found = compared(classifier(), dtype="float32")
        assert found.same
        assert keras.config.dtype_policy().name == "mixed_bfloat16"
        exact = compared(classifier())
        assert exact.same and exact.dtype == "float64"
    finally:
        keras.config.set_dtype_policy("float32")


def test_a_tower_that_drops_a_regularizer(untimed, monkeypatch):
    local = layer_losses.local

    def dropping(*args):
        *others, last = local(*args)
        return [*others, 0 * last]

    monkeypatch.setattr(layer_losses, "local", dropping)
    model = classifier(
        layers.Dense(8, kernel_regularizer="l2", name="regularized")
    )
    found = compared(model, num_clones=[1, 2])
    assert [run.same for run in found.runs[1:]] == [False, False]
    assert found.first.name.endswith("regularized/kernel")
    assert found.first.first == 1
    assert not found.explained and "please report" in repr(found)


@pytest.mark.full
def test_shards_that_are_not_weighted(untimed, monkeypatch):
    def equal(shards):
        n = len(shards.sizes)
        return tf.fill([n], tf.constant(1 / n, tf.float64))

    monkeypatch.setattr(sharding, "shares", equal)
    model = classifier()
    found = compared(model, num_clones=[2, 3], batch_size=10)
    # Ten rows divide by two, and so do six: only three clones are uneven.
    assert [run.same for run in found.runs[1:]] == [True, False]
    assert found.first.name == model.variables[0].path
    assert not found.explained


@pytest.mark.full
def test_one_seed_for_all_clones(untimed, monkeypatch):
    monkeypatch.setattr(state, "offset_seeds", lambda states, i: list(states))
    model = classifier(layers.Dropout(0.4))
    found = compared(model)
    assert found.first.name == model.variables[0].path


class Doubled(keras.Model):
    """Steps twice as far, with a step of its own."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(3)

    def call(self, x):
        return self.dense(x)

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        gradients = tape.gradient(loss, self.trainable_variables)
        doubled = [2 * gradient for gradient in gradients]
        self.optimizer.apply(doubled, self.trainable_variables)
        return {"own": loss}


@pytest.mark.full_but("False")
@pytest.mark.parametrize("built", [True, False])
def test_own_steps(untimed, built):
    model = Doubled()
    model.compile(
        "sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    if built:
        model(arrays()[0])
    found = compared(model)
    assert found.same, found
    assert found.runs[1].differences[-1].name == "own"


def test_a_model_that_is_not_built(untimed):
    model = keras.Sequential([layers.Dense(4), layers.Dense(3, "softmax")])
    model.compile("sgd", "sparse_categorical_crossentropy")
    found = compared(model)
    assert found.same and not model.built
    assert len(found.runs[1].differences) == 4 + 2 + 1


@pytest.mark.full
def test_several_inputs_and_outputs(untimed):
    x, y = cases.arrays(ROWS)["two_by_two"]
    found = compared(cases.compiled("two_by_two"), x, y, batch_size=10)
    assert found.same, found


class Batches(keras.utils.PyDataset):
    def __init__(self):
        super().__init__()
        self.read = []

    def __len__(self):
        return 3

    def __getitem__(self, i):
        self.read.append(i)
        x, y = arrays()
        return x[9 * i : 9 * i + 9], y[9 * i : 9 * i + 9]


def test_what_fit_takes():
    x, y = arrays()
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(9)
    expected = kept_batches.read(x, y, 9, 3)
    batches = Batches()
    generator = (batch for batch in [*data.as_numpy_iterator(), "the next"])
    for given in (data, batches, generator, list(data).__iter__()):
        found = kept_batches.read(given, None, None, 3)
        for one, other in zip(expected.parts, found.parts, strict=True):
            for array, same in zip(one, other, strict=True):
                np.testing.assert_array_equal(array, same)
        assert not found.fixed
    assert kept_batches.read(x, None, 9, 3).parts[0].shape == (9, 6)
    assert len(kept_batches.read([x, x], None, 9, 3).parts[0][0]) == 2
    assert batches.read == [0, 1, 2]
    assert next(generator) == "the next"
    fixed = data.take(2).unbatch().batch(9, drop_remainder=True)
    assert kept_batches.read(fixed, None, None, 2).fixed


@pytest.mark.full
def test_a_generator_is_read_once(untimed):
    x, y = arrays(40)
    generator = ((x[i : i + 9], y[i : i + 9]) for i in range(0, 40, 9))
    found = compared(classifier(), generator)
    assert found.same
    assert "can be read only once: its next 3 batches" in repr(found)
    assert len(list(generator)) == 2


def test_the_rows_of_batches_stay():
    x, y = arrays()
    batches = kept_batches.read(x, y, 10, 3)
    served = list(kept_batches.serve(batches))
    assert [len(one) for one, _ in served] == [10, 10, 6]
    np.testing.assert_array_equal(np.concatenate([a for a, _ in served]), x)
    weighted = tf.data.Dataset.from_tensors(({"a": x}, None, y))
    [part] = kept_batches.serve(kept_batches.read(weighted, None, None, 1))
    assert part[1] is None and set(part[0]) == {"a"}
    moved = kept_batches.permuted(batches, 0)
    for (one, _), (other, _) in zip(batches.parts, moved.parts, strict=True):
        assert (one != other).any()
        np.testing.assert_array_equal(np.sort(one, 0), np.sort(other, 0))
    ragged = tf.data.Dataset.from_tensors(tf.ragged.constant([[1.0], [], [2]]))
    read = kept_batches.read(ragged, None, None, 1)
    [part] = kept_batches.serve(read)
    assert part.to_list() == [[1.0], [], [2.0]]
    assert kept_batches.permuted(read, 0) is None


def world():
    """Return what is to stay as it is around a model."""
    return (
        random.getstate(),
        np.random.get_state()[1].tolist(),
        keras.config.floatx(),
        keras.config.dtype_policy().name,
        keras.backend.get_uid("dense"),
    )


@pytest.mark.full_but("interrupted")
@pytest.mark.parametrize("ends", ["well", "interrupted", "failing"])
def test_the_model_stays_as_it_is(ends, monkeypatch, untimed):
    keras.utils.set_random_seed(3)
    model = classifier(layers.Dropout(0.2), layers.BatchNormalization())
    x, y = arrays()
    model.fit(x, y, batch_size=10, verbose=0)
    before, function = values(model), model.train_function
    iterator = iter(tf.data.Dataset.from_tensor_slices((x, y)).batch(10))
    around = world()
    if ends == "well":
        compared(model)
    else:
        error = KeyboardInterrupt if ends == "interrupted" else OSError
        kind = RuntimeError if ends == "interrupted" else OSError

        def add(self, values, logs):
            raise error

        monkeypatch.setattr(history.History, "add", add)
        with pytest.raises((KeyboardInterrupt, kind)):
            compared(model)
    for one, other in zip(before, values(model), strict=True):
        np.testing.assert_array_equal(one, other)
    assert model.train_function is function
    assert deployment(model) is None
    assert world()[:-1] == around[:-1]
    assert world()[-1] == around[-1] + 2
    assert len(list(iterator)) == 3


@pytest.mark.full
def test_training_goes_on_as_without(untimed):
    def trained(look):
        keras.backend.clear_session(free_memory=False)
        keras.utils.set_random_seed(3)
        model = classifier(layers.Dropout(0.2))
        x, y = arrays()
        model.fit(x, y, batch_size=10, verbose=0, shuffle=False)
        if look:
            compared(model)
        model.fit(x, y, batch_size=10, verbose=0, shuffle=False)
        noise = keras.random.normal((3,))
        return [*values(model), np.asarray(noise), random.random()]

    for one, other in zip(trained(False), trained(True), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.full
def test_a_trained_model_goes_on_from_its_state(untimed):
    model = classifier()
    x, y = arrays()
    model.fit(x, y, batch_size=10, verbose=0)
    found = compared(model)
    iterations = int(model.optimizer.iterations.numpy())
    assert found.same and iterations == 3
    cloned = clone_model(model, 2)
    assert compared(cloned).same
    assert deployment(cloned) is not None


def make_unknown():
    class Unknown(keras.Model):
        def __init__(self, width, function):
            super().__init__()
            self.dense = layers.Dense(width)
            self.function = function

        def call(self, x):
            return self.function(self.dense(x))

    model = Unknown(3, keras.ops.softmax)
    model.compile("sgd", "sparse_categorical_crossentropy")
    return model


class Compiles(keras.Model):
    def compile(self, other, **kwargs):
        super().compile(**kwargs)
        self.other = other

    def call(self, x):
        return x


def test_models_that_cannot_be_copied_say_what_to_pass(untimed):
    with pytest.raises(ValueError, match="Pass a function that makes"):
        compared(make_unknown())
    model = Compiles()
    model.compile("sgd", optimizer="sgd", loss="mse")
    with pytest.raises(ValueError, match=r"overrides `compile`.*function"):
        compared(model)
    assert compared(make_unknown).same


def test_clones_that_work_in_pieces_are_the_same(untimed):
    found = compared(classifier(), pieces=3)
    assert found.same
    assert "All clones were made with `pieces=3`." in repr(found)
    assert found.to_dict()["options"] == {"pieces": "3"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "num_clones=2, pieces='auto'"),
        ({"pieces": 3}, "num_clones=2, pieces=6"),
        ({"pieces": "auto"}, None),
    ],
)
def test_pieces_are_advised_where_memory_did_not_suffice(options, expected):
    short = Run(2, failed="out of memory")
    found = advice.advise([Run(0, seconds=1.0), short, Run(3)], options)
    assert found.text.startswith("Use plain Keras")
    told = f"suffice for 2 clones: `clone_model(model, {expected})` trains"
    assert (told in found.text) == (expected is not None)
    other = short._replace(failed="ValueError: no")
    assert "pieces=" not in advice.advise([Run(0), other], {}).text


def out_of(error):
    def attach(model, num_clones, **options):
        if num_clones == 2:
            raise error
        return clone_model(model, num_clones=num_clones, **options)

    return attach


@pytest.mark.full
def test_one_number_of_clones_that_fails_leaves_the_others(
    untimed, monkeypatch
):
    exhausted = tf.errors.ResourceExhaustedError(None, None, "OOM")
    monkeypatch.setattr(comparing, "clone_model", out_of(exhausted))
    found = compared(classifier(), num_clones=[1, 2, 3])
    assert [run.failed for run in found.runs] == [
        *(None, None, "out of memory", None),
    ]
    assert found.runs[3].same and "2 clones: out of memory" in repr(found)
    monkeypatch.setattr(comparing, "clone_model", out_of(ValueError("no\nx")))
    found = compared(classifier(), num_clones=[2])
    assert found.runs[1].failed == "ValueError: no"
    assert "No clones ran" in repr(found) and not found.same


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"steps": 9}, ValueError, "at least 9 batches.*3 batches.*steps=3"),
        ({"steps": 0}, ValueError, "steps"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"num_clones": []}, ValueError, "at least one"),
        ({"num_clones": 2}, TypeError, "list of integers"),
        ({"num_clones": [0]}, ValueError, "num_clones"),
        ({"dtype": "float16"}, ValueError, "dtype"),
        ({"devices": ["CPU:0"]}, TypeError, "devices"),
        ({"batchnorm": "sync"}, TypeError, "batchnorm"),
        ({"y": np.zeros(3)}, ValueError, "as many rows"),
    ],
)
def test_arguments_that_are_wrong(arguments, error, message, monkeypatch):
    monkeypatch.setattr(keras.Model, "fit", lambda *a, **k: pytest.fail())
    x, y = arrays()
    given = {"x": x, "y": y, "batch_size": 10, "steps": 3, "verbose": 0}
    with pytest.raises(error, match=message):
        compare(classifier(), **{**given, **arguments})


def test_more_that_is_refused(monkeypatch):
    x, y = arrays()
    plain = keras.Sequential([keras.Input((6,)), layers.Dense(3)])
    with pytest.raises(ValueError, match="must be compiled"):
        compared(plain)
    with pytest.raises(ValueError, match="must be compiled"):
        compared(lambda: plain)
    with pytest.raises(TypeError, match="function that returned 3"):
        compared(lambda: 3)
    with pytest.raises(TypeError, match=r"compiled `keras.Model`, or a func"):
        compared(3)
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(10)
    with pytest.raises(ValueError, match="go with arrays"):
        compared(classifier(), data, batch_size=10)
    with pytest.raises(ValueError, match="kept in memory"):
        kept_batches.read(x, y, 10, 3, limit=300)
    gpus = ["/device:GPU:0", "/device:GPU:1"]
    logical = placement.logical_devices
    monkeypatch.setattr(
        placement,
        "logical_devices",
        lambda kind: gpus if kind == "GPU" else logical(kind),
    )
    with pytest.raises(ValueError, match="at most 2 clones"):
        compared(classifier(), num_clones=[1, 4])


@pytest.mark.full
def test_draws_that_cannot_be_repeated_are_told(untimed):
    class Draws(layers.Layer):
        def call(self, x):
            return x + tf.random.normal(tf.shape(x), dtype=x.dtype)

    found = compared(classifier(Draws()), num_clones=[1])
    assert "does not come to the same when it trains again" in repr(found)
    assert "does not come" not in repr(compared(classifier()))


def test_weights_of_the_first_step_are_refused(untimed):
    class Late(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(3)

        def train_step(self, data):
            with tf.GradientTape() as tape:
                loss = keras.ops.mean(self.dense(data[0]) ** 2)
            found = self.dense.trainable_variables
            self.optimizer.apply(tape.gradient(loss, found), found)
            return {"loss": loss}

    def make():
        model = Late()
        model.compile("sgd")
        return model

    with pytest.raises(ValueError, match="Call it on a batch first"):
        compared(make)
    message = r"takes 1 positional|unexpected keyword.*Pass a function"
    with pytest.raises(ValueError, match=message):
        compared(make())


@pytest.mark.full
def test_float64_that_cannot_be(untimed):
    class Casts(layers.Layer):
        def call(self, x):
            assert x.dtype == "float32"
            return x

    found = compared(classifier(Casts()))
    assert found.same and found.dtype == "float32"
    assert "float64 fails" in repr(found)
    with pytest.raises(ValueError, match="Pass `dtype='float32'`"):
        compared(classifier(Casts()), dtype="float64")


@pytest.mark.full
def test_nothing_is_left_behind(untimed):
    gc.collect()
    before = sum(isinstance(o, keras.Model) for o in gc.get_objects())
    compared(classifier())
    gc.collect()
    after = sum(isinstance(o, keras.Model) for o in gc.get_objects())
    assert after <= before + 1


PROGRAM = """
import keras
import numpy as np

def make():
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)])
    model.compile("sgd", "mse")
    return model, (np.ones((40, 6)), np.ones((40, 3)))

def normalized():
    model = keras.Sequential(
        [keras.Input((6,)), keras.layers.BatchNormalization()]
    )
    model.compile("sgd", "mse")
    x = np.random.default_rng(0).normal(size=(40, 6))
    return model, (x, x)

def wrong():
    return 3
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Return the name of a module that makes models."""
    (tmp_path / "program_to_compare.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    importlib.invalidate_caches()
    return "program_to_compare"


COMMON = ("--clones", "1,2", "--batch-size", "10", "--steps", "2")


def test_command(untimed, program, tmp_path, capsys):
    extra = ["--out", "found.json", "--plot", "found.png"]
    assert main(["compare", f"{program}:normalized", *COMMON, *extra]) == 1
    assert "batch_norm='sync'" in capsys.readouterr().out
    assert json.loads((tmp_path / "found.json").read_text())["explained"]
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.full
def test_command_of_what_is_the_same(untimed, program, capsys):
    assert main(["compare", f"{program}:make", *COMMON, "--quiet"]) == 0
    assert "Same: 1 clone and 2 clones" in capsys.readouterr().out
    option = ["--option", "batch_norm=sync", "--quiet"]
    assert main(["compare", f"{program}:normalized", *COMMON, *option]) == 0


def test_command_says_what_is_wrong(program, capsys):
    for arguments, message in (
        (["no_such_module:make"], "cannot find"),
        ([f"{program}:missing"], "cannot find"),
        ([program], "expected module:function"),
        ([f"{program}:wrong"], "a compiled model and its data"),
        ([f"{program}:make", "--steps", "99"], "at least 99 batches"),
        ([f"{program}:make", "--clones", "0"], "at least 1"),
        ([f"{program}:make", "--option", "x"], "NAME=VALUE"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["compare", *arguments])
        assert end.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.full
def test_the_kernel_of_adam_is_no_difference_in_float32(untimed, monkeypatch):
    monkeypatch.setattr(training, "SPREAD", 1)
    model = cases.compiled("mlp")
    found = compared(model, num_clones=[2], dtype="float32")
    assert found.same
    moments = [
        one.largest
        for one in found.runs[1].differences
        if one.name.endswith("_velocity")
    ]
    # TensorFlow's `1 - beta_2` is this much off.
    assert moments and max(moments) == pytest.approx(1.3e-5, rel=0.1)
