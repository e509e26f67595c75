"""Modules import only what stands below them, and nothing but their needs."""

import ast
import collections
import pathlib
import re
import sys

import pytest

import keras_clones

PACKAGE = pathlib.Path(keras_clones.__file__).parent
CONTRIBUTING = pathlib.Path(__file__).parents[1] / "CONTRIBUTING.md"
# The modules from the top down.
TABLE = re.findall(r"^\| `(\w+)\.py` \|", CONTRIBUTING.read_text(), re.M)

LIBRARIES = {"keras", "numpy", "tensorflow"}
# What is imported inside of the functions that need it, if at all.
LATE = {
    "matplotlib": {
        *("benchmark_table", "comparison_picture", "picture", "timeline"),
    },
    "IPython": {"report"},
}
# What the commands need besides, as no module of the library does.
COMMAND = {
    *("argparse", "datetime", "platform", "resource", "statistics"),
    "subprocess",
}
COMMANDS = ("__main__", "benchmark", "compare_command", "devices")
# The doors to private names are lists, one short function each.
LISTS = {"_keras"}


def imports(nodes):
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import of {node.module}"
            if node.module == "keras_clones":
                yield from (f"keras_clones.{a.name}" for a in node.names)
            else:
                yield node.module


def imported(path):
    return imports(ast.walk(ast.parse(path.read_text())))


def is_own(module):
    return module.split(".")[0] == "keras_clones"


def test_every_module_is_in_the_table_once():
    modules = [path.stem for path in PACKAGE.glob("*.py")]
    assert collections.Counter(TABLE) == collections.Counter(modules)


@pytest.mark.parametrize("name", TABLE)
def test_imports_only_go_down(name):
    below = TABLE[TABLE.index(name) + 1 :]
    for module in filter(is_own, imported(PACKAGE / f"{name}.py")):
        assert module.removeprefix("keras_clones.") in below, module


@pytest.mark.parametrize("name", TABLE)
def test_imports_from_outside(name):
    path = PACKAGE / f"{name}.py"
    allowed = (sys.stdlib_module_names - COMMAND) | LIBRARIES
    if name.startswith(COMMANDS):
        allowed |= COMMAND
    late = {library for library, users in LATE.items() if name in users}
    outside = {m.split(".")[0] for m in imported(path) if not is_own(m)}
    assert outside <= allowed | late
    at_the_top = imports(ast.parse(path.read_text()).body)
    assert late.isdisjoint(m.split(".")[0] for m in at_the_top)


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
        if path.stem not in LISTS:
            assert len(path.read_text().splitlines()) <= 400, path.name
