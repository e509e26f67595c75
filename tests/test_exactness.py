"""What is taken to add up over the rows does."""

import functools

import keras
import numpy as np
import pytest

from keras_clones.plan import exactness

ROWS, CLASSES = 11, 3
# What a metric of a kind is made with, and fed.
PROBABILITIES = {
    "PrecisionAtRecall": {"recall": 0.5},
    "RecallAtPrecision": {"precision": 0.5},
    "SensitivityAtSpecificity": {"specificity": 0.5},
    "SpecificityAtSensitivity": {"sensitivity": 0.5},
    "AUC": {},
    "FalseNegatives": {},
    "FalsePositives": {},
    "Precision": {},
    "Recall": {},
    "TrueNegatives": {},
    "TruePositives": {},
    "F1Score": {},
    "FBetaScore": {},
    "R2Score": {},
    "RootMeanSquaredError": {},
    "OneHotIoU": {"num_classes": CLASSES, "target_class_ids": [0, 2]},
    "OneHotMeanIoU": {"num_classes": CLASSES},
}
LABELS = {
    "IoU": {"num_classes": CLASSES, "target_class_ids": [0, 2]},
    "MeanIoU": {"num_classes": CLASSES},
}
FUNCTIONS = {
    "top_k_categorical_accuracy": {"k": 2},
    "sparse_top_k_categorical_accuracy": {"k": 2},
    "categorical_generalized_cross_entropy": {"q": 0.5},
}
BINARY = {"BinaryIoU": {"target_class_ids": [0, 1]}}


def metric_cases():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, size=ROWS)
    one_hot = np.eye(CLASSES)[labels]
    probabilities = rng.dirichlet(np.ones(CLASSES), size=ROWS)
    guesses = rng.integers(0, CLASSES, size=ROWS)
    for kinds, pair in (
        (PROBABILITIES, (one_hot, probabilities)),
        (LABELS, (labels, guesses)),
        (BINARY, (labels > 0, probabilities[:, 1])),
    ):
        for kind, arguments in kinds.items():
            make = getattr(keras.metrics, kind)
            yield kind, functools.partial(make, **arguments), pair
    # The order of a set differs from process to process.
    judged = {f.__name__: f for f in exactness._JUDGED_BY_ROW}
    for name, function in sorted(judged.items()):
        # The generalized cross-entropy takes labels, whatever its name says.
        sparse = name.startswith("sparse") or "generalized" in name
        target = labels if sparse else one_hot
        make = functools.partial(
            keras.metrics.MeanMetricWrapper,
            function,
            **FUNCTIONS.get(name, {}),
        )
        # TensorFlow looks for the top k in float32 only.
        dtype = "float32" if "top_k" in name else "float64"
        yield name, make, (target, probabilities.astype(dtype))


CASES = {name: (make, pair) for name, make, pair in metric_cases()}


def test_every_additive_metric_has_a_case():
    assert {kind.__name__ for kind in exactness.ADDITIVE} <= CASES.keys()


@pytest.mark.parametrize(
    "weighted", [pytest.param(False, marks=pytest.mark.full), True]
)
@pytest.mark.parametrize("name", CASES)
def test_states_of_shards_add_up(name, weighted, float64):
    make, pair = CASES[name]
    # Whole numbers, since confusion matrices count in them.
    weights = np.arange(ROWS) % 3 + 1 if weighted else None

    def state(rows):
        metric = make()
        given = None if weights is None else weights[rows]
        metric.update_state(*(part[rows] for part in pair), given)
        assert exactness.adds_up(metric)
        return [np.asarray(v) for v in metric.variables]

    whole = state(slice(None))
    shards = [state(slice(0, 1)), state(slice(1, 5)), state(slice(5, None))]
    assert any(np.any(value != 0) for value in whole)
    for total, *parts in zip(whole, *shards, strict=True):
        np.testing.assert_allclose(sum(parts), total, rtol=1e-12, atol=1e-14)


class _Peak(keras.metrics.MeanSquaredError):
    def update_state(self, y_true, y_pred, sample_weight=None):
        self.total.assign(keras.ops.max(y_pred))


@pytest.mark.parametrize(
    "metric",
    [
        _Peak(),
        keras.metrics.MeanMetricWrapper(lambda y, p: keras.ops.max(p)),
        keras.metrics.CosineSimilarity(axis=0),
        keras.metrics.Hinge(),
        keras.metrics.PearsonCorrelation(),
    ],
    ids=lambda metric: type(metric).__name__,
)
def test_what_is_not_known_to_add_up_sees_the_whole_batch(metric):
    assert not exactness.adds_up(metric)


def test_float64_by_cudnn_is_refused_on_gpus():
    def model(dtype, **options):
        return keras.Sequential(
            [
                keras.Input((3, 2), dtype=dtype),
                keras.layers.LSTM(4, dtype=dtype, name="memory", **options),
            ]
        )

    gpus = ["/device:GPU:0", "/device:GPU:1"]
    with pytest.raises(ValueError, match=r"'memory'.*use_cudnn=False"):
        exactness.check_cudnn(model("float64"), gpus)
    exactness.check_cudnn(model("float32"), gpus)
    exactness.check_cudnn(model("float64", use_cudnn=False), gpus)
    exactness.check_cudnn(model("float64"), ["/device:CPU:0"])
