"""What `CloneProfiler` shows is what the training steps did."""

import importlib.util
import itertools
import json
import time

import cases
import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from matplotlib.backends.backend_agg import FigureCanvasAgg

from keras_clones import CloneProfiler, clone_model
from keras_clones.callbacks import lanes, profiler, verdict
from keras_clones.callbacks.lanes import WAITING, Places, classify
from keras_clones.callbacks.trace import STEP, Span, find_windows, place
from keras_clones.callbacks.verdict import (
    KINDS,
    Machine,
    advise,
    make_report,
    with_another_clone,
)
from keras_clones.look import timeline
from keras_clones.look.timeline import (
    PIPELINE,
    Event,
    Window,
    chrome_trace,
    join,
    typical,
)

HOME, CLONE_0, CLONE_1 = "CPU:0 (variables)", "clone_0 on A", "clone_1 on B"
BESIDE = "a lane beside"
LANES = [PIPELINE, WAITING, HOME, CLONE_0, CLONE_1, BESIDE]


def step_of(kind):
    """Return the events of a made-up step of 110 ms that a kind bounds.

    Every kind of work takes 10 ms by itself, but the one takes 50 ms.
    """
    work = [
        ("input", WAITING, "input"),
        ("transfer", CLONE_1, "mirror"),
        ("compute", CLONE_1, "forward"),
        ("update", HOME, "update"),
        ("metrics", HOME, "metrics"),
        ("other hosts", CLONE_0, "on another host"),
        ("overhead", None, None),
    ]
    events, now = [], 7.0
    for name, lane, phase in work:
        end = now + (0.05 if name == kind else 0.01)
        if lane is not None:
            events.append(Event(lane, phase, now, end))
        now = end
    # Work beside that of a kind before its own, which takes no time.
    first = ["compute", "update", "transfer", "metrics", "other hosts", "input"]
    spans = {name: events[i] for i, (name, *_) in enumerate(work[:-1])}
    for one, other in itertools.combinations(first, 2):
        start, end = spans[one].start, spans[one].end
        events.append(Event(BESIDE, spans[other].phase, start, end))
    events.append(Event(PIPELINE, "input", 7.0, now))
    return events, Window(12, 1, 7.0, now)


@pytest.mark.parametrize("kind", [*KINDS, "overhead"])
def test_each_moment_of_a_step_counts_once(kind):
    events, window = step_of(kind)
    later = [e._replace(start=e.start + 1, end=e.end + 1) for e in events]
    windows = [window, Window(13, 1, window.start + 1, window.end + 1)]
    report = make_report(events + later, LANES, windows, Machine(2, 1.0))
    assert report.bound_by == kind
    expected = dict.fromkeys([*KINDS, "overhead"], 0.01) | {kind: 0.05}
    assert report.bounds == pytest.approx(expected)
    assert report.seconds == pytest.approx(0.11)
    assert list(report.phases) == LANES
    away = {"on another host": expected["other hosts"]}
    assert report.phases[CLONE_0] == pytest.approx(away)
    assert report.phases[CLONE_1] == pytest.approx(
        {"mirror": expected["transfer"], "forward": expected["compute"]}
    )
    assert f"110 ms, bound by {kind}: {kind} 45%" in report.verdict
    assert all(advice in report.verdict for advice in report.advice)


def test_steps_of_one_call_share_its_time():
    events, window = step_of("update")
    window = window._replace(steps=4)
    report = make_report(events, LANES, [window], Machine(2, 1.0))
    assert report.seconds == pytest.approx(0.0275)
    assert report.phases[HOME]["update"] == pytest.approx(0.0125)


def test_small_gaps_belong_to_what_came_before():
    events = [
        Event(HOME, "update", 0.0, 1.0),
        Event(HOME, "metrics", 0.5, 0.6),
        Event(HOME, "update", 1.00001, 2.0),
        Event(HOME, "metrics", 2.001, 3.0),
        Event(CLONE_0, "forward", 3.00001, 4.0),
    ]
    ends = [event.end for event in join(events)]
    assert ends == [1.00001, 0.6, 2.0, 3.0, 4.0]


