"""The detector example reads VOC folders, and says what is wrong in them."""

import importlib
import pathlib
import sys

import numpy as np
import pytest
import tensorflow as tf

sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples"))
ssd_voc = importlib.import_module("ssd_voc")


def write_voc(folder):
    """Write a small good folder, of five images, and return their boxes."""
    rng = np.random.default_rng(5)
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    names = {"train": ["a", "b", "c"], "val": ["d", "e"]}
    boxes = {name: [[4, 6, 20, 30], [10, 2, 24, 39]] for name in "abde"}
    boxes["c"] = []
    for split, part in names.items():
        listing = folder / "ImageSets" / "Main" / f"{split}.txt"
        listing.write_text("\n".join(part) + "\n\n")
        for name in part:
            image = rng.integers(0, 256, (24, 40, 3), "uint8")
            (folder / "JPEGImages" / f"{name}.jpg").write_bytes(
                tf.io.encode_jpeg(image).numpy()
            )
            kinds = ["cat", "dog"][: len(boxes[name])]
            ssd_voc.write_annotation(folder, name, (24, 40), boxes[name], kinds)
    return boxes


def read(folder, bad="refuse"):
    return ssd_voc.read_voc(folder, ("dog", "cat"), bad)


def test_a_voc_folder_is_read(tmp_path):
    boxes = write_voc(tmp_path)
    training, validation = read(tmp_path)
    assert [s.image.name for s in training] == ["a.jpg", "b.jpg", "c.jpg"]
    assert [s.image.name for s in validation] == ["d.jpg", "e.jpg"]
    for one in (training[0], validation[1]):
        expected = np.array(boxes["a"]) / [24, 40, 24, 40]
        np.testing.assert_allclose(one.boxes, expected, rtol=1e-6)
        assert one.labels.tolist() == [1, 0]
        assert one.difficult.tolist() == [False, False]
    assert training[2].boxes.shape == (0, 4)


def test_what_else_voc_folders_have(tmp_path):
    write_voc(tmp_path)
    # Pixels count from 1; some have fractions, or a box from 0.
    edit(tmp_path, "a", "<xmin>7<", "<xmin>7.5<", "<ymin>11<", "<ymin>0<")
    edit(tmp_path, "b", "<difficult>0<", "<difficult>1<")
    edit(tmp_path, "d", "<size>", "<part>", "</size>", "</part>")
    (tmp_path / "JPEGImages" / "e.jpg").rename(tmp_path / "JPEGImages/e.JPG")
    training, validation = read(tmp_path)
    np.testing.assert_allclose(
        training[0].boxes * [24, 40, 24, 40],
        [[4, 6.5, 20, 30], [0, 2, 24, 39]],
        rtol=1e-6,
    )
    assert training[1].difficult.tolist() == [True, False]
    assert len(validation[0].boxes) == 2
    assert validation[1].image.name == "e.JPG"


def edit(folder, name, *pairs):
    """Replace text in an annotation, at its first place."""
    path = folder / "Annotations" / f"{name}.xml"
    text = path.read_text()
    for old, new in zip(pairs[::2], pairs[1::2], strict=True):
        assert old in text
        text = text.replace(old, new, 1)
    path.write_text(text)


def cut_image(folder):
    path = folder / "JPEGImages" / "b.jpg"
    path.write_bytes(path.read_bytes()[:400])


