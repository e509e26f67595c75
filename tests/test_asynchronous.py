"""Replicas that step by themselves: no row is left out, none waits."""

import itertools
import json
import re
import threading
import time
import types

import keras
import numpy as np
import pytest
import tensorflow as tf
from test_cluster import HERE, run
from test_watch import free_addresses, run_tasks

from keras_clones import DeploymentConfig, _keras, clone_model
from keras_clones.cluster import host_datasets, watch
from keras_clones.cluster.host_datasets import OneByOne
from keras_clones.step import asynchronous


class Slow:
    """A replica whose steps take as long as it is told."""

    def __init__(self, name, seconds=0.0):
        self.name, self.prefix, self.seconds = name, name, seconds
        self.seen, self.forgotten, self.lost = [], 0, False

    def step_on(self, data):
        self.seen.append(data)
        began = len(APPLIED)

        def step():
            time.sleep(self.seconds)
            if self.lost:
                raise tf.errors.UnavailableError(None, None, "gone")
            STALENESS.append(len(APPLIED) - began)
            APPLIED.append(data)
            return {"loss": float(np.ravel(data)[0])}

        return step

    def forget(self):
        self.forgotten += 1

    def is_lost(self):
        return self.lost


APPLIED, STALENESS = [], []


@pytest.fixture(autouse=True)
def nothing_applied():
    APPLIED.clear()
    STALENESS.clear()


