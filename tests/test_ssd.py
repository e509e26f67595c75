"""The detector example, and that clones train the same one."""

import functools
import importlib
import pathlib
import sys

import cases
import keras
import numpy as np
import pytest

from keras_clones import clone_model

sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples"))
ssd = importlib.import_module("ssd")
ssd_boxes = importlib.import_module("ssd_boxes")
ssd_data = importlib.import_module("ssd_data")
ssd_voc = importlib.import_module("ssd_voc")

SIZE = 32
ANCHORS = ssd_boxes.make_anchors(SIZE)  # (84, 4)


def test_anchors_are_as_many_as_the_model_has_outputs():
    for size in (32, 50):
        model = ssd.make_model(size, 3, width=4)
        anchors = ssd_boxes.make_anchors(size)
        assert model.output_shape == (None, len(anchors), 4 + 1 + 3)


def test_three_hard_negatives_for_each_positive_of_an_image():
    rng = np.random.default_rng(3)
    losses = rng.uniform(size=(4, 20))
    positive = np.zeros((4, 20), bool)
    positive[0, :2] = positive[1, 5] = positive[3, :10] = True
    chosen = ssd.hard_negatives(losses, positive).numpy()
    assert chosen.sum(1).tolist() == [6, 3, 0, 10]
    assert not (chosen & positive).any()
    for row in range(2):
        free = np.where(positive[row], -1, losses[row])
        hardest = np.argsort(free)[-chosen[row].sum() :]
        assert set(np.flatnonzero(chosen[row])) == set(hardest)


def test_the_loss_by_hand():
    # Two images of five anchors: the first has one with a box, and its three
    # hardest negatives count; the second has none, and adds nothing.
    logits = np.log([[1, 3], [3, 1], [1, 1], [1, 7], [15, 1]])
    y_pred = np.zeros((2, 5, 6))
    y_pred[:, :, 4:] = logits
    y_pred[0, 0, :4] = [0.5, 0, 3, 1]
    y_true = np.zeros((2, 5, 5))
    y_true[0, 0] = [1, 0, 0, 1, 1]
    confidence = np.log(4 / 3) + np.log(8) + np.log(2) + np.log(4 / 3)
    location = 0.5**2 / 2 + (2 - 0.5)
    loss = ssd.MultiboxLoss()(y_true, y_pred)
    np.testing.assert_allclose(loss, confidence + location, rtol=1e-6)
    # Without any box there is nothing to divide by.
    assert float(ssd.MultiboxLoss()(y_true[1:], y_pred[1:])) == 0
    # Two boxes: each image's share is of both.
    y_true[1] = y_true[0]
    y_pred[1] = y_pred[0]
    loss = ssd.MultiboxLoss()(y_true, y_pred)
    np.testing.assert_allclose(loss, confidence + location, rtol=1e-6)


def uneven_batch(seed):
    """Return images with many boxes first and few last, one with none."""
    rng = np.random.default_rng(seed)
    counts = [7, 9, 8, 0, 1, 1, 1, 2, 1, 1]
    targets = []
    for count in counts:
        low = rng.uniform(0, 0.6, (count, 2))
        boxes = np.concatenate([low, low + rng.uniform(0.1, 0.4)], 1)
        labels = rng.integers(0, 3, count, "int32")
        targets.append(
            ssd_boxes.to_targets(ANCHORS, boxes.astype("float32"), labels)
        )
    images = rng.uniform(size=(len(counts), SIZE, SIZE, 3))
    return images, np.stack(targets)


def train_uneven(num_clones=None):
    keras.utils.set_random_seed(0)
    model = ssd.make_model(SIZE, 3, width=4, deeper=False)
    if num_clones:
        clone_model(model, num_clones)
    model.compile(keras.optimizers.SGD(0.01), ssd.MultiboxLoss())
    losses = [model.train_on_batch(*uneven_batch(seed)) for seed in range(3)]
    return cases.weights(model), losses


@pytest.mark.full
def test_clones_train_the_detector_that_one_device_trains(float64):
    expected, losses = train_uneven()
    assert losses[0] != losses[2]
    for num_clones in (1, 3, 4):
        received, logged = train_uneven(num_clones)
        assert cases.difference(expected, received) < 1e-10, num_clones
        assert cases.difference(losses, logged) < 1e-10, num_clones


def test_a_mean_over_shards_would_be_another_loss(float64):
    # Without this the test above would hold for any loss.
    keras.utils.set_random_seed(0)
    images, targets = uneven_batch(0)
    outputs = ssd.make_model(SIZE, 3, width=4)(images).numpy()
    loss = ssd.MultiboxLoss()
    shards = [slice(0, 4), slice(4, 7), slice(7, 10)]
    parts = [float(loss(targets[s], outputs[s])) for s in shards]
    mean = np.average(parts, weights=[4, 3, 3])
    assert abs(mean - float(loss(targets, outputs))) > 0.02 * mean


