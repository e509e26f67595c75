"""What trains in plain Keras trains the same on clones: case by case.

Each case trains one model plain and on three clones as a user does: traced,
by `fit`, from the same weights, for two epochs of batches of 10, 10, 7 and 2
rows, whose number the trace does not know. So shards are uneven, and one of
the last batch's is empty. Every variable, every optimizer variable and every
log is compared. The table of largest differences goes into docs/guarantees.md
by

    python -m pytest tests/test_equivalence.py --write-table
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import cases
import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, losses, metrics, ops, optimizers

from keras_clones import clone_model

SIZES, EPOCHS = (10, 10, 7, 2), 2
ROWS = sum(SIZES)
CASES: dict[str, Callable[[], "Case"]] = {}
# A test and a predict step take longer than all else, so only cases where they
# do what a train step does not run them, and only in float64.
EVALUATED = (
    "input_",
    "layer_batch_norm_sync_with_metrics",
    "loss_masked_by_time_step",
    "metrics_of_classes",
    "metrics_overridden",
)
# One case for each way that a step can go, which also runs on other numbers of
# clones with `--full`. Two clones leave no shard empty, and their last shards
# have one row; four leave two empty.
ALSO_ON_2_AND_4 = (
    "layer_batch_norm_sync",
    "loss_masked_and_weighted_by_time_step",
    "loss_outputs_with_weights",
    "step_shifts_weights_and_back",
    "table_of_constant_ids",
)
# These run in float32 by default, too: in clones, and in a call of a layer.
ALSO_IN_FLOAT32 = (
    "layer_batch_norm_sync",
    "loss_masked_and_weighted_by_time_step",
)
# Left to `--full`: of each of these kinds, other cases run by default, here, in
# `test_own_steps.py` (assignments, texts, four tensors), in `test_tables.py`
# (sparse ids), in `test_mends.py` (counters, Python functions) or in
# `test_steps.py` (weights of outputs and of rows).
MORE_OF_A_KIND = (
    "input_and_output_of_rank_1",
    "input_nested_with_none",
    "input_sparse_bags",
    "input_sparse_ids",
    "input_strings",
    "input_texts_of_rank_1",
    "layer_attention",
    "layer_batch_norm_sync",
    "layer_batch_norm_sync_subclassed",
    "layer_batch_norm_sync_with_metrics",
    "layer_batch_norm_sync_with_renorm",
    "layer_batch_norm_synchronized",
    "layer_counters",
    "layer_float8",
    "layer_group_normalization",
    "layer_int8_with_lora",
    "layer_layer_normalization",
    "layer_lora",
    "layer_nested_models",
    "layer_recurrent",
    "layer_shared",
    "layer_spectral_normalization",
    "layer_spectral_normalization_gathered",
    "layer_without_jit",
    "layer_xla",
    "layer_xla_gathered",
    "loss_added_by_row",
    "loss_added_gathered",
    "loss_added_mean",
    "loss_ctc",
    "loss_forced_to_clones",
    "loss_forced_to_gather",
    "loss_function_of_a_scalar",
    "loss_ignore_class",
    "loss_masked_by_time_step",
    "loss_masked_mean_with_sample_weight",
    "loss_of_sparse_targets",
    "loss_only_added",
    "loss_output_without_a_loss",
    "loss_outputs_in_a_list",
    "loss_outputs_with_weights",
    "loss_reduction_mean",
    "loss_reduction_mean_with_sample_weight",
    "loss_reduction_none",
    "loss_reduction_sum",
    "loss_saturated_summed",
    "loss_weighted_by_row_with_zeros_in_one_shard",
    "losses_by_row",
    "losses_over_the_batch",
    "metrics_made_in_layers",
    "metrics_of_classes",
    "metrics_of_one_hot_classes",
    "metrics_of_probabilities",
    "metrics_overridden_compute_metrics",
    "optimizer_Adadelta",
    "optimizer_Adafactor",
    "optimizer_Adagrad",
    "optimizer_Adagrad_with_repeated_embedding_rows",
    "optimizer_Adam",
    "optimizer_AdamW",
    "optimizer_Adam_with_repeated_embedding_rows",
    "optimizer_Adamax",
    "optimizer_Ftrl",
    "optimizer_Lamb",
    "optimizer_Lion",
    "optimizer_MultiOptimizer",
    "optimizer_Muon",
    "optimizer_Nadam",
    "optimizer_RMSprop",
    "optimizer_RMSprop_with_repeated_embedding_rows",
    "optimizer_SGD",
    "optimizer_SGD_with_repeated_embedding_rows",
    "optimizer_embedding_gathered",
    "optimizer_frozen_layers",
    "optimizer_variables_without_a_gradient_gathered",
    "optimizer_with_clipvalue_schedule_and_loss_scale",
    "optimizer_with_constraints",
    "optimizer_with_mixed_bfloat16",
    "optimizer_with_mixed_float16",
    "step_assigns_a_raw_variable",
    "step_assigns_weights_before_apply",
    "step_calls_an_unbuilt_layer",
    "step_calls_super_with_a_mask",
    "step_differentiates_losses_by_row",
    "step_gets_four_tensors",
    "step_keeps_a_tensor_on_self",
    "step_of_a_gan_with_noise_and_gradient_penalty",
    "step_of_a_subclass_that_replaces_a_layer",
    "step_reads_layer_losses_after_apply",
    "step_shifts_weights_and_back",
    "step_through_a_python_function",
    "step_uses_one_of_two_outputs",
    "step_with_summed_layer_losses",
    "table_of_constant_ids",
    "table_of_constant_ids_by_take",
    "table_of_constant_ids_of_relative_positions",
    "tables_of_constant_ids_with_Adafactor",
    "tables_of_constant_ids_with_Adagrad",
    "tables_of_constant_ids_with_AdamW",
    "tables_of_constant_ids_with_Muon",
    "tables_of_constant_ids_with_Nadam",
    "tables_of_constant_ids_with_RMSprop",
)


class Case(NamedTuple):
    """A model, what it is compiled with, and the rows it trains on.

    `data` is what `fit` takes, `(x, y)` or `(x, y, sample_weight)`, with all
    rows; `fit` holds further arguments. `float64` and `float32` are the
    tolerances, with the reason in `why` where they are not 1e-10 and 1e-5.
    `more` reads what else to compare from a trained model.
    """

    model: Callable[[], keras.Model]
    compiled: dict[str, Any]
    data: Any
    clone: dict[str, Any] = {}  # noqa: RUF012
    float32: float = 1e-5
    float64: float = 1e-10
    why: str = ""
    fit: dict[str, Any] = {}  # noqa: RUF012
    more: Callable[[keras.Model], list[Any]] = lambda model: []


def case(function):
    CASES[function.__name__] = function
    return function


def rng():
    return np.random.default_rng(0)


def floats(array):
    return np.asarray(array, keras.config.floatx())


def normal(*shape):
    return floats(rng().normal(size=shape))


def uniform(*shape):
    return floats(rng().uniform(0.1, 0.9, size=shape))


def labelled(classes=3, features=6):
    x = normal(ROWS, features)
    return x, rng().integers(0, classes, size=len(x))


def dense(units=3, activation="softmax", features=6, **kwargs):
    return lambda: keras.Sequential(
        [
            keras.Input((features,)),
            layers.Dense(8, "tanh"),
            layers.Dense(units, activation, **kwargs),
        ]
    )


def classify(compiled=None, model=None, **kwargs):
    """Return a case of a small classifier."""
    options = {"loss": "sparse_categorical_crossentropy", **(compiled or {})}
    return Case(model or dense(), options, labelled(), **kwargs)


def regress(compiled, y=None, units=3, activation=None, **kwargs):
    """Return a case of a small regression, on targets between 0 and 1."""
    y = uniform(ROWS, units) if y is None else y
    data = normal(ROWS, 6), y
    return Case(dense(units, activation), compiled, data, **kwargs)


def _add_reductions():
    for reduction in ("mean", "sum", "mean_with_sample_weight", "none"):

        def make(reduction=reduction):
            loss = losses.MeanSquaredError(reduction=reduction)
            made = regress({"loss": loss})
            if reduction == "none":
                return made
            weight = floats(rng().uniform(0, 2, ROWS))
            return made._replace(data=(*made.data, weight))

        CASES[f"loss_reduction_{reduction}"] = make


ACTIVATIONS = {
    losses.BinaryCrossentropy: "sigmoid",
    losses.BinaryFocalCrossentropy: "sigmoid",
    losses.CategoricalCrossentropy: "softmax",
    losses.CategoricalFocalCrossentropy: "softmax",
    losses.CategoricalGeneralizedCrossEntropy: "softmax",
    losses.SparseCategoricalCrossentropy: "softmax",
    losses.KLDivergence: "softmax",
    losses.Poisson: "softplus",
    losses.MeanSquaredLogarithmicError: "softplus",
    losses.Dice: "sigmoid",
    losses.Tversky: "sigmoid",
    losses.Circle: ops.normalize,
}
OF_LABELS = (
    losses.CategoricalGeneralizedCrossEntropy,
    losses.Circle,
    losses.SparseCategoricalCrossentropy,
)
OF_ONE_HOT = (
    losses.CategoricalCrossentropy,
    losses.CategoricalFocalCrossentropy,
    losses.CategoricalHinge,
)
# These look at all rows at once: at their sums, at their pairs, or at whether
# any target of the batch is not 0 or 1.
OF_THE_BATCH = (
    losses.CategoricalHinge,
    losses.Circle,
    losses.Dice,
    losses.Hinge,
    losses.SquaredHinge,
    losses.Tversky,
)


def many_losses(classes):
    """Return a case of one model with an output for each class of loss."""

    def model():
        inputs = keras.Input((6,))
        hidden = layers.Dense(8, "tanh")(inputs)
        # One layer for all heads: each variable takes time to trace.
        heads = ops.split(
            layers.Dense(3 * len(classes))(hidden), len(classes), -1
        )
        outputs = {
            cls.__name__: layers.Activation(ACTIVATIONS.get(cls))(head)
            for cls, head in zip(classes, heads, strict=True)
        }
        return keras.Model(inputs, outputs)

    def targets(cls):
        if cls in OF_LABELS:
            return labelled()[1]
        if cls in OF_ONE_HOT:
            return floats(np.eye(3)[labelled()[1]])
        return uniform(ROWS, 3)

    return Case(
        model,
        {
            "loss": {cls.__name__: cls() for cls in classes},
            # Its gradient is a hundred times that of the others.
            "loss_weights": {
                cls.__name__: 0.01
                if cls is losses.MeanAbsolutePercentageError
                else 1.0
                for cls in classes
            },
        },
        (normal(ROWS, 6), {cls.__name__: targets(cls) for cls in classes}),
    )


def _add_losses():
    every = {
        cls
        for _, cls in inspect.getmembers(losses, inspect.isclass)
        if cls not in (losses.Loss, losses.CTC)
    }
    by_row = sorted(
        every.difference(OF_THE_BATCH), key=lambda cls: cls.__name__
    )
    CASES["losses_by_row"] = lambda: many_losses(by_row)
    CASES["losses_over_the_batch"] = lambda: many_losses(OF_THE_BATCH)


_add_reductions()
_add_losses()


def masked():
    return keras.Sequential(
        [
            keras.Input((6,), dtype="int32"),
            layers.Embedding(12, 4, mask_zero=True),
            layers.Dense(2),
        ]
    )


def tokens(steps=6):
    """Return token ids whose rows are padded with zeros to one length."""
    count = ROWS
    lengths = rng().integers(1, steps + 1, size=(count, 1))
    ids = rng().integers(1, 12, size=(count, steps))
    return np.where(np.arange(steps) < lengths, ids, 0)


@case
def loss_masked_by_time_step():
    x = tokens()
    return Case(masked, {"loss": "mse"}, (x, normal(*x.shape, 2)))


@case
def loss_masked_and_weighted_by_time_step():
    x = tokens()
    weight = np.abs(normal(*x.shape))
    weight[:5] = 0
    data = x, normal(*x.shape, 2), weight
    return Case(masked, {"loss": "mse", "weighted_metrics": ["mae"]}, data)


@case
def loss_masked_mean_with_sample_weight():
    x = tokens()
    loss = losses.MeanSquaredError(reduction="mean_with_sample_weight")
    data = x, normal(*x.shape, 2), np.abs(normal(*x.shape))
    return Case(masked, {"loss": loss}, data)


@case
def loss_weighted_by_row_with_zeros_in_one_shard():
    weight = floats(np.ones(ROWS))
    weight[:4] = weight[20:23] = 0
    x, y = labelled()
    return Case(
        dense(),
        {
            "loss": "sparse_categorical_crossentropy",
            "metrics": ["accuracy"],
            "weighted_metrics": ["accuracy"],
        },
        (x, y, weight),
    )


@case
def loss_class_weight():
    return classify(fit={"class_weight": {0: 0.1, 1: 1.0, 2: 3.0}})


@case
def loss_ignore_class():
    loss = losses.SparseCategoricalCrossentropy(ignore_class=0)
    return classify({"loss": loss})


def two_outputs():
    inputs = keras.Input((6,))
    hidden = layers.Dense(8, "tanh")(inputs)
    kind = layers.Dense(3, "softmax", name="kind")(hidden)
    size = layers.Dense(1, name="size")(hidden)
    return keras.Model(inputs, {"kind": kind, "size": size})


@case
def loss_outputs_with_weights():
    x, y = labelled()
    return Case(
        two_outputs,
        {
            "loss": {"kind": "sparse_categorical_crossentropy", "size": "mse"},
            "loss_weights": {"kind": 0.3, "size": 2.0},
            "metrics": {"kind": ["accuracy"], "size": ["mae"]},
        },
        (x, {"kind": y, "size": normal(len(x), 1)}),
    )


@case
def loss_outputs_in_a_list():
    def model():
        made = two_outputs()
        return keras.Model(made.inputs, list(made.outputs))

    x, y = labelled()
    return Case(
        model,
        {"loss": ["sparse_categorical_crossentropy", "mse"]},
        (x, (y, normal(len(x), 1))),
    )


@case
def loss_output_without_a_loss():
    x, y = labelled()
    return Case(
        two_outputs,
        {"loss": {"kind": "sparse_categorical_crossentropy", "size": None}},
        (x, {"kind": y, "size": normal(len(x), 1)}),
    )


def saturated():
    """Return a model whose outputs lose what its logits still tell."""
    inputs = keras.Input((6,))
    x = layers.Rescaling(40)(inputs)
    kind = layers.Dense(3, "softmax", name="kind")(x)
    yes = layers.Dense(1, "sigmoid", name="yes")(x)
    return keras.Model(inputs, {"kind": kind, "yes": yes})


def _add_saturated():
    def summed():
        return {
            "kind": losses.SparseCategoricalCrossentropy(reduction="sum"),
            "yes": losses.BinaryCrossentropy(reduction="sum"),
        }

    def averaged():
        kind, yes = (
            losses.SparseCategoricalCrossentropy(reduction=None),
            losses.BinaryCrossentropy(reduction=None),
        )
        return {
            "kind": lambda y, p: ops.mean(kind(y, p)),
            "yes": lambda y, p: ops.mean(yes(y, p)),
        }

    for label, loss in (
        ("summed", summed),
        ("averaged_by_a_function_of_ones_own", averaged),
    ):

        def make(loss=loss):
            x, y = labelled()
            targets = {"kind": y, "yes": floats(y[:, None] > 0)}
            options = {"loss": loss(), "optimizer": optimizers.SGD(0.01)}
            return Case(saturated, options, (x, targets))

        CASES[f"loss_saturated_{label}"] = make


_add_saturated()


@case
def loss_function_of_a_scalar():
    return regress({"loss": lambda y, p: ops.max(ops.abs(y - p))})


@case
def loss_contrastive_over_the_batch():
    def loss(y, p):
        p = p / ops.norm(p, axis=-1, keepdims=True)
        y = y / ops.norm(y, axis=-1, keepdims=True)
        logits = ops.matmul(p, ops.transpose(y)) / 0.1
        return losses.sparse_categorical_crossentropy(
            ops.arange(ops.shape(p)[0]), logits, from_logits=True
        )

    return regress({"loss": loss})


class OwnLoss(keras.Model):
    """Reads weights, rows and outputs in a loss of its own."""

    def __init__(self):
        super().__init__()
        self.hidden = layers.Dense(8, "tanh", kernel_regularizer="l2")
        self.head = layers.Dense(3)

    def call(self, x):
        return self.head(self.hidden(x))

    def compute_loss(self, x, y, y_pred, sample_weight, training=True):
        loss = ops.sqrt(ops.mean(ops.square(y - y_pred)))
        loss += 0.1 * ops.sum(ops.square(self.head.kernel))
        loss += ops.mean(self.hidden(x)) ** 2
        return loss + sum(self.losses)


@case
def loss_overridden_compute_loss():
    return regress({})._replace(model=OwnLoss, compiled={})


class AddsLosses(keras.Model):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.hidden = layers.Dense(8, activity_regularizer="l2")
        self.head = layers.Dense(3, "softmax", kernel_regularizer="l2")

    def call(self, x):
        hidden = self.hidden(x)
        square = ops.square(hidden)
        if self.kind == "mean":
            self.add_loss(ops.mean(square))
        elif self.kind == "sum":
            self.add_loss(ops.sum(square))
        else:
            self.add_loss(ops.sum(square, axis=-1))
        return self.head(hidden)


@case
def loss_added_mean():
    return classify(
        model=lambda: AddsLosses("mean"), clone={"layer_losses": "mean"}
    )


@case
def loss_added_sum():
    return classify(
        model=lambda: AddsLosses("sum"), clone={"layer_losses": "sum"}
    )


@case
def loss_added_by_row():
    return classify(model=lambda: AddsLosses("rows"))


@case
def loss_added_gathered():
    loss = losses.SparseCategoricalCrossentropy(reduction="sum")
    return classify(
        {"loss": loss},
        model=lambda: AddsLosses("mean"),
        clone={"layer_losses": "mean"},
    )


@case
def loss_only_added():
    made = classify(
        model=lambda: AddsLosses("mean"), clone={"layer_losses": "mean"}
    )
    return made._replace(compiled={})


@case
def loss_ctc():
    def model():
        return keras.Sequential(
            [keras.Input((7, 3)), layers.Dense(5, "tanh"), layers.Dense(4)]
        )

    x = normal(ROWS, 7, 3)
    y = rng().integers(1, 4, size=(len(x), 3))
    return Case(model, {"loss": losses.CTC()}, (x, y))


class Tokens(keras.Model):
    """Trains on targets that are ragged or sparse."""

    def __init__(self):
        super().__init__()
        self.head = layers.Dense(4)

    def call(self, x):
        return self.head(x)

    def compute_loss(self, x, y, y_pred, sample_weight, training=True):
        if isinstance(y, tf.SparseTensor):
            target = tf.cast(tf.sparse.to_dense(y), y_pred.dtype)
        else:
            target = tf.cast(y.to_tensor(shape=(None, 4)), y_pred.dtype)
        return ops.sum(ops.abs(y_pred - target)) / ops.cast(
            ops.shape(target)[0], y_pred.dtype
        )


@case
def loss_of_ragged_targets():
    lengths = rng().integers(0, 5, size=ROWS)
    values = tf.range(float(lengths.sum()))
    ragged = tf.RaggedTensor.from_row_lengths(values, lengths)
    return Case(Tokens, {}, (normal(ROWS, 6), ragged))


@case
def loss_of_sparse_targets():
    sparse = tf.sparse.from_dense(np.eye(ROWS, 4))
    return Case(Tokens, {}, (normal(ROWS, 6), sparse))


@case
def loss_forced_to_gather():
    return classify(clone={"loss": "gather"})


@case
def loss_forced_to_clones():
    return classify(clone={"loss": "clones"})


class Largest(metrics.Metric):
    """A metric whose state is no sum."""

    def __init__(self, name="largest"):
        super().__init__(name=name)
        self.value = self.add_variable((), "zeros", name="value")

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.value.assign(ops.maximum(self.value, ops.max(y_pred)))

    def result(self):
        return self.value


@case
def metrics_of_classes():
    return classify(
        {
            "metrics": [
                "accuracy",
                metrics.SparseCategoricalCrossentropy(),
                Largest(),
                lambda y, p: ops.mean(p),
            ],
            "weighted_metrics": ["accuracy"],
        }
    )


@case
def metrics_of_probabilities():
    y = floats(rng().integers(0, 2, (ROWS, 1)))
    return regress(
        {
            "loss": "binary_crossentropy",
            "metrics": [
                metrics.AUC(),
                metrics.Precision(thresholds=[0.3, 0.6]),
                metrics.Recall(thresholds=0.4),
                metrics.F1Score(threshold=0.5),
                metrics.BinaryIoU(target_class_ids=[0, 1]),
                metrics.SensitivityAtSpecificity(0.5),
            ],
        },
        y,
        1,
        "sigmoid",
    )


@case
def metrics_of_one_hot_classes():
    y = floats(np.eye(3)[labelled()[1]])
    return regress(
        {
            "loss": "categorical_crossentropy",
            "metrics": [
                metrics.OneHotMeanIoU(3),
                metrics.F1Score("macro"),
                metrics.AUC(multi_label=True),
                metrics.CosineSimilarity(),
                metrics.R2Score(),
                metrics.RootMeanSquaredError(),
                metrics.PearsonCorrelation(),
            ],
        },
        y,
        3,
        "softmax",
    )


class OwnMetrics(keras.Model):
    """Updates a metric with the rows, in `compute_metrics`."""

    def __init__(self):
        super().__init__()
        self.head = layers.Dense(3, "softmax")
        self.own = metrics.Mean(name="own")

    def call(self, x):
        return self.head(x)

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        logs = super().compute_metrics(x, y, y_pred, sample_weight)
        self.own.update_state(ops.max(x) * ops.max(y_pred))
        return {**logs, "own": self.own.result()}


@case
def metrics_overridden_compute_metrics():
    return classify(model=OwnMetrics)


class Measured(layers.Layer):
    """Updates metrics in the forward pass."""

    def __init__(self):
        super().__init__()
        self.mean = metrics.Mean(name="mean_activity")
        self.total = metrics.Sum(name="total_activity")

    def call(self, x):
        self.mean.update_state(x)
        self.total.update_state(ops.abs(x))
        return x


@case
def metrics_made_in_layers():
    def model():
        return keras.Sequential(
            [keras.Input((6,)), Measured(), layers.Dense(3, "softmax")]
        )

    return classify({"metrics": ["accuracy"]}, model=model)


ADAM_AND_SGD = {}


def _optimizer_of(variable):
    """Let kernels learn by Adam and biases by SGD."""
    return ADAM_AND_SGD["adam" if "kernel" in variable.path else "sgd"]


def _add_optimizers():
    elsewhere = ("Optimizer", "LossScaleOptimizer", "OptimizerMap")
    for name, cls in inspect.getmembers(optimizers, inspect.isclass):
        if name in elsewhere:
            continue

        def make(name=name, cls=cls):
            if name == "MultiOptimizer":
                ADAM_AND_SGD["adam"] = optimizers.Adam(0.01)
                ADAM_AND_SGD["sgd"] = optimizers.SGD(0.1)
                return classify({"optimizer": cls(_optimizer_of)})
            return classify({"optimizer": cls(0.01)})

        CASES[f"optimizer_{name}"] = make
    decay = optimizers.schedules.CosineDecay(0.1, EPOCHS * len(SIZES))
    for label, rate, options in (
        (
            "clipnorm_weight_decay_and_ema",
            0.01,
            {
                "clipnorm": 0.05,
                "weight_decay": 0.1,
                "use_ema": True,
                "ema_overwrite_frequency": 3,
            },
        ),
        (
            "global_clipnorm_and_accumulation",
            0.01,
            {"global_clipnorm": 0.05, "gradient_accumulation_steps": 2},
        ),
        (
            "clipvalue_schedule_and_loss_scale",
            decay,
            {"clipvalue": 0.01, "loss_scale_factor": 1024.0},
        ),
    ):

        def make(rate=rate, options=options):
            return classify({"optimizer": optimizers.Adam(rate, **options)})

        CASES[f"optimizer_with_{label}"] = make


_add_optimizers()


@case
def optimizer_loss_scale_with_an_infinite_gradient_in_one_clone():
    made = classify(
        {
            "optimizer": optimizers.LossScaleOptimizer(
                optimizers.Adam(), dynamic_growth_steps=2
            )
        }
    )
    made.data[0][sum(SIZES[:2]) - 1] = np.inf
    return made


def constrained():
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, "tanh", kernel_constraint="unit_norm"),
            layers.Dense(3, "softmax", kernel_constraint="non_neg"),
        ]
    )


@case
def optimizer_with_constraints():
    return classify(model=constrained)


class Unused(keras.Model):
    """Has a layer that the loss does not depend on."""

    def __init__(self):
        super().__init__()
        self.used = layers.Dense(3, "softmax")
        self.unused = layers.Dense(3)

    def call(self, x):
        self.unused(x)
        return self.used(x)


@case
def optimizer_variables_without_a_gradient():
    return classify({"optimizer": optimizers.AdamW(0.01)}, model=Unused)


@case
def optimizer_variables_without_a_gradient_gathered():
    loss = losses.SparseCategoricalCrossentropy(reduction="sum")
    return classify(
        {"optimizer": optimizers.AdamW(0.01), "loss": loss}, model=Unused
    )


@case
def optimizer_frozen_layers():
    def model():
        made = dense()()
        made.layers[0].trainable = False
        return made

    return classify(model=model)


def pooled():
    return keras.Sequential(
        [
            keras.Input((6,), dtype="int32"),
            layers.Embedding(12, 4),
            layers.GlobalAveragePooling1D(),
            layers.Dense(3, "softmax"),
        ]
    )


def _add_embeddings():
    for name in ("Adam", "RMSprop", "Adagrad", "SGD"):

        def make(name=name):
            optimizer = getattr(optimizers, name)(0.01)
            compiled = {
                "optimizer": optimizer,
                "loss": "sparse_categorical_crossentropy",
            }
            return Case(pooled, compiled, (tokens(), labelled()[1]))

        CASES[f"optimizer_{name}_with_repeated_embedding_rows"] = make


_add_embeddings()


@case
def optimizer_embedding_gathered():
    loss = losses.SparseCategoricalCrossentropy(reduction="sum")
    return Case(pooled, {"loss": loss}, (tokens(), labelled()[1]))


class Tied(keras.Model):
    """Looks rows of a table up, and multiplies by all of it."""

    def __init__(self):
        super().__init__()
        self.table = layers.Embedding(12, 4)

    def call(self, x):
        hidden = ops.mean(self.table(x), axis=1)
        return ops.matmul(hidden, ops.transpose(self.table.embeddings))


@case
def optimizer_tied_embedding():
    loss = losses.SparseCategoricalCrossentropy(from_logits=True)
    return Case(Tied, {"loss": loss}, (tokens(), labelled()[1]))


class Positions(layers.Layer):
    """Adds a row of a table to each position, by ids made once."""

    def build(self, shape):
        self.table = layers.Embedding(*shape[1:])
        self.table.build((1, shape[1]))
        self.ids = ops.expand_dims(ops.arange(shape[1]), 0)

    def call(self, x):
        return x + self.table(self.ids)


class TakenPositions(layers.Layer):
    """Takes the rows of a weight, by ids made in the call."""

    def build(self, shape):
        self.table = self.add_weight(shape=(9, shape[2]), name="table")

    def call(self, x):
        return x + ops.take(self.table, ops.arange(ops.shape(x)[1]), axis=0)


class RelativePositions(layers.Layer):
    """Attends with a bias for each distance of two positions, as T5 does."""

    def build(self, shape):
        self.bias = layers.Embedding(5, 1)
        self.bias.build((shape[1], shape[1]))

    def call(self, x):
        at = np.arange(x.shape[1])
        bias = self.bias(ops.clip(at[None] - at[:, None], -2, 2) + 2)
        scores = ops.matmul(x, ops.transpose(x, (0, 2, 1)))
        return ops.matmul(ops.softmax(scores + bias[..., 0]), x)


class TokensAndPositions(layers.Layer):
    """Looks one table up by the batch's ids and by constant ones."""

    def __init__(self):
        super().__init__()
        self.table = layers.Embedding(12, 4)

    def call(self, x):
        return self.table(x) + self.table(ops.arange(ops.shape(x)[1]) + 3)


