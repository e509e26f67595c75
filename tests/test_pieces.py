"""Clones that work through their shards in pieces, one after the other."""

import cases
import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_clones import clone_model, deployment
from keras_clones.benchmark.transfers import count_transfers, traffic
from keras_clones.door import growing

ROWS, SIZES = 29, (10, 10, 7, 2)


def texts(dropout=0.0, normalization=layers.LayerNormalization):
    """Return a model with gradients by rows of each kind, and a penalty."""
    inputs = keras.Input((6,), dtype="int32")
    x = layers.Embedding(12, 8)(inputs)
    x = x + layers.Embedding(6, 8)(keras.ops.arange(6))
    x = normalization()(layers.Dropout(dropout, seed=3)(x))
    x = layers.GlobalAveragePooling1D()(x)
    x = layers.Dense(16, "relu", kernel_regularizer="l2")(x)
    return keras.Model(inputs, layers.Dense(3, "softmax")(x))


class OwnStep(keras.Model):
    """Compute the loss of a batch by its own mathematics."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            outputs = self(x, training=True)
            losses = keras.losses.sparse_categorical_crossentropy(y, outputs)
            # No mean of those of shards.
            loss = tf.reduce_logsumexp(losses) + sum(self.losses)
        variables = self.trainable_variables
        gradients = tape.gradient(loss, variables)
        self.optimizer.apply_gradients(zip(gradients, variables, strict=True))
        return {"loss": loss}


def own(dropout=0.0):
    made = texts(dropout)
    return OwnStep(made.inputs, made.outputs)


def rows_of_texts(rows=ROWS):
    rng = np.random.default_rng(0)
    return rng.integers(0, 12, (rows, 6)), rng.integers(0, 3, rows)


def train(make, clone=None, eager=False, data=None, **compiled):
    """Return all that training, evaluating and predicting come to."""
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(11)
    model = make()
    if clone:
        clone_model(model, **clone)
    model.compile(
        "adam",
        "sparse_categorical_crossentropy",
        metrics=None if isinstance(model, OwnStep) else ["accuracy"],
        run_eagerly=eager,
        **compiled,
    )
    data = data or cases.dataset(rows_of_texts(), SIZES)
    logs = model.fit(data, epochs=2, shuffle=False, verbose=0).history
    evaluated = model.evaluate(data, verbose=0)
    values = [*model.variables, *model.optimizer.variables]
    found = [np.asarray(v.value) for v in values]
    found += [np.asarray(list(logs.values())), np.asarray(evaluated)]
    return [*found, model.predict(data, verbose=0)], model


def assert_same(make, clone, **kwargs):
    expected, _ = train(make, **kwargs)
    received, model = train(make, clone, **kwargs)
    for one, other in zip(expected, received, strict=True):
        assert cases.difference(one, other) < 1e-10
    return model


# Seven are more than a shard has rows.
@pytest.mark.full_but("2-3-auto")
@pytest.mark.parametrize(
    ("num_clones", "pieces", "loss"),
    [
        *((2, 3, "auto"), (1, 3, "gather"), (2, 7, "auto")),
    ],
)
def test_trains_the_same_weights(num_clones, pieces, loss, float64):
    clone = {"num_clones": num_clones, "pieces": pieces, "loss": loss}
    model = assert_same(texts, clone)
    assert deployment(model).pieces == pieces


@pytest.mark.full
@pytest.mark.parametrize(
    ("make", "options"),
    [
        pytest.param(lambda: texts(0.4), {}, id="towers"),
        pytest.param(lambda: texts(0.4), {"loss": "gather"}, id="gathered"),
        pytest.param(lambda: own(0.4), {}, id="own step"),
    ],
)
def test_draws_the_masks_of_one_device_also_the_second_time(
    make, options, float64
):
    clone = {"num_clones": 2, "pieces": 2, "random": "global", **options}
    assert_same(make, clone)


@pytest.mark.full
@pytest.mark.parametrize(
    ("make", "options", "eager"),
    [
        pytest.param(texts, {}, True, id="eager towers"),
        pytest.param(texts, {"loss": "gather"}, True, id="eager gathered"),
        pytest.param(own, {}, True, id="eager own step"),
        pytest.param(own, {}, False, id="own step"),
        pytest.param(texts, {"jit_compile": True}, False, id="xla"),
        pytest.param(texts, {"shares": [3, 1]}, False, id="shares"),
        pytest.param(texts, {"shares": "auto"}, False, id="measured shares"),
    ],
)
def test_trains_the_same_weights_however_it_runs(make, options, eager, float64):
    # Two of seven rows, so that XLA compiles few pieces of another size.
    data = cases.dataset(rows_of_texts(14), (7, 7))
    clone = {"num_clones": 2, "pieces": 2, **options}
    assert_same(make, clone, eager=eager, data=data)


@pytest.mark.full
@pytest.mark.parametrize("loss", ["auto", "gather"])
def test_pieces_are_clones_that_take_turns(loss, float64):
    """What draws, and what normalizes its own rows, does so in each piece."""

    def make():
        return texts(0.4, layers.BatchNormalization)

    data = cases.dataset(rows_of_texts(16), (8, 8))
    clone = {"loss": loss, "check_rows": False}
    expected, _ = train(make, {"num_clones": 4, **clone}, data=data)
    clone |= {"num_clones": 2, "pieces": 2}
    received, _ = train(make, clone, data=data)
    for one, other in zip(expected, received, strict=True):
        assert cases.difference(one, other) < 1e-12


class Noted(layers.Layer):
    """Note the rows that it goes forward with, and when it goes back."""

    def __init__(self, notes, **kwargs):
        super().__init__(**kwargs)
        # Of a list, Keras keeps a copy.
        self.note = notes.append

    def call(self, x):
        def note(what, value):
            def add(array):
                self.note((what, len(array)))
                return array

            noted = tf.numpy_function(add, [value], value.dtype)
            return tf.ensure_shape(noted, value.shape)

        @tf.custom_gradient
        def passed(x):
            return note("forward", x), lambda g: note("backward", g)

        return passed(x)


def noted(notes):
    return keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(8, "tanh"),
            Noted(notes),
            layers.Dense(3, "softmax"),
        ]
    )


@pytest.mark.full_but("auto")
@pytest.mark.parametrize("loss", ["auto", "gather"])
def test_a_device_holds_what_one_piece_computes(loss):
    """A piece goes forward when the one before it has gone backward."""
    notes = []
    model = clone_model(noted(notes), 1, pieces=4, loss=loss, check_rows=False)
    model.compile("sgd", "sparse_categorical_crossentropy")
    x, y = np.ones((14, 4), "float32"), np.zeros(14)
    model.train_on_batch(x, y)
    turns = [(what, n) for n in (4, 4, 3, 3) for what in _BOTH]
    first = [one for one in turns if one[0] == "forward"]
    assert notes == (first if loss == "gather" else []) + turns
    notes.clear()
    model.test_on_batch(x, y)
    model.predict_on_batch(x)
    assert notes == first * 2


_BOTH = ("forward", "backward")


def test_no_more_goes_home_than_of_one_piece():
    def sent(pieces):
        keras.backend.clear_session(free_memory=False)
        # With rows of ids of each batch, and of ids that are always the same.
        model = clone_model(texts(), devices=["CPU:1", "CPU:2"], pieces=pieces)
        model.compile("adam", "sparse_categorical_crossentropy")
        data = tf.data.Dataset.from_tensors(rows_of_texts(16))
        data = iter(data.repeat())
        step = tf.function(lambda: model.train_step(next(data)))
        return traffic(count_transfers(step))["/device:CPU:1"]

    one, four = sent(1), sent(4)
    assert 0.9 * one.bytes_sent <= four.bytes_sent <= 1.1 * one.bytes_sent
    assert four.bytes_received <= 1.1 * one.bytes_received


def normalized():
    return texts(normalization=layers.BatchNormalization)


class Noisy(layers.Layer):
    def call(self, x):
        return x + tf.random.normal(tf.shape(x))


def noisy():
    return keras.Sequential([keras.Input((6,)), Noisy(), layers.Dense(3)])


class Penalty(OwnStep):
    """Differentiate a gradient."""

    def train_step(self, data):
        x, _ = data
        with tf.GradientTape() as tape:
            with tf.GradientTape() as inner:
                inner.watch(x)
                outputs = self(x, training=True)
            loss = tf.reduce_sum(inner.gradient(outputs, x) ** 2)
        variables = self.trainable_variables
        self.optimizer.apply_gradients(
            zip(tape.gradient(loss, variables), variables, strict=True)
        )
        return {"loss": loss}


def penalty():
    inputs = keras.Input((6,))
    return Penalty(inputs, layers.Dense(3, "tanh")(inputs))


@pytest.mark.parametrize(
    ("make", "options", "says"),
    [
        (normalized, {"batch_norm": "sync"}, "batch_normalization"),
        (texts, {"whole": ["dense"]}, "'dense' is called whole"),
        (noisy, {"loss": "gather"}, "draws by a state"),
        (penalty, {}, "Gradients of gradients"),
    ],
)
def test_refuses_what_cannot_be_made_in_pieces(make, options, says):
    model = make()
    before = [np.array(v) for v in model.variables]
    errors = ValueError, NotImplementedError
    with pytest.raises(errors, match=says):
        clone_model(model, 1, pieces=2, check_rows=False, **options)
        model.compile("sgd", "mse")
        model.fit(np.ones((4, 6), "float32"), np.ones((4, 3)), verbose=0)
    for one, other in zip(before, model.variables, strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize(
    ("pieces", "error"),
    [
        *((0, ValueError), (-1, ValueError), ("many", ValueError)),
        *((True, TypeError), (1.5, TypeError), (None, TypeError)),
    ],
)
def test_names_what_is_wrong_with_pieces(pieces, error):
    model = texts()
    with pytest.raises(error, match=f"Received: pieces={pieces!r}"):
        clone_model(model, pieces=pieces)
    assert deployment(model) is None


class Limited(layers.Layer):
    """Run out of memory where there are more than some rows."""

    def __init__(self, most, **kwargs):
        super().__init__(**kwargs)
        self.most = most

    def call(self, x):
        rows = tf.shape(x, out_type=tf.int64)[0]
        # No machine has that many entries.
        entries = tf.where(rows > self.most, 1 << 46, 1)
        entries = tf.cast(entries, tf.int64)[None]
        # Else it would be filled while the graph is optimized.
        size = tf.raw_ops.PlaceholderWithDefault(input=entries, shape=[1])
        filled = tf.fill(size, 0)
        return x + tf.cast(filled[0], x.dtype)


class Counted(OwnStep):
    """Assign something before memory ends."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.count = self.add_weight(shape=(), trainable=False)

    def train_step(self, data):
        self.count.assign_add(1.0)
        return super().train_step(data)


