"""Run Keras's own trainer, callback, saving and model tests on clones.

Every model that a test compiles, fits, evaluates or predicts with is cloned
first. A test that passes on plain Keras and fails here shows where clones
part from it.

    python tests/run_keras_suite.py              # on two clones
    python tests/run_keras_suite.py --clones 0   # plain, to compare
    python tests/run_keras_suite.py -- -k masking -x

What follows `--` goes to pytest. Keras's tests need `jax`, `pandas`,
`tensorboard`, `orbax-checkpoint` and `requests` beside this package.
"""

import argparse
import collections
import functools
import os
import pathlib
import sys
import types

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["KERAS_BACKEND"] = "tensorflow"

import keras
import pytest
import tensorflow as tf

import keras_clones
from keras_clones.door import attach

SOURCE = pathlib.Path(keras.__file__).parent / "src"
FILES = (
    "trainers/trainer_test.py",
    "trainers/compile_utils_test.py",
    "callbacks/*_test.py",
    "saving/*_test.py",
    "models/*_test.py",
    "backend/tensorflow/*trainer*_test.py",
)
# They need torch, or a file that Keras does not install.
DESELECTED = (
    "trainers/trainer_test.py::TestTrainer::"
    "test_fit_with_data_adapter_torch_dataloader",
    "saving/saving_lib_test.py::SavingBattleTest::"
    "test_legacy_load_skips_missing_nested_containers",
)
ENTRIES = (
    "compile",
    "make_train_function",
    "make_test_function",
    "make_predict_function",
)


class CloneEveryModel:
    """A pytest plugin that clones each model before it is first used."""

    def __init__(self, num_clones):
        self.num_clones = num_clones
        self.cloned = 0
        self.plain = collections.Counter()

    def pytest_configure(self):
        # Keras's tests mix a `Trainer` into a layer where they want a model.
        attach._check_is_model = lambda model: None
        for name in ENTRIES:
            # The class that has it: a model that overrides `compile` is not
            # compiled again when it is loaded.
            owner = next(c for c in keras.Model.__mro__ if name in vars(c))
            method = getattr(owner, name)
            setattr(owner, name, self.cloning_first(method, name))

    def cloning_first(self, method, name):
        @functools.wraps(method)
        def entry(model, *args, **kwargs):
            if self.clone(model):
                return getattr(model, name)(*args, **kwargs)
            return method(model, *args, **kwargs)

        return entry

    def clone(self, model):
        """Clone a model that is plain; say whether it was done."""
        if keras_clones.deployment(model) is not None:
            return False
        try:
            keras_clones.clone_model(model, self.num_clones)
        except ValueError as error:
            self.plain[why(error)] += 1
            return False
        self.cloned += 1
        return True

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.write_line(f"{self.cloned} models cloned")
        for reason, count in self.plain.items():
            terminalreporter.write_line(f"{count} refusals: {reason}")


def why(error):
    """Return which of the two known reasons a model was refused for."""
    message = str(error)
    for reason in ("overrides", "tf.distribute"):
        if reason in message:
            return reason
    raise error


def provide_conftest():
    """Stand in for Keras's `conftest.py`, which is not installed."""
    conftest = types.ModuleType("conftest")
    conftest.skip_if_backend = lambda name, reason: pytest.mark.skipif(
        keras.backend.backend() == name, reason=reason
    )
    sys.modules["conftest"] = conftest


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clones", type=int, default=2)
    parser.add_argument("pytest_args", nargs="*")
    args = parser.parse_args()
    keras_clones.use_virtual_devices(args.clones or 2)
    tf.get_logger().setLevel("ERROR")
    provide_conftest()
    files = [str(path) for glob in FILES for path in sorted(SOURCE.glob(glob))]
    options = [
        "-q",
        f"--config-file={os.devnull}",
        f"--rootdir={SOURCE}",
        "--disable-warnings",
        "--show-capture=no",
        "-p",
        "no:cacheprovider",
        *(f"--deselect={test}" for test in DESELECTED),
    ]
    plugins = [CloneEveryModel(args.clones)] if args.clones else []
    return pytest.main([*options, *args.pytest_args, *files], plugins)


if __name__ == "__main__":
    sys.exit(main())