BAD = {
    "no annotation": (
        lambda folder: (folder / "Annotations" / "b.xml").unlink(),
        "Annotations/b.xml: there is no such file",
    ),
    "broken annotation": (
        lambda folder: edit(folder, "b", "</annotation>", ""),
        "Annotations/b.xml: cannot be read: no element found",
    ),
    "empty annotation": (
        lambda folder: (folder / "Annotations" / "b.xml").write_text(""),
        "Annotations/b.xml: cannot be read",
    ),
    "no image": (
        lambda folder: (folder / "JPEGImages" / "b.jpg").unlink(),
        "JPEGImages/b.jpg: there is no such file",
    ),
    "half an image": (cut_image, "JPEGImages/b.jpg: cannot be decoded"),
    "no image format": (
        lambda folder: (folder / "JPEGImages" / "b.jpg").write_text("hello"),
        "JPEGImages/b.jpg: cannot be decoded",
    ),
    "another size": (
        lambda folder: edit(folder, "b", "<width>40<", "<width>41<"),
        "Annotations/b.xml: is for an image of 41 x 24 pixels, and the image "
        "has 40 x 24",
    ),
    "unknown class": (
        lambda folder: edit(folder, "b", "dog", "cow"),
        "Annotations/b.xml: object 2 has the unknown class 'cow'",
    ),
    "no class": (
        lambda folder: edit(folder, "b", "<name>cat</name>", ""),
        "Annotations/b.xml: object 1 has the unknown class ''",
    ),
    "outside on the right": (
        lambda folder: edit(folder, "b", "<xmax>30<", "<xmax>41<"),
        "Annotations/b.xml: object 1 has a box outside the image",
    ),
    "outside below": (
        lambda folder: edit(folder, "b", "<ymax>20<", "<ymax>25<"),
        "Annotations/b.xml: object 1 has a box outside the image",
    ),
    "outside on the left": (
        lambda folder: edit(folder, "b", "<xmin>7<", "<xmin>-1<"),
        "Annotations/b.xml: object 1 has a box outside the image: xmin=-1",
    ),
    "no number": (
        lambda folder: edit(folder, "b", "<xmin>7<", "<xmin>nan<"),
        "Annotations/b.xml: object 1 has a box outside the image: xmin=nan",
    ),
    "no area": (
        lambda folder: edit(folder, "b", "<xmin>7<", "<xmin>30<"),
        "Annotations/b.xml: object 1 has a box with no area",
    ),
    "ends before it begins": (
        lambda folder: edit(folder, "b", "<ymax>20<", "<ymax>2<"),
        "Annotations/b.xml: object 1 has a box with no area",
    ),
    "no coordinate": (
        lambda folder: edit(folder, "b", "<xmin>7</xmin>", ""),
        "Annotations/b.xml: object 1 has no bndbox of four numbers",
    ),
    "word for a coordinate": (
        lambda folder: edit(folder, "b", "<xmin>7<", "<xmin>left<"),
        "Annotations/b.xml: object 1 has no bndbox of four numbers",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_annotation_is_refused_or_left_out(kind, tmp_path, capsys):
    write_voc(tmp_path)
    spoil, message = BAD[kind]
    spoil(tmp_path)
    with pytest.raises(ssd_voc.DataError) as refused:
        read(tmp_path)
    assert message in str(refused.value)
    assert "1 of 5" in str(refused.value)
    assert "--bad-annotations skip" in str(refused.value)
    assert capsys.readouterr().out == ""
    training, validation = read(tmp_path, "skip")
    assert [s.image.stem for s in training] == ["a", "c"]
    assert [s.image.stem for s in validation] == ["d", "e"]
    printed = capsys.readouterr().out
    assert "left out 1 of 5 images" in printed and message in printed


def test_every_bad_image_is_named_at_once(tmp_path):
    write_voc(tmp_path)
    edit(tmp_path, "a", "cat", "cow")
    (tmp_path / "JPEGImages" / "e.jpg").unlink()
    with pytest.raises(ssd_voc.DataError, match=r"2 of 5") as refused:
        read(tmp_path)
    assert "Annotations/a.xml" in str(refused.value)
    assert "JPEGImages/e.jpg" in str(refused.value)


def test_another_layout_is_refused(tmp_path):
    voc = tmp_path / "voc"
    write_voc(voc)
    for part, missing in {
        "JPEGImages": "JPEGImages",
        "Annotations": "Annotations",
        "ImageSets": "ImageSets/Main/train.txt",
        "ImageSets/Main/train.txt": "ImageSets/Main/train.txt",
        "ImageSets/Main/val.txt": "ImageSets/Main/val.txt",
    }.items():
        (voc / part).rename(tmp_path / "away")
        for bad in ("refuse", "skip"):
            with pytest.raises(ssd_voc.DataError, match=f"without {missing}"):
                read(voc, bad)
        (tmp_path / "away").rename(voc / part)


def test_folders_with_nothing_to_learn_are_refused(tmp_path):
    with pytest.raises(ssd_voc.DataError, match="is not a folder"):
        read(tmp_path / "nowhere")
    with pytest.raises(ssd_voc.DataError, match="without JPEGImages, Annot"):
        read(tmp_path)
    write_voc(tmp_path)
    listing = tmp_path / "ImageSets" / "Main" / "val.txt"
    listing.write_text("d\n")
    edit(tmp_path, "d", "cat", "cow")
    with pytest.raises(ssd_voc.DataError, match=r"'val'.*0 good images of 1"):
        read(tmp_path, "skip")
    listing.write_text("c\n")
    with pytest.raises(ssd_voc.DataError, match=r"'val'.*1 good images of 1"):
        read(tmp_path)
    listing.write_text("\n")
    with pytest.raises(ssd_voc.DataError, match="which is empty"):
        read(tmp_path)


def test_shapes_are_drawn_where_their_boxes_say(tmp_path):
    ssd_voc.draw_shapes(tmp_path / "one", 6, 3, seed=2)
    ssd_voc.draw_shapes(tmp_path / "same", 6, 3, seed=2)
    one, same = (
        [s for part in ssd_voc.read_voc(folder, ssd_voc.SHAPES) for s in part]
        for folder in (tmp_path / "one", tmp_path / "same")
    )
    assert len(one) == 9 and sum(len(s.boxes) for s in one) > 9
    rng = np.random.default_rng(2)
    for left, right in zip(one, same, strict=True):
        assert left.image.read_bytes() == right.image.read_bytes()
        np.testing.assert_array_equal(left.boxes, right.boxes)
        _, boxes, kinds = ssd_voc.draw_image(rng, 128)
        np.testing.assert_allclose(
            left.boxes * 128, np.reshape(boxes, (-1, 4)), atol=1e-4
        )
        assert [ssd_voc.SHAPES[i] for i in left.labels] == kinds


class Quiet(np.random.Generator):
    """Random numbers without noise, so that a shape is of one color."""

    def normal(self, loc, scale, size):
        return np.zeros(size)


def test_shapes_fill_their_boxes():
    rng = Quiet(np.random.PCG64(2))
    seen = set()
    for _ in range(12):
        image, boxes, kinds = ssd_voc.draw_image(rng, 128)
        for (ymin, xmin, ymax, xmax), kind in zip(boxes, kinds, strict=True):
            color = image[ymax - 2, (xmin + xmax) // 2]
            painted = (image == color).all(-1)
            found = np.argwhere(painted)
            assert found.min(0).tolist() == [ymin, xmin]
            assert (found.max(0) + 1).tolist() == [ymax, xmax]
            # What part of its box a shape fills tells which it is.
            part = painted.sum() / ((ymax - ymin) * (xmax - xmin))
            fills = {"ellipse": np.pi / 4, "rectangle": 1, "triangle": 0.5}
            assert abs(part - fills[kind]) < 0.05
            seen.add(kind)
    assert seen == set(ssd_voc.SHAPES)
