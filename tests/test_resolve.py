"""What `TF_CONFIG` and Slurm tell of a cluster, or what is wrong with it."""

import json
import pathlib
import re
import subprocess

import pytest

from keras_clones.cluster.resolve import resolve
from keras_clones.cluster.slurm import expand_counts, expand_nodes

DOCS = pathlib.Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "cluster.md").read_text()
# What `srun --ntasks=3` over two nodes sets in the second task.
STEP = {
    "SLURM_JOB_ID": "1207",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[08-09]",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_NTASKS": "3",
    "SLURM_PROCID": "1",
}
TWO = ["10.0.0.1:2222", "10.0.0.2:2222"]


def config(task=("worker", 0), **jobs):
    kind, index = task
    return {"cluster": jobs, "task": {"type": kind, "index": index}}


def names(spec):
    return [host.name for host in spec.hosts]


def test_worker_0_is_the_controller():
    spec = resolve(config(("worker", 1), worker=TWO, ps=["c:1"]), {})
    assert names(spec) == ["worker 0", "worker 1", "ps 0"]
    assert spec.controller.address == TWO[0]
    assert spec.here.name == "worker 1"
    assert spec.jobs == {"worker": TWO, "ps": ["c:1"]}


def test_a_chief_is_the_controller():
    spec = resolve(config(ps=["c:1"], worker=TWO, chief=["d:1"]), {})
    assert names(spec) == ["chief 0", "worker 0", "worker 1", "ps 0"]
    assert spec.controller.name == "chief 0"
    assert spec.here.name == "worker 0"
    assert names(spec)[1:] == [host.name for host in spec.others]


def test_tf_config_is_read_at_the_time_of_the_call():
    environ = {**STEP, "TF_CONFIG": json.dumps(config(worker=TWO))}
    assert names(resolve(None, environ)) == ["worker 0", "worker 1"]
    mine = config(worker=[*TWO, "c:1"])
    assert len(resolve(mine, environ).hosts) == 3
    assert len(resolve(json.dumps(mine), environ).hosts) == 3


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        json.dumps(config(worker=TWO[:1])),
        json.dumps(config(("chief", 0), chief=TWO[:1])),
    ],
    ids=["empty", "no_parts", "one_worker", "one_chief"],
)
def test_one_process_is_no_cluster(text):
    assert resolve(None, {"TF_CONFIG": text}) is None
    assert resolve(None, {}) is None


def test_one_worker_with_a_ps_is_a_cluster():
    assert len(resolve(config(worker=TWO[:1], ps=TWO[1:]), {}).hosts) == 2


def test_evaluators_take_no_part():
    for jobs in ({}, {"evaluator": ["e:1"]}):
        spec = resolve(config(("evaluator", 0), worker=TWO, **jobs), {})
        assert spec.here.job == "evaluator"
        assert names(spec) == ["worker 0", "worker 1"]


def test_what_kubeflow_adds_is_no_matter():
    more = {"environment": "cloud", "sparseCluster": {"worker": {"0": "a:1"}}}
    assert len(resolve(config(worker=TWO) | more, {}).hosts) == 2


@pytest.mark.parametrize("address", ["[::1]:2222", "a.b.svc:2222"])
def test_addresses_of_other_forms(address):
    spec = resolve(config(worker=[address, "b:1"]), {})
    assert spec.controller.address == address


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("{", "must have JSON"),
        ("[1]", "must have a dict"),
        ({"task": {}}, 'a dict under "cluster"'),
        ({"cluster": {"worker": TWO}}, 'a dict under "task"'),
        ({"cluster": {"worker": TWO}, "task": {"type": "worker"}}, '"index"'),
        ({"cluster": {"worker": TWO}, "task": {"index": 0}}, '"type"'),
        (config(("worker", 2), worker=TWO), "an integer of 0 to 1"),
        (config(("worker", -1), worker=TWO), "an integer of 0 to 1"),
        (config(("worker", "0"), worker=TWO), "an integer of 0 to 1"),
        (config(("ps", 0), worker=TWO), "one of ['worker'] as the \"type\""),
        (config(worker=TWO, master=["c:1"]), "not ['master']"),
        (config(worker=TWO, ps=TWO[:1]), "['10.0.0.1:2222'] twice"),
        (config(worker=TWO, chief=["c:1", "d:1"]), 'one "chief" at most'),
        (config(worker={"0": "a:1"}), 'a list of addresses for "worker"'),
        (config(worker="a:1"), 'a list of addresses for "worker"'),
        (config(worker=["a", "b:1"]), "host:port"),
        (config(worker=["a:0", "b:1"]), "1 to 65535, not 'a:0'"),
        (config(worker=["a:65536", "b:1"]), "1 to 65535"),
        (config(worker=["grpc://a:1", "b:1"]), "host:port"),
        (config(worker=["::1:2222", "b:1"]), "host:port"),
        (config(worker=[5, "b:1"]), "not 5"),
        (config(("ps", 0), ps=TWO), 'a "worker" or a "chief"'),
    ],
)
def test_what_is_wrong_is_said_with_an_example(given, said):
    with pytest.raises(ValueError) as caught:
        resolve(given, {})
    message = str(caught.value)
    assert message.startswith("Argument `cluster` must have ")
    assert said in message
    assert 'For example: {"cluster": {"worker"' in message
    assert "Received: " in message
    text = given if isinstance(given, str) else json.dumps(given)
    with pytest.raises(ValueError, match=r"^TF_CONFIG must have "):
        resolve(None, {"TF_CONFIG": text})


