"""Train a small GPT on the sources of Python's standard library, on clones.

Run it with `python examples/language_model.py`; it needs no GPU and no
download. It predicts the next byte, prints the perplexity of text it has not
seen, writes a few lines of its own, and shows what stays off the devices.

Texts end at a blank line, and so are of different lengths. The rest of a row is
padding, which a mask keeps out of attention and of the loss.

`--pieces 4` lets each clone work through its rows in four pieces, one after the
other, to the same perplexity with less memory; `--pieces auto` in as many as
it takes.

With GPUs, `--device-memory MIB` gives each clone a GPU of that much memory,
split off the first one. Without, it is only compared with what is needed.
"""

import argparse
import math
import os
import pathlib
import sysconfig

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from machine import add_clones, positive, take_devices

from keras_clones import clone_model, deployment

NUM_BYTES = 128  # ASCII; every other byte is read as a question mark
PADDING = 0
NEWLINE = ord("\n")


def load_text(path=None, limit=2_000_000):
    """Return text as an array of ASCII bytes."""
    if path is not None:
        files = [pathlib.Path(path)]
    else:
        files = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text, size = [], 0
    for file in files:
        text.append(file.read_bytes())
        size += len(text[-1])
        if size >= limit:
            break
    codes = np.frombuffer(b"".join(text)[:limit], "uint8")
    is_text = (codes != PADDING) & (codes < NUM_BYTES)
    return np.where(is_text, codes, ord("?")).astype("int32")


def windows(codes, number, context, seed):
    """Return random texts, padded, and the same one byte further on.

    Each ends after `context` bytes, or sooner where a blank line ends.
    """
    starts = np.random.default_rng(seed).integers(
        0, len(codes) - context, number
    )
    found = codes[starts[:, None] + np.arange(context + 1)]
    x, y = found[:, :-1], found[:, 1:]  # (number, context) each
    ends = (x == NEWLINE) & (y == NEWLINE)
    inside = np.cumsum(ends, axis=1) - ends == 0
    return np.where(inside, x, PADDING), np.where(inside, y, PADDING)


class Embed(keras.layers.Layer):
    """Add up what a byte is and where it stands, and mask the padding."""

    def __init__(self, context, width):
        super().__init__()
        self.what = keras.layers.Embedding(NUM_BYTES, width, mask_zero=True)
        self.where = keras.layers.Embedding(context, width)

    def build(self, shape):
        """Make both tables, so that clones find them there."""
        self.what.build(shape)
        self.where.build(shape)

    def call(self, codes):
        """Return vectors of shape `(batch, context, width)`."""
        positions = keras.ops.arange(codes.shape[1])
        return self.what(codes) + self.where(positions)

    def compute_mask(self, codes, mask=None):
        """Return which bytes are no padding, `(batch, context)` booleans."""
        return self.what.compute_mask(codes)


