"""Processes of a cluster greet each other, and say what is wrong."""

import contextlib
import socket
import threading
import time
import warnings

import pytest
import tensorflow as tf

import keras_clones
from keras_clones import _tf
from keras_clones.cluster import gather, hello, join, serve
from keras_clones.cluster.launch import free_ports
from keras_clones.cluster.resolve import resolve
from keras_clones.devices.hosts import Host


@pytest.fixture
def addresses():
    return [f"127.0.0.1:{port}" for port in free_ports(3)]


def spec_of(addresses, job="worker", index=0):
    cluster = {"worker": addresses[:2], "ps": addresses[2:]}
    task = {"type": job, "index": index}
    return resolve({"cluster": cluster, "task": task}, {})


@contextlib.contextmanager
def answering(address, data):
    """Answer whoever comes to an address with some bytes."""
    with hello.listen(Host("worker", 0, address)) as listener:

        def answer():
            # Closing the listener ends it.
            with contextlib.suppress(OSError):
                while True:
                    line, _ = listener.accept()
                    line.recv(1000)
                    line.sendall(data)
                    held.append(line)

        held = []
        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(5)
        for line in held:
            line.close()


SETTINGS = bytes((0, 0, 0, 4, *5 * [0]))


def greet(spec, results, **changes):
    """Say hello as a task does, and keep what comes back."""

    def run():
        for _ in range(100):
            try:
                line = socket.create_connection(
                    hello.split(spec.controller.address), 5
                )
                break
            except OSError:
                time.sleep(0.02)
        message = {
            "job": spec.here.job,
            "task": spec.here.task,
            "jobs": spec.jobs,
            "versions": hello.versions(),
        }
        with line:
            line.settimeout(10)
            hello.send(line, **(message | changes))
            results[spec.here.name] = hello.receive(line)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def meet(addresses, timeout=10.0, data=SETTINGS, **changes):
    """Have a controller and two tasks meet; return what the tasks heard."""
    results = {}
    threads = [
        greet(spec_of(addresses, "worker", 1), results, **changes),
        greet(spec_of(addresses, "ps", 0), results),
    ]
    try:
        with answering(addresses[1], data), answering(addresses[2], SETTINGS):
            lines = gather.gather(spec_of(addresses), timeout)
            for line in lines.values():
                line.close()
    finally:
        for thread in threads:
            thread.join(10)
    return results


def test_all_tasks_are_told_to_go_on(addresses):
    go = {"go": True}
    assert meet(addresses) == {"worker 1": go, "ps 0": go}


def test_tasks_that_do_not_come_are_named(addresses):
    results = {}
    thread = greet(spec_of(addresses, "worker", 1), results)
    began = time.monotonic()
    with pytest.raises(TimeoutError) as caught:
        gather.gather(spec_of(addresses), 1.0)
    assert time.monotonic() - began < 5
    assert f"nothing from ps 0 ({addresses[2]})" in str(caught.value)
    assert "worker 1" not in str(caught.value)
    thread.join(10)
    # Who did come is told why it is not needed.
    assert results["worker 1"] == {"refused": str(caught.value)}


def test_an_address_that_never_answers_is_named(addresses):
    with pytest.raises(TimeoutError) as caught:
        meet(addresses, timeout=2.0, data=b"")
    message = str(caught.value)
    assert f"no answer from worker 1 ({addresses[1]})" in message
    assert "ps 0" not in message


def test_something_else_that_answers_is_no_server(addresses):
    with pytest.raises(TimeoutError, match="no answer from worker 1"):
        meet(addresses, timeout=2.0, data=b"HTTP/1.1 400 Bad Request\r\n")


def test_tasks_of_other_versions_are_named(addresses):
    other = hello.versions() | {"TensorFlow": "2.18.0", "Keras": "3.0.0"}
    with pytest.raises(RuntimeError) as caught:
        meet(addresses, versions=other)
    message = str(caught.value)
    assert f"worker 1 ({addresses[1]}) has TensorFlow 2.18.0, Keras 3.0.0" in (
        message
    )
    assert f"TensorFlow {tf.__version__}" in message
    assert f"keras_clones {keras_clones.__version__}" in message
    assert "ps 0" not in message


def test_tasks_of_another_cluster_are_named(addresses):
    with pytest.raises(RuntimeError, match="told of the same cluster"):
        meet(addresses, jobs={"worker": addresses[:2]})


def test_a_port_in_use_is_named(addresses):
    said = "port of worker 0 is in use.*Received: address='127.0.0.1"
    with (
        hello.listen(Host("worker", 0, addresses[0])),
        pytest.raises(OSError, match=said),
    ):
        gather.gather(spec_of(addresses), 5.0)


def test_strangers_are_not_taken_for_tasks(addresses):
    results = {}
    strangers = [
        greet(spec_of(addresses, "worker", 1), results, task=5),
        greet(spec_of(addresses, "worker", 1), results, job="\n"),
    ]
    with pytest.raises(TimeoutError, match=r"worker 1 .*, ps 0 "):
        gather.gather(spec_of(addresses), 1.0)
    for thread in strangers:
        thread.join(10)
    # They are not told why they are not needed, either.
    assert results == {"worker 1": None}