def tables(*kinds):
    """Return a case of tables one after the other, of tokens at the end."""
    takes_tokens = kinds[0] is TokensAndPositions

    def model():
        if takes_tokens:
            inputs = keras.Input((6,), dtype="int32")
        else:
            inputs = keras.Input((6, 4))
        x = inputs
        for kind in kinds:
            x = kind()(x)
        return keras.Model(inputs, layers.Dense(1)(x))

    x = tokens() if takes_tokens else normal(ROWS, 6, 4)
    options = {"loss": "mse", "optimizer": optimizers.Adam(0.01)}
    return Case(model, options, (x, normal(ROWS, 6, 1)))


def _add_tables():
    kinds = {
        "": Positions,
        "_by_take": TakenPositions,
        "_of_relative_positions": RelativePositions,
        "_and_of_tokens": TokensAndPositions,
    }
    for label, kind in kinds.items():
        CASES[f"table_of_constant_ids{label}"] = lambda kind=kind: tables(kind)
    for name in (
        "Adam",
        "AdamW",
        "Nadam",
        "RMSprop",
        "Adagrad",
        "Muon",
        "Adafactor",
    ):

        def make(name=name):
            made = tables(Positions, TakenPositions)
            made.compiled["optimizer"] = getattr(optimizers, name)(0.01)
            return made

        CASES[f"tables_of_constant_ids_with_{name}"] = make