def steps(replicas, numbers, bound=None, num_batches=1):
    function = asynchronous.Replicas(replicas, bound, num_batches)
    iterator = iter(range(numbers))
    logs = []
    for _ in range(numbers // num_batches):
        logs.append(function(iterator))
    function.drain()
    return logs


def test_a_slow_replica_keeps_nobody():
    slow, quick = Slow("slow", 0.2), Slow("quick", 0.01)
    steps([quick, slow], 30)
    assert sorted(APPLIED) == list(range(30))
    assert len(quick.seen) > 3 * len(slow.seen) > 0


@pytest.mark.parametrize("bound", [0, 1, 2, 5])
def test_no_step_is_staler_than_the_bound(bound):
    replicas = [Slow(str(i), 0.002 * (i + 1) ** 2) for i in range(4)]
    steps(replicas, 60, bound)
    assert sorted(APPLIED) == list(range(60))
    assert max(STALENESS) <= bound
    # As far as it goes, they do run at the same time.
    assert bound == 0 or max(STALENESS) > 0


def test_a_call_takes_as_many_batches_as_are_run_at_once():
    logs = steps([Slow("0"), Slow("1")], 12, num_batches=4)
    assert len(logs) == 3 and sorted(APPLIED) == list(range(12))
    assert all(set(found) == {"loss"} for found in logs)


def test_a_step_of_a_lost_replica_is_run_again(monkeypatch):
    lost, other = Slow("worker 1", 0.01), Slow("worker 2", 0.01)
    monkeypatch.setattr(watch, "explain", lambda error: ConnectionError("x"))
    function = asynchronous.Replicas([other, lost], None, 1)
    iterator = iter(range(20))
    with pytest.warns(UserWarning, match="worker 1 is lost, and the others"):
        for i in range(20):
            lost.lost = i > 9
            function(iterator)
        function.drain()
    assert sorted(APPLIED) == list(range(20))
    assert lost.forgotten == 1


def test_an_error_of_a_step_is_raised_and_nothing_runs_on():
    class Wrong(Slow):
        def step_on(self, data):
            def step():
                raise ZeroDivisionError("of the user's own")

            return step if data == 4 else super().step_on(data)

    with pytest.raises(ZeroDivisionError, match="of the user's own"):
        steps([Wrong("0"), Wrong("1")], 20)
    assert len(APPLIED) < 20


def test_after_an_error_of_a_trace_steps_go_on():
    class Once(Slow):
        def step_on(self, data):
            if data == 3:
                raise ValueError("cannot be traced")
            return super().step_on(data)

    function = asynchronous.Replicas([Once("0"), Once("1")], None, 1)
    iterator = iter(range(8))
    for _ in range(3):
        function(iterator)
    with pytest.raises(ValueError, match="cannot be traced"):
        function(iterator)
    for _ in range(4):
        function(iterator)
    function.drain()
    assert sorted(APPLIED) == [0, 1, 2, 4, 5, 6, 7]


def test_data_that_a_host_has_read_go_to_its_replica(monkeypatch):
    replicas = [Slow(name) for name in ("a", "b")]
    monkeypatch.setattr(
        asynchronous.from_hosts,
        "read_apart",
        lambda iterator, n: (("b", x) for x in itertools.islice(iterator, n)),
    )
    function = asynchronous.Replicas(replicas, 0, 1)
    iterator = iter(range(6))
    for _ in range(6):
        function(iterator)
    function.drain()
    assert replicas[1].seen == list(range(6)) and not replicas[0].seen


@pytest.fixture
def two_hosts(monkeypatch):
    """Let two CPUs be those of hosts that read; return what is lost."""
    lost = set()

    def host_of(device):
        return f"host {device[-1]}"

    monkeypatch.setattr(host_datasets, "host_of", host_of)
    seen = types.SimpleNamespace(host_of=host_of)
    monkeypatch.setattr(asynchronous.from_hosts, "hosts", seen)
    monkeypatch.setattr(host_datasets._tf, "forget_task", lambda *task: None)
    monkeypatch.setattr(watch, "is_lost", lambda prefix: prefix in lost)
    explain = watch.explain
    monkeypatch.setattr(
        watch,
        "explain",
        lambda error: (
            ConnectionError("x")
            if isinstance(error, tf.errors.UnavailableError)
            else explain(error)
        ),
    )
    next_of = OneByOne.next_of

    def next_if_there(iterator, i):
        if host_of(iterator.devices[i]) in lost and i not in iterator._ended:
            raise tf.errors.UnavailableError(None, None, "gone")
        return next_of(iterator, i)

    monkeypatch.setattr(OneByOne, "next_of", next_if_there)
    return lost


@pytest.mark.parametrize("when", ["step", "read", "end"])
def test_rows_of_a_host_that_is_lost_are_read_by_another(two_hosts, when):
    devices = [
        f"/job:localhost/replica:0/task:0/device:CPU:{i}" for i in range(2)
    ]
    made = []

    def make(i, device):
        made.append((i, device))
        with tf.device(device):
            return tf.data.Dataset.range(20).shard(2, i).batch(1)

    datasets = [make(i, device) for i, device in enumerate(devices)]
    spec = datasets[0].element_spec
    data = host_datasets.HostsDataset(spec, devices, datasets, make)
    replicas = [Slow(f"host {i}", 0.005) for i in range(2)]
    function = asynchronous.Replicas(replicas, None, 1)
    iterator = iter(data)
    with pytest.warns(UserWarning, match="host 1 is lost, and the others"):
        # As many calls as Keras makes, who has counted the batches.
        for call in range(int(data.cardinality())):
            if call == 5 and when != "end":
                if when == "read":
                    function.drain()
                two_hosts.add("host 1")
                replicas[1].lost = True
            if call == 9 and when == "end":
                function.wait()
                replicas[1].seconds = 0.3
            function(iterator)
        if when == "end":
            two_hosts.add("host 1")
            replicas[1].lost = True
        function.drain()
    applied = [int(one[0]) for one in APPLIED]
    assert set(applied) == set(range(20))
    # What the host had read since all was done with is given twice.
    assert len(applied) <= 20 + {"step": 5, "read": 0, "end": 10}[when]
    assert made[2:] == [(1, devices[0])] and replicas[1].forgotten == 1
    # The next epoch begins without it.
    assert [*iter(data).devices] == [devices[0]] * 2


def test_the_last_replica_that_is_lost_ends_it(monkeypatch):
    monkeypatch.setattr(watch, "explain", lambda error: ConnectionError("x"))
    gone = Slow("worker 0")
    gone.lost = True
    with pytest.raises(ConnectionError):
        steps([gone], 3)


def test_additions_of_threads_are_all_there():
    total = keras.Variable(0.0, dtype="float64")

    def add():
        for _ in range(50):
            concrete()

    with _keras.adding_at_once([total]):

        @tf.function
        def step():
            for _ in range(20):
                total.assign_add(1.0)

        concrete = step.get_concrete_function()
    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert float(total.value) == 4 * 50 * 20
    assert "assign_add" not in vars(total)


def test_config_of_replicas_that_step_by_themselves():
    with pytest.raises(TypeError, match="`sync` must be a boolean"):
        DeploymentConfig(sync=1)
    with pytest.raises(ValueError, match="pass `sync=False` with it"):
        DeploymentConfig(max_staleness=1)
    with pytest.raises(ValueError, match="`max_staleness` must be"):
        DeploymentConfig(sync=False, max_staleness=-1)
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    with pytest.raises(ValueError, match=r"keras_clones\.connect"):
        clone_model(model, config=DeploymentConfig(num_replicas=2, sync=False))


def check(found, least=0.97):
    assert found["accuracy"] > least
    assert np.all(np.array(found["rows"]) >= 1400)
    assert np.all(np.array(found["least"]) >= 1)


@pytest.mark.full
def test_digits_with_replicas_that_step_by_themselves():
    """As they like, and no staler than a bound."""
    trainings = run("asynchronous.py", "FOUND", "none", "1")
    assert [*trainings] == ["none", "1"]
    for found in trainings.values():
        check(found)
        assert set(found["rows"]) == {1400.0}
        assert found["told"] == []
    assert trainings["none"]["steps"] == 44 * 10


@pytest.mark.full
@pytest.mark.parametrize("reader", ["none", "hosts"])
def test_a_training_goes_on_without_a_replica_that_dies(tmp_path, reader):
    *workers, ps = free_addresses(4)
    cluster = {"worker": workers, "ps": [ps]}
    command = [HERE / "asynchronous.py", reader]
    _, printed = run_tasks(cluster, tmp_path, *command, seconds=240)
    found = json.loads(re.search(r"^FOUND (.*)$", printed, re.M)[1])[reader]
    # After half as many epochs.
    check(found, 0.95)
    # The step that was lost ran again, after some of its rows were counted,
    # or all that its host had read in the epoch.
    twice = 32 if reader == "none" else 467
    assert sum(found["rows"]) <= 1400 * len(found["rows"]) + twice
    assert "worker 1 is lost" in found["told"][0]
