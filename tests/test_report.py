"""What a user looks at, against the bytes of real steps."""

import copy
import html.parser
import importlib.util
import itertools
import json
import pickle
import sys
import types

import cases
import keras
import matplotlib.image
import numpy as np
import pytest
import tensorflow as tf
from matplotlib.backends.backend_agg import FigureCanvasAgg

import keras_clones
from keras_clones import clone_model, deployment
from keras_clones.__main__ import main
from keras_clones.benchmark.transfers import count_transfers, traffic
from keras_clones.devices import placement
from keras_clones.devices.placement import PlacedClone
from keras_clones.look import machine, picture
from keras_clones.look.labels import label
from keras_clones.look.page import Page, Table, readable

CPUS = [f"CPU:{i}" for i in range(8)]


def convolution():
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((12, 12, 3)),
            layers.Conv2D(16, 3),
            layers.BatchNormalization(),
            layers.Flatten(),
            layers.Dropout(0.2),
            layers.Dense(32),
            layers.Dense(10, "softmax"),
        ]
    )


def words():
    """A large embedding table, of which only the rows travel."""
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((20,), dtype="int32"),
            layers.Embedding(20_000, 16),
            layers.Flatten(),
            layers.Dense(128),
            layers.Dense(10, "softmax"),
        ]
    )


def next_word(masks=False):
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((20,), dtype="int32"),
            layers.Embedding(300, 16, mask_zero=masks),
            layers.Dense(300, "softmax"),
        ]
    )


def batch_for(model, rows, seed=0):
    """Return a dataset of one batch that fits a classifier."""
    rng = np.random.default_rng(seed)
    [inputs], [outputs] = model.inputs, model.outputs
    shape = (rows, *inputs.shape[1:])
    x = (
        rng.integers(0, 300, shape)
        if "int" in inputs.dtype
        else rng.normal(size=shape)
    )
    y = rng.integers(0, outputs.shape[-1], (rows, *outputs.shape[1:-1]))
    data = (x.astype(inputs.dtype), y)
    return tf.data.Dataset.from_tensor_slices(data).batch(
        rows, drop_remainder=True
    )


def footprint(model):
    size, why_not = deployment(model)._footprint()
    assert why_not == ""
    return size


def crossentropy(reduction):
    return keras.losses.SparseCategoricalCrossentropy(reduction=reduction)


@pytest.mark.full_but("convolution", "table", "next_word_sum")
@pytest.mark.parametrize(
    ("make", "clone", "loss", "known_before"),
    [
        (convolution, {}, "sparse_categorical_crossentropy", True),
        (next_word, {"loss": "gather"}, crossentropy("mean"), True),
        (words, {}, "sparse_categorical_crossentropy", True),
        (
            words,
            {"jit_compile": True},
            "sparse_categorical_crossentropy",
            True,
        ),
        (lambda: next_word(True), {}, crossentropy("mean"), True),
        (next_word, {}, crossentropy("mean"), True),
        # That its loss is gathered shows when Keras has built it.
        (next_word, {}, crossentropy("sum"), False),
    ],
    ids=[
        *("convolution", "gathered", "table", "table_by_xla"),
        *("masked_words", "next_word", "next_word_sum"),
    ],
)
def test_bytes_of_a_step_are_those_that_it_moves(
    make, clone, loss, known_before
):
    model = clone_model(make(), devices=["CPU:0", "CPU:1", "CPU:2"], **clone)
    model.compile("adam", loss, metrics=["accuracy"])
    data = batch_for(model, 26)
    before = footprint(model)
    moved = traffic(count_transfers(lambda: model.fit(data, verbose=0)))
    after = footprint(model)
    shards = deployment(model).shard_sizes(26)
    for size in [before, after] if known_before else [after]:
        for i in (1, 2):
            real = moved[f"/device:CPU:{i}"]
            about = size.received.of(shards[i]), size.sent.of(shards[i])
            assert about[0] == pytest.approx(real.bytes_received, rel=0.02)
            assert about[1] == pytest.approx(real.bytes_sent, rel=0.02)


def cells(text):
    """Return the cells of a page's tables by the first cell of the row."""
    rows = {}
    for line in text.splitlines():
        row = [cell.strip() for cell in line.split("  ") if cell.strip()]
        if row:
            rows.setdefault(row[0], []).append(row[1:])
    return rows