_add_tables()


class Overwritten(layers.Layer):
    """Gives a variable its next value as the gradient, as float8 layers do."""

    def build(self, shape):
        self.largest = self.add_weight(
            shape=(), initializer="zeros", name="largest"
        )
        self.largest.overwrite_with_gradient = True

    def call(self, x):
        @tf.custom_gradient
        def remember(x, largest):
            def gradient(upstream, variables=None):
                seen = tf.maximum(largest, tf.reduce_max(tf.abs(x)))
                return upstream, seen

            return tf.identity(x), gradient

        return remember(x, tf.convert_to_tensor(self.largest))


@case
def optimizer_overwrite_with_gradient():
    def model():
        return keras.Sequential(
            [keras.Input((6,)), Overwritten(), layers.Dense(3, "softmax")]
        )

    return classify(model=model)


def _add_mixed_precision():
    for dtype in ("float16", "bfloat16"):

        def make(dtype=dtype):
            def model():
                policy = keras.DTypePolicy(f"mixed_{dtype}")
                made = keras.Sequential(
                    [
                        keras.Input((6,)),
                        layers.Dense(8, "tanh", dtype=policy),
                        layers.Dense(3, "softmax", dtype="float32"),
                    ]
                )
                made.dtype_policy = policy
                return made

            return classify(
                {"optimizer": optimizers.SGD(0.1)},
                model=model,
                float32=2e-3 if dtype == "float16" else 2e-2,
                float64=2e-3 if dtype == "float16" else 2e-2,
                why=f"{dtype} sums of other shards round otherwise",
            )

        CASES[f"optimizer_with_mixed_{dtype}"] = make