def test_another_clone_divides_the_compute_where_there_is_room():
    bounds = {"compute": 0.6, "transfer": 0.1, "overhead": 0.2}
    assert with_another_clone(bounds, Machine(2, 4.0)) == pytest.approx(0.7)
    assert with_another_clone(bounds, Machine(2, 1.2)) == pytest.approx(0.8)
    assert with_another_clone(bounds, Machine(2, 1.0)) == pytest.approx(0.9)


def test_advice_fits_what_bounds_the_step():
    def advice(kind, n=2, saved=0.3, compiled=False, several_steps=False):
        return " ".join(
            advise(
                kind,
                n,
                saved=saved,
                compiled=compiled,
                several_steps=several_steps,
            )
        )

    assert "num_clones=3" in advice("compute")
    assert "num_clones" not in advice("compute", saved=0.0)
    assert "jit_compile" in advice("compute")
    assert "jit_compile" not in advice("compute", compiled=True)
    assert advice("compute", saved=0.0, compiled=True)
    assert "larger batch" in advice("update")
    assert "fewer clones" in advice("transfer")
    assert "fewer clones" not in advice("transfer", n=1)
    assert "prefetch" in advice("input")
    assert "metrics" in advice("metrics")
    assert "steps_per_execution" in advice("overhead")
    assert "steps_per_execution" not in advice("overhead", several_steps=True)


PLACES = Places(
    home=HOME,
    clones={"clone_0": CLONE_0, "clone_1": CLONE_1},
    devices={"CPU:0": HOME, "GPU:0": CLONE_0, "GPU:1": CLONE_1},
    optimizers=frozenset({"adam"}),
    forward=frozenset({"net", "compile_loss"}),
)


@pytest.mark.parametrize(
    ("path", "lane", "phase"),
    [
        ("send_mirrors/Read_3/ReadVariableOp:ReadVariableOp", HOME, "mirror"),
        ("while/body/_1/send_mirrors/on_GPU_1/call/split:SplitV", 1, "mirror"),
        ("split_batch/split:SplitV", HOME, "mirror"),
        ("clone_1/PartitionedCall/net/dense/MatMul:MatMul", 1, "forward"),
        ("clone_0_1/PartitionedCall/gradients/a:Mul", 0, "backward"),
        ("clone_0/call/gradient_tape/net/dense/MatMul:MatMul", 0, "backward"),
        ("clone_0/call/backward_pass/PyFunc:PyFunc", 0, "backward"),
        ("clone_1/PartitionedCall/_9:_Send", 1, "gradient transfer"),
        ("bring_home/on_GPU_0/call/concat:ConcatV2", 0, "gradient transfer"),
        ("bring_home/on_CPU_0_1/call/s:SplitV", HOME, "gradient transfer"),
        ("merge_gradients/AddN_4:AddN", HOME, "gradient transfer"),
        ("cond/then/_9/cond/adam/Square_3:Square", HOME, "update"),
        ("adam/clone_1/Square:Square", HOME, "update"),
        ("update_metrics_1/ArgMax:ArgMax", HOME, "metrics"),
        ("compile_loss/mse/Sum:Sum", HOME, "forward"),
        ("Cast_7:Cast", HOME, "other"),
    ],
)
def test_names_tell_lanes_and_phases(path, lane, phase):
    lane = {0: CLONE_0, 1: CLONE_1}.get(lane, lane)
    assert classify(f"StatefulPartitionedCall/{path}", PLACES) == (lane, phase)


