"""The examples do what they say, in fewer epochs."""

import functools
import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from keras_clones.comparing import timing

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
sys.path.append(str(EXAMPLES))


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.full
def test_digits(tmp_path, capsys):
    digits = load("digits")
    accuracy = digits.train(3, 4, 64, tmp_path, verbose=0)
    out = capsys.readouterr().out
    assert accuracy > 0.9
    rows = [line.split()[:3] for line in out.splitlines()]
    assert ["clone_2", "CPU:2", "21"] in rows
    assert "the predictions agree" in out
    assert (tmp_path / "digits.keras").stat().st_size > 10_000
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")


def test_examples_refuse_numbers_that_are_none_or__wrong_arguments():
    machine = load("machine")
    for text in ("0", "-1", "two"):
        with pytest.raises((ValueError, machine.argparse.ArgumentTypeError)):
            machine.positive(text)


@pytest.mark.full
def test_compare_digits(tmp_path, capsys, monkeypatch):
    compare_digits = load("compare_digits")
    # Timing takes as long as all else.
    monkeypatch.setattr(timing, "time_runs", lambda *args: args[2])
    found, exact = compare_digits.report([2], 25, 2, tmp_path, verbose=0)
    out = capsys.readouterr().out
    assert not found.same and "batch_normalization" in out
    assert {tuple(c.mends) for c in found.causes} == {
        *(("batch_norm",), ("random",)),
    }
    # Only what is not exact may be refused.
    assert exact.same or exact.first is not None
    for name in ("default", "exact"):
        picture = tmp_path / f"compare_{name}.png"
        assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.full
def test_custom_loop(tmp_path, capsys):
    custom_loop = load("custom_loop")
    accuracy = custom_loop.train(3, 3, 64, str(tmp_path))
    out = capsys.readouterr().out
    assert accuracy > 0.9
    losses = re.findall(r"epoch \d: loss (\S+)", out)
    assert len(losses) == 3 and float(losses[2]) < float(losses[0]) / 2
    assert "clone_2 on CPU:2: loss" in out
    assert [file.suffix for file in tmp_path.iterdir()] == [".v2"]


@pytest.mark.full
def test_gan(tmp_path, capsys, float64, monkeypatch):
    gan = load("gan")
    make = functools.partial(gan.make_model, n_critic=1)
    monkeypatch.setattr(gan, "make_model", make)
    images = gan.load_data()[:20]
    model, drawn = gan.train(3, 2, 8, images, verbose=0)
    gan.plot(drawn, tmp_path)
    assert "clone_2" in capsys.readouterr().out
    assert (tmp_path / "gan.png").read_bytes().startswith(b"\x89PNG")
    assert model.predict(np.zeros((5, 16)), verbose=0).shape == (5, 8, 8, 1)
    assert gan.compare(3, 2, 8, images) < 1e-10


def small_language_model(language_model, *flags):
    args = language_model.arguments().parse_args(
        [
            *("--epochs", "2", "--steps", "8", "--batch-size", "9"),
            *("--context", "16", "--width", "16", "--blocks", "1"),
            *("--heads", "2", *flags),
        ]
    )
    codes = language_model.load_text(limit=20_000)
    return language_model.train(2, codes, args)


@pytest.mark.full
def test_language_model(capsys):
    language_model = load("language_model")
    perplexity, written = small_language_model(
        language_model, "--device-memory", "1"
    )
    out = capsys.readouterr().out
    # As good as guessing would be 128.
    assert 1 < perplexity < 90
    assert "epoch 2: perplexity" in out and f"{perplexity:.2f}" in out
    assert written.startswith("def ")
    assert len(written) == 204 or written.endswith("\n\n")
    assert re.search(r"^[1-9]\d?% of the batches is padding$", out, re.M)
    assert "clone_0 on CPU:0 holds no mirrors, as it is where" in out
    assert re.search(r"clone_1 on CPU:1 holds 0\.\d\d MiB of mirrors", out)
    assert "stay on CPU:0\n" in out
    assert "(arithmetic: nothing limits the memory" in out
    in_pieces, _ = small_language_model(language_model, "--pieces", "3")
    assert in_pieces == pytest.approx(perplexity, rel=1e-4)


def test_language_model_counts_bytes(capsys):
    language_model = load("language_model")
    model = language_model.make_model(16, 16, 1, 2)
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    language_model.clone_model(model, num_clones=2)
    held, slots = language_model.print_memory(model, device_memory=1)
    # Two float32 numbers a parameter each; the step and the learning rate.
    assert held == 8 * model.count_params()
    assert slots == 8 * model.count_params() + 12
    assert "fit in 1 MiB; with the slots they fit in it" in (
        capsys.readouterr().out
    )


def test_language_model_sees_no_byte_that_comes_later():
    language_model = load("language_model")
    model = language_model.make_model(8, 16, 1, 2)
    codes = language_model.load_text(limit=8)[None]
    other = codes.copy()
    other[0, 5:] = 1
    one, two = (np.asarray(model(c)) for c in (codes, other))
    np.testing.assert_allclose(one[0, :5], two[0, :5], atol=1e-6)
    assert not np.allclose(one[0, 5], two[0, 5], atol=1e-3)