def test_summary_has_the_bytes_of_every_part(capsys):
    model = cases.compiled("mlp", clone_model(cases.mlp(), 3))
    deployment(model).summary()
    assert cells(capsys.readouterr().out)["optimizer slots"] == [
        ["CPU:0", "made in the first step"]
    ]
    x, y = cases.arrays(10)["mlp"]
    model.fit(x, y, batch_size=10, verbose=0)
    deployment(model).summary(batch_size=10)
    found = cells(capsys.readouterr().out)
    # 6 x 16 + 16 + 16 x 3 + 3 weights, and two int64 of the global seed.
    weights, seed = 163 * 4, 16
    home = "CPU:0"
    assert found["trainable variables"] == [[home, readable(weights)]]
    assert found["other variables"] == [[home, readable(seed)]]
    # Two slots a weight, an int64 of iterations and a learning rate.
    assert found["optimizer slots"] == [[home, readable(2 * weights + 8 + 4)]]
    assert found["gradients, added up"] == [[home, readable(weights)]]
    # A row has 6 numbers and an int64.
    assert found["global batch"] == [[home, f"about {readable(320)}"]]
    shard = f"about {readable(3 * 32)}"
    assert found["clone_0"] == [
        [home, "4", "at home", "652 B", "about 128 B", "0 B", "0 B"]
    ]
    assert found["clone_2"][0][:5] == [*("CPU:2", "3", "652 B", "652 B", shard)]
    assert found["clone_2"][0][5] == f"about {readable(652 + 16 + 24 + 96)}"
    [[at_clone]] = [row for row in found["CPU:2"] if len(row) == 1]
    assert at_clone == readable(2 * 652 + 96)
    [[at_home]] = [row for row in found[home] if len(row) == 1]
    slots = 2 * weights + 12
    assert at_home == readable(3 * weights + seed + slots + 320 + 128)


def test_summary_of_a_model_that_is_not_there_yet(capsys):
    model = clone_model(cases.subclassed(), 2)
    deployment(model).summary(batch_size=5)
    text = capsys.readouterr().out
    assert cells(text)["clone_0"] == [["CPU:0", "3", *["not built"] * 5]]
    assert "The model is not built" in text
    model(cases.arrays(5)["subclassed"][0])
    deployment(model).summary(batch_size=5)
    found = cells(capsys.readouterr().out)
    assert found["optimizer slots"][0][1] == "not compiled"
    # A subclassed model does not tell what its batches are like.
    assert found["global batch"][0][1] == "not known"
    assert found["clone_1"][0][-2].endswith("+ the shard's")


def test_rows_of_no_fixed_size_are_not_known(capsys):
    text = keras.Input((1,), dtype="string")
    ids = keras.layers.TextVectorization(vocabulary=["a"])(text)
    table = keras.layers.Embedding(20_000, 16)(ids)
    model = keras.Model(text, keras.layers.GlobalMaxPooling1D()(table))
    model.compile("sgd", "mse")
    deployment(clone_model(model, 2)).summary(batch_size=8)
    found = cells(capsys.readouterr().out)
    assert found["trainable variables"][0][1] == "1.22 MiB"
    assert found["global batch"][0][1] == "not known"
    # Its table stays home: the seed's 16 bytes and the share's go for sure.
    assert found["clone_1"][0][-2] == "about 40 B + the shard's"


def test_summary_of_a_step_of_the_models_own(capsys):
    class Own(keras.Sequential):
        def train_step(self, data):
            return super().train_step(data)

    model = Own([keras.Input((3,)), keras.layers.Dense(2)])
    model.compile("sgd", "mse")
    deployment(clone_model(model, 2)).summary()
    row = cells(capsys.readouterr().out)["clone_1"][0]
    assert row[1] == "32 B" and row[-2:] == ["not known", "not known"]


def test_clones_without_rows_move_nothing(capsys):
    model = cases.compiled("mlp", clone_model(cases.mlp(), 4))
    deployment(model).summary(batch_size=2)
    found = cells(capsys.readouterr().out)
    assert [found[f"clone_{i}"][0][1] for i in range(4)] == [*"1100"]
    assert found["clone_3"][0][-2:] == ["0 B", "0 B"]