def test_streams_of_gpus_take_the_place_of_the_host():
    def kernel(device, line, name, start, operation=""):
        stats = {"tf_op": operation} if operation else {}
        plane = f"/device:GPU:{device}"
        return Span(plane, f"{line} 1", name, start, start + 1.0, stats)

    def host(name, start, end, /, **stats):
        return Span("/host:CPU", "tf_Compute 1", name, start, end, stats)

    call = "StatefulPartitionedCall/clone_1/PartitionedCall"
    start = "ExecutorState::ProcessAsync::Start"
    process = "ExecutorState::Process"
    spans = [
        host(STEP, 0.0, 100.0, step_num=3),
        host("FunctionRun", 1.0, 50.0, id=7),
        host(process, 2.0, 49.0, id=7),
        host("adam/Square:Square", 2.5, 2.6),
        host(start, 3.0, 48.0, name=call, step_id=7),
        host("FunctionRun", 4.0, 5.0, id=8),
        host(process, 6.0, 47.0, id=8),
        host("net/dense/MatMul:MatMul", 7.0, 8.0),
        kernel(0, "Stream #14(MemcpyH2D)", "MemcpyH2D", 10.0),
        kernel(1, "Stream #13(Compute)", "sgemm", 12.0, "net/dense/Mul:Mul"),
        kernel(1, "Stream #13(Compute)", "s", 13.0, "gradient_tape/net/M:M"),
        kernel(1, "Stream #13(Compute)", "fusion_1", 14.0),
        kernel(1, "Stream #13(Compute)", "concat", 14.5, "a::on_GPU_1/c:C"),
        kernel(1, "Stream #15(MemcpyD2H)", "MemcpyD2H", 15.0),
        # What a tool derives from the streams is not work of its own.
        kernel(1, "XLA Modules", "cluster_0", 11.0),
    ]
    found = {(e.lane, e.phase, e.start) for e in place(spans, PLACES)}
    assert found == {
        (HOME, "update", 2.5),
        (CLONE_0, "mirror", 10.0),
        (CLONE_1, "forward", 12.0),
        (CLONE_1, "backward", 13.0),
        (CLONE_1, "forward and backward", 14.0),
        (CLONE_1, "forward", 14.5),
        (CLONE_1, "gradient transfer", 15.0),
    }
    # Without a GPU, the same operation of the host is the work.
    places = PLACES._replace(devices={"CPU:0": HOME, "CPU:1": CLONE_1})
    found = {(e.lane, e.phase) for e in place(spans[:8], places)}
    assert found == {(HOME, "update"), (CLONE_1, "forward")}


def test_a_step_lasts_until_the_next_of_its_epoch():
    marks = [(4, 1.0, 2.0), (5, 2.5, 3.5), (6, 9.0, 9.5)]
    # The data ran out where these steps began.
    marks += [(6, 3.6, 8.0), (7, 9.6, 9.9)]
    spans = [
        Span("/host:CPU", "python 1", STEP, start, end, {"step_num": number})
        for number, start, end in marks
    ]
    calls = {4: (0, 1), 5: (0, 1), 6: (1, 1)}
    windows = find_windows(spans[::-1], calls)
    assert [w[2:] for w in windows] == [(1.0, 2.5), (2.5, 3.5), (9.0, 9.5)]
    assert typical(windows).first == 5


def test_chrome_trace_keeps_what_overlaps_apart():
    events = [
        Event(CLONE_0, "forward", 1.0, 3.0, "a"),
        Event(CLONE_0, "backward", 2.0, 4.0, "b"),
        Event(HOME, "update", 4.5, 9.0, "c"),
        Event(HOME, "update", 0.2, 0.4, "before the window"),
    ]
    found = chrome_trace(events, [HOME, CLONE_0], Window(0, 1, 1.0, 5.0))
    names, drawn = threads_of(found)
    assert [*names.values()] == [HOME, CLONE_0, f"{CLONE_0} (2)"]
    assert {
        (names[e["tid"]], e["name"], e["cat"], e["ts"], e["dur"]) for e in drawn
    } == {
        (CLONE_0, "a", "forward", 0.0, 2e6),
        (f"{CLONE_0} (2)", "b", "backward", 1e6, 2e6),
        (HOME, "c", "update", 3.5e6, 0.5e6),
    }


def threads_of(found):
    """Return a Chrome trace's names of threads, and its events."""
    names = {
        e["tid"]: e["args"]["name"]
        for e in found["traceEvents"]
        if e["ph"] == "M" and e["name"] == "thread_name"
    }
    return names, [e for e in found["traceEvents"] if e["ph"] == "X"]


