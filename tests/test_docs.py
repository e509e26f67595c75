"""The README's code runs, and so do the examples of public docstrings."""

import doctest
import inspect
import pathlib
import re

import cases
import keras
import numpy as np
import pytest

import keras_clones
from keras_clones import deployed

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_readme_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x, y = cases.arrays(64)["mlp"]
    names = {"x": x, "y": y, "model": cases.make("mlp")}
    found = blocks("python")
    assert found
    for block in found:
        exec(compile(block, "README.md", "exec"), names)
    assert keras_clones.deployment(names["model"]) is not None
    assert np.isfinite(names["model"].evaluate(x, y, verbose=0)).all()


def test_readme_commands_name_what_is_there():
    commands = "".join(blocks("bash"))
    project = (ROOT / "pyproject.toml").read_text()
    asked = re.findall(r'"\.\[(\w+)\]"', commands)
    assert sorted(asked) == ["examples", "test"]
    assert all(f"\n{extra} = [" in project for extra in asked)
    for script in re.findall(r"python (\S+\.py)", commands):
        assert (ROOT / script).is_file()
    # `.ci/run` takes its commands from the README, so that they are run.
    assert "README.md" in (ROOT / ".ci" / "run").read_text()


def test_readme_table_has_every_argument():
    parameters = inspect.signature(keras_clones.clone_model).parameters
    for name, parameter in parameters.items():
        assert f"| `{name}` |" in README, name
        if parameter.default is not inspect.Parameter.empty:
            default = repr(parameter.default).replace("'", '"')
            assert re.search(rf"\| `{name}` \| `{default}` \|", README), name


@pytest.mark.parametrize("name", keras_clones.__all__)
def test_public_names_have_examples_that_run(name):
    thing = getattr(keras_clones, name)
    assert inspect.getdoc(thing)
    finder = doctest.DocTestFinder(recurse=False)
    runner = doctest.DocTestRunner()
    for test in finder.find(thing, name):
        runner.run(test)
    assert runner.failures == 0
    if inspect.isfunction(thing):
        assert "Example:" in thing.__doc__
        assert "Args:" in thing.__doc__
        assert "Raises:" in thing.__doc__


def test_every_public_method_is_documented():
    for thing in (deployed.Deployment, keras_clones.DeploymentConfig):
        for name, method in inspect.getmembers(thing, inspect.isfunction):
            assert name.startswith("_") or inspect.getdoc(method), name


def test_version_is_in_the_changelog():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"## {keras_clones.__version__}" in changelog
    assert keras.__version__.startswith("3.")
