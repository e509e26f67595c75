"""Measure on GPUs what no CPU can show, and print it.

    python docs/measure_gpu.py right     # weights against plain Keras's
    python docs/measure_gpu.py time      # steps, copies, the update
    python docs/measure_gpu.py memory    # the largest model that trains

The first GPU is split into four. `right` needs the tests beside it.
"""

import argparse
import collections
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

from keras_clones import CloneProfiler, clone_model
from keras_clones.callbacks.trace import read_spans

CASES = (
    *("layer_batch_norm_sync", "layer_recurrent", "loss_contrastive"),
    *("loss_masked_and_weighted_by_time_step", "loss_outputs_with_weights"),
    *("optimizer_Adam_with_repeated_embedding_rows", "optimizer_AdamW"),
    *("optimizer_with_clipnorm_weight_decay_and_ema", "table_of_constant_ids"),
    "step_of_a_gan_with_noise_and_gradient_penalty",
    "step_shifts_weights_and_back",
)
STEPS = 12


def split(num, mebibytes):
    """Split the first GPU into logical ones; without one, take CPUs."""
    gpus = tf.config.list_physical_devices("GPU")
    devices = gpus or tf.config.list_physical_devices("CPU")
    limit = {"memory_limit": mebibytes} if gpus else {}
    parts = [tf.config.LogicalDeviceConfiguration(**limit)] * num
    tf.config.set_logical_device_configuration(devices[0], parts)
    kind = "GPU" if gpus else "CPU"
    return [f"{kind}:{i}" for i in range(num)]


def say(*parts):
    print(*parts, sep=" | ", flush=True)


def right():
    """Compare cases of the equivalence suite on 1, 2 and 4 GPUs."""
    devices = split(4, 4096)
    tests = pathlib.Path(__file__).resolve().parents[1] / "tests"
    sys.path.insert(0, str(tests))
    import test_equivalence as equivalence

    for floatx in ("float64", "float32"):
        for name in [n for n in CASES if n in equivalence.CASES]:
            keras.backend.clear_session()
            keras.config.set_floatx(floatx)
            expected = equivalence.train(equivalence.CASES[name](), None)
            found = []
            for num in (1, 2, 4):
                made = equivalence.CASES[name]()
                clone = {**made.clone, "devices": devices[:num]}
                places = []

                def more(model, made=made, places=places):
                    values = [*model.variables, *model.optimizer.variables]
                    places += [v.value.device for v in values]
                    return made.more(model)

                made = made._replace(clone=clone, more=more)
                try:
                    received = equivalence.train(
                        made, None if num == 0 else num
                    )
                    worst = max(
                        equivalence.cases.difference(expected[key], value)
                        for key, value in zip(
                            expected, received.values(), strict=True
                        )
                    )
                    found.append(f"{worst:.1e}")
                except Exception as error:
                    found.append(f"{type(error).__name__}: {error}"[:200])
                elsewhere = {p for p in places if "CPU:0" not in p}
                if elsewhere:
                    found.append(f"not at home: {elsewhere}")
            say("right", floatx, name, *found)


def transformer(blocks, width=768, length=256, vocabulary=8192):
    """Return a causal language model; 12 blocks have some 98 M weights."""
    ids = keras.Input((length,), dtype="int32")
    x = keras.layers.Embedding(vocabulary, width)(ids)
    for _ in range(blocks):
        y = keras.layers.LayerNormalization()(x)
        y = keras.layers.MultiHeadAttention(width // 64, 64)(
            y, y, use_causal_mask=True
        )
        x = keras.layers.Add()([x, y])
        y = keras.layers.LayerNormalization()(x)
        y = keras.layers.Dense(4 * width, "gelu")(y)
        x = keras.layers.Add()([x, keras.layers.Dense(width)(y)])
    return keras.Model(ids, keras.layers.Dense(vocabulary)(x))


def resnet():
    return keras.applications.ResNet50(weights=None, classes=1000)


def compiled(make, jit_compile):
    keras.utils.set_random_seed(0)
    model = make()
    loss = keras.losses.SparseCategoricalCrossentropy(
        from_logits=len(model.output_shape) == 3
    )
    model.compile("adam", loss, jit_compile=jit_compile)
    return model