class Stop(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 1:
            raise KeyboardInterrupt


def arguments(folder, *more):
    settings = "--epochs 2 --batch-size 4 --image-size 32 --train-images 10"
    return [*settings.split(), "--out", str(folder), *more]


@pytest.fixture
def small(monkeypatch):
    """Let the example's main function make less of a model."""
    made = functools.partial(ssd.make_model, width=4, deeper=False)
    monkeypatch.setattr(ssd, "make_model", made)
    monkeypatch.setattr(
        ssd, "take_devices", lambda clones, without_gpu: clones or without_gpu
    )


def trained_weights(folder):
    model = keras.models.load_model(folder / "ssd.keras", compile=False)
    return cases.weights(model)


@pytest.mark.full
def test_the_example_runs_stops_and_resumes(tmp_path, small, capsys, float64):
    mean = ssd.main(arguments(tmp_path / "whole"))
    out = capsys.readouterr().out
    assert 0 <= mean <= 1 and f"overlap of 0.5: {mean:.3f}" in out
    picture = tmp_path / "whole" / "detections.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 20_000

    with pytest.raises(KeyboardInterrupt):
        ssd.train(
            ssd.parse(arguments(tmp_path / "cut", "--clones", "2")), [Stop()]
        )
    assert not (tmp_path / "cut" / "ssd.keras").exists()
    ssd.main(arguments(tmp_path / "cut", "--resume", "--clones", "3"))
    out = capsys.readouterr().out
    assert "resumed after 1 epochs" in out
    assert "Epoch 2/2" in out.partition("resumed")[2]
    assert "Epoch 1/2" not in out.partition("resumed")[2]
    # Two clones all the way, or three from the second epoch on.
    expected = trained_weights(tmp_path / "whole")
    received = trained_weights(tmp_path / "cut")
    assert cases.difference(expected, received) < 1e-10

    # A finished run has nothing left to train, and says so.
    again = ssd.main(arguments(tmp_path / "cut", "--resume"))
    out = capsys.readouterr().out
    assert again == mean and "Epoch" not in out
    with pytest.raises(SystemExit, match="--batch-size: 4 before, 5 now"):
        ssd.main(arguments(tmp_path / "cut", "--resume", "--batch-size", "5"))
    with pytest.raises(SystemExit, match="Expected a stopped run to resume"):
        ssd.main(arguments(tmp_path / "none", "--resume"))
    assert not (tmp_path / "none").exists()


def test_the_example_says_what_is_wrong(tmp_path, small):
    ssd_voc.draw_shapes(tmp_path / "voc", 4, 2)
    data = ("--data", str(tmp_path / "voc"))
    with pytest.raises(SystemExit, match=r"unknown class 'ellipse': name the"):
        ssd.main(arguments(tmp_path / "out", *data))
    (tmp_path / "voc" / "JPEGImages" / "000003.jpg").write_text("")
    data += ("--classes", *ssd_voc.SHAPES)
    with pytest.raises(SystemExit, match=r"JPEGImages/000003.jpg: cannot be"):
        ssd.main(arguments(tmp_path / "out", *data))
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"error: .*file"):
        ssd.main(arguments(tmp_path / "file"))
    for wrong in (
        ["--epochs", "0"],
        ["--clones", "-1"],
        ["--batch-size", "two"],
        ["--bad-annotations", "ignore"],
    ):
        with pytest.raises(SystemExit):
            ssd.parse(wrong)


def test_labels_stay_in_their_panels(tmp_path):
    ssd_voc.draw_shapes(tmp_path, 1, 3)
    _, samples = ssd_voc.read_voc(tmp_path, ssd_voc.SHAPES)
    corners = np.array([[0, 0, 0.2, 0.2], [0, 0.9, 1, 1], [0.95, 0.8, 1, 1]])
    found = [(corners, [0, 1, 2], [0.9, 0.8, 0.7])] * len(samples)
    figures = []
    savefig = ssd.matplotlib.figure.Figure.savefig
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            ssd.matplotlib.figure.Figure,
            "savefig",
            lambda self, *args, **kwargs: [
                figures.append(self),
                savefig(self, *args, **kwargs),
            ],
        )
        ssd.draw(samples, found, ssd_voc.SHAPES, tmp_path / "found.png")
    for axis in figures[0].axes:
        panel = axis.get_window_extent()
        for text in axis.texts:
            box = text.get_bbox_patch().get_window_extent()
            assert panel.x0 - 1 < box.x0 and box.x1 < panel.x1 + 1
            assert panel.y0 - 1 < box.y0 and box.y1 < panel.y1 + 1


@pytest.mark.full
def test_the_detector_finds_what_it_was_trained_on(tmp_path):
    ssd_voc.draw_shapes(tmp_path, 8, 4, seed=1)
    samples, _ = ssd_voc.read_voc(tmp_path, ssd_voc.SHAPES)
    keras.utils.set_random_seed(0)
    anchors = ssd_boxes.make_anchors(64)
    model = clone_model(ssd.make_model(64, 3, width=8, deeper=False), 2)
    ssd.compile_model(model, steps=150)
    data = ssd_data.validation_data(samples, 64, 8).cache()
    model.fit(data.repeat(150), steps_per_epoch=150, shuffle=False, verbose=0)
    found = ssd_boxes.detect(anchors, model.predict(data, verbose=0))
    precision = ssd_boxes.average_precision(samples, found, 3)
    assert np.nanmean(precision) > 0.9
