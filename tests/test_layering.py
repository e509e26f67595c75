"""Modules import only what stands below them, and nothing but their needs."""

import ast
import pathlib

import pytest

import keras_clones

PACKAGE = pathlib.Path(keras_clones.__file__).parent

# What each module may import, as CONTRIBUTING.md has it. `_keras` and `_tf` are
# the doors to private names, open to all but the configuration.
MAY_IMPORT = {
    "choosers": set(),
    "config": {"choosers"},
    "_private": set(),
    "_tf": {"_private", "tensorflow"},
    "_keras": {"_private", "keras", "tensorflow"},
    "placement": {"config", "_keras", "keras", "tensorflow"},
    "balance": {"tensorflow"},
    "sharding": {"keras", "tensorflow"},
    "state": {"_keras", "keras", "tensorflow"},
    "gradients": {"tensorflow"},
    "unique_rows": {"tensorflow"},
    "watch": {"_keras", "gradients", "keras", "tensorflow"},
    "exactness": {"_keras", "sharding", "keras"},
    "rendezvous": {"_keras", "placement", "tensorflow"},
    "synchronize": {"_keras", "rendezvous", "keras", "tensorflow"},
    "tables": {"_keras", "keras", "tensorflow"},
    "tower": {"_keras", "state", "keras", "tensorflow"},
    "exchange": {
        *(
            "balance",
            "gradients",
            "placement",
            "rendezvous",
            "sharding",
            "state",
        ),
        *("synchronize", "tower", "unique_rows", "keras", "tensorflow"),
    },
    "begin": {
        *("_keras", "balance", "exactness", "placement", "sharding"),
        *("state", "tables", "watch", "keras", "tensorflow"),
    },
    "combine": {
        *("_keras", "balance", "begin", "exactness", "exchange", "gradients"),
        *("sharding", "state", "tower", "keras", "tensorflow"),
    },
    "custom": {
        *("_keras", "exactness", "gradients", "placement", "rendezvous"),
        *("sharding", "state", "synchronize", "keras", "tensorflow"),
    },
    "steps": {
        *("_keras", "begin", "combine", "custom", "exactness", "exchange"),
        *("placement", "sharding", "state", "synchronize", "tables"),
        *("tower", "keras", "tensorflow"),
    },
    "mirrors": {
        *("_keras", "exchange", "placement", "scopes", "state"),
        *("keras", "tensorflow"),
    },
    "clones": {
        *("config", "exchange", "mirrors", "placement", "sharding", "state"),
        *("tables", "keras", "numpy", "tensorflow"),
    },
    "clone_gradients": {
        *("_keras", "clones", "exchange", "gradients", "mirrors"),
        *("placement", "tower", "traced", "keras", "tensorflow"),
    },
    "optimize": {
        *("_keras", "clone_gradients", "clones", "config", "exchange"),
        *("sharding", "keras", "tensorflow"),
    },
    "runner": {
        *("_keras", "clones", "config", "mirrors", "optimize", "placement"),
        *("keras", "tensorflow"),
    },
    "model_deploy": {
        *("clones", "config", "optimize", "runner", "keras", "tensorflow"),
    },
    "footprint": {
        *("_keras", "begin", "combine", "exactness", "state", "synchronize"),
        *("tables", "keras", "tensorflow"),
    },
    # IPython, where it has been imported already.
    "report": {"footprint", "placement", "IPython"},
    "timeline": {"matplotlib"},
    "picture": {"footprint", "placement", "report", "timeline", "matplotlib"},
    "deployed": {
        *("balance", "begin", "config", "footprint", "picture", "placement"),
        *("report", "sharding", "keras"),
    },
    "attach": {
        *("_keras", "balance", "begin", "config", "deployed", "exactness"),
        *("placement", "sharding", "state", "steps", "watch"),
        *("keras", "tensorflow"),
    },
    "summaries": {
        *("attach", "exactness", "watch", "keras", "numpy", "tensorflow"),
    },
    "joined_graph": {"_tf", "tensorflow"},
    "transfers": {"_tf", "joined_graph", "tensorflow"},
    "benchmark_models": {"keras"},
    "benchmark_cell": {
        *("benchmark_models", "attach", "placement", "transfers"),
        *("keras", "numpy", "tensorflow"),
    },
    "benchmark_table": {"benchmark_cell", "matplotlib"},
    "benchmark_run": {"benchmark_cell", "benchmark_table"},
    "benchmark": {
        *("benchmark_cell", "benchmark_models", "benchmark_run"),
        *("benchmark_table", "tensorflow"),
    },
    "devices": {"_tf", "config", "placement", "report", "tensorflow"},
    "__main__": {"benchmark", "devices"},
    "verdict": {"attach", "placement", "timeline", "keras"},
    "phases": {"_keras", "attach", "placement", "timeline", "keras"},
    "trace": {"phases", "timeline", "tensorflow"},
    "profiler": {
        *("phases", "timeline", "trace", "verdict", "keras", "tensorflow"),
    },
    "__init__": {
        *("attach", "clones", "config", "model_deploy", "optimize"),
        *("placement", "profiler", "summaries"),
    },
}
STANDARD = {
    *("collections", "contextlib", "dataclasses", "functools", "html"),
    *("importlib", "itertools", "json", "math", "numbers", "operator", "os"),
    *("pathlib", "random", "re", "sys", "tempfile", "threading", "time"),
    *("typing", "warnings", "weakref"),
}
# What the commands need besides, as no module of the library does.
COMMAND = {
    *("argparse", "datetime", "platform", "resource", "statistics"),
    "subprocess",
}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            if node.module == "keras_clones":
                yield from (f"keras_clones.{a.name}" for a in node.names)
            else:
                yield node.module


def test_imports_only_go_down():
    modules = {path.stem: path for path in PACKAGE.glob("*.py")}
    assert modules.keys() == MAY_IMPORT.keys()
    for name, path in modules.items():
        found = {
            module.removeprefix("keras_clones.").split(".")[0]
            for module in imported(path)
        }
        if name.startswith(("__main__", "benchmark", "devices")):
            found -= COMMAND
        assert found - STANDARD <= MAY_IMPORT[name], name


@pytest.mark.parametrize(
    ("door", "private"),
    [("_keras", "keras.src."), ("_tf", "tensorflow.python.")],
)
def test_private_names_have_one_door(door, private):
    for path in PACKAGE.glob("*.py"):
        if path.stem not in (door, "_private"):
            assert private not in path.read_text(), path.name
        assert not any(m.startswith(private) for m in imported(path)), path.name


def test_no_module_holds_two_concepts():
    for path in PACKAGE.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 375, path.name