def test_language_model_reads_any_file(tmp_path):
    language_model = load("language_model")
    (tmp_path / "text").write_bytes("a\xe9b\0".encode())
    codes = language_model.load_text(tmp_path / "text")
    assert bytes(codes.tolist()) == b"a??b?"
    x, y = language_model.windows(np.arange(20, 70), 6, 4, seed=0)
    assert x.shape == y.shape == (6, 4)
    np.testing.assert_array_equal(x + 1, y)


def test_language_model_leaves_padding_out():
    language_model = load("language_model")
    text = np.frombuffer(b"ab\n\ncd" * 20, "uint8").astype("int32")
    x, y = language_model.windows(text, 12, 8, seed=0)
    assert {bytes(r[r > 0].tolist()) for r in x} <= {
        *(b"ab\n", b"b\n", b"\n", b"\ncdab\n", b"cdab\n", b"dab\n"),
    }
    np.testing.assert_array_equal(x == 0, y == 0)
    model = language_model.make_model(8, 16, 1, 2)
    model.compile(
        loss=language_model.keras.losses.SparseCategoricalCrossentropy(True)
    )
    logits = model(x)
    loss, same = (
        float(model.compute_loss(x, targets, logits))
        for targets in (y, np.where(x == 0, 5, y))
    )
    assert loss == same
    assert float(model.compute_loss(x, np.where(x == 0, y, 5), logits)) != loss


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("custom_loop", ["--clones", "0"], "0 is not a positive integer"),
        (
            "custom_loop",
            ["--clones", "4", "--batch-size", "3"],
            "--batch-size must be from the number of clones",
        ),
        ("gan", ["--epochs", "0"], "0 is not a positive integer"),
        ("language_model", ["--width", "10"], "must be a multiple of --heads"),
        ("language_model", ["--text", "none"], "--text must be a file"),
        ("language_model", ["--text", __file__, "--context", "999"], "too few"),
        ("language_model", ["--device-memory", "-1"], "not a positive integer"),
    ],
)
def test_examples_refuse(name, arguments, message, monkeypatch, capsys):
    example = load(name)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(SystemExit):
        example.main()
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("num_gpus", "arguments", "expected", "said"),
    [
        (0, (None, 4), 4, "There is no GPU: 4 clone(s)"),
        (0, (3, 4), 3, "There is no GPU: 3 clone(s)"),
        (1, (None, 4), 1, "1 clone(s) on GPU:0."),
        (3, (None, 4), 3, "3 clone(s) on GPU:0, GPU:1, GPU:2."),
        (3, (2, 4), 2, "2 clone(s) on GPU:0, GPU:1."),
        (1, (None, 4, 512), 2, "2 clone(s) on GPU:0, of 512 MiB each."),
    ],
)
def test_examples_take_the_devices_there_are(
    num_gpus, arguments, expected, said, monkeypatch, capsys
):
    machine = load("machine")
    split = []
    monkeypatch.setattr(
        machine, "use_virtual_devices", lambda *args: split.append(args)
    )
    monkeypatch.setattr(
        machine.tf.config, "list_physical_devices", lambda kind: [0] * num_gpus
    )
    assert machine.take_devices(*arguments) == expected
    assert said in capsys.readouterr().out
    whole = num_gpus and len(arguments) == 2
    assert [args[0] for args in split] == ([] if whole else [expected])
    if whole:
        with pytest.raises(SystemExit, match="--clones must be at most"):
            machine.take_devices(num_gpus + 1, 4)


@pytest.mark.parametrize(
    ("name", "flag"), [("digits", "--folder"), ("gan", "--folder")]
)
def test_examples_check_where_to_save_first(name, flag, tmp_path, monkeypatch):
    example = load(name)
    monkeypatch.setattr(example, "train", lambda *args: pytest.fail("trained"))
    (tmp_path / "file").touch()
    folder = str(tmp_path / "file" / "folder")
    monkeypatch.setattr(sys, "argv", [name, flag, folder])
    with pytest.raises(SystemExit, match="--folder must be a folder"):
        example.main()


@pytest.mark.parametrize(
    "name", ["custom_loop", "digits", "gan", "language_model", "ssd"]
)
def test_examples_explain_each_flag(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit):
        load(name).main()
    _, _, flags = capsys.readouterr().out.partition("options:")
    for entry in flags.split("\n  -")[1:]:
        first, *rest = entry.strip().split("\n")
        assert rest or "  " in first, entry


@pytest.mark.full
def test_cluster_digits_alone(tmp_path, capsys):
    cluster_digits = load("cluster_digits")
    accuracy = cluster_digits.train(3, 64, tmp_path, verbose=0)
    assert accuracy > 0.9
    assert "sum of the weights" in capsys.readouterr().out
    assert (tmp_path / "digits.keras").stat().st_size > 10_000


@pytest.mark.full
def test_ray_digits_goes_on_when_a_worker_dies(tmp_path):
    pytest.importorskip("ray")
    finished = subprocess.run(
        [
            *(sys.executable, str(EXAMPLES / "ray_digits.py"), "--kill"),
            *("--epochs", "5", "--folder", str(tmp_path / "ray")),
        ],
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    found = re.search(r"^validation accuracy: (\S+)%$", finished.stdout, re.M)
    assert float(found[1]) > 95
    assert (tmp_path / "ray" / "killed").is_file()