def batches(model, rows):
    random = np.random.default_rng(0)
    shape = (rows, *model.input_shape[1:])
    if len(shape) == 2:
        x = random.integers(1, 8000, shape).astype("int32")
        y = x
    else:
        x = random.normal(size=shape).astype("float32")
        y = random.integers(0, 1000, rows)
    data = tf.data.Dataset.from_tensors((x, y)).repeat(STEPS)
    return data.prefetch(2)


class Clock(keras.callbacks.Callback):
    """Notes when each step ends."""

    def __init__(self):
        super().__init__()
        self.ends = [time.perf_counter()]

    def on_train_batch_end(self, batch, logs=None):
        """Note the time."""
        self.ends.append(time.perf_counter())


def copies(model, data):
    """Return what a profile says of copies: bytes, seconds, by memory."""
    with tempfile.TemporaryDirectory() as folder:
        tf.profiler.experimental.start(folder)
        model.fit(data.take(3), verbose=0)
        tf.profiler.experimental.stop()
        spans = [s for s in read_spans(folder) if "GPU" in s.plane]
    kernels = [
        (s.start, s.end)
        for s in spans
        if s.line.startswith("Stream") and "emcpy" not in s.name
    ]
    found = collections.defaultdict(lambda: [0, 0.0, 0.0, 0])
    for span in spans:
        details = str(span.stats.get("memcpy_details", ""))
        if not span.line.startswith("Stream") or "size:" not in details:
            continue
        fields = dict(part.split(":", 1) for part in details.split())
        kind = [span.name, fields.get("kind_src"), fields.get("kind_dst")]
        row = found[" ".join(map(str, kind))]
        row[0] += int(fields["size"])
        row[1] += span.end - span.start
        row[2] += overlap(span, kernels)
        row[3] += 1
    busy = sum(end - start for start, end in merged(kernels))
    return busy, found


def merged(intervals):
    done = []
    for start, end in sorted(intervals):
        if done and start <= done[-1][1]:
            done[-1][1] = max(done[-1][1], end)
        else:
            done.append([start, end])
    return done


def overlap(span, kernels):
    return sum(
        max(0.0, min(end, span.end) - max(start, span.start))
        for start, end in merged(kernels)
        if start < span.end and end > span.start
    )


VARIANTS = {
    "plain": None,
    "1 clone, update=keras": {"num": 1, "update": "keras"},
    "1 clone": {"num": 1},
    "2 clones": {"num": 2},
    "4 clones": {"num": 4},
}


def measure(name, make, rows, variant, options, devices, jit_compile):
    strategy = None
    if variant == "mirrored 4":
        strategy = tf.distribute.MirroredStrategy(
            devices, tf.distribute.HierarchicalCopyAllReduce()
        )
        with strategy.scope():
            model = compiled(make, jit_compile)
    else:
        model = compiled(make, jit_compile)
    if options:
        options = dict(options)
        num = options.pop("num")
        clone_model(model, devices=devices[:num], **options)
    data, clock = batches(model, rows), Clock()
    for device in devices:
        if "GPU" in device:
            tf.config.experimental.reset_memory_stats(device)
    model.fit(data, verbose=0, callbacks=[clock])
    steps = np.diff(clock.ends)
    peak = [
        tf.config.experimental.get_memory_info(device)["peak"] / 2**20
        for device in devices
        if "GPU" in device
    ]
    say(
        *("time", name, f"XLA {jit_compile}", variant),
        f"first {steps[0]:.1f} s",
        f"step {statistics.median(steps[3:]) * 1e3:.1f} ms",
        f"least {min(steps[3:]) * 1e3:.1f} ms",
        "peak MiB " + " ".join(f"{p:.0f}" for p in peak),
    )
    return model, data