_add_mixed_precision()


def normalized(layer):
    # A bias right before a normalization has a zero gradient, of which Adam
    # would make steps in the direction of its rounding.
    return lambda: keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, use_bias=False),
            layer(),
            layers.Dense(3, "softmax"),
        ]
    )


@case
def layer_batch_norm_sync():
    model = normalized(layers.BatchNormalization)
    return classify(model=model, clone={"batch_norm": "sync"})


@case
def layer_batch_norm_sync_with_metrics():
    return classify(
        {"metrics": ["accuracy"], "optimizer": optimizers.Adam()},
        model=normalized(layers.BatchNormalization),
        clone={"batch_norm": "sync"},
    )


@case
def layer_batch_norm_synchronized():
    return classify(
        model=normalized(lambda: layers.BatchNormalization(synchronized=True))
    )


@case
def layer_batch_norm_sync_with_renorm():
    return classify(
        model=normalized(lambda: layers.BatchNormalization(renorm=True)),
        clone={"batch_norm": "sync"},
    )


@case
def layer_batch_norm_sync_masked():
    def model():
        return keras.Sequential(
            [
                keras.Input((6,), dtype="int32"),
                layers.Embedding(12, 4, mask_zero=True),
                layers.BatchNormalization(),
                layers.GlobalAveragePooling1D(),
                layers.Dense(3, "softmax"),
            ]
        )

    return Case(
        model,
        {"loss": "sparse_categorical_crossentropy"},
        (tokens(), labelled()[1]),
        clone={"batch_norm": "sync"},
    )