def nap(x, seconds):
    """Return `x` after some seconds."""

    def sleep(value):
        time.sleep(seconds)
        return value

    result = tf.numpy_function(sleep, [x], x.dtype)
    result.set_shape(x.shape)
    return result


FORWARD, BACKWARD, UPDATE, METRICS, INPUT = 0.04, 0.06, 0.05, 0.03, 0.02
# A nap lasts longer on a busy machine, never shorter.
SLACK = 0.035


class NapLayer(layers.Layer):
    def __init__(self, both_ways):
        super().__init__()
        self.both_ways = both_ways

    def call(self, x):
        if not self.both_ways:
            return x + 0 * tf.stop_gradient(nap(x, FORWARD))

        @tf.custom_gradient
        def through(x):
            return nap(x, FORWARD), lambda upstream: nap(upstream, BACKWARD)

        return through(x)


class NapOptimizer(keras.optimizers.SGD):
    def update_step(self, gradient, variable, learning_rate):
        super().update_step(nap(gradient, UPDATE), variable, learning_rate)


class NapMetric(keras.metrics.MeanSquaredError):
    def update_state(self, y, y_pred, sample_weight=None):
        super().update_state(y, nap(y_pred, METRICS), sample_weight)


def napping_model(both_ways=True):
    """Make a model with one variable that takes known times in each phase."""
    inputs = keras.Input((4,))
    outputs = NapLayer(both_ways)(layers.Dense(1, use_bias=False)(inputs))
    model = keras.Model(inputs, outputs, name="net")
    optimizer = NapOptimizer(0.01, name="optim")
    model.compile(optimizer, "mse", metrics=[NapMetric()])
    return model


def rows(steps, batch_size, width=4, classes=None):
    rng = np.random.default_rng(0)
    x = rng.random((steps * batch_size, width), "float32")
    y = rng.random((len(x), 1), "float32")
    if classes:
        y = rng.integers(0, classes, len(x))
    data = tf.data.Dataset.from_tensor_slices((x, y))
    return data.batch(batch_size, drop_remainder=True)


def slow(data, seconds):
    """Make each batch of a dataset take some seconds."""
    return data.map(lambda x, y: (nap(x, seconds), y))


def profiled(model, data, path, steps=(2, 5), **kwargs):
    callback = CloneProfiler(steps, path)
    model.fit(data, callbacks=[callback], verbose=0, **kwargs)
    return callback


@pytest.mark.full_but("lanes1")
@pytest.mark.parametrize(
    "lanes", [["clone_0 on CPU:1"], ["clone_0 on CPU:1", "clone_1 on CPU:2"]]
)
def test_phases_take_the_time_that_they_took(lanes, tmp_path, capsys):
    model = napping_model()
    clone_model(model, devices=[lane.split()[-1] for lane in lanes])
    home = "CPU:0 (variables)"
    data = slow(rows(6, 6), INPUT).prefetch(1)
    report = profiled(model, data, tmp_path / "naps").report
    expected = {
        (PIPELINE, "input"): INPUT,
        (home, "update"): UPDATE,
        (home, "metrics"): METRICS,
        **{(lane, "forward"): FORWARD for lane in lanes},
        **{(lane, "backward"): BACKWARD for lane in lanes},
    }
    for (lane, phase), seconds in expected.items():
        assert seconds <= report.phases[lane][phase] < seconds + SLACK
    assert list(report.phases)[:3] == [PIPELINE, WAITING, home]
    assert report.bound_by == "compute"
    assert report.bounds["compute"] >= FORWARD + BACKWARD
    assert report.bounds["update"] >= UPDATE
    assert sum(report.bounds.values()) == pytest.approx(report.seconds)
    assert report.verdict in capsys.readouterr().out


def test_a_plain_model_has_one_lane(tmp_path):
    model = napping_model(both_ways=False)
    report = profiled(model, rows(6, 6), tmp_path / "naps").report
    assert list(report.phases) == [PIPELINE, WAITING, "CPU:0"]
    computed = report.phases["CPU:0"]
    assert FORWARD <= computed["forward"] < FORWARD + SLACK
    assert UPDATE <= computed["update"] < UPDATE + SLACK
    assert METRICS <= computed["metrics"] < METRICS + SLACK
    assert 0 < computed["backward"] < 0.01


