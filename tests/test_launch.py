"""Tasks of a cluster start, meet and end, all of them and in time.

Processes are real, on loopback addresses, and none is left. A script that
imports TensorFlow takes some five seconds to start, so most do not.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from keras_clones.__main__ import main
from keras_clones.cluster import isolate
from keras_clones.cluster.launch import Run, free_ports, launch, tasks

LIMIT = 120
# What a process of this test has in its environment, to be found by.
MARK = "KERAS_CLONES_TEST_MARK"
ROOT = str(pathlib.Path(__file__).parents[1])


def marked(mark):
    """Return the processes whose environment has a mark."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            environ = (folder / "environ").read_bytes().split(b"\0")
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if wanted in environ and state != "Z":
            found.append(int(folder.name))
    return [pid for pid in found if pid != os.getpid()]


def wait_until(done, what, seconds=60):
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.fixture
def mark(tmp_path, monkeypatch):
    """Mark the processes of a test, and see that none of them is left."""
    if not pathlib.Path("/proc/self/environ").exists():
        pytest.skip("processes are found by what Linux tells of them")
    mark = str(tmp_path)
    monkeypatch.setenv(MARK, mark)
    monkeypatch.setenv("PYTHONPATH", ROOT)
    monkeypatch.delenv("TF_CONFIG", raising=False)
    yield mark
    left = marked(mark)
    deadline = time.monotonic() + 3
    while left and time.monotonic() < deadline:
        time.sleep(0.05)
        left = marked(mark)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


@pytest.fixture
def start(mark):
    """Return what starts a process that reads a program, for this test."""
    started = []

    def start(*command, **more):
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=subprocess.PIPE,
            text=True,
            **more,
        )
        # So that a test that waits for its lines does not wait forever.
        timer = threading.Timer(LIMIT, process.kill)
        timer.start()
        started.append((process, timer))
        return process

    yield start
    for process, timer in started:
        timer.cancel()
        process.kill()
        process.communicate()


@pytest.fixture
def script(tmp_path, mark):
    """Return what writes a script, and gives the command that runs it."""

    def write(text, *arguments):
        path = tmp_path / "script.py"
        path.write_text(text)
        return (sys.executable, str(path), *arguments)

    return write


def bounded(command, replicas, **more):
    return Run(command, replicas, **({"seconds": LIMIT} | more))


ME = """
import json, os, subprocess, sys, time
task = json.loads(os.environ["TF_CONFIG"])["task"]
me = f"{task['type']} {task['index']}"
"""


def test_every_task_knows_the_cluster_and_its_place():
    found = tasks(Run(("x",), 2, ps=1), 3, {"HOME": "h"})
    assert [name for name, _ in found] == ["worker 0", "worker 1", "ps 0"]
    configs = [json.loads(environ["TF_CONFIG"]) for _, environ in found]
    (cluster,) = {json.dumps(config["cluster"]) for config in configs}
    addresses = [a for job in json.loads(cluster).values() for a in job]
    assert len(set(addresses)) == 3
    assert all(address.startswith("127.0.0.1:") for address in addresses)
    assert all(e["KERAS_CLONES_RESTART"] == "3" for _, e in found)
    assert all(e["HOME"] == "h" for _, e in found)
    assert all("CUDA_VISIBLE_DEVICES" not in e for _, e in found)
    # New tasks have new ports.
    again = tasks(Run(("x",), 2, ps=1), 4, {})
    assert again[0][1]["TF_CONFIG"] != found[0][1]["TF_CONFIG"]


@pytest.mark.parametrize(
    ("replicas", "shares"),
    [(1, ["4,5,6"]), (2, ["4", "5,6"]), (4, ["-1", "4", "5", "6"])],
)
def test_gpus_are_divided_among_the_workers(replicas, shares):
    found = tasks(Run(("x",), replicas, ps=1, gpus=("4", "5", "6")), 0, {})
    given = [environ["CUDA_VISIBLE_DEVICES"] for _, environ in found]
    assert given == [*shares, "-1"]


def test_lines_have_the_name_of_their_task(script, capfd):
    text = ME + "print('out of', me, sys.argv[1:]); sys.stderr.write(me)"
    assert launch(bounded(script(text, "a", "-b"), 2, ps=1)) == 0
    printed = capfd.readouterr()
    names = ["ps 0", "worker 0", "worker 1"]
    lines = [f"[{name}] out of {name} ['a', '-b']" for name in names]
    assert sorted(printed.out.splitlines()) == lines
    # A last line that does not end is a line, too.
    assert sorted(printed.err.splitlines()) == [f"[{n}] {n}" for n in names]


SLEEPING = "subprocess.Popen(['sleep', '600']); time.sleep(600)"


def test_the_first_failure_ends_all(script, capfd, mark):
    text = ME + f"sys.exit(7) if me == 'ps 0' else None\n{SLEEPING}"
    began = time.monotonic()
    assert launch(bounded(script(text), 2, ps=1)) == 7
    assert time.monotonic() - began < 10
    said = "[launch] ps 0 ended with 7: ending all tasks"
    assert said in capfd.readouterr().err
    assert not marked(mark)