def make_model(context, width, blocks, heads):
    """Return a model whose every layer passes the mask on.

    `Add` does. A plain `+` between layers would not, and the loss would count
    the padding.
    """
    codes = keras.Input((context,), dtype="int32")
    x = Embed(context, width)(codes)  # (batch, context, width)
    for _ in range(blocks):
        y = keras.layers.LayerNormalization()(x)
        attention = keras.layers.MultiHeadAttention(heads, width // heads)
        y = attention(y, y, use_causal_mask=True)
        x = keras.layers.Add()([x, y])
        y = keras.layers.LayerNormalization()(x)
        y = keras.layers.Dense(4 * width, activation="gelu")(y)
        x = keras.layers.Add()([x, keras.layers.Dense(width)(y)])
    x = keras.layers.LayerNormalization()(x)
    logits = keras.layers.Dense(NUM_BYTES)(x)  # (batch, context, NUM_BYTES)
    return keras.Model(codes, logits)


class Perplexity(keras.callbacks.Callback):
    """Log how many bytes the model finds equally likely on average."""

    def on_epoch_end(self, epoch, logs=None):
        """Add to the logs, and print them."""
        logs["perplexity"] = math.exp(logs["loss"])
        logs["val_perplexity"] = math.exp(logs["val_loss"])
        print(
            f"epoch {epoch + 1}: perplexity {logs['perplexity']:.2f}, "
            f"of text not seen {logs['val_perplexity']:.2f}"
        )


def num_bytes(variables):
    return sum(
        math.prod(v.shape) * tf.as_dtype(v.dtype).size for v in variables
    )


def short(device):
    """Return a device as it is printed, such as `"GPU:1"`."""
    return device.rpartition("/device:")[2]


def print_memory(model, device_memory=None):
    """Print what a clone's device holds, and what it does not.

    Returns:
        The bytes of mirrors and gradients that a clone holds, and those of
        the optimizer's slots, which it does not.
    """
    made = deployment(model)
    mirrors = num_bytes(model.variables)
    gradients = num_bytes(model.trainable_variables)
    slots = num_bytes(model.optimizer.variables)
    homes = {short(v.value.device) for v in model.optimizer.variables}
    mib = 2**20
    for clone in made.clones:
        held = f"{mirrors / mib:.2f} MiB of mirrors"
        if clone.device == made.variables_device:
            held = "no mirrors, as it is where the variables are at home,"
        print(
            f"{clone.scope or 'clone_0'} on {short(clone.device)} holds {held} "
            f"and at most {gradients / mib:.2f} MiB of gradients"
        )
    print(
        f"the optimizer's slots, {slots / mib:.2f} MiB, stay on "
        f"{', '.join(sorted(homes))}"
    )
    held, all_of_it = mirrors + gradients, mirrors + gradients + slots
    print(
        f"beside activations a clone needs {held / mib:.2f} MiB, and would "
        f"need {all_of_it / mib:.2f} MiB if it held the slots too"
    )
    if device_memory is not None:
        fits = {True: "fit in", False: "do not fit in"}
        on_gpus = all("GPU" in clone.device for clone in made.clones)
        limit = device_memory * mib
        print(
            f"mirrors and gradients {fits[held <= limit]} {device_memory} MiB; "
            f"with the slots they {fits[all_of_it <= limit]} it"
            + (
                " (each of these GPUs has no more)"
                if on_gpus
                else " (arithmetic: nothing limits the memory of these CPUs)"
            )
        )
    return held, slots


def write(model, prompt, length, context, seed=0):
    """Let the model continue a prompt, byte by byte, up to a blank line."""
    rng = np.random.default_rng(seed)
    codes = list(prompt.encode())
    predict = tf.function(lambda codes: model(codes, training=False))
    for _ in range(length):
        seen = codes[-context:]
        padded = seen + [PADDING] * (context - len(seen))
        logits = predict(tf.constant([padded]))[0, len(seen) - 1].numpy()
        chances = np.exp((logits - logits.max()) / 0.7)
        codes.append(int(rng.choice(NUM_BYTES, p=chances / chances.sum())))
        if codes[-2:] == [NEWLINE, NEWLINE]:
            break
    return bytes(codes).decode()


def train(num_clones, codes, args):
    """Train; return the perplexity of text not seen, and what was written."""
    keras.utils.set_random_seed(0)
    context, rows = args.context, args.batch_size
    split = len(codes) * 19 // 20
    x, y = windows(codes[:split], args.steps * rows, context, seed=1)
    validation = windows(codes[split:], 8 * rows, context, seed=2)
    model = clone_model(
        make_model(context, args.width, args.blocks, args.heads),
        num_clones=num_clones,
        pieces=args.pieces,
    )
    model.compile(
        keras.optimizers.AdamW(2e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    print(f"{np.mean(x == PADDING):.0%} of the batches is padding")
    deployment(model).summary(rows)
    history = model.fit(
        x,
        y,
        batch_size=rows,
        epochs=args.epochs,
        validation_data=validation,
        callbacks=[Perplexity()],
        verbose=0,
    ).history
    print_memory(model, args.device_memory)
    written = write(model, "def ", 200, context)
    print(f"the model writes:\n{written}")
    return history["val_perplexity"][-1], written


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_clones(parser, without_gpu=2)
    for flag, default, text in (
        ("--epochs", 4, "how often to go through the steps"),
        ("--steps", 100, "of an epoch"),
        ("--batch-size", 32, "rows of the global batch"),
        ("--context", 64, "bytes that the model sees"),
        ("--width", 128, "of a vector"),
        ("--blocks", 2, "of attention and dense layers"),
        ("--heads", 4, "of attention"),
    ):
        parser.add_argument(
            flag,
            type=positive,
            default=default,
            help=f"{text} (default: {default})",
        )
    parser.add_argument(
        "--text", help="a file to train on (default: Python's library)"
    )
    parser.add_argument(
        "--pieces",
        type=lambda text: text if text == "auto" else positive(text),
        default=1,
        help="of a clone's rows, one after the other (default: 1), or 'auto'",
    )
    parser.add_argument(
        "--device-memory", type=positive, metavar="MIB", help="of each clone"
    )
    return parser


def main():
    parser = arguments()
    args = parser.parse_args()
    if args.width % args.heads:
        parser.error(
            "--width must be a multiple of --heads. "
            f"Received: --width {args.width} --heads {args.heads}"
        )
    if args.text and not pathlib.Path(args.text).is_file():
        parser.error(f"--text must be a file. Received: --text {args.text}")
    codes = load_text(args.text)
    if len(codes) < 40 * (args.context + 1):
        parser.error(
            f"the text has {len(codes)} bytes, which is too few for --context "
            f"{args.context}: pass a longer one with --text"
        )
    clones = take_devices(args.clones, 2, args.device_memory)
    train(clones, codes, args)


if __name__ == "__main__":
    main()
