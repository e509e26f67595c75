"""Boxes of a detector: anchors, matching, offsets, detections, precision.

A box is (ymin, xmin, ymax, xmax) in parts of the image's height and width,
so that it stays what it is when the image is resized.
"""

import contextlib
import io
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

STRIDES = (8, 16, 32)
# The side of an anchor on the map of each stride, and of one beyond the last.
SCALES = (0.15, 0.3, 0.6, 1.0)
ASPECTS = (1.0, 2.0, 0.5)
ANCHORS_A_CELL = len(ASPECTS) + 1
# From which an anchor has a box, and from which a box counts as found.
LEAST_OVERLAP = 0.5
# What the SSD paper divides offsets by, so that they are of size one.
VARIANCES = np.array([0.1, 0.1, 0.2, 0.2])


class Detections(NamedTuple):
    """What was found in one image, the surest first."""

    boxes: np.ndarray  # (found, 4)
    labels: np.ndarray  # (found,)
    scores: np.ndarray  # (found,)


def make_anchors(image_size):
    """Return the anchors of all maps, row by row, in the model's order."""
    maps = []
    for stride, side, larger in zip(
        STRIDES, SCALES[:-1], SCALES[1:], strict=True
    ):
        cells = -(-image_size // stride)
        centers = (np.arange(cells) + 0.5) / cells
        y, x = np.meshgrid(centers, centers, indexing="ij")  # (cells, cells)
        root = np.sqrt(ASPECTS)
        between = np.sqrt(side * larger)
        heights = np.append(side / root, between)
        widths = np.append(side * root, between)
        low = np.stack(
            [y[..., None] - heights / 2, x[..., None] - widths / 2], -1
        )  # (cells, cells, 4 a cell, 2)
        size = np.stack([heights, widths], -1)  # (4 a cell, 2)
        maps.append(np.concatenate([low, low + size], -1).reshape(-1, 4))
    return np.concatenate(maps).astype("float32")  # (anchors, 4)


def overlap(boxes, others):
    """Return the intersection over union of every box with every other."""
    low = tf.maximum(boxes[:, None, :2], others[:, :2])
    high = tf.minimum(boxes[:, None, 2:], others[:, 2:])
    shared = tf.reduce_prod(tf.maximum(high - low, 0), -1)
    areas = tf.reduce_prod(boxes[:, 2:] - boxes[:, :2], -1)
    other_areas = tf.reduce_prod(others[:, 2:] - others[:, :2], -1)
    return shared / (areas[:, None] + other_areas - shared)  # (boxes, others)


@tf.function(input_signature=[tf.TensorSpec([None, 4])] * 2)
def match(anchors, boxes):
    """Return for each anchor the index of its box, or -1 for background.

    An anchor gets the box it overlaps most, above `LEAST_OVERLAP`. Before that
    each box, the best pair first, takes the anchor that overlaps it most
    among those not yet taken, so that no box goes without one.
    """
    overlaps = overlap(anchors, boxes)  # (anchors, boxes)
    num_anchors, num_boxes = tf.unstack(tf.shape(overlaps))
    background = tf.fill([num_anchors, 1], LEAST_OVERLAP)
    matches = tf.concat([background, overlaps], 1)  # (anchors, 1 + boxes)
    matches = tf.argmax(matches, 1, tf.int32) - 1  # (anchors,)
    # As wide as with the background, so that no argmax is over nothing.
    free = tf.pad(overlaps, [[0, 0], [1, 0]], constant_values=-1)
    for _ in tf.range(num_boxes):
        best = tf.argmax(tf.reshape(free, [-1]), output_type=tf.int32)
        anchor, column = best // (1 + num_boxes), best % (1 + num_boxes)
        matches = tf.tensor_scatter_nd_update(matches, [[anchor]], [column - 1])
        taken = (tf.range(num_anchors) == anchor)[:, None] | (
            tf.range(1 + num_boxes) == column
        )  # (anchors, 1 + boxes)
        free = tf.where(taken, -1.0, free)
    return matches


def to_targets(anchors, boxes, labels):
    """Return what the model should say of each anchor of one image.

    Args:
        anchors: Array of shape (anchors, 4).
        boxes: Tensor of shape (boxes, 4).
        labels: Integer tensor of shape (boxes,), the classes from 0.

    Returns:
        A tensor of shape (anchors, 5): the class from 1, or 0 for background,
        and the offsets to the box.
    """
    matches = match(anchors, boxes)  # (anchors,)
    # Something to gather for the anchors, or images, without a box.
    boxes = tf.concat([[[0.0, 0.0, 1.0, 1.0]], boxes], 0)
    labels = tf.concat([[0], labels + 1], 0)
    labels = tf.cast(tf.gather(labels, matches + 1), tf.float32)
    offsets = encode(anchors, tf.gather(boxes, matches + 1))  # (anchors, 4)
    offsets = tf.where(labels[:, None] > 0, offsets, 0.0)
    return tf.concat([labels[:, None], offsets], -1)  # (anchors, 5)


def encode(anchors, boxes):
    """Return the offsets from anchors to boxes, both (..., anchors, 4)."""
    center, size = _center_and_size(boxes)
    anchor_center, anchor_size = _center_and_size(anchors)
    offsets = tf.concat(
        [
            (center - anchor_center) / anchor_size,
            tf.math.log(size / anchor_size),
        ],
        -1,
    )
    return offsets / tf.cast(VARIANCES, offsets.dtype)


def decode(anchors, offsets):
    """Return the boxes that lie at these offsets from the anchors."""
    offsets = offsets * tf.cast(VARIANCES, offsets.dtype)
    anchor_center, anchor_size = _center_and_size(anchors)
    center = anchor_center + offsets[..., :2] * anchor_size
    size = anchor_size * tf.exp(offsets[..., 2:])
    return tf.concat([center - size / 2, center + size / 2], -1)


def _center_and_size(boxes):
    low, high = boxes[..., :2], boxes[..., 2:]
    return (low + high) / 2, high - low


def detect(anchors, outputs, least_score=0.01, most=100):
    """Turn the model's outputs into one `Detections` an image.

    Args:
        anchors: Array of shape (anchors, 4).
        outputs: Array of shape (batch, anchors, 4 + 1 + classes): offsets,
            and logits with the background first.
        least_score: Float, the probability from which a box is one.
        most: Integer, the number of boxes an image at most.
    """
    outputs = tf.cast(outputs, tf.float32)  # what the suppression takes
    boxes = decode(anchors, outputs[..., :4])
    scores = tf.nn.softmax(outputs[..., 4:])[..., 1:]
    found = tf.image.combined_non_max_suppression(
        boxes[:, :, None],  # (batch, anchors, 1, 4)
        scores,  # (batch, anchors, classes)
        max_output_size_per_class=most,
        max_total_size=most,
        iou_threshold=0.45,
        score_threshold=least_score,
    )
    parts = [found.nmsed_boxes, found.nmsed_classes, found.nmsed_scores]
    return [
        Detections(b[:n], c[:n].astype(int), s[:n])
        for b, c, s, n in zip(
            *(part.numpy() for part in parts),
            found.valid_detections.numpy(),
            strict=True,
        )
    ]


def average_precision(samples, detections, num_classes):
    """Return the average precision of each class, by COCO's own evaluator.

    It is the mean of the precision at 101 recalls. Boxes marked difficult
    neither have to be found nor make what finds them wrong.

    Args:
        samples: Sequence with `boxes`, `labels` and `difficult` an image.
        detections: Sequence of `Detections`, one an image.
        num_classes: Integer, how many classes there are.

    Returns:
        An array of shape (classes,), with NaN for a class without boxes.
    """
    truth = [
        {"image_id": image, "category_id": int(label), "iscrowd": int(hard)}
        | _coco_box(box)
        for image, sample in enumerate(samples)
        for box, label, hard in zip(
            sample.boxes, sample.labels, sample.difficult, strict=True
        )
    ]
    found = [
        {"image_id": image, "category_id": int(label), "score": float(score)}
        | _coco_box(box)
        for image, one in enumerate(detections)
        for box, label, score in zip(
            one.boxes, one.labels, one.scores, strict=True
        )
    ]
    # The evaluator prints its progress and has no switch for it.
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(
            _coco(truth, len(samples), num_classes),
            _coco(found, len(samples), num_classes),
            "bbox",
        )
        evaluation.params.iouThrs = np.array([LEAST_OVERLAP])
        # By their area boxes are "all", small, medium and large: only "all".
        evaluation.params.areaRng = evaluation.params.areaRng[:1]
        evaluation.params.areaRngLbl = ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
    # (overlaps, recalls, classes, areas, most detections)
    precision = evaluation.eval["precision"][0, :, :, 0, -1]
    return np.where((precision < 0).all(0), np.nan, precision.mean(0))


def _coco_box(box):
    ymin, xmin, ymax, xmax = (float(value) for value in box)
    width, height = xmax - xmin, ymax - ymin
    return {"bbox": [xmin, ymin, width, height], "area": width * height}


def _coco(annotations, num_images, num_classes):
    coco = COCO()
    coco.dataset = {
        "images": [{"id": image} for image in range(num_images)],
        "categories": [{"id": label} for label in range(num_classes)],
        # An id of 0 would mean "no match" to the evaluator.
        "annotations": [
            {"id": number, **annotation}
            for number, annotation in enumerate(annotations, 1)
        ],
    }
    coco.createIndex()
    return coco