class Convolved(keras.Model):
    """A subclassed model that normalizes twice."""

    def __init__(self):
        super().__init__()
        self.first = layers.Conv2D(4, 3, use_bias=False)
        self.norm = layers.BatchNormalization()
        self.second = layers.Conv2D(4, 3, use_bias=False)
        self.other = layers.BatchNormalization(axis=1)
        self.head = layers.Dense(3, "softmax")

    def call(self, x, training=False):
        x = ops.relu(self.norm(self.first(x), training=training))
        x = self.other(self.second(x), training=training)
        return self.head(ops.mean(x, axis=(1, 2)))


@case
def layer_batch_norm_sync_subclassed():
    return Case(
        Convolved,
        {"loss": "sparse_categorical_crossentropy"},
        (normal(ROWS, 8, 8, 1), labelled()[1]),
        clone={"batch_norm": "sync"},
    )


@case
def layer_group_normalization():
    return classify(model=normalized(lambda: layers.GroupNormalization(4)))


@case
def layer_layer_normalization():
    return classify(model=normalized(layers.LayerNormalization))


@case
def layer_spectral_normalization():
    def model():
        return keras.Sequential(
            [
                keras.Input((6,)),
                layers.SpectralNormalization(layers.Dense(8, "tanh")),
                layers.Dense(3, "softmax"),
            ]
        )

    return classify(model=model)


@case
def layer_spectral_normalization_gathered():
    made = layer_spectral_normalization()
    return made._replace(clone={"loss": "gather"})


class Counter(layers.Layer):
    """Counts its batches and its rows."""

    def __init__(self):
        super().__init__()
        self.batches = self.add_weight(
            shape=(), dtype="int32", initializer="zeros", trainable=False
        )
        self.rows = self.add_weight(
            shape=(), initializer="zeros", trainable=False, aggregation="sum"
        )

    def call(self, x):
        self.batches.assign_add(1)
        self.rows.assign_add(ops.cast(ops.shape(x)[0], self.rows.dtype))
        return x


@case
def layer_counters():
    def model():
        return keras.Sequential(
            [keras.Input((6,)), Counter(), layers.Dense(3, "softmax")]
        )

    return classify(model=model)


@case
def layer_shared():
    def model():
        left, right = keras.Input((6,)), keras.Input((6,))
        shared = layers.Dense(5, "tanh")
        both = layers.Concatenate()([shared(left), shared(right)])
        return keras.Model([left, right], layers.Dense(3, "softmax")(both))

    x, y = labelled()
    return Case(
        model,
        {"loss": "sparse_categorical_crossentropy"},
        ((x, x[::-1].copy()), y),
    )


@case
def layer_nested_models():
    def model():
        inner = keras.Sequential([layers.Dense(6, "tanh"), layers.Dense(6)])
        inputs = keras.Input((6,))
        hidden = inner(inner(inputs))
        return keras.Model(inputs, layers.Dense(3, "softmax")(hidden))

    return classify(model=model)


@case
def layer_attention():
    def model():
        inputs = keras.Input((5, 8))
        hidden = layers.MultiHeadAttention(2, 4, use_bias=False)(inputs, inputs)
        hidden = layers.LayerNormalization()(hidden + inputs)
        pooled = layers.GlobalAveragePooling1D()(hidden)
        return keras.Model(inputs, layers.Dense(3, "softmax")(pooled))

    return Case(
        model,
        {"loss": "sparse_categorical_crossentropy"},
        (normal(ROWS, 5, 8), labelled()[1]),
    )