def test_files_show_the_step(tmp_path):
    model = clone_model(napping_model(), devices=["CPU:1", "CPU:2"])
    profiled(model, rows(6, 6), tmp_path / "naps")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "naps.json",
        "naps.png",
    ]
    names, drawn = threads_of(json.loads((tmp_path / "naps.json").read_text()))
    assert all(e["ts"] >= 0 and e["dur"] > 0 for e in drawn)
    in_lane = sorted((e["tid"], e["ts"], e["ts"] + e["dur"]) for e in drawn)
    for (tid, _, end), (next_tid, start, _) in itertools.pairwise(in_lane):
        assert tid != next_tid or start >= end - 1e-3
    # Of what overlaps in a lane, some is drawn in a second row, "lane (2)".
    naps = {
        (names[e["tid"]].removesuffix(" (2)"), e["cat"]): e["dur"] * 1e-6
        for e in drawn
        if e["name"].endswith(":PyFunc") and names[e["tid"]] != PIPELINE
    }
    assert naps.keys() == {
        *itertools.product(
            ("clone_0 on CPU:1", "clone_1 on CPU:2"), ("forward", "backward")
        ),
        ("CPU:0 (variables)", "update"),
        ("CPU:0 (variables)", "metrics"),
    }
    assert naps["clone_1 on CPU:2", "backward"] >= BACKWARD
    from matplotlib import colors, image

    pixels = image.imread(tmp_path / "naps.png")[..., :3]
    for phase in ("forward", "backward", "update"):
        color = colors.to_rgb(profiler.timeline.PHASES[phase])
        # An area, not only the legend's patch.
        assert (np.abs(pixels - color).max(-1) < 0.02).sum() > 2000, phase


def compile_and_clone(model, num_clones, optimizer="adam", **kwargs):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"], **kwargs)
    return clone_model(model, num_clones)


class Rows(layers.Layer):
    """Uses a row of each of many small variables, all of which are sent."""

    def build(self, shape):
        self.tables = [self.add_weight(shape=(128, 128)) for _ in range(30)]

    def call(self, x):
        for table in self.tables:
            x = x + table[0, : x.shape[-1]]
        return x