def test_a_task_names_a_controller_that_does_not_come(addresses):
    spec = spec_of(addresses, "worker", 1)
    with pytest.raises(TimeoutError) as caught:
        serve._greet(spec, 0.5)
    assert "worker 0, the controller, to answer at " in str(caught.value)
    assert addresses[0] in str(caught.value)


def test_a_task_says_why_it_was_refused(addresses):
    refusal = b'{"refused": "of Tuesday"}\n'
    with (
        answering(addresses[0], refusal),
        pytest.raises(RuntimeError, match="refused worker 1: of Tuesday"),
    ):
        serve._greet(spec_of(addresses, "worker", 1), 5.0)


def test_an_older_server_at_the_address_is_not_the_controller(addresses):
    began = time.monotonic()
    with (
        answering(addresses[0], SETTINGS),
        pytest.raises(TimeoutError, match="worker 0, the controller"),
    ):
        serve._greet(spec_of(addresses, "worker", 1), 0.5)
    assert time.monotonic() - began < 4


def test_without_a_cluster_the_script_goes_on(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    tf.zeros(1)
    for exit in (True, False):
        cluster = keras_clones.connect(exit=exit)
        assert cluster
        assert cluster.replicas == (cluster.controller,)
        assert cluster.ps == ()
    keras_clones.disconnect()


def test_connect_after_devices_says_to_move_it_up(addresses, monkeypatch):
    tf.zeros(1)
    assert _tf.has_devices()
    cluster = {"worker": addresses}
    config = {"cluster": cluster, "task": {"type": "worker", "index": 0}}
    with pytest.raises(RuntimeError, match="Move it up"):
        keras_clones.connect(config)


def test_evaluators_are_told_that_there_is_nothing_to_do(addresses):
    cluster = {"worker": addresses}
    config = {"cluster": cluster, "task": {"type": "evaluator", "index": 0}}
    with pytest.warns(UserWarning, match="nothing to do for an evaluator"):
        assert keras_clones.connect(config, exit=False) is None
    with (
        pytest.warns(UserWarning, match="nothing to do for an evaluator"),
        pytest.raises(SystemExit) as caught,
    ):
        keras_clones.connect(config)
    assert caught.value.code == 0


@pytest.mark.parametrize("timeout", [0, -1, "5", None, True, float("nan")])
def test_timeouts_are_positive_numbers(timeout):
    with pytest.raises(ValueError, match=r"Received: timeout="):
        keras_clones.connect(timeout=timeout)


@pytest.mark.parametrize(
    ("address", "alone"),
    [
        ("127.0.0.1:1", True),
        ("127.8.0.1:1", True),
        ("localhost:1", True),
        ("[::1]:1", True),
        ("10.0.0.1:1", False),
        ("node7:1", False),
        ("[fe80::1]:1", False),
    ],
)
def test_open_ports_are_warned_of(address, alone):
    host = Host("worker", 1, address)
    if not alone:
        with pytest.warns(UserWarning, match="without authentication"):
            hello.warn_of_open_port(host)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hello.warn_of_open_port(host)


def test_a_server_of_tensorflow_answers(addresses):
    assert not hello.answers(addresses[1], 1.0)
    spec = spec_of(addresses, "worker", 1)
    serve._start_server(spec)
    assert hello.answers(addresses[1], 5.0)
    # It serves again when it is asked to, since it cannot be stopped.
    serve._start_server(spec)
    other = spec_of([addresses[0], addresses[1], *free_addresses()])
    with pytest.raises(OSError, match="TensorFlow cannot stop"):
        serve._start_server(other._replace(here=spec.here))


def test_a_task_that_ends_while_tensorflow_connects_is_named(
    addresses, monkeypatch
):
    for name, wait in (("ended", 60.0), ("does not answer", 0.3)):
        there, here = socket.socketpair()
        release = threading.Event()
        monkeypatch.setattr(
            tf.config,
            "experimental_connect_to_cluster",
            lambda *args, release=release, **kwargs: release.wait(60),
        )
        spec = spec_of(addresses)
        assert not hello.has_ended(here)
        if name == "ended":
            there.close()
            assert hello.has_ended(here)
        began = time.monotonic()
        with pytest.raises(TimeoutError) as caught:
            join.join(spec, {spec.others[0]: here}, wait)
        assert time.monotonic() - began < 5
        assert f"worker 1 ({addresses[1]}), which " in str(caught.value)
        assert name in str(caught.value)
        with pytest.raises(RuntimeError, match="Start a new process"):
            keras_clones.connect()
        release.set()
        (thread,) = join._stuck
        thread.join(5)
        join._stuck.clear()
        there.close()
        here.close()


def free_addresses():
    return [f"127.0.0.1:{port}" for port in free_ports(1)]
