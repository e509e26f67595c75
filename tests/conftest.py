"""Logical CPU devices for the whole suite, made once, before TensorFlow."""

import gc
import itertools
import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["KERAS_BACKEND"] = "tensorflow"

import keras
import pytest
import tensorflow as tf

from keras_clones import use_virtual_devices

use_virtual_devices(8)
tf.get_logger().setLevel("ERROR")
# What has been imported by now stays, and is not looked through again.
gc.freeze()
gc.set_threshold(50_000, 20, 20)
STARTED = itertools.count(1)


@pytest.fixture(params=["float64", "float32"])
def floatx(request):
    """Run a test once in each precision."""
    keras.config.set_floatx(request.param)
    yield request.param
    keras.config.set_floatx("float32")


@pytest.fixture
def float64():
    """Run a test where rounding hides nothing."""
    keras.config.set_floatx("float64")
    yield
    keras.config.set_floatx("float32")


@pytest.fixture(autouse=True)
def _fresh_names():
    """Let every test number its layers from zero.

    A collection of garbage looks at all that is kept, which takes up to 2 s
    once some hundred tests have run: it took half of the time of all tests.
    Here is one in ten tests, and what it leaves is not looked at again.
    """
    keras.backend.clear_session(free_memory=False)
    if next(STARTED) % 10 == 0:
        gc.collect()
        gc.freeze()


def pytest_addoption(parser):
    parser.addoption(
        "--write-table",
        action="store_true",
        help="write the table of largest differences into docs/guarantees.md",
    )
    parser.addoption(
        "--xla",
        action="store_true",
        help="also run the equivalence cases with clones compiled by XLA",
    )
    parser.addoption(
        "--pieces",
        type=int,
        default=0,
        help="also run the equivalence cases with clones that work in pieces",
    )
    parser.addoption(
        "--full",
        action="store_true",
        help="also run the tests marked `full`: long ones, and more of a kind",
    )


def pytest_configure(config):
    config.left_to_full = 0
    config.pluginmanager.register(Left())


class Left:
    """Learns from the workers how many tests are left to `--full`."""

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node):
        found = getattr(node, "workeroutput", {}).get("left_to_full", 0)
        node.config.left_to_full = max(node.config.left_to_full, found)


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        found = session.config.left_to_full
        session.config.workeroutput["left_to_full"] = found


def mark_full(items):
    """Mark what `full_but` does not name as `full`."""
    named, there = {}, {}
    for item in items:
        mark = item.get_closest_marker("full_but")
        if mark:
            test = item.nodeid.partition("[")[0]
            named[test] = set(mark.args)
            there.setdefault(test, set()).add(item.callspec.id)
            if item.callspec.id not in mark.args:
                item.add_marker(pytest.mark.full)
    if any("::" in one for one in items[0].config.args):
        # Of a test that is run by its case's name, there is that case alone.
        return
    for test, ids in named.items():
        if unknown := ids - there[test]:
            raise pytest.UsageError(
                f"{test}: `full_but` names cases that are not there: "
                f"{sorted(unknown)}. There are: {sorted(there[test])}."
            )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    if not items:
        return
    if not config.getoption("--xla"):
        items[:] = [item for item in items if "by_xla" not in item.name]
    if not config.getoption("--pieces"):
        items[:] = [item for item in items if "in_pieces" not in item.name]
    mark_full(items)
    options = ("--full", "--write-table", "-m")
    asked = any(config.getoption(option) for option in options)
    # Who names a test by `file::test` gets it.
    if not asked and not any("::" in one for one in config.args):
        left = [item for item in items if item.get_closest_marker("full")]
        items[:] = [
            item for item in items if not item.get_closest_marker("full")
        ]
        config.hook.pytest_deselected(items=left)
        config.left_to_full = len(left)


def pytest_terminal_summary(terminalreporter, config):
    """Say what is left to `--full`, and what cases and updates came to."""
    if config.left_to_full:
        terminalreporter.write_line(
            f"{config.left_to_full} tests are left to `python -m pytest --full`"
        )
    for key, title, mark in (
        ("case", "| case |", "table"),
        ("update", "| optimizer | gradient | updated by |", "updates"),
    ):
        rows = largest(terminalreporter, key)
        if rows and config.getoption("--write-table"):
            page = config.rootpath / "docs" / "guarantees.md"
            write_table(page, mark, as_table(title, rows))
        elif rows and config.getoption("verbose") > 0:
            terminalreporter.write_line(as_table(title, rows))


def largest(reporter, key):
    """Return the largest differences by what tests recorded them of."""
    found = {}
    for report in reporter.getreports("passed"):
        for name, value in getattr(report, "user_properties", []):
            if name == key:
                *of, precision, worst = value
                row = found.setdefault(tuple(of), {})
                row[precision] = max(worst, row.get(precision, 0))
    return found


def as_table(title, rows):
    width = title.count("|") - 1
    lines = [f"{title} float64 | float32 |", "|---" * (width + 2) + "|"]
    for of in sorted(rows):
        cells = [
            f"{rows[of][p]:.1e}" if p in rows[of] else ""
            for p in ("float64", "float32")
        ]
        names = [name.replace("_", " ") for name in of]
        lines.append(f"| {' | '.join([*names, *cells])} |")
    return "\n".join(lines)


def write_table(page, mark, table):
    before, _, rest = page.read_text().partition(f"<!-- {mark} -->\n")
    after = rest.partition(f"<!-- end of {mark} -->")[2]
    page.write_text(
        f"{before}<!-- {mark} -->\n{table}\n<!-- end of {mark} -->{after}"
    )
