"""The boxes of the detector example, against figures worked out by hand."""

import importlib
import pathlib
import sys

import numpy as np
import pytest

sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples"))
ssd_boxes = importlib.import_module("ssd_boxes")
ssd_voc = importlib.import_module("ssd_voc")

ANCHORS = ssd_boxes.make_anchors(32)  # (84, 4)


def random_boxes(rng, count):
    low = rng.uniform(0, 0.6, (count, 2))
    high = low + rng.uniform(0.1, 0.4, (count, 2))
    return np.concatenate([low, high], 1).astype("float32")


def intersection_over_union(box, other):
    height = min(box[2], other[2]) - max(box[0], other[0])
    width = min(box[3], other[3]) - max(box[1], other[1])
    shared = max(height, 0) * max(width, 0)
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (box, other)]
    return shared / (sum(areas) - shared)


def test_anchors_lie_where_the_maps_cells_do():
    assert ANCHORS.shape == (4 * (4 * 4 + 2 * 2 + 1), 4)
    # Cell (1, 2) of the first map, of four by four.
    first, wide, tall, larger = ANCHORS[4 * (1 * 4 + 2) : 4 * (1 * 4 + 2) + 4]
    np.testing.assert_allclose(first, [0.3, 0.55, 0.45, 0.7], rtol=1e-6)
    for anchor in (first, wide, tall, larger):
        center = (anchor[:2] + anchor[2:]) / 2
        np.testing.assert_allclose(center, [0.375, 0.625], rtol=1e-6)
    heights, widths = np.transpose(
        [a[2:] - a[:2] for a in (wide, tall, larger)]
    )
    np.testing.assert_allclose(widths / heights, [2, 0.5, 1], rtol=1e-5)
    np.testing.assert_allclose(
        widths * heights, [0.15**2, 0.15**2, 0.15 * 0.3], rtol=1e-5
    )


def test_every_box_gets_its_best_anchor():
    rng = np.random.default_rng(0)
    for count in (1, 2, 5, 12):
        boxes = random_boxes(rng, count)
        overlaps = np.array(
            [[intersection_over_union(a, b) for b in boxes] for a in ANCHORS]
        )
        np.testing.assert_allclose(
            ssd_boxes.overlap(ANCHORS, boxes), overlaps, atol=1e-5
        )
        matches = ssd_boxes.match(ANCHORS, boxes).numpy()
        assert set(range(count)) <= set(matches)
        forced = np.zeros(len(ANCHORS), bool)
        best = overlaps.argmax(0)
        for box in range(count):
            if (best == best[box]).sum() == 1:
                assert matches[best[box]] == box
            forced[best[box]] = True
        near = overlaps.max(1) >= 0.5
        moved = (matches != overlaps.argmax(1)) & near
        assert moved.sum() <= count
        far = ~near & (matches >= 0)
        assert far.sum() <= count and (matches[~near & ~far] == -1).all()


def test_boxes_that_want_the_same_anchor_each_get_one():
    box = ANCHORS[40]
    boxes = np.stack([box + 0.002, box, box - 0.003])
    matches = ssd_boxes.match(ANCHORS, boxes).numpy()
    assert matches[40] == 1
    assert {0, 1, 2} <= set(matches)


def test_an_image_without_boxes_is_all_background():
    none = np.zeros((0, 4), "float32")
    assert (ssd_boxes.match(ANCHORS, none).numpy() == -1).all()
    targets = ssd_boxes.to_targets(ANCHORS, none, np.zeros(0, "int32"))
    assert targets.shape == (84, 5) and not targets.numpy().any()


def test_encode_is_what_the_paper_has_and_decode_its_inverse():
    anchor = np.array([[0.2, 0.2, 0.4, 0.6]], "float32")
    box = np.array([[0.2, 0.3, 0.6, 0.7]], "float32")
    np.testing.assert_allclose(
        ssd_boxes.encode(anchor, box),
        [[0.1 / 0.2 / 0.1, 0.1 / 0.4 / 0.1, np.log(2) / 0.2, 0]],
        atol=1e-5,
    )
    boxes = random_boxes(np.random.default_rng(1), len(ANCHORS))
    offsets = ssd_boxes.encode(ANCHORS, boxes)
    np.testing.assert_allclose(
        ssd_boxes.decode(ANCHORS, offsets), boxes, atol=1e-5
    )
    np.testing.assert_allclose(
        ssd_boxes.encode(ANCHORS, ssd_boxes.decode(ANCHORS, offsets)),
        offsets,
        atol=1e-4,
    )