def limited(most, cls=keras.Model):
    inputs = keras.Input((6,))
    outputs = layers.Dense(3, "softmax")(Limited(most)(inputs))
    return cls(inputs, outputs)


@pytest.mark.full_but("own step")
@pytest.mark.parametrize(
    ("cls", "steps_per_execution"),
    [
        pytest.param(keras.Model, 1, id="towers"),
        pytest.param(Counted, 2, id="own step"),
    ],
)
def test_pieces_grow_where_memory_ends(
    cls, steps_per_execution, float64, capsys
):
    """The batch that did not fit is run again, and no other is lost."""
    clone = {"num_clones": 2, "pieces": "auto", "check_rows": False}
    compiled = {"steps_per_execution": steps_per_execution}
    expected, _ = train(lambda: limited(100, cls), **compiled)
    received, model = train(lambda: limited(2, cls), clone, **compiled)
    for one, other in zip(expected, received, strict=True):
        assert cases.difference(one, other) < 1e-10
    assert deployment(model).pieces == 4
    said = capsys.readouterr().out
    assert said.count("pieces='auto'") == 1
    assert "in 4 pieces" in said


@pytest.mark.parametrize("most", [2, 0])
def test_pieces_grow_where_only_others_are_said_to_be_cancelled(
    most, monkeypatch
):
    """TensorFlow tells of the device or of those that wait for it."""

    def cancelled(self, again, undo):
        try:
            return tried(self, again, undo)
        except tf.errors.ResourceExhaustedError:
            message = "RecvAsync is cancelled."
            raise tf.errors.CancelledError(None, None, message) from None

    tried = growing.Growing._try
    monkeypatch.setattr(growing.Growing, "_try", cancelled)
    model = clone_model(limited(most), 1, pieces="auto", check_rows=False)
    model.compile("adam", "sparse_categorical_crossentropy")
    x, y = rows_of_texts(4)
    if most:
        model.fit(x, y, verbose=0)
        assert deployment(model).pieces == 2
        return
    before = [np.array(v) for v in model.variables]
    with pytest.raises(tf.errors.CancelledError):
        model.fit(x, y, verbose=0)
    for one, other in zip(before, model.variables, strict=True):
        assert np.array_equal(one, other)


def test_pieces_grow_no_further_than_to_one_row():
    model = clone_model(limited(0), 1, pieces="auto", check_rows=False)
    model.compile("adam", "sparse_categorical_crossentropy")
    x, y = rows_of_texts(4)
    before = [np.array(v) for v in model.variables]
    with pytest.raises(tf.errors.ResourceExhaustedError) as raised:
        model.fit(x, y, verbose=0)
    for said in ("CPU:0 has not got it", "needs 256 TiB more", "as it was"):
        assert said in str(raised.value)
    for one, other in zip(before, model.variables, strict=True):
        assert np.array_equal(one, other)
    assert model.optimizer.iterations == 0
