"""Train a single-shot detector (SSD) on clones.

Run it with `python examples/ssd.py`: it draws shapes to find, trains, and
saves the model and a picture of what it finds. It needs no GPU and no
download. `--data FOLDER` trains on a folder in Pascal VOC layout instead, and
`--resume` goes on where a stopped run of the same `--out` was.

With the defaults, 40 epochs of 800 images of 96 by 96 pixels, the mean
average precision on 200 other images is 0.97 at an overlap of 0.5, after some
four minutes on two cores.

The loss is divided by the number of anchors that have a box, in the whole
batch: a mean over clones of what each divides by its own number would be
another loss. `clone_model` sees that the loss is one over the batch, and
computes it once, on the joined outputs of the clones.
"""

import argparse
import json
import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import matplotlib
import numpy as np
import tensorflow as tf
from machine import add_clones, check_folder, positive, take_devices
from ssd_boxes import (
    ANCHORS_A_CELL,
    average_precision,
    detect,
    make_anchors,
)
from ssd_data import training_data, validation_data
from ssd_voc import (
    SHAPES,
    VOC_CLASSES,
    DataError,
    decode,
    draw_shapes,
    read_voc,
)

from keras_clones import clone_model, deployment

NEGATIVES_A_POSITIVE = 3


def make_model(image_size, num_classes, width=16, deeper=True):
    """Return a model from images to offsets and logits of every anchor.

    Args:
        image_size: Integer, the pixels of a side.
        num_classes: Integer, the classes beside the background.
        width: Integer, a multiple of 4, the filters of the first map.
            Defaults to 16.
        deeper: Boolean, whether each map that anchors look at gets a second
            convolution. Defaults to `True`.
    """

    def block(x, filters, strides):
        x = keras.layers.Conv2D(
            filters, 3, strides, padding="same", use_bias=False
        )(x)
        # Normalizes each image by itself, so a shard is as good as a batch.
        # BatchNormalization would see only the rows of its clone, unless
        # `clone_model` got `batch_norm="sync"`.
        x = keras.layers.GroupNormalization(4)(x)
        return keras.layers.Activation("relu")(x)

    outputs = 4 + 1 + num_classes
    images = keras.Input((image_size, image_size, 3))
    x = keras.layers.Rescaling(2.0, -1.0)(images)
    x = block(x, width, 2)  # (batch, size / 2, size / 2, width)
    x = block(x, 2 * width, 2)  # (batch, size / 4, size / 4, 2 width)
    maps = []
    for filters in (4 * width, 6 * width, 8 * width):
        x = block(x, filters, 2)  # (batch, size / 8, 16, 32, ..., filters)
        x = block(x, filters, 1) if deeper else x
        maps.append(x)
    found = []
    for features in maps:
        x = keras.layers.Conv2D(ANCHORS_A_CELL * outputs, 3, padding="same")(
            features
        )
        found.append(keras.layers.Reshape((-1, outputs))(x))
    # (batch, anchors, 4 + 1 + classes)
    return keras.Model(images, keras.layers.Concatenate(axis=1)(found))


def hard_negatives(losses, positive):
    """Pick the background anchors with the largest losses of each image.

    Args:
        losses: Tensor of shape (batch, anchors).
        positive: Boolean tensor of shape (batch, anchors), who has a box.

    Returns:
        A boolean tensor of shape (batch, anchors), with up to three for each
        anchor with a box.
    """
    losses = tf.where(positive, tf.cast(-np.inf, losses.dtype), losses)
    order = tf.argsort(losses, direction="DESCENDING", stable=True)
    rank = tf.argsort(order)  # (batch, anchors)
    count = tf.reduce_sum(tf.cast(positive, tf.int32), 1, keepdims=True)
    return (rank < NEGATIVES_A_POSITIVE * count) & ~positive


