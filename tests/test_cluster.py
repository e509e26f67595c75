"""Clones on the processes of a cluster train what one device trains."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent / "cluster"


def scale():
    path = HERE.parents[1] / "docs" / "scale.py"
    spec = importlib.util.spec_from_file_location("scale", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def launch(script, *arguments, **options):
    """Run a script that trains or counts; return what it found."""
    what = {"train.py": "DIFFERENCES", "count.py": "LINKS"}[script]
    return run(script, what, *arguments, **options)


def run(script, what, *arguments, seconds=400, **flags):
    """Run a script on a cluster of this machine; return what a line says."""
    flags = {"replicas": 2, "ps": 1} | flags
    paths = [str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    finished = subprocess.run(
        [
            *(sys.executable, "-m", "keras_clones", "launch"),
            *(f"--{name}={value}" for name, value in flags.items()),
            *("--timeout", str(seconds), str(HERE / script)),
            *map(str, arguments),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=seconds + 60,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    (line,) = (
        line
        for line in finished.stdout.splitlines()
        if line.startswith(f"[worker 0] {what} ")
    )
    return json.loads(line[line.index("{") :])


def check(found, expected, floatx="float64"):
    assert len(found) == expected
    # Rounding: of some forty steps of Adam, 1e-15 and 1e-6 in the end.
    most = {"float64": 1e-10, "float32": 1e-5}[floatx]
    assert {case: worst for case, worst in found.items() if worst > most} == {}


def test_clones_of_two_hosts_train_as_one_device():
    found = launch(
        "train.py",
        *("--cases", "batch_norm", "--variables", "spread"),
        ps=0,
    )
    check(found, 1)


# Replicas, clones of each, homes of the weights, which the cases take in turn,
# and the cases: all of them once, and some elsewhere. `tests/cluster/train.py`
# runs all of them anywhere.
TOPOLOGIES = {
    "2x2": (2, 2, "controller,spread,greedy,round_robin", ""),
    "4x1": (4, 1, "spread,greedy", "batch_norm,own_step"),
    "1x4-float32": (1, 4, "greedy", "masked"),
}


@pytest.mark.full
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_all_cases_train_as_one_device(name):
    replicas, clones, homes, cases = TOPOLOGIES[name]
    floatx = "float32" if "float32" in name else "float64"
    found = launch(
        "train.py",
        *("--clones", str(clones), "--floatx", floatx, "--variables", homes),
        *(("--cases", cases) if cases else ()),
        replicas=replicas,
        ps=2 if name == "2x2" else 1,
    )
    check(found, len(cases.split(",")) if cases else 8, floatx)


@pytest.mark.full
def test_a_divided_table_trains_as_one_device_and_sends_rows_alone():
    found = run("divided.py", "FOUND", ps=2)
    check(found["differences"], 4)
    # A look-up and a gradient between each two that have clones or rows.
    for home, links in found["links"].items():
        for ends, link in links.items():
            source, _, target = ends.partition(" to ")
            rows, ids = link["rows"], link["ids"]
            if home != "greedy":
                assert (rows, ids) == (2, 2)
            elif source.startswith("worker") and target.startswith("ps"):
                assert (rows, ids) == (1, 2)
            elif source.startswith("ps") and target.startswith("worker"):
                assert (rows, ids) == (1, 0)
            else:
                assert (rows, ids) == (0, 0)
            assert abs(link["bytes"] - link.get("said", 0)) <= 100


@pytest.mark.full
def test_a_link_carries_parameters_and_gradients_once_a_host():
    found = launch("count.py")
    page = scale()
    # A parameter server has as many links as there are hosts.
    share = {
        "controller": page.controller(2),
        "spread": page.spread(2),
        "greedy": page.servers(2, 1) / 2,
    }
    for clones in (1, 3):
        for home, links in both(found, clones).items():
            weights = links.pop("parameters")
            size = weights * share[home]
            batch = 8 * 256 * 4
            ends = ("worker 1", "ps 0" if home == "greedy" else "worker 0")
            for source, target in (ends, ends[::-1]):
                moved, messages, said = links.pop(f"{source} to {target}")
                # Beside them, rows, shares of them, learning rates.
                assert size <= moved <= size + batch
                assert messages < 60
                assert size <= said <= size + batch
                assert abs(moved - said) <= 3000
            for moved, *_ in links.values():
                assert moved <= (size + batch if home == "greedy" else 0)


def both(found, clones):
    """Return what was counted with some clones on each host, by home."""
    return {
        name.partition(" ")[2]: links
        for name, links in found.items()
        if name.startswith(f"{clones} ")
    }


def test_the_page_on_growth_has_what_is_computed():
    page = scale()
    text = page.PAGE.read_text()
    assert page.page(text) == text
    assert "| 1,024 | 1,023 P | 2 P | 1,024 P | 1 P |" in text


@pytest.mark.full
def test_a_training_that_is_restarted_comes_to_the_same_weights(tmp_path):
    # Of 28 batches, in the third epoch, two after a backup.
    found = run("restarted.py", "FOUND", tmp_path, "20", ps=0, restarts=1)
    assert found["life"] == "1"
    assert found["killed"] == found["whole"]
