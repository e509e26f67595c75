"""A folder in Pascal VOC layout: read and check one, or draw one of shapes.

Everything that could go wrong with a file is looked for before training
starts, the decoding of every image included.
"""

import concurrent.futures
import pathlib
import xml.etree.ElementTree as ElementTree
from typing import NamedTuple

import numpy as np
import tensorflow as tf

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat"),
    *("chair", "cow", "diningtable", "dog", "horse", "motorbike", "person"),
    *("pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
SHAPES = ("ellipse", "rectangle", "triangle")
SPLITS = ("train", "val")
SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")


class DataError(ValueError):
    """What is wrong with the data, in words for who has to mend it."""


class Sample(NamedTuple):
    """One image and its boxes; labels are indices of the classes."""

    image: pathlib.Path
    boxes: np.ndarray  # (boxes, 4)
    labels: np.ndarray  # (boxes,)
    difficult: np.ndarray  # (boxes,)


def read_voc(folder, classes, bad_annotations="refuse"):
    """Return the samples of the train and of the val split.

    Args:
        folder: Path of a folder with JPEGImages, Annotations and
            ImageSets/Main/train.txt and val.txt.
        classes: Sequence of strings, the names that an object may have.
        bad_annotations: String, what becomes of an image whose annotation or
            file is bad: `"refuse"` raises an error that lists all of them,
            `"skip"` leaves the image out and prints the list. Defaults to
            `"refuse"`.

    Raises:
        DataError: If the folder has another layout, a split has no images
            left, or an image is bad and `bad_annotations` is `"refuse"`.
    """
    folder = pathlib.Path(folder)
    names = {split: _read_split(folder, split) for split in SPLITS}
    every = list(
        dict.fromkeys(name for part in names.values() for name in part)
    )
    with concurrent.futures.ThreadPoolExecutor() as pool:
        samples = dict(
            zip(
                every,
                pool.map(lambda n: _read_sample(folder, n, classes), every),
                strict=True,
            )
        )
    problems = [one for one in samples.values() if isinstance(one, str)]
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        if bad_annotations == "refuse":
            raise DataError(
                f"Expected every image of {folder} to have a good file and a "
                f"good annotation. Received: {len(problems)} of {len(every)} "
                f"that have not:\n{listed}\nMend them, or leave these images "
                "out with `--bad-annotations skip`."
            )
        print(f"left out {len(problems)} of {len(every)} images:\n{listed}")
    good = {
        split: [samples[n] for n in part if isinstance(samples[n], Sample)]
        for split, part in names.items()
    }
    for split, part in good.items():
        if all(sample.difficult.all() for sample in part):
            raise DataError(
                "Expected at least one box, and one not marked difficult, in "
                f"the split {split!r} of {folder}. Received: {len(part)} good "
                f"images of {len(names[split])}, without any."
            )
    return [good[split] for split in SPLITS]


def decode(path):
    """Read an image file, as bytes of shape (height, width, 3)."""
    return tf.io.decode_image(
        tf.io.read_file(path), channels=3, expand_animations=False
    )


def _read_split(folder, split):
    if not folder.is_dir():
        raise DataError(
            "Expected `--data` to be a folder in Pascal VOC layout. "
            f"Received: {folder}, which is not a folder."
        )
    listing = folder / "ImageSets" / "Main" / f"{split}.txt"
    parts = [folder / "JPEGImages", folder / "Annotations", listing]
    missing = [
        str(part.relative_to(folder)) for part in parts if not part.exists()
    ]
    if missing:
        raise DataError(
            "Expected a folder in Pascal VOC layout: JPEGImages, Annotations "
            "and ImageSets/Main with train.txt and val.txt. Received: "
            f"{folder}, without {', '.join(missing)}."
        )
    lines = listing.read_text(errors="replace").splitlines()
    names = [line.split()[0] for line in lines if line.strip()]
    if not names:
        raise DataError(
            "Expected the name of an image on every line of a split. "
            f"Received: {listing}, which is empty."
        )
    return names


def _read_sample(folder, name, classes):
    """Return a `Sample`, or a string that says why there is none."""
    annotation = folder / "Annotations" / f"{name}.xml"
    try:
        image = _find_image(folder, name)
        objects = _read_objects(annotation, *_image_size(image), classes)
    except DataError as problem:
        return str(problem)
    return Sample(
        image,
        np.array([box for box, _, _ in objects], "float32").reshape(-1, 4),
        np.array([label for _, label, _ in objects], "int32"),
        np.array([difficult for _, _, difficult in objects], bool),
    )


def _find_image(folder, name):
    for suffix in SUFFIXES:
        path = folder / "JPEGImages" / f"{name}{suffix}"
        if path.is_file():
            return path
    raise DataError(f"JPEGImages/{name}.jpg: there is no such file")


def _image_size(path):
    try:
        return decode(str(path)).shape[:2]
    except tf.errors.OpError as error:
        reason = str(error).partition("\n")[0][:200]
        raise DataError(
            f"JPEGImages/{path.name}: cannot be decoded: {reason}"
        ) from error


def _read_objects(path, height, width, classes):
    """Return a list with (box, label, difficult) of each object."""
    where = f"Annotations/{path.name}"
    if not path.is_file():
        raise DataError(f"{where}: there is no such file")
    try:
        root = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, ValueError, LookupError, OSError) as error:
        raise DataError(f"{where}: cannot be read: {error}") from error
    said = root.findtext("size/height"), root.findtext("size/width")
    if None not in said and said != (str(height), str(width)):
        raise DataError(
            f"{where}: is for an image of {said[1]} x {said[0]} pixels, and "
            f"the image has {width} x {height}"
        )
    return [
        _read_object(f"{where}: object {number}", one, height, width, classes)
        for number, one in enumerate(root.findall("object"), 1)
    ]