@pytest.mark.full
def test_a_convnet_is_bound_by_compute(tmp_path):
    model = keras.Sequential(
        [
            keras.Input((768,)),
            layers.Reshape((16, 16, 3)),
            layers.Conv2D(32, 3, activation="relu"),
            layers.Conv2D(32, 3, activation="relu"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(10),
        ]
    )
    model = compile_and_clone(model, 2)
    data = rows(6, 256, 768, classes=10)
    report = profiled(model, data, tmp_path / "step").report
    assert report.bound_by == "compute"
    assert report.bounds["compute"] > 0.5 * report.seconds
    assert "bound by compute" in report.verdict


@pytest.mark.full
def test_a_large_table_with_a_tiny_batch_is_bound_by_its_update(tmp_path):
    # Clones compute with a few rows of it. Keras's Adam updates all of them.
    table = layers.Embedding(200_000, 64)
    model = keras.Sequential(
        [keras.Input((4,)), table, layers.Flatten(), layers.Dense(10)]
    )
    model = clone_model(compile_and_clone(model, 2), 2, update="keras")
    data = rows(6, 2, 4, classes=10)
    report = profiled(model, data, tmp_path / "step").report
    assert report.bound_by == "update"
    assert "larger batch" in report.verdict


@pytest.mark.full
def test_many_variables_hardly_used_are_bound_by_their_transfer(tmp_path):
    model = keras.Sequential([keras.Input((32,)), Rows(), layers.Dense(10)])
    model = compile_and_clone(model, 6, "sgd")
    data = rows(6, 8, 32, classes=10)
    report = profiled(model, data, tmp_path / "step").report
    assert report.bound_by == "transfer"
    assert "fewer clones" in report.verdict
    sent = [report.phases[f"clone_{i} on CPU:{i}"] for i in range(1, 6)]
    assert all(p["mirror"] > 0 and p["gradient transfer"] > 0 for p in sent)
    # What is on the variables device already is not sent.
    assert "mirror" not in report.phases["clone_0 on CPU:0"]


@pytest.mark.full_but("map")
@pytest.mark.parametrize("source", ["map", "generator"])
def test_slow_data_bounds_the_step_by_input(source, tmp_path):
    data = rows(6, 8, 32, classes=10)
    if source == "map":
        data = slow(data, 0.03)
    else:
        batches = [*data.as_numpy_iterator()]

        def generate():
            for batch in batches:
                time.sleep(0.03)
                yield batch

        data = tf.data.Dataset.from_generator(
            generate, output_signature=data.element_spec
        )
    model = keras.Sequential([keras.Input((32,)), layers.Dense(10)])
    model = compile_and_clone(model, 2)
    report = profiled(model, data, tmp_path / "step").report
    assert report.bound_by == "input"
    assert report.bounds["input"] > 0.015
    # The first batch of the profile was begun before it.
    assert report.phases[PIPELINE]["input"] > 0.015
    assert "prefetch" in report.verdict


def test_steps_of_one_execution_are_counted_one_by_one(tmp_path, capsys):
    model = napping_model()
    model.compile(NapOptimizer(name="optim"), "mse", steps_per_execution=2)
    clone_model(model, devices=["CPU:1", "CPU:2"])
    callback = profiled(model, rows(6, 6), tmp_path / "step", steps=(3, 6))
    report = callback.report
    # The range grows to whole calls, from step 4 to step 5.
    assert "steps 4 to 5" in capsys.readouterr().out
    forward = report.phases["clone_0 on CPU:1"]["forward"]
    assert FORWARD <= forward < FORWARD + SLACK
    update = report.phases["CPU:0 (variables)"]["update"]
    assert UPDATE <= update < UPDATE + SLACK
    assert report.seconds >= FORWARD + BACKWARD + UPDATE


@pytest.mark.full
def test_steps_are_counted_over_epochs(small, tmp_path, capsys):
    x, y = small[1:]
    model = clone_model(cases.compiled("mlp", steps_per_execution=3), 2)
    # Two calls an epoch, the second of which has one step.
    callback = CloneProfiler((4, 8), tmp_path / "step")
    model.fit(x, y, batch_size=5, epochs=2, callbacks=[callback], verbose=0)
    assert "steps 4 to 7" in capsys.readouterr().out


@pytest.mark.full
def test_a_range_goes_on_where_the_data_has_run_out(small, tmp_path, capsys):
    model, x, y = small
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(5)
    data = data.filter(lambda x, y: True)
    callback = profiled(model, data, tmp_path / "step", (2, 6), epochs=2)
    assert "steps 2 to 5" in capsys.readouterr().out
    assert 0 < callback.report.seconds < 5


@pytest.mark.full
def test_a_compiled_clone_has_one_phase_for_both_passes(tmp_path):
    model = keras.Sequential([keras.Input((32,)), layers.Dense(10)])
    model = compile_and_clone(model, 2, jit_compile=True)
    data = rows(6, 8, 32, classes=10)
    report = profiled(model, data, tmp_path / "step").report
    for i in range(2):
        computed = report.phases[f"clone_{i} on CPU:{i}"]
        assert computed["forward and backward"] > 0
        assert "forward" not in computed


@pytest.mark.full
def test_outputs_gathered_run_backward_in_the_clones(tmp_path):
    model = napping_model()
    clone_model(model, devices=["CPU:1", "CPU:2"], loss="gather")
    report = profiled(model, rows(6, 6), tmp_path / "step").report
    for lane in ("clone_0 on CPU:1", "clone_1 on CPU:2"):
        assert FORWARD <= report.phases[lane]["forward"] < FORWARD + SLACK
        assert BACKWARD <= report.phases[lane]["backward"] < BACKWARD + SLACK


@pytest.mark.full
def test_training_stays_what_it_is(tmp_path):
    x, y = cases.arrays(40)["mlp"]
    trained = []
    for callbacks in ([], [CloneProfiler((3, 9), tmp_path / "step")]):
        model = clone_model(cases.compiled("mlp"), 2)
        history = model.fit(
            x, y, batch_size=5, epochs=2, callbacks=callbacks, verbose=0
        )
        trained.append((model.get_weights(), history.history))
    (weights, logs), (profiled_weights, profiled_logs) = trained
    assert callbacks[0].report is not None
    assert logs == profiled_logs
    for one, other in zip(weights, profiled_weights, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("error", "steps"),
    [
        (TypeError, 5),
        (TypeError, (1,)),
        (TypeError, (1, 2, 3)),
        (TypeError, (1.0, 2.0)),
        (TypeError, (False, True)),
        (TypeError, "ab"),
        (ValueError, (3, 3)),
        (ValueError, (5, 2)),
        (ValueError, (-1, 2)),
    ],
)
def test_steps_must_be_an_increasing_pair(error, steps):
    with pytest.raises(error, match=r"`steps` must be.*Received: steps="):
        CloneProfiler(steps)


def test_the_folder_must_be_writable(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"folder that exists.*Received: path"):
        CloneProfiler((1, 2), tmp_path / "none" / "step")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="folder that exists"):
        CloneProfiler((1, 2), tmp_path / "file" / "step")
    with pytest.raises(TypeError, match=r"`path` must be.*Received: path=3"):
        CloneProfiler((1, 2), 3)
    # The superuser may write everywhere.
    monkeypatch.setattr(profiler.os, "access", lambda *args: False)
    with pytest.raises(ValueError, match="written to"):
        CloneProfiler((1, 2), tmp_path / "step")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("step", "step"),
        ("step.png", "step"),
        ("step.json", "step"),
        ("step.v2", "step.v2"),
        ("logs/", "logs/clone_profile"),
        ("logs", "logs/clone_profile"),
        ("logs/step", "logs/step"),
        (".", "./clone_profile"),
    ],
)
def test_files_have_the_names_that_are_meant(path, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs").mkdir()
    assert CloneProfiler((1, 2), path).path == name
    with pytest.raises(ValueError, match="folder that exists"):
        CloneProfiler((1, 2), "none/")


def test_the_title_of_a_picture_stays_in_it():
    events, window = step_of("compute")
    report = make_report(events, LANES, [window], Machine(2, 4.0))
    title = f"Training step 12\n{report.verdict} {'and more ' * 20}"
    figure = timeline.draw(events, LANES, window, title)
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    [axes] = figure.axes
    box = figure._suptitle.get_window_extent(renderer)
    assert box.x0 > 0 and box.x1 < figure.bbox.width
    assert box.y0 > axes.bbox.y1 and box.y1 < figure.bbox.height
    text = figure._suptitle.get_text()
    assert text.split() == title.split()


@pytest.fixture(scope="module")
def small():
    """Return a cloned model, which tests go on training, and its data."""
    return clone_model(cases.compiled("mlp"), 2), *cases.arrays(20)["mlp"]


def test_a_range_past_the_end_is_refused_where_the_end_is_known(
    small, tmp_path
):
    model, x, y = small
    before = model.get_weights()
    callback = CloneProfiler((3, 9), tmp_path / "step")
    with pytest.raises(ValueError, match=r"8 steps \(2 .*Received: steps="):
        model.fit(x, y, batch_size=5, epochs=2, callbacks=[callback], verbose=0)
    for one, other in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    # One epoch of the range is enough for it to end in the second.
    callback = CloneProfiler((3, 8), tmp_path / "step")
    model.fit(x, y, batch_size=5, epochs=2, callbacks=[callback], verbose=0)
    assert callback.report.seconds > 0


@pytest.mark.full_but("steps0")
@pytest.mark.parametrize("steps", [(2, 9), (7, 9)])
def test_a_range_past_an_unknown_end_warns(small, steps, tmp_path):
    model, x, y = small
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(5)
    data = data.filter(lambda x, y: True)
    callback = CloneProfiler(steps, tmp_path / "step")
    with pytest.warns(UserWarning, match=r"after 4 steps.*nothing was written"):
        model.fit(data, callbacks=[callback], verbose=0)
    assert callback.report is None
    assert not [*tmp_path.iterdir()]
    # The profiler is free again.
    assert profiled(model, data, tmp_path / "step", (2, 4)).report is not None


def test_another_profiler_stops_no_training(small, tmp_path):
    model, x, y = small
    callback = CloneProfiler((1, 3), tmp_path / "step")
    tf.profiler.experimental.start(str(tmp_path / "other"))
    try:
        with pytest.warns(UserWarning, match="Another profiler runs"):
            model.fit(x, y, batch_size=5, callbacks=[callback], verbose=0)
    finally:
        tf.profiler.experimental.stop(save=False)
    assert callback.report is None
    assert not (tmp_path / "step.png").exists()


def test_a_profiler_stopped_by_others_stops_no_training(small, tmp_path):
    model, x, y = small
    stop = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: (
            tf.profiler.experimental.stop(save=False) if batch == 2 else None
        )
    )
    callback = CloneProfiler((1, 4), tmp_path / "step")
    with pytest.warns(UserWarning, match="was stopped by something else"):
        model.fit(x, y, batch_size=5, callbacks=[callback, stop], verbose=0)
    assert callback.report is None


