"""The examples do what they say, in fewer epochs."""

import importlib.util
import pathlib

import pytest

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_digits(tmp_path, capsys):
    digits = load("digits")
    accuracy = digits.train(3, 4, 64, tmp_path, verbose=0)
    out = capsys.readouterr().out
    assert accuracy > 0.9
    assert "clone_2    /device:CPU:2  21" in out
    assert "the predictions agree" in out
    assert (tmp_path / "digits.keras").stat().st_size > 10_000
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")


def test_digits_refuses_wrong_arguments():
    digits = load("digits")
    for text in ("0", "-1", "two"):
        with pytest.raises((ValueError, digits.argparse.ArgumentTypeError)):
            digits.positive(text)