class MultiboxLoss(keras.losses.Loss):
    """The loss of SSD, over all anchors that have a box in the batch."""

    def call(self, y_true, y_pred):
        """Return one number for the whole batch.

        Args:
            y_true: Tensor of shape (batch, anchors, 5): class and offsets.
            y_pred: Tensor of shape (batch, anchors, 4 + 1 + classes).
        """
        classes = tf.cast(y_true[..., 0], tf.int32)  # (batch, anchors)
        positive = classes > 0
        confidence = tf.nn.sparse_softmax_cross_entropy_with_logits(
            classes, y_pred[..., 4:]
        )  # (batch, anchors)
        chosen = positive | hard_negatives(confidence, positive)
        distance = abs(y_true[..., 1:] - y_pred[..., :4])
        location = tf.reduce_sum(
            tf.where(distance < 1, distance**2 / 2, distance - 0.5), -1
        )  # (batch, anchors)
        total = tf.reduce_sum(tf.where(chosen, confidence, 0)) + tf.reduce_sum(
            tf.where(positive, location, 0)
        )
        matched = tf.reduce_sum(tf.cast(positive, total.dtype))
        return total / tf.maximum(matched, 1)


def compile_model(model, steps, learning_rate=3e-3):
    """Compile with a rate that warms up, and falls to zero as a cosine."""
    warmup = max(steps // 20, 1)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0,
        max(steps - warmup, 1),
        warmup_target=learning_rate,
        warmup_steps=warmup,
    )
    model.compile(keras.optimizers.Adam(schedule), MultiboxLoss())


def check_run(folder, resume):
    """Stop before any work if a run can be neither begun nor resumed."""
    folder = pathlib.Path(folder)
    there = ("settings.json", "last.weights.h5")
    if resume and not all((folder / name).is_file() for name in there):
        raise DataError(
            "Expected a stopped run to resume. Received: --out "
            f"{folder}, without settings.json and last.weights.h5. Leave "
            "out `--resume` to begin a run."
        )
    check_folder(folder, "--out")


def open_run(model, folder, settings, resume):
    """Return how many steps a run has behind it, with its state restored.

    Raises:
        DataError: If it was made with other settings.
    """
    path, weights = folder / "settings.json", folder / "last.weights.h5"
    if resume:
        before = json.loads(path.read_text())
        changed = [
            f"{key}: {before.get(key)} before, {value} now"
            for key, value in settings.items()
            if before.get(key) != value
        ]
        if changed:
            raise DataError(
                "Expected the settings of the run to resume. Received: "
                f"{'; '.join(changed)}."
            )
        model.optimizer.build(model.trainable_variables)
        model.load_weights(weights)
        return int(model.optimizer.iterations)
    # Until its first epoch ends, a new run has nothing to resume.
    weights.unlink(missing_ok=True)
    path.write_text(json.dumps(settings, indent=1))
    return 0