def test_a_failed_training_leaves_the_callback_usable(small, tmp_path):
    model, x, y = small

    def fail(batch, logs):
        raise RuntimeError("no more")

    failing = keras.callbacks.LambdaCallback(on_train_batch_end=fail)
    callback = CloneProfiler((0, 3), tmp_path / "step")
    with pytest.raises(RuntimeError, match="no more"):
        model.fit(x, y, batch_size=5, callbacks=[callback, failing], verbose=0)
    model.fit(x, y, batch_size=5, callbacks=[callback], verbose=0)
    assert callback.report is not None


def test_files_that_cannot_be_written_stop_no_training(small, tmp_path):
    model, x, y = small
    (tmp_path / "step.json").mkdir()
    callback = CloneProfiler((1, 3), tmp_path / "step")
    with pytest.warns(UserWarning, match=r"could not write.*step\.json"):
        model.fit(x, y, batch_size=5, callbacks=[callback], verbose=0)


def test_eager_steps_are_refused(small, tmp_path):
    _, x, y = small
    model = clone_model(cases.make("mlp"), 2)
    model.compile("sgd", "sparse_categorical_crossentropy", run_eagerly=True)
    callback = CloneProfiler((1, 3), tmp_path / "step")
    with pytest.raises(ValueError, match="run_eagerly=False"):
        model.fit(x, y, batch_size=5, callbacks=[callback], verbose=0)