def test_a_deployment_is_copied_and_pickled_without_its_model(capsys):
    model = clone_model(cases.mlp(), 2)
    made = deployment(model)
    assert made._model() is model
    for other in (copy.copy(made), pickle.loads(pickle.dumps(made))):
        assert other.clones == made.clones
        other.summary()
        assert "The model is gone" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.977 KiB"),
        (1024, "1 KiB"),
        (1_750_000, "1.67 MiB"),
        (2**30, "1 GiB"),
        (5 * 2**50, "5.12e+03 TiB"),
    ],
)
def test_bytes_have_one_unit(size, text):
    assert readable(size) == text


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("/device:GPU:1", "GPU:1"),
        ("gpu", "GPU:0"),
        ("/job:localhost/replica:0/task:0/device:CPU:3", "CPU:3"),
        ("/job:ps/task:2/device:CPU:0", "/job:ps/task:2/CPU:0"),
    ],
)
def test_devices_have_one_name(device, name):
    assert placement.short_name(device) == name


@pytest.mark.parametrize("bad", [0, -4, "8", 2.0, True])
def test_batch_sizes_that_are_none(bad, tmp_path):
    made = deployment(clone_model(cases.mlp(), 2))
    for look in (
        made.summary,
        lambda n: made.plot(tmp_path / "clones.png", n),
    ):
        with pytest.raises((TypeError, ValueError), match="`batch_size` must"):
            look(bad)
    assert not list(tmp_path.iterdir())


