"""The benchmark's arguments, cells, tables and files; nothing is timed."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from keras_clones.__main__ import main
from keras_clones.benchmark import (
    cell,
    cells,
    jax_cell,
    processes,
    timed_fit,
)
from keras_clones.benchmark import results as table
from keras_clones.benchmark.timed_fit import Cell

PLAIN = Cell("mlp", "plain")
CLONES = Cell("mlp", "clones", 2)
ONE = Cell("mlp", "mirrored", 2, "ReductionToOneDevice")
COPY = Cell("mlp", "mirrored", 2, "HierarchicalCopyAllReduce")
CONTROL = Cell("cnn", "control")
FIGURES = {"ms": 2.0, "first": 1.5, "memory": 100.0}
RESULTS = {
    PLAIN: [
        {"ms": 4.0, "first": 0.5, "memory": 30.0, "bytes": 0},
        {"ms": 5.0, "first": 0.4, "memory": 31.0},
    ],
    CLONES: [{**FIGURES, "bytes": 2048}, {"error": "no luck"}],
    ONE: [{**FIGURES, "ms": 3.5, "bytes": None}],
    COPY: [{**FIGURES, "ms": 3.0, "bytes": None}],
    Cell("mlp", "central", 2): [{"error": "OSError: gone"}],
    CONTROL: [
        {"alone": 10.0, "together": [12.0, 11.0]},
        {"alone": 11.0, "together": [11.0, 11.5]},
    ],
}


def forbid(*_):
    raise AssertionError("A cell ran.")


@pytest.fixture
def no_cells(monkeypatch):
    monkeypatch.setattr(processes, "run_cell", forbid)
    monkeypatch.setattr(processes, "run_pair", forbid)


@pytest.fixture
def fake_cells(monkeypatch):
    """Let every cell but MirroredStrategy's find the same, without running."""

    def run_cell(cell):
        if cell.peer == "mirrored":
            return {"error": "ValueError: not today"}
        return {**FIGURES, **({"bytes": 1024} if cell.transfers else {})}

    monkeypatch.setattr(processes, "run_cell", run_cell)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            "--models mlp,vgg",
            "mlp,mlp-norm,cnn,own,transformer,wide,embedding,masked,blocks",
        ),
        ("--models=", "mlp,mlp-norm"),
        ("--models mlp,mlp", "once"),
        ("--against horovod", "plain,gather,mirrored,central"),
        ("--against plain,plain", "once"),
        ("--clones 0", "at least 1"),
        ("--clones=-1", "at least 1"),
        ("--clones 1,two", "whole numbers"),
        ("--clones 1.5", "whole numbers"),
        ("--clones 2,1,2", "once"),
        ("--threads 1", "INTRA,INTER"),
        ("--threads 1,2,3", "INTRA,INTER"),
        ("--threads 1,0", "at least 1"),
        ("--update fused", "auto,keras"),
        ("--pieces 1,0", "at least 1"),
        ("--pieces auto", "whole numbers"),
        ("--repeat 0", "at least 1"),
        ("--steps 0", "at least 1"),
        ("--logical 0", "at least 1"),
        ("--logical 2", "no GPU to split"),
        ("--out nowhere/at/all.json", "cannot write"),
        ("--out .", "cannot write"),
        ("--plot nowhere/at/all.png", "cannot write"),
        ("--plot steps.doc", "png"),
        ("--plot nowhere/at/all.png --out fine.json", "cannot write"),
    ],
)
def test_bad_arguments_end_before_any_cell_runs(
    no_cells, monkeypatch, tmp_path, capsys, arguments, expected
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["benchmark", *arguments.split()])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert arguments.split()[0].partition("=")[0] in error
    assert expected in error
    assert not list(tmp_path.iterdir())


def test_more_clones_than_gpus_are_an_error(no_cells, monkeypatch, capsys):
    from keras_clones.benchmark import benchmark_command

    monkeypatch.setattr(
        benchmark_command.tf.config,
        "list_physical_devices",
        lambda kind: ["gpu"] * 2,
    )
    with pytest.raises(SystemExit) as end:
        main(["benchmark", "--clones", "1,4"])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "at most 2" in error
    assert "`--logical 4`" in error
    with pytest.raises(SystemExit):
        main(["benchmark", "--clones", "4", "--logical", "3"])
    assert "at most 3" in capsys.readouterr().err