def _read_object(where, one, height, width, classes):
    name = (one.findtext("name") or "").strip()
    if name not in classes:
        raise DataError(
            f"{where} has the unknown class {name!r}: name the classes with "
            "`--classes`"
        )
    try:
        ymin, xmin, ymax, xmax = (
            float(one.findtext(f"bndbox/{side}", ""))
            for side in ("ymin", "xmin", "ymax", "xmax")
        )
    except ValueError as error:
        raise DataError(f"{where} has no bndbox of four numbers") from error
    given = f"xmin={xmin:g}, ymin={ymin:g}, xmax={xmax:g}, ymax={ymax:g}"
    # `not` of what is right, so that NaN is wrong.
    if not (0 <= xmin <= width and 0 <= ymin <= height):
        raise DataError(f"{where} has a box outside the image: {given}")
    if not (xmax <= width and ymax <= height):
        raise DataError(f"{where} has a box outside the image: {given}")
    if not (xmin < xmax and ymin < ymax):
        raise DataError(f"{where} has a box with no area: {given}")
    # VOC counts pixels from 1 and its last pixel is part of the box.
    box = (
        *(max(ymin - 1, 0) / height, max(xmin - 1, 0) / width),
        *(ymax / height, xmax / width),
    )
    difficult = (one.findtext("difficult") or "0").strip() == "1"
    return box, classes.index(name), difficult


def draw_shapes(folder, num_train=800, num_val=200, seed=0, size=128):
    """Draw images of shapes into a folder in Pascal VOC layout."""
    folder = pathlib.Path(folder)
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    numbers = {
        "train": range(num_train),
        "val": range(num_train, num_train + num_val),
    }
    for split, part in numbers.items():
        names = [f"{number:06}" for number in part]
        for name in names:
            image, boxes, kinds = draw_image(rng, size)
            jpeg = tf.io.encode_jpeg(image, quality=95).numpy()
            (folder / "JPEGImages" / f"{name}.jpg").write_bytes(jpeg)
            write_annotation(folder, name, (size, size), boxes, kinds)
        listing = folder / "ImageSets" / "Main" / f"{split}.txt"
        listing.write_text("\n".join(names) + "\n")


def draw_image(rng, size):
    """Draw up to four shapes that do not touch, on a rough background.

    Returns:
        The image (size, size, 3), the boxes (shapes, 4) in pixels, with the
        ends left out, and the names of the shapes.
    """
    ground = rng.uniform(0, 255, 3)
    slope = rng.uniform(-60, 60, (2, 3))
    rows, columns = np.mgrid[:size, :size] + 0.5  # (size, size)
    image = (
        ground
        + (rows[..., None] / size - 0.5) * slope[0]
        + (columns[..., None] / size - 0.5) * slope[1]
        + rng.normal(0, 12, (size, size, 3))
    )
    boxes, kinds = [], []
    for _ in range(rng.integers(0, 5)):
        kind = SHAPES[rng.integers(len(SHAPES))]
        half = rng.uniform(0.07, 0.25) * size * rng.uniform(0.75, 1.33, 2)
        center = rng.uniform(half, size - half)
        y = (rows - center[0]) / half[0]  # -1 to 1 in the shape's box
        x = (columns - center[1]) / half[1]
        inside = {
            "ellipse": x**2 + y**2 <= 1,
            "rectangle": np.maximum(abs(x), abs(y)) <= 1,
            "triangle": (abs(y) <= 1) & (abs(x) <= (y + 1) / 2),
        }[kind]  # (size, size)
        low = np.argwhere(inside).min(0)
        high = np.argwhere(inside).max(0) + 1
        if any(
            (low < other[2:]).all() and (high > other[:2]).all()
            for other in boxes
        ):
            continue
        color = (
            ground + rng.choice([-1, 1], 3) * rng.uniform(60, 128, 3)
        ) % 255
        image[inside] = color + rng.normal(0, 12, (inside.sum(), 3))
        boxes.append(np.concatenate([low, high]))
        kinds.append(kind)
    return np.clip(image, 0, 255).astype("uint8"), boxes, kinds


def write_annotation(folder, name, size, boxes, kinds):
    """Write the XML file of an image, for boxes whose ends are left out."""
    height, width = size
    objects = "".join(
        f"<object><name>{kind}</name><difficult>0</difficult><bndbox>"
        f"<xmin>{box[1] + 1}</xmin><ymin>{box[0] + 1}</ymin>"
        f"<xmax>{box[3]}</xmax><ymax>{box[2]}</ymax></bndbox></object>"
        for box, kind in zip(boxes, kinds, strict=True)
    )
    (folder / "Annotations" / f"{name}.xml").write_text(
        f"<annotation><filename>{name}.jpg</filename><size>"
        f"<width>{width}</width><height>{height}</height><depth>3</depth>"
        f"</size>{objects}</annotation>\n"
    )