class Reader(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.open, self.found = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.found.append((self.open[-1], data))


def test_html_has_what_the_text_has():
    made = deployment(cases.compiled("mlp", clone_model(cases.mlp(), 2)))
    found = Reader(made._repr_html_()).found
    assert ("th", "gets a step") in found
    assert found.count(("td", "clone_1")) == 1
    assert ("td", "652 B") in found
    page = Page([Table(["<a>"], [["x & <script>"]])], ["<i>"])
    text = page._repr_html_()
    assert Reader(text).found == [
        *(("th", "<a>"), ("td", "x & <script>"), ("p", "<i>")),
    ]
    assert "<script>" not in text and "<script>" in str(page)


def test_a_notebook_shows_html(monkeypatch, capsys):
    shown = []
    shell = types.SimpleNamespace(kernel=object())
    ipython = types.ModuleType("IPython")
    ipython.get_ipython = lambda: shell
    display = types.ModuleType("IPython.display")
    display.display = shown.append
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    made = deployment(clone_model(cases.mlp(), 2))
    made.summary()
    assert capsys.readouterr().out == ""
    assert "<table>" in shown[0]._repr_html_()
    # A shell in a terminal has no kernel.
    del shell.kernel
    made.summary()
    assert len(shown) == 1
    assert "clone_1  CPU:1" in capsys.readouterr().out


def check_legible(labels):
    """Check that all texts of a picture are apart; return its size and them."""
    figure = picture.draw(labels)
    [axes] = figure.axes
    width, height = figure.get_size_inches() * 110
    renderer = FigureCanvasAgg(figure).get_renderer()
    texts = [t for t in axes.texts if t.get_text()]
    boxes = [t.get_window_extent(renderer) for t in texts]
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    for box in boxes:
        assert box.x0 > 0 and box.y0 > 0
        assert box.x1 < width and box.y1 < height
    # Every text of a box lies inside of one.
    patches = [p.get_window_extent(renderer) for p in axes.patches]
    inside = [
        text.get_text()
        for text, box in zip(texts, boxes, strict=True)
        if any(
            p.x0 < box.x0 and box.x1 < p.x1 and p.y0 < box.y0 and box.y1 < p.y1
            for p in patches
        )
    ]
    wanted = [labels.batch, *labels.towers, *labels.shards, *labels.stages]
    assert sorted(inside) == sorted([*wanted, labels.home])
    return width, " ".join(t.get_text() for t in texts)


@pytest.mark.full_but("1", "8")
@pytest.mark.parametrize("num_clones", [1, 2, 4, 8])
def test_pictures_are_legible(num_clones, tmp_path):
    model = clone_model(words(), devices=CPUS[8 - num_clones :])
    model.compile("adam", "sparse_categorical_crossentropy")
    made = deployment(model)
    made.plot(tmp_path / "clones.png", 256)
    pixels = matplotlib.image.imread(tmp_path / "clones.png")
    size, _ = made._footprint()
    rows = made.shard_sizes(256)
    labels = label(made.clones, made._homes(), rows, size, "")
    width, shown = check_legible(labels)
    assert pixels.shape[1] == round(width)
    away = CPUS[8 - num_clones :][-1] != "CPU:0"
    assert f"{256 // num_clones} rows" in shown
    if away:
        sent = size.sent.of(256 // num_clones)
        assert f"gradients: about {readable(sent)}" in labels.gradients[-1]


def test_a_picture_of_a_cluster_is_legible():
    devices = [
        f"/job:worker/replica:0/task:{i}/device:CPU:0" for i in range(10, 12)
    ]
    clones = [PlacedClone(f"clone_{i}", one) for i, one in enumerate(devices)]
    model = clone_model(words(), 2)
    size, _ = deployment(model)._footprint()
    homes = {"variables": tuple(devices), "inputs": (devices[0],)}
    _, shown = check_legible(label(clones, homes, [32, 32], size, ""))
    assert "spread over 2 devices" in shown


def test_a_picture_of_a_model_that_is_not_built(tmp_path):
    made = deployment(clone_model(cases.subclassed(), 2))
    made.plot(tmp_path / "clones.svg")
    assert (tmp_path / "clones.svg").read_text().count("<svg") == 1
    labels = label(made.clones, made._homes(), None, None, "not built")
    assert labels.mirrors[1] == "mirrors: not built"


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("clones.xyz", ValueError, "'png'.*clones.xyz"),
        ("clones", ValueError, "must end in one of"),
        ("missing/clones.png", ValueError, "a folder that exists"),
        ("folder.png", ValueError, "must be a file"),
        ("", TypeError, "path of a file"),
        (3, TypeError, "path of a file"),
    ],
)
def test_pictures_that_cannot_be_written(
    path, error, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr(picture, "draw", lambda labels: pytest.fail("drawn"))
    with pytest.raises(error, match=message):
        deployment(clone_model(cases.mlp(), 2)).plot(path)


def test_no_matplotlib(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name == "matplotlib" else find(name),
    )
    made = deployment(clone_model(cases.mlp(), 2))
    with pytest.raises(ImportError, match="`pip install matplotlib`"):
        made.plot(tmp_path / "clones.png")
    made.summary()


def test_devices_are_listed_with_what_clone_model_would_choose(capsys):
    assert main(["devices"]) == 0
    text = capsys.readouterr().out
    found = cells(text)
    clones = deployment(clone_model(cases.mlp())).clones
    for clone in clones:
        device = clone.device.removeprefix("/device:")
        assert [device] in found[clone.scope]
        assert device in found
    assert len([name for name in found if name.startswith("clone_")]) == 9
    assert found["variables"] == [["CPU:0"]]
    assert "There is no GPU" in text
    with open("/proc/meminfo") as file:
        kilobytes = int(file.readline().split()[1])
    assert found["CPU:0"][0][0] == readable(kilobytes * 1024)
    assert "/device:" not in text and "/job:" not in text
    with pytest.raises(SystemExit) as end:
        main(["devices", "--all"])
    assert end.value.code == 2


def test_the_commands_tell_their_version_and_explain_each_flag(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    version = keras_clones.__version__
    assert capsys.readouterr().out == f"keras_clones {version}\n"
    for command in ("benchmark", "devices"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        _, _, flags = capsys.readouterr().out.partition("options:")
        for entry in flags.split("\n  -")[1:]:
            first, *rest = entry.split("\n")
            assert rest or "  " in first, entry


def test_the_devices_command_lists_the_tasks_of_a_cluster(monkeypatch):
    cluster = {"worker": ["10.0.0.1:2222", "10.0.0.2:2222"], "ps": ["c:1"]}
    task = {"type": "worker", "index": 1}
    told = json.dumps({"cluster": cluster, "task": task})
    monkeypatch.setenv("TF_CONFIG", told)
    found = machine.page()
    assert [list(row) for row in found.tables[0].rows] == [
        ["worker 0", "10.0.0.1:2222", "controller, takes clones"],
        ["worker 1", "10.0.0.2:2222", "takes clones; this process"],
        ["ps 0", "c:1", "home of variables"],
    ]
    assert "connect()" in found.notes[-1]
    monkeypatch.delenv("TF_CONFIG")
    assert machine.page().tables[0].header[0] == "physical device"