def test_plot_without_matplotlib_says_what_to_install(
    no_cells, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as end:
        main(["benchmark", "--plot", "steps.png"])
    assert end.value.code == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_a_command_must_be_named(capsys):
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 2
    assert "command" in capsys.readouterr().err


def run(*arguments):
    return main(["benchmark", "--models", "mlp,cnn", *arguments])


def test_a_run_goes_on_past_a_peer_that_fails(fake_cells, tmp_path, capsys):
    out, plot = tmp_path / "run.json", tmp_path / "run.png"
    files = "--out", str(out), "--plot", str(plot)
    code = run("--clones", "1,2", "--repeat", "2", "--markdown", *files)
    assert code == 0
    printed = capsys.readouterr()
    assert "\nmlp    central 2" in printed.out
    assert (
        "cnn, mirrored 2 (ReductionToOneDevice): failed: ValueError: not today"
        in printed.out
    )
    assert "| mlp | clones 2 | 2.00 | 1.00 | 1.5 | 100 | 1.0 |" in printed.out
    assert "NcclAllReduce, which needs them, is left out" in printed.err
    # A model has plain, and for 1 and 2: clones, two reductions and central.
    lines = [line for line in printed.err.splitlines() if line[0] == "["]
    assert lines[0] == ("[1/36] mlp, plain Keras, repeat 1 of 2, 0:00 elapsed")
    assert "cnn, central 2, repeat 1 of 2" in lines[17]
    assert "mlp, plain Keras, repeat 2 of 2" in lines[18]
    report = json.loads(out.read_text())
    assert report["date"].startswith("20")
    assert report["arguments"]["clones"] == [1, 2]
    assert report["machine"]["cores"] >= 1
    assert {"tensorflow", "keras", "gpus", "python"} <= report["machine"].keys()
    assert len(report["cells"]) == 18
    assert report["cells"][1]["peer"] == "clones"
    assert report["cells"][1]["repeats"] == [
        {**FIGURES, "bytes": 1024},
        FIGURES,
    ]
    assert report["rows"][1] == {
        **FIGURES,
        **{"model": "mlp", "peer": "clones 1", "ratio": 1.0},
        **{"bytes": 1024, "error": None},
    }
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_options_of_clones_are_cells_of_their_own(fake_cells, tmp_path, capsys):
    plot = str(tmp_path / "run.png")
    line = "benchmark --models mlp,masked --against plain,gather --clones 2"
    more = "--update auto,keras --pieces 1,4 --repeat 1 --plot"
    assert main([*line.split(), *more.split(), plot]) == 0
    _, _, *lines = capsys.readouterr().out.partition("\n\n")[0].splitlines()
    options = "", " (pieces=4)", " (update=keras)", " (update=keras, pieces=4)"
    ours = [f"clones 2{text}" for text in options]
    gather = [f"gather 2{text}" for text in options]
    expected = [
        f"{model:6}  {peer}  "
        for model, peers in (("mlp", ours), ("masked", [*ours, *gather]))
        for peer in ["plain Keras", *peers]
    ]
    for line, start in zip(lines, expected, strict=True):
        assert line.startswith(start)
    short = [
        table._short_label(table.Row("mlp", peer))
        for peer in [*ours[:2], "mirrored 2 (Copy)", "plain Keras"]
    ]
    assert short == ["2", "2 (pieces=4)", "2", "plain"]


def test_clones_get_the_options_of_their_cell():
    asked = Cell("masked", "clones", 2, update="keras", pieces=3)
    task = cell.TASKS["masked"]
    options = {"update": "keras", "pieces": 3}
    assert cell._options(asked, task) == options
    gather = asked._replace(peer="gather")
    assert cell._options(gather, task) == {**options, "loss": "gather"}


def test_texts_are_padded_and_their_targets_are_the_next_words():
    task = cell.TASKS["masked"]
    x, y = (np.array(part) for part in next(iter(timed_fit.make_data(task))))
    assert x.shape == y.shape == (task.batch, *task.shape)
    lengths = (x > 0).sum(axis=1)
    assert lengths.min() < 8 and lengths.max() > task.shape[0] - 8
    np.testing.assert_array_equal(x > 0, np.arange(32) < lengths[:, None])
    np.testing.assert_array_equal(y[:, :-1], x[:, 1:])


def test_the_last_batch_has_fewer_rows_where_a_task_says_so():
    sizes = {
        name: [len(x) for x, _ in timed_fit.make_data(cell.TASKS[name]).take(4)]
        for name in ("blocks", "masked")
    }
    assert sizes == {"blocks": [32, 32, 32, 22], "masked": [32] * 4}


@pytest.mark.full
def test_only_gradients_leave_the_clones_of_a_language_model():
    asked = Cell("masked", "clones", 2, steps=2, transfers=True)
    found = processes.run_cell(asked)
    sent = found["devices"]["/device:CPU:1"]["bytes_sent"]
    dense, rows = 4 * 64 * 20_000, 4 * 16 * 32 * 64
    # The outputs of a shard would be 4 * 16 * 32 * 20_000 more.
    assert dense < sent < 1.1 * (dense + rows)


def test_controls_run_for_the_models_that_have_one(
    fake_cells, monkeypatch, capsys
):
    pair = {"alone": 10.0, "together": [12.0, 11.0]}
    monkeypatch.setattr(processes, "run_pair", lambda cell: pair)
    run("--clones", "1", "--against", "plain", "--control", "--repeat", "1")
    printed = capsys.readouterr()
    assert "cnn               10.00        12.00      1.20" in printed.out
    assert "mlp, two processes" not in printed.err


def test_interruption_keeps_what_has_finished(
    fake_cells, monkeypatch, tmp_path, capsys
):
    finish = processes.run_cell

    def interrupted(cell):
        if cell.peer == "clones":
            raise KeyboardInterrupt
        return finish(cell)

    monkeypatch.setattr(processes, "run_cell", interrupted)
    out = tmp_path / "run.json"
    assert run("--out", str(out)) == 130
    printed = capsys.readouterr()
    assert "Interrupted" in printed.err
    assert "mlp    plain Keras" in printed.out
    assert "clones" not in printed.out.partition("\n\n")[0]
    cells = json.loads(out.read_text())["cells"]
    assert [cell["peer"] for cell in cells] == ["plain"]


def test_interruption_of_the_first_cell_prints_an_empty_table(
    monkeypatch, capsys
):
    def interrupted(cell):
        raise KeyboardInterrupt

    monkeypatch.setattr(processes, "run_cell", interrupted)
    assert run() == 130
    assert capsys.readouterr().out.startswith("model  peer ")


def test_best_takes_each_figure_of_the_repeats_that_worked():
    assert table.best(RESULTS[PLAIN]) == {
        **{"ms": 4.0, "first": 0.4, "memory": 30.0, "bytes": 0},
    }
    assert table.best(RESULTS[CLONES])["ms"] == 2.0
    assert table.best([{"error": "a"}, {"error": "b"}]) == {"error": "b"}


def test_the_fastest_reduction_counts():
    assert table.fastest([ONE, COPY], RESULTS) == COPY
    failed = {**RESULTS, COPY: [{"error": "no"}]}
    assert table.fastest([ONE, COPY], failed) == ONE
    rows = table.make_rows(failed)
    assert [row.peer for row in rows][2] == "mirrored 2 (ReductionToOneDevice)"
    assert [row.ratio for row in rows] == [1.0, 0.5, 0.875, None]


def test_the_plain_table_lines_up():
    lines = table.plain_text(RESULTS).splitlines()
    header = lines[0]
    assert " ".join(lines[2].split()) == "mlp plain Keras 4.00 1.00 0.4 30 0.0"
    for line in lines[2:5]:
        at = header.index("ms a step") + len("ms a step")
        assert line[at - 1] == "0"
        assert line[at : at + 1] == " "
    assert "mirrored 2 (HierarchicalCopyAllReduce)" in lines[4]
    assert lines[5].split() == ["mlp", "central", "2", "failed"]
    assert lines[-1] == "mlp, central 2: failed: OSError: gone"


def test_the_markdown_table_has_what_the_plain_one_has():
    assert table.markdown(RESULTS).splitlines() == [
        "| model | peer | ms a step | of plain | first step, s | peak MiB "
        "| KiB moved a step |",
        "|---|---|---:|---:|---:|---:|---:|",
        "| mlp | plain Keras | 4.00 | 1.00 | 0.4 | 30 | 0.0 |",
        "| mlp | clones 2 | 2.00 | 0.50 | 1.5 | 100 | 2.0 |",
        "| mlp | mirrored 2 (HierarchicalCopyAllReduce) | 3.00 | 0.75 | 1.5 "
        "| 100 |  |",
        "| mlp | central 2 | failed |  |  |  |  |",
        "",
        "| two processes | ms alone | ms together | of alone |",
        "|---|---:|---:|---:|",
        "| cnn | 10.00 | 11.50 | 1.15 |",
    ]


def test_a_picture_without_a_single_time_is_drawn_too(tmp_path):
    path = tmp_path / "none.png"
    table.draw([table.Row("mlp", "plain Keras", error="no")], str(path))
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_labels_of_a_picture_are_short(tmp_path):
    cell = Cell("cnn", "plain")
    more = {
        cell._replace(peer=peer, clones=clones, reduction=reduction): [
            {"ms": 10.0 * clones}
        ]
        for clones in (1, 2)
        for peer, reduction in (
            ("clones", None),
            ("mirrored", "HierarchicalCopyAllReduce"),
            ("central", None),
        )
    }
    rows = table.make_rows({**RESULTS, cell: [{"ms": 9.0}], **more})
    picture = table.figure(rows)
    charts = {chart.get_title(): chart for chart in picture.axes}
    labels = [text.get_text() for text in charts["cnn"].get_yticklabels()]
    assert labels == ["plain", *"111222"]
    [legend] = picture.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "plain Keras",
        "clones",
        "MirroredStrategy, its fastest reduction",
        "CentralStorageStrategy",
    ]
    canvas = FigureCanvasAgg(picture)
    canvas.draw()
    for chart in picture.axes:
        assert chart.bbox.width > picture.bbox.width / len(charts) * 0.6


