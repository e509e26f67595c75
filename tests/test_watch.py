"""A host that is gone or stuck is named, and what waits for it ends."""

import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import threading
import time

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_clones import clone_model
from keras_clones.cluster import hello, watch
from keras_clones.cluster.launch import free_ports
from keras_clones.devices.hosts import Host

SCRIPT = pathlib.Path(__file__).parent / "cluster" / "fault.py"


def free_addresses(count):
    return [f"127.0.0.1:{port}" for port in free_ports(count)]


def run_tasks(cluster, folder, *command, seconds=120):
    """Run a script in all tasks; return what the first's process came to.

    It is started without `launch`, which ends all tasks when one ends.
    """
    tasks = []
    for job, addresses in cluster.items():
        for index in range(len(addresses)):
            task = {"cluster": cluster, "task": {"type": job, "index": index}}
            settings = {
                "TF_CONFIG": json.dumps(task),
                "FAULT_FOLDER": str(folder),
                "PYTHONPATH": str(SCRIPT.parents[2]),
            }
            tasks.append(
                subprocess.Popen(
                    [sys.executable, *map(str, command)],
                    env={**os.environ, **settings},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
    try:
        printed, _ = tasks[0].communicate(timeout=seconds)
    finally:
        for task in tasks:
            task.kill()
            task.communicate()
    return tasks[0].returncode, printed


def strike(folder, name, victim):
    """Run the script in all tasks of a cluster; return what it prints."""
    controller, worker, ps = free_addresses(3)
    cluster = {"chief": [controller], "worker": [worker], "ps": [ps]}
    code, printed = run_tasks(cluster, folder, SCRIPT, name, victim)
    assert code == 0, printed
    assert printed.splitlines()[-1] == "SAVED"
    return json.loads(re.search(r"^RAISED (.*)$", printed, re.M)[1])


@pytest.mark.full
def test_a_stuck_host_is_named_in_time(tmp_path):
    seconds, text = strike(tmp_path, "SIGSTOP", "worker")
    assert 3 < seconds < 15
    assert re.search(r"worker 0 \(127\.0\.0\.1:\d+\) has not answered", text)
    assert "keras_clones.Backup" in text


@pytest.mark.full
@pytest.mark.parametrize("victim", ["worker", "ps"])
def test_a_host_that_dies_is_named_at_once(tmp_path, victim):
    seconds, text = strike(tmp_path, "SIGKILL", victim)
    assert seconds < 5
    assert re.search(rf"{victim} 0 \(127\.0\.0\.1:\d+\) has ended", text)


@pytest.mark.full
def test_a_stuck_parameter_server_is_named_in_time(tmp_path):
    seconds, text = strike(tmp_path, "SIGSTOP", "ps")
    assert 3 < seconds < 15
    assert "ps 0" in text


def test_connections_to_one_address_are_shut_down():
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_server(("127.0.0.1", 0)) as other,
        socket.create_connection(server.getsockname()) as line,
        socket.create_connection(other.getsockname()) as kept,
    ):
        address = "{}:{}".format(*server.getsockname())
        watch._disconnect(Host("worker", 1, address))
        line.settimeout(5)
        assert line.recv(1) == b""
        kept.settimeout(0.2)
        with pytest.raises(TimeoutError):
            kept.recv(1)


@pytest.fixture
def pair():
    ends = socket.socketpair()
    yield ends
    for end in ends:
        end.close()


@pytest.fixture
def watching(pair, monkeypatch):
    """A watch of one host, whose questions this process answers itself."""
    one = watch.Watch({Host("worker", 1, "10.0.0.1:2222"): pair[0]}, 0.5)
    monkeypatch.setattr(watch, "_watches", [one])
    yield one
    one.stop()


def test_an_error_of_a_lost_host_says_so(watching, pair):
    error = tf.errors.UnavailableError(None, None, "Socket closed")
    pair[1].close()
    found = watch.explain(error)
    assert "worker 1 (10.0.0.1:2222) has ended" in str(found)


def test_threads_ask_whether_a_process_has_ended_without_waiting(pair):
    def ask():
        found.append(any(hello.has_ended(pair[0]) for _ in range(2000)))

    found = []
    threads = [threading.Thread(target=ask, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == [False] * 3


def test_a_lost_host_is_named_where_no_step_fails(watching, pair, monkeypatch):
    monkeypatch.setattr(watch, "_PAUSE", 0.05)
    monkeypatch.setattr(watch._tf.Apart, "run", lambda self, function: 2.0)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    clone_model(model, 2)
    model.compile("sgd", "mse")
    x, y = np.ones((4, 2)), np.ones((4, 1))
    watching.start()
    model.train_on_batch(x, y)
    pair[1].close()
    deadline = time.monotonic() + 10
    while not watching.seen_lost and time.monotonic() < deadline:
        time.sleep(0.05)
    for call in (model.train_on_batch, model.test_on_batch):
        with pytest.raises(ConnectionError, match=r"worker 1 .* has ended"):
            call(x, y)


def test_errors_of_the_users_own_are_left_alone(watching, pair):
    pair[1].close()
    assert watch.explain(ValueError("wrong")) is None


def test_errors_while_all_hosts_are_there(watching, monkeypatch):
    monkeypatch.setattr(watch, "_SECONDS_TO_NOTICE", 0.2)
    error = tf.errors.InvalidArgumentError(None, None, "shapes")
    assert watch.explain(error) is None


def test_a_host_that_does_not_answer_counts_as_stuck(watching, monkeypatch):
    cut = []
    monkeypatch.setattr(watch, "_disconnect", cut.append)
    monkeypatch.setattr(watch, "_PAUSE", 0.05)

    def fail(self, function):
        raise tf.errors.UnavailableError(None, None, "not there")

    monkeypatch.setattr(watch._tf.Apart, "run", fail)
    watching.start()
    deadline = time.monotonic() + 10
    while not cut and time.monotonic() < deadline:
        time.sleep(0.05)
    assert cut[0].name == "worker 1"
    assert "has not answered for" in watching.lost()[0]