def test_targets_lead_back_to_the_boxes():
    boxes = random_boxes(np.random.default_rng(2), 3)
    targets = ssd_boxes.to_targets(ANCHORS, boxes, np.array([2, 0, 1]))
    classes, offsets = targets[:, 0].numpy().astype(int), targets[:, 1:]
    decoded = ssd_boxes.decode(ANCHORS, offsets).numpy()
    assert set(classes) == {0, 1, 2, 3}
    for box, name in zip(boxes, (3, 1, 2), strict=True):
        rows = decoded[classes == name]
        np.testing.assert_allclose(rows, [box] * len(rows), atol=1e-5)


def sample(boxes, labels, difficult=None):
    boxes = np.array(boxes, "float32").reshape(-1, 4)
    hard = np.zeros(len(boxes), bool) if difficult is None else difficult
    return ssd_voc.Sample(None, boxes, np.array(labels), np.array(hard))


def detections(*found):
    boxes = np.array([box for box, _, _ in found]).reshape(-1, 4)
    return ssd_boxes.Detections(
        boxes,
        np.array([label for _, label, _ in found], int),
        np.array([score for _, _, score in found]),
    )


LEFT, RIGHT = [0.1, 0.0, 0.5, 0.4], [0.1, 0.5, 0.5, 0.9]
ELSEWHERE = [0.6, 0.6, 0.9, 0.9]


@pytest.mark.parametrize(
    "found, expected",
    [
        ([(LEFT, 0, 0.9), (RIGHT, 0, 0.8)], 1),
        ([], 0),
        # Recall ends at 0.5: 51 of the 101 recalls have precision 1.
        ([(LEFT, 0, 0.9)], 51 / 101),
        # Precisions 0, 1/2, 2/3: at every recall the best to come is 2/3.
        ([(ELSEWHERE, 0, 0.9), (LEFT, 0, 0.8), (RIGHT, 0, 0.7)], 2 / 3),
        # Precision 1 up to recall 0.5, then 2/3: the second hit is a repeat.
        (
            [(LEFT, 0, 0.9), (LEFT, 0, 0.8), (RIGHT, 0, 0.7)],
            (51 + 50 * 2 / 3) / 101,
        ),
        # The right box under the wrong class is no hit.
        ([(LEFT, 0, 0.9), (RIGHT, 1, 0.8)], 51 / 101),
        # Overlaps of 0.49 and 0.51.
        ([([0.1, 0.0, 0.5, 0.196], 0, 0.9)], 0),
        ([([0.1, 0.0, 0.5, 0.204], 0, 0.9)], 51 / 101),
    ],
)
def test_average_precision_by_hand(found, expected):
    precision = ssd_boxes.average_precision(
        [sample([LEFT, RIGHT], [0, 0])], [detections(*found)], 2
    )
    np.testing.assert_allclose(precision, [expected, np.nan], rtol=1e-6)


def test_average_precision_over_images_and_difficult_boxes():
    samples = [
        # A difficult box that is not found is not missed.
        sample([LEFT, RIGHT], [0, 0], [False, True]),
        # One that is found is no mistake.
        sample([RIGHT], [0], [True]),
        sample([], []),
        sample([LEFT], [1]),
    ]
    found = [
        detections((LEFT, 0, 0.8)),
        detections((RIGHT, 0, 0.9)),
        # One that is sure, and wrong, comes before the hit.
        detections((LEFT, 1, 0.9)),
        detections((LEFT, 1, 0.8)),
    ]
    np.testing.assert_allclose(
        ssd_boxes.average_precision(samples, found, 2), [1, 0.5], rtol=1e-6
    )


def test_detect_finds_what_the_outputs_say():
    outputs = np.zeros((2, 84, 4 + 1 + 3), "float32")
    outputs[..., 4] = 9  # background
    box = np.array([[0.3, 0.35, 0.6, 0.6]], "float32")
    for anchor, logit in ((40, 20), (44, 18)):
        outputs[1, anchor, :4] = ssd_boxes.encode(ANCHORS[[anchor]], box)
        outputs[1, anchor, 4 + 1 + 2] = logit
    empty, found = ssd_boxes.detect(ANCHORS, outputs, least_score=0.5)
    assert len(empty.boxes) == 0
    # The two anchors say the same, and the less sure one is left out.
    assert found.labels.tolist() == [2] and found.scores[0] > 0.99
    np.testing.assert_allclose(found.boxes, box, atol=1e-5)
