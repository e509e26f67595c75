"""The code of README and docs runs, and what they name is there."""

import ast
import doctest
import importlib.util
import inspect
import pathlib
import re
import xml.etree.ElementTree as ElementTree

import cases
import keras
import numpy as np
import pytest

import keras_clones
from keras_clones import model_deploy
from keras_clones.door import deployed

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCS = ROOT / "docs"
PAGES = {path.name: path.read_text() for path in sorted(DOCS.glob("*.md"))}
MARKDOWN = {"README.md": README} | {
    f"docs/{name}": text for name, text in PAGES.items()
}
HOME = "https://github.com/keras-clones/keras_clones"
# Where README, which a package index shows too, finds files of the repository.
FILES = (
    f"{HOME}/blob/main/",
    "https://raw.githubusercontent.com/keras-clones/keras_clones/main/",
)
# Texts of messages that troubleshooting.md has, of code that is not here yet.
COMING: set[str] = set()


def blocks(language, text=README):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def without_code(text):
    """Return a page without its blocks of code."""
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def links_of(text):
    prose = re.sub(r"`[^`\n]*`", "", without_code(text))
    return re.findall(r"\]\(([^)\s]+)\)", prose)


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name, text, model):
    """Run the Python of a page from the top down; return its names."""
    x, y = cases.arrays(64)["mlp"]
    names = {"x": x, "y": y, "model": model}
    for block in blocks("python", text):
        exec(compile(block, name, "exec"), names)
    return names


def test_readme_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert blocks("python")
    names = run("README.md", README, cases.make("mlp"))
    model = names["model"]
    assert keras_clones.deployment(model) is not None
    losses = model.evaluate(names["x"], names["y"], verbose=0)
    assert np.isfinite(losses).all()


# Takes as long as all other pages.
LONG = {"looking.md"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.full] * (name in LONG))
        for name, text in PAGES.items()
        if blocks("python", text)
    ],
)
def test_code_of_pages_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run(name, PAGES[name], cases.compiled("mlp"))
    weights = names["model"].get_weights()
    assert all(np.isfinite(weight).all() for weight in weights)


def anchors(text):
    """Return the anchors of a page's headings, as mkdocs makes them."""
    found = re.findall(r"^#+ (.*)$", without_code(text), re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", title).strip() for title in found)
    return {re.sub(r"[\s-]+", "-", title.lower()) for title in plain}


@pytest.mark.parametrize("name", MARKDOWN)
def test_links_lead_somewhere(name):
    folder = (ROOT / name).parent
    for link in links_of(MARKDOWN[name]):
        target, _, anchor = link.partition("#")
        if target.startswith(FILES):
            path = ROOT / target.partition("/main/")[2]
        else:
            # A package index shows README by itself.
            assert name != "README.md" or link.startswith("https:"), link
            if link.startswith("https:"):
                continue
            path = folder / target if target else ROOT / name
        assert path.is_file(), link
        if anchor:
            assert anchor in anchors(path.read_text()), link


@pytest.mark.parametrize("name", [*MARKDOWN, "CONTRIBUTING.md"])
def test_files_that_are_named_are_there(name):
    text = without_code((ROOT / name).read_text())
    named = re.findall(
        r"`[^`\n]*?((?:tests|docs|examples|\.ci)/[\w./-]*)", text
    )
    assert not [path for path in named if not (ROOT / path).exists()]


def test_the_table_of_differences_can_be_written():
    _, start, rest = PAGES["guarantees.md"].partition("\n<!-- table -->\n")
    table, end, _ = rest.partition("\n<!-- end of table -->\n")
    assert start and end
    assert all(line.startswith("| ") for line in table.split("\n")[2:])
    assert table.count("\n") > 100


def test_every_page_is_in_the_navigation():
    config = (ROOT / "mkdocs.yml").read_text()
    nav = re.findall(r"^  - .*: (\S+\.md)$", config, re.MULTILINE)
    assert sorted(nav) == sorted(PAGES)
    linked = re.findall(rf"{re.escape(FILES[0])}docs/([\w-]+\.md)", README)
    assert {*linked, "index.md"} == set(PAGES)


def test_the_reference_has_every_public_name():
    named = re.findall(r"^::: (\S+)$", PAGES["reference.md"], re.MULTILINE)
    public = [f"keras_clones.{name}" for name in keras_clones.__all__]
    # Of what is called so, `keras_clones.Clone` is something else.
    public.append("keras_clones.model_deploy.Clone")
    assert sorted(named) == sorted(public)
    assert {*model_deploy.__all__} - {*keras_clones.__all__} == {"Clone"}


def test_pictures_are_those_that_pages_show():
    shown = re.findall(r"pictures/[\w.]+", "".join(PAGES.values()))
    there = [path.name for path in (DOCS / "pictures").iterdir()]
    assert {f"pictures/{name}" for name in there} == set(shown)
    for path in (DOCS / "pictures").glob("*.svg"):
        assert ElementTree.parse(path).getroot().tag.endswith("svg")


def test_drawings_are_what_the_script_draws(tmp_path, monkeypatch):
    draw = load(DOCS / "draw.py")
    monkeypatch.setattr(draw, "PICTURES", tmp_path)
    draw.draw_by_towers()
    draw.draw_by_calls()
    for path in tmp_path.iterdir():
        assert path.read_text() == (DOCS / "pictures" / path.name).read_text()
    # The benchmark's picture has the figures of the table.
    rows = draw.rows_of_table()
    assert len(rows) == 9 * 6 and all(row.ms > 0 for row in rows)


def plain(text):
    return re.sub(r"\s+", " ", text.replace("`", "")).strip()


def messages():
    """Return all texts of the package's code, with ... for what differs."""
    texts = []
    for path in (ROOT / "keras_clones").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [getattr(part, "value", None) for part in node.values]
                texts.append(
                    "".join(p if isinstance(p, str) else "..." for p in parts)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return plain("\n".join(texts))


def test_troubleshooting_has_messages_that_there_are():
    page = PAGES["troubleshooting.md"]
    terms = re.findall(r"^(.*)\n\n:   ", page, re.MULTILINE)
    assert len(terms) > 50
    known = messages()
    quoted = [text for term in terms for text in re.findall(r"`(.*?)`", term)]
    parts = [part for text in quoted for part in text.split("...")]
    parts = [plain(part).strip(" .,") for part in parts]
    missing = [part for part in parts if part and part not in known]
    assert set(missing) <= COMING


def test_docstrings_are_read_by_mkdocstrings():
    pytest.importorskip("griffe")
    docstrings = load(DOCS / "docstrings.py")
    text = docstrings.readable(inspect.getdoc(keras_clones.split_batch))
    assert "\n**Example**\n" in text and "Example:" not in text
    [block] = blocks("pycon", text)
    assert block.startswith(">>> ") and ">>>" not in without_code(text)


def test_the_package_says_where_it_is_from():
    project = (ROOT / "pyproject.toml").read_text()
    assert f'Homepage = "{HOME}"' in project
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"version: {keras_clones.__version__}\n" in citation
    assert f"repository-code: {HOME}\n" in citation
    listed = project.partition("targets.sdist]\n")[2].partition("]")[0]
    for path in re.findall(r'"/(.*?)"', listed):
        assert (ROOT / path).exists(), path
    tracked = {"LICENSE", "docs", "mkdocs.yml", ".ci", "tests", "README.md"}
    assert tracked <= set(re.findall(r'"/(.*?)"', listed))


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
            assert f"| `{name}` | `{default}` |" in README, name


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
        if inspect.signature(thing).parameters:
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
