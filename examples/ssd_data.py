"""Batches for a detector: parallel loading, and augmentation with boxes.

Everything random comes from the seed, the epoch and the place in it, so that
a run that was stopped goes on with the batches it would have had.
"""

import numpy as np
import tensorflow as tf
from ssd_boxes import make_anchors, to_targets
from ssd_voc import decode

WHOLE = (0.0, 0.0, 1.0, 1.0)
GREY = 0.5


def training_data(samples, image_size, batch_size, seed, epochs):
    """Return the batches of some epochs, one after the other.

    Args:
        samples: List of `Sample`.
        image_size: Integer, the pixels of a side.
        batch_size: Integer; the last batch of an epoch may be smaller.
        seed: Integer.
        epochs: A `range` of the epochs, from another one than 0 to resume.

    Returns:
        A `tf.data.Dataset` of (images, targets).
    """
    columns, anchors = _columns(samples), make_anchors(image_size)
    count = len(samples)

    def load(image, boxes, labels, key):
        return augment(decode(image), boxes, labels, image_size, key)

    def one_epoch(epoch):
        keys = tf.stack(
            [tf.fill([count], seed + 1), epoch * count + tf.range(count)], 1
        )  # (count, 2)
        draws = tf.random.stateless_uniform([count], [seed, epoch])
        shuffled = [tf.gather(part, tf.argsort(draws)) for part in columns]
        return (
            tf.data.Dataset.from_tensor_slices((*shuffled, keys))
            .map(load, tf.data.AUTOTUNE)
            .map(_with_targets(anchors), tf.data.AUTOTUNE)
            .batch(batch_size)
        )

    return (
        tf.data.Dataset.range(epochs.start, epochs.stop, output_type=tf.int32)
        .flat_map(one_epoch)
        .prefetch(tf.data.AUTOTUNE)
    )


def validation_data(samples, image_size, batch_size):
    """Return the batches of all samples as they are, in their order."""

    def load(image, boxes, labels):
        return look_through(WHOLE, decode(image), image_size), boxes, labels

    return (
        tf.data.Dataset.from_tensor_slices(_columns(samples))
        .map(load, tf.data.AUTOTUNE)
        .map(_with_targets(make_anchors(image_size)), tf.data.AUTOTUNE)
        .batch(batch_size)
        .prefetch(tf.data.AUTOTUNE)
    )


def augment(image, boxes, labels, image_size, key):
    """Return an image in other colours, place and size, and its boxes.

    Args:
        image: Tensor of bytes, of shape (height, width, 3).
        boxes: Tensor of shape (boxes, 4).
        labels: Tensor of shape (boxes,).
        image_size: Integer, the pixels of a side of the new image.
        key: Integer tensor of shape (2,), which all is drawn from.

    Returns:
        The image of shape (image_size, image_size, 3), the boxes and their
        labels. Boxes whose center is no longer in the image are gone.
    """
    keys = tf.unstack(tf.random.experimental.stateless_split(key, 3))
    window = random_window(keys[0])
    image = look_through(window, image, image_size)
    boxes, labels = move_boxes(window, boxes, labels)
    image, boxes = tf.cond(
        tf.random.stateless_uniform([], keys[1]) < 0.5,
        lambda: flip(image, boxes),
        lambda: (image, boxes),
    )
    return recolor(image, keys[2]), boxes, labels


def random_window(key):
    """Return what part of the image to show, as a box.

    Half of the windows are larger than the image, which then lies somewhere
    in them; half are smaller, and lie somewhere in the image.
    """
    kind, size, shape, y, x = tf.unstack(tf.random.stateless_uniform([5], key))
    side = tf.where(kind < 0.5, 1 + 0.6 * size, 1 - 0.4 * size)
    longer = tf.exp(0.15 * (2 * shape - 1))
    sides = tf.stack([side * longer, side / longer])
    low = tf.stack([y, x]) * (1 - sides)
    return tf.concat([low, low + sides], 0)  # (4,)


def look_through(window, image, image_size):
    """Return what a window shows: between 0 and 1, and grey off the image."""
    image = tf.cast(image, tf.float32) / 255
    sides = tf.cast(tf.shape(image)[:2], tf.float32)
    window = tf.convert_to_tensor(window)
    # `crop_and_resize` wants the centers of the first and last new pixel, in
    # parts of the way from the first to the last center of the old ones. A
    # larger image has new centers beyond these, so its edge is repeated.
    image = tf.pad(image, [[1, 1], [1, 1], [0, 0]], "SYMMETRIC")
    half = (window[2:] - window[:2]) / (2 * image_size)
    ends = tf.stack([window[:2] + half, window[2:] - half])  # (2, 2)
    ends = (ends * sides + 0.5) / (sides + 1)
    return tf.image.crop_and_resize(
        image[None],
        tf.reshape(ends, [1, 4]),
        [0],
        [image_size, image_size],
        extrapolation_value=GREY,
    )[0]  # (image_size, image_size, 3)


def move_boxes(window, boxes, labels):
    """Return the boxes as parts of a window, those with their center in it."""
    low, high = window[:2], window[2:]
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    seen = tf.reduce_all((centers > low) & (centers < high), 1)  # (boxes,)
    boxes, labels = boxes[seen], labels[seen]
    moved = (boxes - tf.tile(low, [2])) / tf.tile(high - low, [2])
    # With its center in the window, a box keeps an area.
    return tf.clip_by_value(moved, 0, 1), labels


def flip(image, boxes):
    """Return an image and its boxes, left for right."""
    ymin, xmin, ymax, xmax = tf.unstack(boxes, axis=1)
    return image[:, ::-1], tf.stack([ymin, 1 - xmax, ymax, 1 - xmin], 1)


def recolor(image, key):
    """Return an image in somewhat other colours."""
    keys = tf.unstack(tf.random.experimental.stateless_split(key, 4))
    image = tf.image.stateless_random_brightness(image, 0.1, keys[0])
    image = tf.image.stateless_random_contrast(image, 0.7, 1.3, keys[1])
    image = tf.image.stateless_random_saturation(image, 0.7, 1.3, keys[2])
    image = tf.image.stateless_random_hue(image, 0.05, keys[3])
    return tf.clip_by_value(image, 0, 1)


def _columns(samples):
    boxes = np.concatenate([sample.boxes for sample in samples])
    labels = np.concatenate([sample.labels for sample in samples])
    lengths = [len(sample.boxes) for sample in samples]
    return (
        tf.constant([str(sample.image) for sample in samples]),
        tf.RaggedTensor.from_row_lengths(boxes, lengths),
        tf.RaggedTensor.from_row_lengths(labels, lengths),
    )


def _with_targets(anchors):
    return lambda image, boxes, labels: (
        image,
        to_targets(anchors, boxes, labels),
    )
