"""Models and data that tests train twice: plain, and on clones."""

import functools

import keras
import numpy as np
import tensorflow as tf

# The largest difference over the largest magnitude of a variable.
TOLERANCE = {"float64": 1e-10, "float32": 1e-5}


def mlp():
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(16, "relu", kernel_regularizer="l2"),
            keras.layers.Dense(3, "softmax"),
        ]
    )


def convnet():
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(
                4, 3, activation="relu", kernel_regularizer="l2"
            ),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            keras.layers.Dense(3, "softmax"),
        ]
    )


def two_by_two():
    left = keras.Input((6,), name="left")
    right = keras.Input((4,), name="right")
    both = keras.layers.Concatenate()([left, right])
    hidden = keras.layers.Dense(12, "tanh", kernel_regularizer="l2")(both)
    kind = keras.layers.Dense(3, "softmax", name="kind")(hidden)
    size = keras.layers.Dense(1, name="size")(hidden)
    return keras.Model([left, right], [kind, size])


class Subclassed(keras.Model):
    """Built in its first step: it has no input shape before."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.hidden = keras.layers.Dense(12, "relu", kernel_regularizer="l2")
        self.head = keras.layers.Dense(3, "softmax")

    def call(self, x, training=False):
        return self.head(self.hidden(x))


def subclassed():
    return Subclassed()


def arrays(rows, seed=0):
    """Return the inputs and targets of every model, by model name."""
    rng = np.random.default_rng(seed)
    floatx = keras.config.floatx()
    left = rng.normal(size=(rows, 6)).astype(floatx)
    right = rng.normal(size=(rows, 4)).astype(floatx)
    image = rng.normal(size=(rows, 8, 8, 1)).astype(floatx)
    kind = rng.integers(0, 3, size=rows)
    size = rng.normal(size=(rows, 1)).astype(floatx)
    return {
        "mlp": (left, kind),
        "convnet": (image, kind),
        "two_by_two": ((left, right), (kind, size)),
        "subclassed": (left, kind),
    }


COMPILE = {
    "two_by_two": {
        "loss": ["sparse_categorical_crossentropy", "mse"],
        "loss_weights": [1.0, 0.3],
        "metrics": [["accuracy"], ["mae"]],
    },
}
DEFAULT_COMPILE = {
    "loss": "sparse_categorical_crossentropy",
    "metrics": ["accuracy"],
}
MODELS = {
    "mlp": mlp,
    "convnet": convnet,
    "two_by_two": two_by_two,
    "subclassed": subclassed,
}


def make(name, seed=7):
    """Make a model whose initial weights depend on the seed alone."""
    keras.utils.set_random_seed(seed)
    return MODELS[name]()


def compiled(name, model=None, optimizer="adam", **kwargs):
    model = model or make(name)
    options = {**COMPILE.get(name, DEFAULT_COMPILE), **kwargs}
    model.compile(optimizer=optimizer, **options)
    return model


def build_optimizer(model):
    """Build a plain model's optimizer before its first step, where it can be.

    Keras traces a step twice that makes variables, which takes most of the
    time; and ScheduleFreeAdamW is wrong if its first step builds it (its
    averages start at zero). A step of the model's own may train other weights.
    """
    if model.built and type(model).train_step is keras.Model.train_step:
        model.optimizer.build(model.trainable_variables)


def batches(x, y, sizes):
    """Return a dataset of batches of the given sizes, and no others."""
    flat = tf.nest.flatten((x, y))
    signature = tf.nest.map_structure(
        lambda a: tf.TensorSpec([None, *a.shape[1:]], a.dtype), (x, y)
    )

    def generate():
        start = 0
        for size in sizes:
            part = [array[start : start + size] for array in flat]
            yield tf.nest.pack_sequence_as((x, y), part)
            start += size

    return tf.data.Dataset.from_generator(
        generate, output_signature=signature
    ).apply(tf.data.experimental.assert_cardinality(len(sizes)))


def _rows(value, start, stop):
    if isinstance(value, tf.SparseTensor):
        begin = [start] + [0] * (len(value.shape) - 1)
        return tf.sparse.slice(value, begin, [stop - start, *value.shape[1:]])
    return None if value is None else value[start:stop]


def dataset(data, sizes):
    """Return a dataset of batches of the given, different sizes.

    Args:
        data: A nest of arrays, of ragged or sparse tensors, or of `None`s,
            with tuples for lists: of a list a dataset makes one tensor.
        sizes: Sequence of integers. Where they differ, the number of rows is
            not known to what is traced.
    """
    parts, start = [], 0
    for size in sizes:
        part = tf.nest.map_structure(
            lambda value, a=start, b=start + size: _rows(value, a, b), data
        )
        parts.append(tf.data.Dataset.from_tensors(part))
        start += size
    return functools.reduce(lambda all_, part: all_.concatenate(part), parts)


def difference(expected, received):
    """Return the largest difference over the largest magnitude.

    Both are arrays, or nests of arrays; the worst leaf counts.
    """
    worst = 0.0
    expected, received = tf.nest.flatten(expected), tf.nest.flatten(received)
    assert len(expected) == len(received)
    for one, other in zip(expected, received, strict=True):
        one = np.asarray(one, "float64")
        other = np.asarray(other, "float64")
        assert one.shape == other.shape
        assert np.isfinite(one).all() and np.isfinite(other).all()
        if one.size:
            scale = max(np.abs(one).max(), np.finfo("float64").tiny)
            worst = max(worst, np.abs(one - other).max() / scale)
    return worst


def weights(model):
    return [np.asarray(w) for w in model.get_weights()]


class Recorder(keras.Model):
    """A model that keeps the outputs of its last step in a variable."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def build(self, shape):
        self.scale = self.add_weight(shape=(), initializer="ones")
        self.seen = tf.Variable(tf.zeros((0, shape[-1])), shape=(None, None))

    def call(self, x, training=False):
        return self.scale * self.inner(x, training=training)

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        self.seen.assign(y_pred)
        return super().compute_metrics(x, y, y_pred, sample_weight)
