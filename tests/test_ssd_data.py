"""The detector example's batches: boxes stay on what they are around."""

import importlib
import pathlib
import sys

import numpy as np
import tensorflow as tf

sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples"))
ssd_boxes = importlib.import_module("ssd_boxes")
ssd_data = importlib.import_module("ssd_data")
ssd_voc = importlib.import_module("ssd_voc")

SIZE = 32


def drawn(folder):
    ssd_voc.draw_shapes(folder, 4, 3, seed=1)
    training, validation = ssd_voc.read_voc(folder, ssd_voc.SHAPES)
    return [*training, validation[0]]


COLORS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], "uint8")


def painted_image():
    """Return a grey image with three boxes, each in a color of its own."""
    image = np.full((60, 80, 3), 128, "uint8")
    pixels = [[4, 6, 20, 30], [30, 10, 56, 36], [10, 50, 40, 74]]
    for (ymin, xmin, ymax, xmax), color in zip(pixels, COLORS, strict=True):
        image[ymin:ymax, xmin:xmax] = color
    boxes = np.array(pixels) / [60, 80, 60, 80]
    return image, boxes.astype("float32")


def extent(image, color):
    """Return the box of the pixels that are nearer to a color than grey."""
    painted = (image - 0.5) @ (2 * (color / 255.0) - 1) > 0.75
    found = np.argwhere(painted)
    return np.concatenate([found.min(0), found.max(0) + 1])


def test_augmentation_keeps_boxes_on_their_objects(monkeypatch):
    monkeypatch.setattr(ssd_data, "recolor", lambda image, key: image)
    image, boxes = painted_image()
    windows, flips, gone, cut = [], 0, 0, 0
    for number in range(60):
        moved, new_boxes, labels = (
            part.numpy()
            for part in ssd_data.augment(
                image, boxes, tf.range(3), 96, tf.constant([7, number])
            )
        )
        assert moved.shape == (96, 96, 3)
        assert moved.min() >= 0 and moved.max() <= 1
        assert (new_boxes[:, 2:] > new_boxes[:, :2]).all()
        for box, label in zip(new_boxes, labels, strict=True):
            seen = extent(moved, COLORS[label])
            np.testing.assert_allclose(box * 96, seen, atol=1.01)
            cut += (box == 0).any() or (box == 1).any()
        gone += 3 - len(labels)
        if len(labels) > 1 and {0, 2} <= set(labels):
            flips += new_boxes[labels == 0, 1] > new_boxes[labels == 2, 1]
        windows.append(len(labels))
    # Every kind of move was among them.
    assert 5 < flips < 55 and gone > 5 and cut > 5 and 3 in windows


def test_a_box_leaves_only_with_its_center():
    window = tf.constant([0.25, 0.25, 0.75, 0.75])
    boxes = tf.constant(
        [[0.0, 0.0, 0.4, 1.0], [0.0, 0.0, 0.5, 1.0], [0.3, 0.3, 0.4, 0.5]]
    )
    moved, labels = ssd_data.move_boxes(window, boxes, tf.range(3))
    assert labels.numpy().tolist() == [2]
    np.testing.assert_allclose(moved, [[0.1, 0.1, 0.3, 0.5]], atol=1e-6)
    moved, labels = ssd_data.move_boxes(window, boxes + 0.01, tf.range(3))
    assert labels.numpy().tolist() == [1, 2]
    np.testing.assert_allclose(moved[0], [0, 0, 0.52, 1], atol=1e-6)


def test_the_whole_window_shows_the_image_as_it_is():
    rng = np.random.default_rng(4)
    for side in (1, 7, 24, 96):
        image = rng.integers(0, 256, (side, side, 3), "uint8")
        shown = ssd_data.look_through(ssd_data.WHOLE, image, side)
        np.testing.assert_allclose(shown, image / 255, atol=1e-4)
        white = np.full((side, side + 3, 3), 255, "uint8")
        for size in (24, 96):
            shown = ssd_data.look_through(ssd_data.WHOLE, white, size)
            np.testing.assert_allclose(shown, 1, atol=1e-5)


def test_recolor_changes_colors_and_stays_in_range():
    image = (painted_image()[0] / 255).astype("float32")
    one, same, other = (
        ssd_data.recolor(image, tf.constant([0, n])).numpy() for n in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, same)
    assert abs(one - other).max() > 0.02 and abs(one - image).max() > 0.02
    assert one.min() >= 0 and one.max() <= 1


def test_a_resumed_run_gets_the_batches_it_would_have_had(tmp_path):
    samples = drawn(tmp_path)

    def batches(epochs):
        data = ssd_data.training_data(samples, SIZE, 2, 3, epochs)
        return [[part.numpy() for part in batch] for batch in data]

    whole = batches(range(3))
    assert [len(images) for images, _ in whole] == [2, 2, 1] * 3
    assert whole[0][0].shape == (2, SIZE, SIZE, 3)
    assert whole[0][1].shape == (2, 84, 5)
    resumed = batches(range(1, 3))
    for batch, other in zip(whole[3:], resumed, strict=True):
        for part, other_part in zip(batch, other, strict=True):
            np.testing.assert_array_equal(part, other_part)
    assert not np.array_equal(whole[0][0], whole[3][0])


def test_an_epoch_has_every_image_once(tmp_path, monkeypatch):
    samples = drawn(tmp_path)
    monkeypatch.setattr(
        ssd_data,
        "augment",
        lambda image, boxes, labels, size, key: (
            ssd_data.look_through(ssd_data.WHOLE, image, size),
            boxes,
            labels,
        ),
    )
    still = ssd_data.validation_data(samples, SIZE, 5)
    images, targets = next(iter(still))
    orders = []
    data = ssd_data.training_data(samples, SIZE, 5, 3, range(4))
    for shuffled, shuffled_targets in data:
        same = (shuffled.numpy()[:, None] == images.numpy()).all((2, 3, 4))
        assert (same.sum(0) == 1).all() and (same.sum(1) == 1).all()
        orders.append(tuple(same.argmax(1)))
        np.testing.assert_array_equal(
            shuffled_targets, targets.numpy()[same.argmax(1)]
        )
    assert len(set(orders)) > 1