@case
def layer_recurrent():
    def model():
        return keras.Sequential(
            [
                keras.Input((3,), dtype="int32"),
                layers.Embedding(12, 4, mask_zero=True),
                layers.LSTM(4),
                layers.Dense(3, "softmax"),
            ]
        )

    return Case(
        model,
        {"loss": "sparse_categorical_crossentropy"},
        (tokens(3), labelled()[1]),
    )


@case
def layer_without_jit():
    class Plain(layers.Layer):
        def __init__(self):
            super().__init__()
            self.supports_jit = False

        def call(self, x):
            return x

    def model():
        return keras.Sequential(
            [keras.Input((6,)), Plain(), layers.Dense(3, "softmax")]
        )

    return classify(model=model)


LORA = "LoRA weights are float32 whatever the model is"


@case
def layer_lora():
    def model():
        made = dense()()
        made.layers[0].enable_lora(2)
        return made

    return classify(model=model, float64=1e-6, why=LORA)


@case
def layer_int8_with_lora():
    def model():
        made = dense()()
        made.quantize("int8")
        made.layers[0].enable_lora(2)
        return made

    return classify(model=model, float64=1e-6, why=LORA)


@case
def layer_float8():
    def model():
        made = dense()()
        made.quantize("float8")
        return made

    return classify(
        model=model,
        float64=1e-6,
        float32=2e-2,
        why="a sum in another order can round to another float8 value",
    )


def linear():
    return keras.Sequential([keras.Input((6,)), layers.Dense(3, "softmax")])


@case
def layer_xla():
    return classify({"jit_compile": True}, model=linear)


@case
def layer_xla_gathered():
    loss = losses.SparseCategoricalCrossentropy(reduction="sum")
    return classify({"jit_compile": True, "loss": loss}, model=linear)


class Nested(keras.Model):
    """Takes a nest of inputs, one of them missing."""

    def __init__(self):
        super().__init__()
        self.head = layers.Dense(3, "softmax")
        if keras.__version__.startswith("3.12."):
            # This Keras builds no model by the shapes of a nest with `None`.
            self.head.build((None, 12))
            self.built = True

    def call(self, inputs):
        left, right = inputs["pair"]
        assert inputs["none"] is None
        return self.head(ops.concatenate([left, right], axis=-1))


@case
def input_nested_with_none():
    x, y = labelled()
    return Case(
        Nested,
        {"loss": "sparse_categorical_crossentropy"},
        ({"pair": (x, x**2), "none": None}, y),
    )


class Worded(keras.Model):
    """Looks words up."""

    def __init__(self):
        super().__init__()
        self.lookup = layers.StringLookup(vocabulary=["a", "b", "c", "d"])
        self.table = layers.Embedding(5, 4)
        self.head = layers.Dense(3, "softmax")

    def call(self, x):
        return self.head(ops.mean(self.table(self.lookup(x)), axis=1))


@case
def input_strings():
    words = rng().choice(["a", "b", "c", "e"], size=(ROWS, 5))
    return Case(
        Worded,
        {"loss": "sparse_categorical_crossentropy"},
        (words, labelled()[1]),
    )


@case
def input_sparse_ids():
    def model():
        inputs = keras.Input((6,), dtype="int64", sparse=True)
        rows = layers.Embedding(12, 4)(inputs)
        x = layers.GlobalAveragePooling1D()(rows)
        return keras.Model(inputs, layers.Dense(3, "softmax")(x))

    return Case(
        model,
        {"loss": "sparse_categorical_crossentropy"},
        (tf.sparse.from_dense(tokens()), labelled()[1]),
    )


@case
def input_sparse_bags():
    def model():
        inputs = keras.Input((12,), sparse=True)
        return keras.Model(inputs, layers.Dense(3, "softmax")(inputs))

    bags = normal(ROWS, 12)
    return Case(
        model,
        {"loss": "sparse_categorical_crossentropy"},
        (tf.sparse.from_dense(bags * (bags > 1)), labelled()[1]),
    )


class Texts(keras.Model):
    """Takes texts, one a row, of rank 1."""

    def __init__(self):
        super().__init__()
        self.split = layers.TextVectorization(
            vocabulary=["a", "b", "c"], output_sequence_length=4
        )
        self.table = layers.Embedding(5, 4)
        self.head = layers.Dense(3, "softmax")

    def call(self, x):
        return self.head(ops.mean(self.table(self.split(x)), axis=1))


@case
def input_texts_of_rank_1():
    texts = np.array(["a b", "c", "a a c b", "d a"] * ROWS)[:ROWS]
    return Case(
        Texts,
        {"loss": "sparse_categorical_crossentropy"},
        (texts, labelled()[1]),
    )


class Rank1(keras.Model):
    def __init__(self):
        super().__init__()
        self.scale = self.add_weight(shape=(), initializer="ones")

    def call(self, x):
        return self.scale * x


@case
def input_and_output_of_rank_1():
    x = normal(ROWS)
    return Case(Rank1, {"loss": "mse", "metrics": ["mae"]}, (x, x**2))


def net(units=1):
    return keras.Sequential(
        [keras.Input((6,)), layers.Dense(8, "tanh"), layers.Dense(units)]
    )


def step(model, data=None, rate=0.1, **options):
    """Return a case of a model with a step of its own.

    Such steps log no "loss": for it `fit` would show Keras's own metric, which
    they do not update.
    """
    fields = {"clone", "fit", "more"} & options.keys()
    fields = {field: options.pop(field) for field in fields}
    compiled = {"optimizer": optimizers.SGD(rate), **options}
    if data is None:
        data = normal(ROWS, 6), uniform(ROWS, 1)
    return Case(model, compiled, data, **fields)


def functional(kind, layer):
    """Return what makes a model of a class, of one layer and a Dense one."""

    def model():
        inputs = keras.Input((6,))
        return kind(inputs, layers.Dense(1)(layer()(inputs)))

    return model


class WarmsUp(keras.Model):
    """Counts its steps in a `tf.Variable`, and weighs the loss by them."""

    def __init__(self, *args):
        super().__init__(*args)
        self.steps = tf.Variable(0, dtype="int64")

    def train_step(self, data):
        x, y = data
        self.steps.assign_add(1)
        variables = self.trainable_variables
        with tf.GradientTape() as tape:
            loss = ops.mean(ops.square(self(x) - y))
            loss *= ops.minimum(ops.cast(self.steps, loss.dtype) / 9, 1)
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        return {"own": loss}


@case
def step_assigns_a_raw_variable():
    return step(
        functional(WarmsUp, lambda: layers.Dense(8, "tanh")),
        more=lambda model: [model.steps],
    )


class Own(keras.Model):
    """A net, for steps that say what they do with it."""

    def __init__(self):
        super().__init__()
        self.net = net()

    def call(self, x):
        return self.net(x)


class Decays(Own):
    def train_step(self, data):
        x, y = data
        variables = self.trainable_variables
        with tf.GradientTape() as tape:
            loss = self.compute_loss(y=y, y_pred=self(x))
        gradients = tape.gradient(loss, variables)
        for variable in variables:
            variable.assign(0.99 * variable)
        self.optimizer.apply_gradients(zip(gradients, variables, strict=True))
        return {"own": loss}