def test_a_signal_is_told_as_by_a_shell(script):
    text = ME + "os.kill(os.getpid(), 9) if me == 'worker 1' else None\n"
    assert launch(bounded(script(text + SLEEPING), 2)) == 137


def test_all_tasks_are_restarted(script, capfd, tmp_path):
    # Worker 1 fails when worker 0 has started: an end comes at any time.
    text = ME + (
        "restart = os.environ['KERAS_CLONES_RESTART']\n"
        "started = sys.argv[1] + restart\n"
        "print('started', restart, flush=True)\n"
        "if me == 'worker 0': open(started, 'w').close()\n"
        "while not os.path.exists(started): time.sleep(0.01)\n"
        "if me == 'worker 1' and restart != '2': sys.exit(3)\n"
        "if restart != '2': time.sleep(600)"
    )
    command = script(text, str(tmp_path / "started_"))
    assert launch(bounded(command, 2, restarts=2)) == 0
    printed = capfd.readouterr()
    started = sorted(printed.out.splitlines())
    assert started == [
        f"[worker {task}] started {n}" for task in (0, 1) for n in (0, 1, 2)
    ]
    assert "[launch] restart 2 of 2" in printed.err


def test_restarts_come_to_an_end(script):
    assert launch(bounded(script(ME + "sys.exit(4)"), 1, restarts=1)) == 4


@pytest.mark.full
def test_the_time_of_a_run_is_bounded(script, capfd):
    # Who does not end when asked to is killed.
    text = ME + (
        "import signal\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN) if me == 'ps 0' else 0\n"
    )
    run = bounded(script(text + SLEEPING), 1, ps=1, restarts=3, seconds=1.0)
    assert launch(run) == 124
    assert "the time is up" in capfd.readouterr().err


LAUNCH = """
import sys
from keras_clones.cluster.launch import Run, launch
sys.exit(launch(Run((sys.executable, *sys.argv[1:]), 2, ps=1)))
"""


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGKILL, -9, marks=pytest.mark.full),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.full),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.full),
    ],
    ids=["term", "kill", "int", "hup"],
)
def test_a_launch_that_is_ended_leaves_nothing(
    script, start, mark, number, code
):
    command = script(ME + "print(me)\n" + SLEEPING)
    process = start("-c", LAUNCH, *command[1:])
    lines = {process.stdout.readline() for _ in range(3)}
    names = ("ps 0", "worker 0", "worker 1")
    assert lines == {f"[{name}] {name}\n" for name in names}
    # Three tasks with a process each, the launch and what guards it.
    wait_until(lambda: len(marked(mark)) == 8, "all have started")
    process.send_signal(number)
    assert process.wait(LIMIT) == code
    wait_until(lambda: not marked(mark), "all have ended", 10)


ONE_SCRIPT = """
import sys
import keras_clones
import tensorflow as tf

keras_clones.use_virtual_devices(2)
cluster = keras_clones.connect(timeout=60)
assert keras_clones.connect() == cluster
for host in cluster.hosts:
    for cpu in range(2):
        with tf.device(f"{host.prefix}/device:CPU:{cpu}"):
            print((tf.Variable([1.0]) + 1.0).device)
try:
    keras_clones.connect({"cluster": {"worker": ["a:1", "b:1"]},
                          "task": {"type": "worker", "index": 0}})
except RuntimeError as error:
    print(str(error)[:8])
print("replicas", len(cluster.replicas), "ps", len(cluster.ps))
sys.exit(int(sys.argv[1]))
"""


@pytest.mark.full
def test_one_script_runs_in_every_process(script, capfd):
    run = bounded(script(ONE_SCRIPT, "0"), 2, ps=1)
    assert launch(run) == 0
    printed = capfd.readouterr()
    jobs = ("worker/replica:0/task:0", "worker/replica:0/task:1")
    devices = [
        f"/job:{job}/device:CPU:{cpu}"
        for job in (*jobs, "ps/replica:0/task:0")
        for cpu in range(2)
    ]
    said = [*devices, "Expected", "replicas 2 ps 1"]
    assert printed.out.splitlines() == [f"[worker 0] {line}" for line in said]
    # The others ended by themselves.
    assert "[launch]" not in printed.err


SERVES_TWICE = """
import json, os, sys, threading, time
import keras_clones

def run(config):
    served.append(keras_clones.connect(config, timeout=60, exit=False))

for config in json.loads(sys.argv[1]):
    served = []
    # Off the main thread, as in a task of Ray Train.
    thread = threading.Thread(target=run, args=(config,))
    thread.start()
    thread.join()
    print("served", served, time.time(), flush=True)
"""
LEADS = """
import json, os, sys, time
import keras_clones
import tensorflow as tf

cluster = keras_clones.connect(json.loads(sys.argv[1]), timeout=60)
with tf.device(cluster.hosts[1].cpu):
    print(float(tf.constant(1.0) + 1.0), flush=True)
if sys.argv[2] == "disconnect":
    keras_clones.disconnect()
    print(time.time(), flush=True)
    keras_clones.disconnect()
    try:
        keras_clones.connect(json.loads(sys.argv[1]))
    except RuntimeError as error:
        print(error, flush=True)
time.sleep(600)
"""