def test_what_remains_goes_by_the_last_time_or_the_mean():
    assert processes.remaining({}, [PLAIN, CLONES]) == 0.0
    seconds = {PLAIN: 2.0, CLONES: 6.0}
    assert processes.remaining(seconds, [CLONES, ONE, COPY]) == 14.0


@pytest.mark.full
def test_plain_keras_runs_in_a_process_of_its_own():
    plain = processes.run_cell(PLAIN._replace(steps=2, transfers=True))
    assert plain["ms"] > 0 and plain["first"] > 0 and plain["memory"] > 0
    assert (plain["bytes"], plain["transfers"]) == (0, 0)


@pytest.mark.full
def test_clones_run_in_a_process_of_their_own():
    cell = CLONES._replace(steps=2, transfers=True, threads=(1, 2))
    clones = processes.run_cell(cell)
    assert clones["ms"] > 0 and clones["first"] > 0 and clones["memory"] > 0
    moved = clones["devices"]["/device:CPU:1"]
    # Parameters and half of a batch go, gradients come; little else does.
    parameters, shard, outputs = 4 * 101_770, 128 * 784 * 4, 128 * 10 * 4
    assert 0 <= moved["bytes_received"] - parameters - shard < 1024
    assert 0 <= moved["bytes_sent"] - parameters < outputs + 1024


