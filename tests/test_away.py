"""What the profiler shows of clones on other hosts, which it does not trace."""

import dataclasses

import keras
import pytest
from test_cluster import run

from keras_clones import CloneProfiler, clone_model, deployment
from keras_clones.callbacks import away
from keras_clones.callbacks.away import AWAY, HOME, STARTED, THERE, Hosts
from keras_clones.callbacks.lanes import Places, classify
from keras_clones.callbacks.verdict import Machine, make_report
from keras_clones.look.timeline import Event, Window

HERE, ONE, TWO, THREE = (f"clone_{i} on somewhere" for i in range(4))
HOSTS = Hosts(
    {HERE: "worker 0", ONE: "worker 1", TWO: "worker 1", THREE: "worker 2"},
    "worker 0",
)


def step(begin):
    """Return the marks of a step, of which clone 2 takes 9 seconds."""
    marks = [
        ("", STARTED, 1),
        (HERE, THERE, 3),
        ("worker 1", HOME, 4),
        (ONE, THERE, 5),
        (THREE, THERE, 6),
        ("worker 2", HOME, 7),
        (TWO, THERE, 10),
        ("worker 1", HOME, 12),
    ]
    return [
        Event(
            lane,
            phase if phase == HOME else f"{phase} forth",
            begin + second,
            begin + second,
        )
        for lane, phase, second in marks
    ]


def test_lanes_of_other_hosts_show_how_long_clones_are_away():
    forward = Event(HERE, "forward", 1.5, 3.0)
    shown = away.show([*step(0), forward, *step(20)], HOSTS)
    first = [tuple(event[:4]) for event in shown if event.start < 20]
    assert sorted(first) == sorted(
        [
            (HERE, "forward", 1.5, 3.0),
            (ONE, AWAY, 1, 5),
            (TWO, AWAY, 1, 10),
            (THREE, AWAY, 1, 6),
            # What had come before all of a host's clones were done is not
            # the sum of their gradients.
            (ONE, "gradient transfer", 10, 12),
            (TWO, "gradient transfer", 10, 12),
            (THREE, "gradient transfer", 6, 7),
        ]
    )
    assert len(shown) == 1 + 2 * 6


@pytest.mark.parametrize("per_window", [1, 2])
def test_the_slowest_clone_of_each_replica_counts(per_window):
    events = [*step(0), *step(20)]
    windows = [Window(0, 1, 0, 20), Window(1, 1, 20, 40)]
    if per_window == 2:
        windows = [Window(0, 2, 0, 40)]
    seconds = away.seconds_by_host(events, windows, HOSTS)
    assert seconds == {"worker 0": 2, "worker 1": 9, "worker 2": 5}


def test_the_way_back_counts_by_itself():
    marks = [
        ("", "started forth", 1),
        (HERE, "there forth", 2),
        # The number of a clone may be behind what it is of.
        ("", "started back", 6),
        (ONE, "there forth", 7),
        (ONE, "there back", 8),
        (HERE, "there back", 9),
    ]
    events = [Event(lane, phase, at, at) for lane, phase, at in marks]
    seconds = away.seconds_by_host(events, [Window(0, 1, 0, 20)], HOSTS)
    assert seconds == {"worker 0": 1 + 3, "worker 1": 6 + 2}
    shown = [event[:4] for event in away.show(events, HOSTS)]
    assert shown == [(ONE, AWAY, 1, 7), (ONE, AWAY, 6, 8)]


def test_the_verdict_names_the_replica_that_others_wait_for():
    seconds = {"worker 0": 0.002, "worker 1": 0.009, "worker 2": 0.005}
    hosts = HOSTS._replace(seconds=seconds)
    events = [Event(ONE, AWAY, 0.0, 0.009)]
    report = make_report(
        events,
        list(HOSTS.of_lanes),
        [Window(0, 1, 0, 0.01)],
        Machine(4, 9),
        hosts,
    )
    assert report.bound_by == "other hosts" and report.hosts == seconds
    assert (
        "All wait for worker 1 (clone_1, clone_2): its gradients are there "
        "after 9 ms, 1.8 times as long as the next replica takes (5 ms)"
    ) in report.verdict
    assert "for fewer rows on worker 1" in report.advice[0]
    even = hosts._replace(seconds=dict.fromkeys(seconds, 0.005))
    assert away.slowest(even) is None and away.advise(even) == ()
    assert "All replicas take about as long" in away.describe(even)
    assert away.advise(hosts._replace(shared=True)) == ()
    assert "where that is measured" in away.describe(HOSTS)


def test_names_tell_of_hosts():
    lanes = [*HOSTS.of_lanes]
    path = "while/clone_arrivals/{}/PartitionedCall/A:AssignVariableOp"
    found = away.mark_of(path.format("back/of_2"), lanes)
    assert found == (TWO, f"{THERE} back")
    found = away.mark_of(path.format("forth/start"), lanes)
    assert found == ("", f"{STARTED} forth")
    assert away.mark_of("clone_2/dense/MatMul:MatMul", lanes) is None
    names = {
        "bring_home/on_CPU_0_of_worker_1/AddN_2/_40": "worker 1",
        "a/bring_home_1/on_CPU_0_of_worker_12_3/AddN/_4": "worker 12",
        "bring_home/on_CPU_1/AddN/_4": None,
    }
    assert {name: away.host_sending(name) for name in names} == names
    devices = {"/job:worker/task:0/CPU:1": ONE, "CPU:1": TWO}
    places = Places("home", {}, devices, frozenset(), frozenset())
    name = "bring_home/on_CPU_1{}/concat:ConcatV2"
    assert classify(name.format(""), places)[0] == TWO
    assert classify(name.format("_of_worker_0"), places)[0] == ONE
    assert classify(name.format("_of_worker_0_3"), places)[0] == ONE


def test_replicas_that_step_by_themselves_are_refused(tmp_path):
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    clone_model(model, 2)
    made = deployment(model)
    made.config = dataclasses.replace(made.config, sync=False)
    callback = CloneProfiler((1, 2), tmp_path / "step")
    callback.set_model(model)
    callback.set_params({})
    with pytest.raises(ValueError, match="sync=False"):
        callback._check_fit()


@pytest.mark.full
def test_a_slow_replica_is_named_and_gets_fewer_rows(tmp_path):
    # Other processes may use the cores too, and take the difference away.
    for _ in range(3):
        found = run("slow.py", "FOUND", tmp_path, ps=0)
        ratios = [
            seconds["worker 1"] / seconds["worker 0"]
            for seconds in (found["hosts"], found["own"])
        ]
        if min(ratios) > 1.5 and found["sizes"][0] > 25:
            break
    assert min(ratios) > 1.5
    assert "All wait for worker 1 (clone_1)" in found["verdict"]
    lane = "clone_1 on /job:worker/task:1/CPU:0"
    assert found["phases"][lane]["on another host"] > 0
    assert found["bounds"]["other hosts"] > found["bounds"]["overhead"]
    first, second = found["sizes"]
    assert first + second == 40 and first > 25
    assert max(found["differences"]) < 1e-12