def two_tasks():
    cluster = {"worker": [f"127.0.0.1:{port}" for port in free_ports(2)]}
    return [
        {"cluster": cluster, "task": {"type": "worker", "index": index}}
        for index in (0, 1)
    ]


@pytest.mark.full
def test_a_task_serves_until_the_controller_is_done_or_gone(start):
    first, second = two_tasks(), two_tasks()
    configs = json.dumps([first[1], second[1]])
    task = start("-c", SERVES_TWICE, configs)
    killed = start("-c", LEADS, json.dumps(first[0]), "killed")
    done = start("-c", LEADS, json.dumps(second[0]), "disconnect")
    assert killed.stdout.readline() == "2.0\n"
    killed.kill()
    ended = time.time()
    *served, at = task.stdout.readline().split()
    assert served == ["served", "[None]"]
    assert float(at) - ended < 3
    # And again with another `TF_CONFIG`, of a controller that lives on.
    assert done.stdout.readline() == "2.0\n"
    ended = float(done.stdout.readline())
    *served, at = task.stdout.readline().split()
    assert served == ["served", "[None]"]
    assert float(at) - ended < 3
    assert task.wait(10) == 0
    # A process connects once.
    assert "disconnected from it since" in done.stdout.readline()


def test_serve_is_for_a_task_without_the_script(mark, monkeypatch, capsys):
    config = two_tasks()
    for environ in (None, json.dumps(config[0])):
        if environ:
            monkeypatch.setenv("TF_CONFIG", environ)
        assert main(["serve"]) == 1
        said = "Expected TF_CONFIG to tell of a task other than the controller"
        assert said in capsys.readouterr().err
    monkeypatch.setenv("TF_CONFIG", json.dumps(config[1]))
    # No controller comes.
    assert main(["serve", "--timeout", "0.5"]) == 1
    printed = capsys.readouterr()
    assert f"worker 1 serves worker 0 at {config[1]['cluster']}"[:24] in (
        printed.out
    )
    assert "worker 0, the controller, to answer at" in printed.err


@pytest.mark.full
def test_serve_ends_with_0(start):
    config = two_tasks()
    environ = {**os.environ, "TF_CONFIG": json.dumps(config[1])}
    serve = ("-m", "keras_clones", "serve", "--virtual-devices", "3")
    task = start(*serve, env=environ)
    controller = start("-c", LEADS, json.dumps(config[0]), "killed")
    assert controller.stdout.readline() == "2.0\n"
    controller.kill()
    # Within seconds, of which a busy machine has more.
    assert task.wait(30) == 0
    assert "worker 1 serves worker 0 at" in task.stdout.read()


def command(*arguments):
    return [sys.executable, "-m", "keras_clones", "launch", *arguments]


@pytest.mark.full
def test_the_command_gives_the_tasks_a_network_of_their_own(script):
    path = script(ME + "print(open('/proc/net/dev').read())")[1]
    done = subprocess.run(
        command("--replicas", "2", "--isolate", path),
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0
    interfaces = {
        line.split("] ")[1].split(":")[0].strip()
        for line in done.stdout.splitlines()
        if ":" in line
    }
    assert interfaces == {"lo"} or "No network of its own" in done.stderr


def test_without_a_network_of_its_own_a_command_goes_on(monkeypatch, capsys):
    def refuse():
        raise OSError("not today")

    became = []
    monkeypatch.setattr(isolate, "isolate", refuse)
    monkeypatch.setattr(os, "execv", lambda *args: became.append(args))
    isolate.main(["/bin/true", "a"])
    assert became == [("/bin/true", ["/bin/true", "a"])]
    assert "can be had here (not today): going on" in capsys.readouterr().err


@pytest.mark.full
def test_the_command_runs_modules(mark):
    done = subprocess.run(
        command("--replicas", "2", "-m", "timeit", "-n", "1", "pass"),
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0
    assert "[worker 1] 1 loop" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no_such_script.py"], "which is not there"),
        (["--replicas", "0", "x.py"], "an integer of at least 1"),
        (["--ps", "-1", "x.py"], "an integer of at least 0"),
        (["--restarts", "x", "x.py"], "an integer of at least 0"),
        (["--timeout", "0", "x.py"], "a positive number of seconds"),
    ],
)
def test_the_command_says_what_is_wrong(arguments, said, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["launch", *arguments])
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_help_says_that_ports_are_open(capsys):
    for name in ("launch", "serve"):
        with pytest.raises(SystemExit):
            main([name, "--help"])
        assert "without authentication" in " ".join(
            capsys.readouterr().out.split()
        )