@pytest.mark.full
def test_memory_is_that_of_the_process_and_not_of_its_parent():
    code = "from keras_clones.look import resident\n"
    code += "before = resident.peak()\n"
    code += "held = bytearray(b'1') * (50 << 20)\n"
    code += "print(resident.grown(before) / (1 << 20))"
    held = bytearray(b"1") * (1 << 30)
    grown = float(subprocess.check_output([sys.executable, "-c", code]))
    assert len(held) == 1 << 30
    assert 45 < grown < 60


def test_without_jax_a_line_says_so(fake_cells, monkeypatch, capsys):
    monkeypatch.setattr(cells.importlib.util, "find_spec", lambda name: None)
    run("--clones", "1,2", "--against", "plain,jax", "--repeat", "1")
    printed = capsys.readouterr()
    assert (
        "jax is not installed (`pip install 'keras_clones[jax]'`): its cells "
        "are left out." in printed.err
    )
    assert "jax" not in printed.out


def test_cells_of_jax(fake_cells, monkeypatch, capsys):
    monkeypatch.setattr(cells.importlib.util, "find_spec", lambda name: name)
    models = "--models", "mlp,own,minibatch", "--repeat", "1"
    main(["benchmark", *models, "--clones", "1,2,4", "--against", "jax"])
    printed = capsys.readouterr()
    assert "steps of own, minibatch are written for TensorFlow" in printed.err
    lines = printed.out.splitlines()
    assert [line.split()[:3] for line in lines if " jax" in line] == [
        ["mlp", "jax", "2.00"],
        ["mlp", "jax", "2"],
        ["mlp", "jax", "4"],
    ]
    settings = jax_cell.settings(
        Cell("mlp", "jax", 4, threads=(2, 1)), {"XLA_FLAGS": "--of=mine"}
    )
    assert settings == {
        "KERAS_BACKEND": "jax",
        "XLA_FLAGS": "--of=mine --xla_force_host_platform_device_count=4",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "NPROC": "2",
    }