def test_matplotlib_is_asked_for_before_training(small, tmp_path, monkeypatch):
    model, x, y = small
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name == "matplotlib" else find(name),
    )
    callback = CloneProfiler((1, 3), tmp_path / "step")
    with pytest.raises(ImportError, match="pip install matplotlib"):
        model.fit(x, y, batch_size=5, callbacks=[callback], verbose=0)


def test_room_for_clones_is_devices_or_idle_cores(monkeypatch):
    model = clone_model(cases.compiled("mlp"), 2)
    monkeypatch.setattr(verdict, "_num_cores", lambda: 8)
    assert verdict.find_machine(model, busy=1.5) == Machine(2, 4.0)
    assert verdict.find_machine(model, busy=6.4) == Machine(2, 1.25)
    assert verdict.find_machine(model, busy=9.0) == Machine(2, 1.0)
    plain = cases.compiled("mlp")
    assert verdict.find_machine(plain, busy=2.0) == Machine(1, 4.0)

    def logical_devices(kind):
        return [f"/device:{kind}:{i}" for i in range(4)]

    monkeypatch.setattr(verdict, "logical_devices", logical_devices)
    monkeypatch.setattr(lanes, "logical_devices", logical_devices)
    assert verdict.find_machine(plain, busy=2.0) == Machine(1, 4.0)
    # On a GPU, a plain model's work is all there.
    assert lanes.find_places(plain).devices == {"GPU:0": "GPU:0"}