def test_a_slurm_step_is_a_cluster():
    spec = resolve(None, STEP)
    base = 10_000 + 1207 % 350 * 64
    assert spec.jobs == {
        "worker": [f"gpu08:{base}", f"gpu08:{base + 1}", f"gpu09:{base}"]
    }
    assert spec.here.name == "worker 1"
    # The port of the next step is another, and of any below those that
    # systems give out.
    later = resolve(None, STEP | {"SLURM_STEP_ID": "1"})
    assert later.here.address == f"gpu08:{base + 65}"
    last = resolve(None, STEP | {"SLURM_JOB_ID": "349"})
    assert last.here.address == "gpu08:32337"


def test_ports_that_slurm_reserves_are_taken():
    ports = {"SLURM_STEP_RESV_PORTS": "12000,12005-12006"}
    spec = resolve(None, STEP | ports)
    assert spec.jobs["worker"] == ["gpu08:12000", "gpu08:12005", "gpu09:12000"]


@pytest.mark.parametrize(
    "missing", ["SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS"]
)
def test_without_a_step_there_is_no_cluster(missing):
    # A batch script has the job's variables, and is one process.
    environ = {k: v for k, v in STEP.items() if k != missing}
    environ |= {"SLURM_NTASKS": "1"} if "NUM" in missing else {}
    assert resolve(None, environ) is None


def test_what_a_slurm_step_lacks_is_said():
    environ = {k: v for k, v in STEP.items() if k != "SLURM_PROCID"}
    with pytest.raises(ValueError, match="Expected SLURM_PROCID"):
        resolve(None, environ)
    with pytest.raises(ValueError, match="each of the 2 nodes"):
        resolve(None, STEP | {"SLURM_STEP_TASKS_PER_NODE": "3"})


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ("a", ["a"]),
        ("a,b-1", ["a", "b-1"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("n[08-10,2],m", ["n08", "n09", "n10", "n2", "m"]),
        ("r[1-2]n[1,3]x", ["r1n1x", "r1n3x", "r2n1x", "r2n3x"]),
    ],
)
def test_lists_of_nodes(nodes, expected):
    assert expand_nodes(nodes) == expected


def test_lists_of_counts():
    assert expand_counts("2(x3),1") == [2, 2, 2, 1]


def block(language, word):
    """Return the block of code on the page of clusters that has a word."""
    found = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    (one,) = [text for text in found if word in text]
    return one


def test_the_form_that_the_page_shows():
    spec = resolve(block("json", '"cluster"'), {})
    assert names(spec) == ["worker 0", "worker 1", "ps 0"]
    (text,) = re.findall(r"TF_CONFIG='(.*)'", block("bash", "export"))
    assert resolve(None, {"TF_CONFIG": text}).here.name == "worker 1"


def test_the_tfjob_of_the_page():
    job, policy = block("yaml", "TFJob").split("\n---\n")
    (name,) = re.findall(r"^metadata:\n  name: (\S+)$", job, re.MULTILINE)
    counts = dict(
        re.findall(r"^    (\w+):\n      replicas: (\d+)$", job, re.MULTILINE)
    )
    assert counts == {"Worker": "2", "PS": "1"}
    # The operator looks for a container of this name.
    assert job.count("- name: tensorflow") == 2
    assert policy.count(f"training.kubeflow.org/job-name: {name}") == 2
    # As the operator names its services, with its own port.
    cluster = {
        kind.lower(): [
            f"{name}-{kind.lower()}-{index}.default.svc:2222"
            for index in range(int(count))
        ]
        for kind, count in counts.items()
    }
    for job, index in (("worker", 0), ("worker", 1), ("ps", 0)):
        task = {"type": job, "index": index}
        config = {"cluster": cluster, "task": task, "environment": "cloud"}
        spec = resolve(None, {"TF_CONFIG": json.dumps(config)})
        assert spec.here.name == f"{job} {index}"
        assert spec.jobs == cluster


def test_the_slurm_script_of_the_page():
    script = block("bash", "#SBATCH")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", script, re.M))
    nodes = int(options["nodes"])
    each = int(options["ntasks-per-node"])
    for index in range(nodes * each):
        step = STEP | {
            "SLURM_STEP_NODELIST": f"gpu[1-{nodes}]",
            "SLURM_STEP_NUM_TASKS": str(nodes * each),
            "SLURM_STEP_TASKS_PER_NODE": f"{each}(x{nodes})",
            "SLURM_PROCID": str(index),
        }
        spec = resolve(None, step)
        assert names(spec) == [f"worker {i}" for i in range(nodes * each)]
        assert spec.here.address.startswith(f"gpu{index // each + 1}:")