@pytest.mark.full
@pytest.mark.parametrize("devices", [1, 2])
def test_jax_runs_in_a_process_of_its_own(devices):
    pytest.importorskip("jax")
    found = processes.run_cell(Cell("mlp", "jax", devices, steps=5))
    assert "error" not in found, found
    assert 0 < found["ms"] < 1000 * found["first"]


@pytest.mark.full
def test_mirrored_strategy_runs_in_a_process_of_its_own():
    mirrored = processes.run_cell(COPY._replace(steps=2))
    assert mirrored["ms"] > 0
    assert "bytes" not in mirrored


def test_a_cell_that_raises_says_the_last_line_of_why(monkeypatch, capsys):
    def measure(cell):
        raise RuntimeError("first line\nlast line\n")

    monkeypatch.setattr(cell, "measure", measure)
    cell.main(json.dumps(PLAIN._asdict()))
    result = json.loads(capsys.readouterr().out)
    assert result == {"error": "RuntimeError: last line"}


@pytest.fixture
def fake_process(monkeypatch, tmp_path):
    """Let a shell script stand for the process of a cell."""

    def fake(body):
        script = tmp_path / "python"
        script.write_text(f"#!/bin/sh\n{body}\n")
        script.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(script))

    return fake


def test_a_process_that_crashes_or_hangs_says_so(fake_process, monkeypatch):
    fake_process("echo killed by the system >&2; exit 9")
    assert processes.run_cell(PLAIN) == {
        "error": "exit code 9: killed by the system"
    }
    fake_process("exec sleep 3600")
    monkeypatch.setattr(processes, "_MOST_SECONDS", 0.2)
    result = processes.run_cell(PLAIN)
    assert result == {"error": "no result after 0.2 seconds"}


def test_a_pair_runs_alone_and_then_two_that_start_together(
    fake_process, tmp_path
):
    # Of the pair, each is ready before any goes on.
    log = tmp_path / "log"
    fake_process(
        f"echo ready >> {log}; echo ready; read line; echo $line >> {log}; "
        "sleep 0.2; echo '{\"ms\": 5.0}'"
    )
    pair = processes.run_pair(CONTROL)
    assert pair == {"alone": 5.0, "together": [5.0, 5.0]}
    assert log.read_text().split() == [
        "ready",
        "go",
        *["ready"] * 2,
        "go",
        "go",
    ]
    fake_process("echo no room >&2; exit 3")
    assert processes.run_pair(CONTROL)["error"] == "exit code 3: no room"
    fake_process('echo \'{"error": "ValueError: no"}\'')
    assert processes.run_pair(CONTROL) == {"error": "ValueError: no"}


def test_the_stopwatch_waits_after_the_warm_up(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("go\nrest"))
    stopwatch = timed_fit.Stopwatch(wait=True)
    for batch in range(timed_fit.WARM_UP + 3):
        assert sys.stdin.tell() == (3 if batch > timed_fit.WARM_UP else 0)
        stopwatch.on_train_batch_end(batch)
    assert capsys.readouterr().out == "ready\n"
    assert len(stopwatch.ends) == timed_fit.WARM_UP + 3
    assert stopwatch.ends == sorted(stopwatch.ends)


@pytest.mark.full
def test_every_model_fits_its_task():
    for name, task in cell.TASKS.items():
        model = task.make()
        if name.startswith("minibatch"):
            images = np.ones((2, *task.shape), "float32")
            assert model.critic(images).shape == (2, 1)
            assert model.generator(np.ones((2, 64))).shape == images.shape
            continue
        assert model.input_shape == (None, *task.shape), name
        outputs = (*task.shape, task.ids) if task.masked else (10,)
        assert model.output_shape == (None, *outputs), name
    assert cell.TASKS["wide"].make().count_params() > 10_000_000