@case
def step_assigns_weights_before_apply():
    return step(Decays, loss="mse")


class Shifts(Own):
    """Differentiates at other weights, as sharpness-aware training does."""

    def train_step(self, data):
        x, y = data
        variables = self.trainable_variables
        with tf.GradientTape() as tape:
            loss = self.compute_loss(y=y, y_pred=self(x))
        shifts = tape.gradient(loss, variables)
        for variable, shift in zip(variables, shifts, strict=True):
            variable.assign_add(0.05 * shift)
        with tf.GradientTape() as tape:
            shifted = self.compute_loss(y=y, y_pred=self(x))
        gradients = tape.gradient(shifted, variables)
        for variable, shift in zip(variables, shifts, strict=True):
            variable.assign_sub(0.05 * shift)
        self.optimizer.apply_gradients(zip(gradients, variables, strict=True))
        return {"own": loss, "shifted": shifted}


@case
def step_shifts_weights_and_back():
    return step(Shifts, loss="mse")


class Projects(keras.Model):
    """Calls parts of itself, one of which has no input shape before."""

    def __init__(self):
        super().__init__()
        self.augment = keras.Sequential(
            [layers.Rescaling(0.5), layers.Lambda(lambda x: x + 1)]
        )
        self.net = net(3)
        self.head = keras.Sequential([keras.Input((3,)), layers.Dense(2)])

    def train_step(self, x):
        with tf.GradientTape() as tape:
            outputs = self.head(self.net(self.augment(x)))
            loss = ops.mean(ops.square(outputs - 1))
        variables = [
            *self.net.trainable_variables,
            *self.head.trainable_variables,
        ]
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        return {"own": loss}


@case
def step_calls_an_unbuilt_layer():
    return step(Projects, normal(ROWS, 6))


class Logs(keras.Model):
    """Overrides `train_step` to add an entry to the logs."""

    def train_step(self, data):
        logs = super().train_step(data)
        return logs | {"rate": self.optimizer.learning_rate.value}


@case
def step_calls_super_with_a_mask():
    def model():
        inputs = keras.Input((6,), dtype="int32")
        rows = layers.Embedding(12, 4, mask_zero=True)(inputs)
        return Logs(inputs, layers.Dense(5, "softmax")(rows))

    return step(
        model,
        (tokens(), rng().integers(0, 5, size=(ROWS, 6))),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )


class DifferentiatesRows(Own):
    """The gradient of losses by row is the gradient of their sum."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = ops.square(self(x) - y)[:, 0]
        variables = self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        return {"own": ops.mean(loss)}


@case
def step_differentiates_losses_by_row():
    return step(DifferentiatesRows, rate=0.01)


class TakesFour(Own):
    def train_step(self, data):
        x, y, weight, offset = data
        with tf.GradientTape() as tape:
            loss = ops.mean(weight * ops.square(self(x) - y - offset))
        variables = self.trainable_variables
        gradients = tape.gradient(loss, variables)
        self.optimizer.apply_gradients(zip(gradients, variables, strict=True))
        return {"own": loss}


@case
def step_gets_four_tensors():
    rows = uniform(3, ROWS, 1)
    return step(TakesFour, (normal(ROWS, 6), *rows))


class Gan(keras.Model):
    """Updates its critic twice a step; noise, and a penalty on a gradient."""

    def __init__(self):
        super().__init__()
        self.critic = keras.Sequential(
            [
                keras.Input((5, 5, 1)),
                layers.Conv2D(3, 3, activation="tanh"),
                layers.Flatten(),
                layers.Dense(1),
            ]
        )
        self.generator = keras.Sequential(
            [
                keras.Input((4,)),
                layers.Dense(25),
                layers.LayerNormalization(),
                layers.Activation("tanh"),
                layers.Reshape((5, 5, 1)),
            ]
        )
        self.seed = keras.random.SeedGenerator(1)

    def compile(self, **kwargs):
        super().compile(**kwargs)
        self.critics = optimizers.Adam(1e-3)
        self.generators = optimizers.Adam(1e-3)

    def call(self, x):
        return self.critic(x)

    def generate(self, rows):
        noise = keras.random.normal((rows, 4), seed=self.seed)
        return self.generator(noise, training=True)

    def penalty(self, real, fake):
        rows = ops.shape(real)[0]
        share = keras.random.uniform((rows, 1, 1, 1), seed=self.seed)
        mixed = real + share * (fake - real)
        with tf.GradientTape() as tape:
            tape.watch(mixed)
            score = self.critic(mixed, training=True)
        square = ops.sum(tape.gradient(score, mixed) ** 2, axis=[1, 2, 3])
        return 10 * ops.mean((ops.sqrt(square + 1e-12) - 1) ** 2)

    def update_critic(self, real):
        with tf.GradientTape() as tape:
            fake = self.generate(ops.shape(real)[0])
            loss = self.penalty(real, fake)
            loss += ops.mean(self.critic(fake, training=True))
            loss -= ops.mean(self.critic(real, training=True))
        variables = self.critic.trainable_variables
        gradients = tape.gradient(loss, variables)
        self.critics.apply_gradients(zip(gradients, variables, strict=True))
        for variable in variables:
            variable.assign(ops.clip(variable, -0.5, 0.5))
        return loss

    def train_step(self, real):
        for _ in range(2):
            loss = self.update_critic(real)
        with tf.GradientTape() as tape:
            fake = self.generate(ops.shape(real)[0])
            generated = -ops.mean(self.critic(fake, training=True))
        variables = self.generator.trainable_variables
        gradients = tape.gradient(generated, variables)
        self.generators.apply_gradients(zip(gradients, variables, strict=True))
        return {"critic": loss, "generator": generated}


@case
def step_of_a_gan_with_noise_and_gradient_penalty():
    data = normal(ROWS, 5, 5, 1)

    def model():
        made = Gan()
        made(data[:2])
        return made

    return step(
        model,
        data,
        jit_compile=False,
        more=lambda made: [
            *made.critics.variables,
            *made.generators.variables,
        ],
    )


class Headed(keras.Model):
    """Has a head of three units."""

    def __init__(self):
        super().__init__()
        self.head = layers.Dense(3, name="head")

    def call(self, x):
        return self.head(x)

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = ops.mean(ops.square(self(x) - y))
        variables = self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        return {"own": loss}


class Reheaded(Headed):
    """Has another head; the first is never called, so never built."""

    def __init__(self):
        super().__init__()
        self.head = layers.Dense(1, name="head")


@case
def step_of_a_subclass_that_replaces_a_layer():
    def model():
        made = Reheaded()
        made(normal(2, 6))
        return made

    return step(model)


class Penalty(layers.Layer):
    """Adds a loss: the mean or the sum of the squares of its inputs."""

    def __init__(self, reduce):
        super().__init__()
        self.reduce = reduce

    def call(self, x):
        self.add_loss(0.1 * self.reduce(ops.square(x)))
        return x


class Penalized(keras.Model):
    """Trains on the losses of its layers, and reads them again afterwards."""

    def __init__(self):
        super().__init__()
        self.hidden = layers.Dense(2)
        self.penalty = Penalty(ops.mean)
        self.seen = metrics.Mean(name="penalty")

    def call(self, x):
        return self.penalty(self.hidden(x))

    @property
    def metrics(self):
        return [self.seen]

    def train_step(self, x):
        with tf.GradientTape() as tape:
            self(x)
            loss = sum(self.losses)
        variables = self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        self.seen.update_state(sum(self.losses))
        return {"penalty": self.seen.result()}


@case
def step_reads_layer_losses_after_apply():
    return step(Penalized, normal(ROWS, 6), clone={"layer_losses": "mean"})


class CallsSuper(keras.Model):
    def train_step(self, data):
        return super().train_step(data)


@case
def step_with_summed_layer_losses():
    def model():
        inputs = keras.Input((6,))
        hidden = Penalty(ops.sum)(layers.Dense(8, "tanh")(inputs))
        return CallsSuper(inputs, layers.Dense(1)(hidden))

    return step(model, loss="mse", rate=0.01, clone={"layer_losses": "sum"})


class Keeps(keras.Model):
    """Keeps a tensor on itself in `call` and uses it in `compute_loss`."""

    def __init__(self):
        super().__init__()
        self.first, self.head = layers.Dense(8, "tanh"), layers.Dense(1)

    def call(self, x):
        self.hidden = self.first(x)
        return self.head(self.hidden)

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        loss = ops.mean(ops.square(y - y_pred))
        return loss + 0.1 * ops.mean(ops.abs(self.hidden))


@case
def step_keeps_a_tensor_on_self():
    return step(Keeps)


class Python(layers.Layer):
    """A differentiable piece of eager Python."""

    def call(self, x):
        sine = tf.py_function(tf.sin, [x], x.dtype)
        sine.set_shape(x.shape)
        return sine


@case
def step_through_a_python_function():
    def model():
        inputs = keras.Input((6,))
        hidden = Python()(layers.Dense(8)(inputs))
        return keras.Model(inputs, layers.Dense(1)(hidden))

    # Clones that got in each other's way did so in some steps of many.
    return step(model, loss="mse", fit={"epochs": 10})


class TwoHeads(keras.Model):
    """Returns two outputs, of which its step's loss uses one."""

    def __init__(self):
        super().__init__()
        self.hidden = layers.Dense(8, "tanh")
        self.used, self.unused = layers.Dense(1), layers.Dense(2)

    def call(self, x):
        hidden = self.hidden(x)
        return self.used(hidden), self.unused(hidden)

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(y=y, y_pred=self(x, training=True)[0])
        variables = self.trainable_variables
        gradients = tape.gradient(loss, variables)
        self.optimizer.apply_gradients(zip(gradients, variables, strict=True))
        return {"own": loss}