def load_samples(args, folder):
    """Return the class names, and the samples of both splits."""
    if args.data is not None:
        classes = tuple(args.classes or VOC_CLASSES)
        return classes, *read_voc(args.data, classes, args.bad_annotations)
    num_validate = -(-args.train_images // 4)
    draw_shapes(folder, args.train_images, num_validate, args.seed)
    return SHAPES, *read_voc(folder, SHAPES)


def train(args, callbacks=(), verbose="auto"):
    """Train, save, and return the mean average precision."""
    keras.utils.set_random_seed(args.seed)
    folder = pathlib.Path(args.out)
    check_run(folder, args.resume)
    classes, training, validation = load_samples(args, folder / "shapes")
    print(f"{len(training)} training images, {len(validation)} to validate")
    steps = -(-len(training) // args.batch_size)
    to_validate = validation_data(validation, args.image_size, args.batch_size)

    model = make_model(args.image_size, len(classes))
    model = clone_model(model, num_clones=args.clones)
    compile_model(model, steps * args.epochs)
    deployment(model).summary(args.batch_size)
    settings = {
        "classes": list(classes),
        "training images": len(training),
        "--batch-size": args.batch_size,
        "--epochs": args.epochs,
        "--image-size": args.image_size,
        "--seed": args.seed,
    }
    first = open_run(model, folder, settings, args.resume) // steps
    if first:
        print(f"resumed after {first} epochs")
    if first < args.epochs:
        model.fit(
            training_data(
                training,
                args.image_size,
                args.batch_size,
                args.seed,
                range(first, args.epochs),
            ),
            steps_per_epoch=steps,
            initial_epoch=first,
            epochs=args.epochs,
            validation_data=to_validate,
            callbacks=[
                keras.callbacks.ModelCheckpoint(
                    folder / "last.weights.h5", save_weights_only=True
                ),
                *callbacks,
            ],
            shuffle=False,
            verbose=verbose,
        )
    model.save(folder / "ssd.keras")

    anchors = make_anchors(args.image_size)  # (anchors, 4)
    detections = detect(anchors, model.predict(to_validate, verbose=0))
    precision = average_precision(validation, detections, len(classes))
    for name, value in zip(classes, precision, strict=True):
        print(f"AP of {name}: {value:.3f}")
    print(f"mAP at an overlap of 0.5: {np.nanmean(precision):.3f}")
    draw(validation, detections, classes, folder / "detections.png")
    print(f"picture: {folder / 'detections.png'}")
    return float(np.nanmean(precision))


def draw(samples, detections, classes, path, least_score=0.5):
    """Draw what was found in the first images, and the truth in white."""
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        3, 4, figsize=(12, 9), layout="constrained", squeeze=False
    )
    labels = []
    for axis in axes.flat:
        axis.axis("off")
    for axis, sample, found in zip(
        axes.flat, samples, detections, strict=False
    ):
        image = decode(str(sample.image)).numpy()
        axis.imshow(image)
        sides = np.tile(image.shape[:2], 2)
        for box in sample.boxes * sides:
            _draw_box(axis, box, edgecolor="white", linestyle="--")
        for box, label, score in zip(*found, strict=True):
            if score >= least_score:
                box, color = box * sides, f"C{label % 10}"
                _draw_box(axis, box, edgecolor=color)
                text = f"{classes[label]} {score:.2f}"
                labels.append(_draw_label(axis, box, text, color))
    keep_inside(figure, labels)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _draw_label(axis, box, text, color):
    return axis.text(
        box[1],
        box[0],
        text,
        fontsize=8,
        color="white",
        bbox={"facecolor": color, "edgecolor": color, "pad": 2},
        verticalalignment="bottom",
        in_layout=False,
    )


def keep_inside(figure, labels):
    """Move labels to where all of them is in their panels."""
    figure.draw_without_rendering()
    for label in labels:
        to_pixels = label.axes.transData
        panel = label.axes.get_window_extent()
        box = label.get_bbox_patch().get_window_extent()
        right = max(panel.x0 - box.x0, 0) + min(panel.x1 - box.x1, 0)
        up = max(panel.y0 - box.y0, 0) + min(panel.y1 - box.y1, 0)
        x, y = to_pixels.transform(label.get_position())
        place = to_pixels.inverted().transform((x + right, y + up))
        label.set_position(place)


def _draw_box(axis, box, **kwargs):
    ymin, xmin, ymax, xmax = box
    axis.add_patch(
        matplotlib.patches.Rectangle(
            (xmin - 0.5, ymin - 0.5),
            xmax - xmin,
            ymax - ymin,
            fill=False,
            linewidth=1.5,
            **kwargs,
        )
    )


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--data", help="a folder in Pascal VOC layout (default: shapes)")
    add("--classes", nargs="+", help="of --data (default: those of VOC)")
    add(
        "--bad-annotations",
        choices=("refuse", "skip"),
        default="refuse",
        help="what to do with images whose files or boxes are bad",
    )
    add("--train-images", type=positive, default=800, help="shapes to draw")
    add_clones(parser, without_gpu=2)
    add("--epochs", type=positive, default=40, help="default: 40")
    add("--batch-size", type=positive, default=32, help="default: 32")
    add("--image-size", type=positive, default=96, help="pixels, default: 96")
    add("--seed", type=int, default=0, help="of the run, default: 0")
    add("--out", default="ssd", help="where to save (default: ssd)")
    add("--resume", action="store_true", help="go on with the run in --out")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    try:
        check_run(args.out, args.resume)
        args.clones = take_devices(args.clones, without_gpu=2)
        return train(args)
    except (DataError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
