"""Modules import only what stands below them, and nothing but their needs."""

import ast
import collections
import itertools
import pathlib
import re
import sys

import pytest

import keras_clones

PACKAGE = pathlib.Path(keras_clones.__file__).parent
CONTRIBUTING = pathlib.Path(__file__).parents[1] / "CONTRIBUTING.md"
# The modules from the top down, a room after the other.
TABLE = re.findall(r"^\| `([\w/]+)\.py` \|", CONTRIBUTING.read_text(), re.M)
# The rooms. Their own files say what they are for, and import nothing.
ROOMS = re.findall(r"^\| \*\*`(\w+)/`\*\* \|", CONTRIBUTING.read_text(), re.M)

LIBRARIES = {"keras", "numpy", "tensorflow"}
# What is imported inside of the functions that need it, if at all.
LATE = {
    "matplotlib": {
        *("benchmark/results", "comparing/drawing", "look/picture"),
        "look/timeline",
    },
    "IPython": {"look/page"},
    "jax": {"benchmark/jax_cell"},
}
# What the commands need besides, as no module of the library does.
COMMAND = {
    *("argparse", "datetime", "platform", "resource", "statistics"),
    "subprocess",
}
COMMANDS = (
    *("__main__", "benchmark/", "comparing/compare_", "look/machine"),
    "look/resident",
    *("cluster/launch", "cluster/processes", "cluster/serve_command"),
)
# What has the arguments of Keras or of TF-Slim, or is called as Keras does.
SIGNATURES = {"call", "clone_model", "compare", "compute_loss", "deploy"}
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


def dotted(name):
    """Return the name by which a file of the table is imported."""
    return ".".join(["keras_clones", *name.split("/")])


def names_of_own(path):
    """Return the modules of the package that a file imports."""
    known = {dotted(name) for name in TABLE}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and is_own(node.module):
            inside = [f"{node.module}.{a.name}" for a in node.names]
            modules = [name for name in inside if name in known]
            yield from modules or [node.module]


def is_own(module):
    return module.split(".")[0] == "keras_clones"


def test_every_module_is_in_the_table_once():
    modules = [
        str(path.relative_to(PACKAGE).with_suffix(""))
        for path in PACKAGE.rglob("*.py")
        if path.parent == PACKAGE or path.stem != "__init__"
    ]
    assert collections.Counter(TABLE) == collections.Counter(modules)


def test_rooms_follow_each_other():
    found = [name.split("/")[0] for name in TABLE if "/" in name]
    assert [room for room, _ in itertools.groupby(found)] == ROOMS


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_say_what_they_are_for(room):
    source = (PACKAGE / room / "__init__.py").read_text()
    said = ast.get_docstring(ast.parse(source))
    assert "In: " in said
    assert "Out: " in said
    # TF-Slim's names are to be had from that room itself.
    if room != "model_deploy":
        assert not list(imported(PACKAGE / room / "__init__.py"))


def test_imports_only_go_down():
    upward = [
        f"{name} imports {module}"
        for i, name in enumerate(TABLE)
        for module in names_of_own(PACKAGE / f"{name}.py")
        if module not in map(dotted, TABLE[i + 1 :])
    ]
    assert not upward


def test_imports_from_outside():
    for name in TABLE:
        path = PACKAGE / f"{name}.py"
        allowed = (sys.stdlib_module_names - COMMAND) | LIBRARIES
        if name.startswith(COMMANDS):
            allowed |= COMMAND
        late = {library for library, users in LATE.items() if name in users}
        outside = {m.split(".")[0] for m in imported(path) if not is_own(m)}
        assert outside <= allowed | late, name
        at_the_top = imports(ast.parse(path.read_text()).body)
        assert late.isdisjoint(m.split(".")[0] for m in at_the_top), name


@pytest.mark.parametrize(
    ("door", "private"),
    [("_keras", "keras.src."), ("_tf", "tensorflow.python.")],
)
def test_private_names_have_one_door(door, private):
    for path in PACKAGE.rglob("*.py"):
        if path.stem not in (door, "_private"):
            assert private not in path.read_text(), path.name
        assert not any(m.startswith(private) for m in imported(path)), path.name


def test_no_module_holds_two_concepts():
    for path in PACKAGE.rglob("*.py"):
        if path.stem not in LISTS:
            assert len(path.read_text().splitlines()) <= 300, path.name


def lines_of_code(function):
    """Return how many lines a function has besides its docstring."""
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function, clean=False) is None:
        return lines
    said = function.body[0]
    return lines - (said.end_lineno - said.lineno + 1)


def functions(folder):
    """Yield each function of a folder's files, and where it is."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, kinds):
                yield f"{path.name}: {node.name}", node


def test_no_function_is_long():
    found = functions(PACKAGE)
    assert not [name for name, node in found if lines_of_code(node) > 40]


def num_parameters(function):
    """Return how many parameters a function has besides `self`."""
    given = function.args
    names = [a.arg for a in (*given.posonlyargs, *given.args)]
    return len(names) + len(given.kwonlyargs) - (names[:1] == ["self"])


@pytest.mark.parametrize("folder", ["keras_clones", "tests", "examples"])
def test_no_function_lacks_a_record(folder):
    """What tests are given by pytest is no signature of their own."""
    found = functions(CONTRIBUTING.parent / folder)
    assert not [
        name
        for name, node in found
        if num_parameters(node) > 5
        and node.name not in SIGNATURES
        and not node.name.startswith("test_")
    ]