@case
def step_uses_one_of_two_outputs():
    # Weights without a gradient do not decay; with one of zeros they do.
    optimizer = optimizers.AdamW(0.01, weight_decay=0.1)
    return step(TwoHeads, loss="mse", optimizer=optimizer)


def train(made, num_clones, evaluated=False, jit_compile=False, **more):
    """Return all that training a case comes to, by name."""
    keras.utils.set_random_seed(11)
    model = made.model()
    if num_clones:
        clone_model(model, num_clones, **made.clone, **more)
    options = {"optimizer": optimizers.SGD(0.1), **made.compiled}
    if jit_compile:
        options |= {"jit_compile": True}
    model.compile(**options)
    if not num_clones:
        cases.build_optimizer(model)
    data = cases.dataset(made.data, SIZES)
    arguments = {"epochs": EPOCHS, "shuffle": False, "verbose": 0, **made.fit}
    logs = model.fit(data, **arguments).history
    found = {f"logs {key}": value for key, value in logs.items()}
    if evaluated:
        logs = model.evaluate(data, verbose=0, return_dict=True)
        found |= {f"evaluated {key}": value for key, value in logs.items()}
        predicted = tf.nest.flatten(model.predict(data, verbose=0))
        found |= {f"predicted {i}": value for i, value in enumerate(predicted)}
    values = [*model.variables, *model.optimizer.variables, *made.more(model)]
    for i, value in enumerate(values):
        name = getattr(value, "path", getattr(value, "name", ""))
        found[f"{i} {name}"] = np.array(value)
    return found


def compare(expected, received, tolerance):
    """Return the largest difference, and name those beyond the tolerance."""
    assert len(expected) == len(received), (list(expected), list(received))
    found = {}
    for name, other in zip(expected, received.values(), strict=True):
        value = expected[name]
        if name.startswith("logs") and np.isnan(value).any():
            # As the loss of a batch with an infinite entry is in plain Keras.
            assert np.array_equal(np.isnan(value), np.isnan(other)), name
            value, other = np.nan_to_num(value), np.nan_to_num(other)
        found[name] = float(cases.difference(value, other))
    # The kernel of Adam takes 0.999 in float32 from 1, where Keras takes it
    # in Python, and 1.3e-5 of what the second moment takes in is lost.
    of_moments = max(tolerance, 2e-5) if tolerance >= 1e-5 else tolerance
    beyond = {
        name: f"{worst:.1e}"
        for name, worst in found.items()
        if not worst < (of_moments if "_velocity" in name else tolerance)
    }
    assert not beyond, beyond
    return max(found.values())


@pytest.mark.parametrize("name", CASES)
def test_case_by_xla(name, float64):
    """Run with `--xla`: every clone is compiled, and trains the same."""
    expected = train(CASES[name](), None)
    try:
        received = train(CASES[name](), 3, jit_compile=True)
    except Exception as error:
        try:
            train(CASES[name](), None, jit_compile=True)
        except Exception:
            pytest.skip(f"XLA does not compile the plain model: {error!r}")
        raise
    compare(expected, received, CASES[name]().float64)


DEFAULT = (
    *(f"float64-{name}" for name in CASES if name not in MORE_OF_A_KIND),
    *(f"float32-{name}" for name in ALSO_IN_FLOAT32),
)


@pytest.mark.full_but(*DEFAULT)
@pytest.mark.parametrize("name", CASES)
def test_case(name, floatx, record_property):
    tolerance = getattr(CASES[name](), floatx)
    evaluated = floatx == "float64" and name.startswith(EVALUATED)
    expected = train(CASES[name](), None, evaluated)
    received = train(CASES[name](), 3, evaluated)
    worst = compare(expected, received, tolerance)
    record_property("case", [name, floatx, worst])


@pytest.mark.full
@pytest.mark.parametrize("name", ALSO_ON_2_AND_4)
def test_case_on_2_and_4_clones(name, float64, record_property):
    evaluated = name.startswith(EVALUATED)
    expected = train(CASES[name](), None, evaluated)
    worst = [
        compare(
            expected,
            train(CASES[name](), num_clones, evaluated),
            CASES[name]().float64,
        )
        for num_clones in (2, 4)
    ]
    record_property("case", [name, "float64", max(worst)])


@pytest.mark.parametrize("name", CASES)
def test_case_in_pieces(name, float64, request):
    """Run with `--pieces 3`: two clones that work in pieces train the same."""
    evaluated = name.startswith(EVALUATED)
    expected = train(CASES[name](), 0, evaluated)
    pieces = request.config.getoption("--pieces")
    try:
        received = train(CASES[name](), 2, evaluated, pieces=pieces)
    except (ValueError, NotImplementedError) as error:
        if "all rows of it at once" in str(error) or "all pieces" in str(error):
            pytest.skip(f"it is refused: {error}")
        raise
    compare(expected, received, CASES[name]().float64)