def tell_of_copies(name, variant, model, data):
    busy, found = copies(model, data)
    say("copies", name, variant, f"kernels {busy / 3 * 1e3:.1f} ms a step")
    for kind, (size, seconds, hidden, count) in found.items():
        say(
            *("copies", name, variant, kind),
            f"{size / 3 / 2**20:.1f} MiB and {count / 3:.0f} copies a step",
            f"{seconds / 3 * 1e3:.1f} ms",
            f"{size / max(seconds, 1e-9) / 1e9:.1f} GB/s",
            f"{hidden / max(seconds, 1e-9):.0%} beside kernels",
        )


def timed(small, output):
    """Time steps of a ResNet-50 and of a transformer."""
    devices = split(4, 18 * 1024)
    models = {
        "transformer": (lambda: transformer(12), 32),
        "resnet": (resnet, 64),
    }
    if small:
        models = {"transformer": (lambda: transformer(2, 128, 32, 8192), 8)}
    for name, (make, rows) in models.items():
        for variant, options in [*VARIANTS.items(), ("mirrored 4", None)]:
            try:
                model, data = measure(
                    name, make, rows, variant, options, devices, False
                )
                if options and not options.get("update"):
                    tell_of_copies(name, variant, model, data)
                    path = f"{output}/{name}_{options['num']}"
                    profiler = CloneProfiler(steps=(4, 8), path=path)
                    model.fit(data, verbose=0, callbacks=[profiler])
            except Exception as error:
                say(
                    "time",
                    name,
                    variant,
                    f"{type(error).__name__}: {error}"[:300],
                )
            model = data = None
            keras.backend.clear_session()
    for variant in ("plain", "1 clone", "4 clones"):
        name, (make, rows) = next(iter(models.items()))
        try:
            measure(name, make, rows, variant, VARIANTS[variant], devices, True)
        except Exception as error:
            say("time", name, variant, f"{type(error).__name__}: {error}"[:300])
        keras.backend.clear_session()


def fits(peer, blocks, small):
    """Say whether a transformer of some blocks trains on 8 GiB."""
    devices = split(1 if peer != "mirrored 2" else 2, 8 * 1024)
    width = 128 if small else 1024
    options = {"clones": {}, "pieces": {"pieces": "auto"}}.get(peer)
    strategy = None
    if peer == "mirrored 2":
        strategy = tf.distribute.MirroredStrategy(
            devices, tf.distribute.HierarchicalCopyAllReduce()
        )
    with strategy.scope() if strategy else tf.device(devices[0]):
        model = compiled(lambda: transformer(blocks, width), False)
    if options is not None:
        clone_model(model, devices=devices, **options)
    data = batches(model, 32 if peer == "pieces" else 4).take(3)
    start = time.perf_counter()
    model.fit(data, verbose=0)
    size = sum(int(np.prod(v.shape)) for v in model.trainable_variables)
    say(
        "memory",
        peer,
        f"{blocks} blocks",
        f"{size / 1e6:.0f} M weights",
        f"{time.perf_counter() - start:.0f} s",
    )


def memory(small, peers):
    """Find the largest transformer that trains on a GPU of 8 GiB."""
    for peer in peers:
        low, high = 0, None
        step = 8 if not small else 1
        blocks = 32 if not small else 1
        while high is None or high - low > step:
            command = [sys.executable, __file__, "fits", "--peer", peer]
            command += ["--blocks", str(blocks)] + ["--small"] * small
            finished = subprocess.run(command, capture_output=True, text=True)
            good = finished.returncode == 0
            last = finished.stdout.strip().splitlines()[-1:] or [""]
            if not good:
                last = finished.stderr.strip().splitlines()[-1:]
            say("memory", peer, f"{blocks} blocks", good, last[0][:200])
            if good:
                low = blocks
            else:
                high = blocks
            blocks = (low + high) // 2 if high else 2 * blocks
            if small and good:
                break


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["right", "time", "memory", "fits"])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--output", default=".")
    parser.add_argument("--peer", default="plain,clones,mirrored 2")
    parser.add_argument("--blocks", type=int)
    options = parser.parse_args()
    what = {
        "right": right,
        "time": lambda: timed(options.small, options.output),
        "memory": lambda: memory(options.small, options.peer.split(",")),
        "fits": lambda: fits(options.peer, options.blocks, options.small),
    }[options.what]
    what()


if __name__ == "__main__":
    main()
