"""`DeploymentConfig` gives device strings, and refuses what makes no sense."""

import dataclasses
import re
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_clones import DeploymentConfig, clone_model, deployment

GPU0, GPU1, CPU = "/device:GPU:0", "/device:GPU:1", "/device:CPU:0"
WORKER = "/job:worker"

# Worked out from the rules of TF-Slim's `deployment/model_deploy.py` and from
# its tests: the arguments, then the devices of the clones, their scopes, and
# the devices of the inputs and of the optimizer.
FROM_THE_ORIGINAL = [
    ({}, [GPU0], [""], CPU, CPU),
    ({"clone_on_cpu": True}, [CPU], [""], CPU, CPU),
    ({"num_clones": 2}, [GPU0, GPU1], ["clone_0", "clone_1"], CPU, CPU),
    (
        {"num_clones": 2, "clone_on_cpu": True},
        [CPU, CPU],
        ["clone_0", "clone_1"],
        CPU,
        CPU,
    ),
    # Without parameter servers the job names are not used.
    ({"worker_job_name": "w", "ps_job_name": "p"}, [GPU0], [""], CPU, CPU),
    ({"num_ps_tasks": 1}, [WORKER + GPU0], [""], WORKER + CPU, WORKER + CPU),
    (
        {"num_clones": 2, "num_ps_tasks": 1},
        [WORKER + GPU0, WORKER + GPU1],
        ["clone_0", "clone_1"],
        WORKER + CPU,
        WORKER + CPU,
    ),
    (
        {"num_replicas": 2, "num_ps_tasks": 2, "replica_id": 1},
        [WORKER + GPU0],
        [""],
        WORKER + CPU,
        WORKER + CPU,
    ),
    (
        {
            "num_clones": 2,
            "clone_on_cpu": True,
            "num_replicas": 2,
            "num_ps_tasks": 2,
            "worker_job_name": "trainer",
        },
        ["/job:trainer" + CPU, "/job:trainer" + CPU],
        ["clone_0", "clone_1"],
        "/job:trainer" + CPU,
        "/job:trainer" + CPU,
    ),
]


@pytest.mark.parametrize(
    ("arguments", "clones", "scopes", "inputs", "optimizer"), FROM_THE_ORIGINAL
)
def test_devices_are_the_originals(
    arguments, clones, scopes, inputs, optimizer
):
    config = DeploymentConfig(**arguments)
    indices = range(config.num_clones)
    assert [config.clone_device(i) for i in indices] == clones
    assert [config.clone_scope(i) for i in indices] == scopes
    assert config.inputs_device() == inputs
    assert config.optimizer_device() == optimizer
    if not config.num_ps_tasks:
        assert config.variables_device() == CPU
        assert config.variables_device("greedy") == CPU
        assert config.caching_device() is None


def test_every_device_is_one_that_tensorflow_reads():
    config = DeploymentConfig(2, num_replicas=3, num_ps_tasks=2)
    for device in (config.clone_device(1), config.variables_device()()):
        spec = tf.DeviceSpec.from_string(device)
        assert spec.job in ("worker", "ps")
        assert spec.device_type in ("GPU", "CPU")


def test_arguments_are_in_the_originals_order():
    names = [field.name for field in dataclasses.fields(DeploymentConfig)]
    assert names == [
        "num_clones",
        "clone_on_cpu",
        "replica_id",
        "num_replicas",
        "num_ps_tasks",
        "worker_job_name",
        "ps_job_name",
        *("devices", "sync", "max_staleness"),
    ]
    config = DeploymentConfig(2, True, 1, 3, 4, "w", "p")
    assert config.clone_device(1) == "/job:w/device:CPU:0"
    assert config.variables_device()() == "/job:p/task:0/device:CPU:0"
    with pytest.raises(TypeError):
        DeploymentConfig(1, False, 0, 1, 0, "w", "p", ["GPU:0"])


def test_parameter_servers_take_variables_in_turn():
    config = DeploymentConfig(num_ps_tasks=3, ps_job_name="store")
    choose = config.variables_device()
    big, small = tf.zeros((1000, 10)), tf.zeros((1,))
    chosen = [choose(v) for v in (big, small, small, big)]
    assert chosen == [
        f"/job:store/task:{task}/device:CPU:0" for task in (0, 1, 2, 0)
    ]
    # Each function counts for itself.
    assert config.variables_device()(small) == chosen[0]


def test_parameter_servers_take_variables_by_bytes():
    choose = DeploymentConfig(num_ps_tasks=2).variables_device("greedy")
    dense = keras.Variable(np.zeros((5, 5), "float32"))  # 100 bytes
    half = tf.Variable(tf.zeros((25,), tf.bfloat16))  # 50 bytes
    tasks = [
        tf.DeviceSpec.from_string(device).task
        for device in (
            choose(dense),  # 100, 0
            choose(half),  # 100, 50
            choose((25,), "int16"),  # 100, 100
            choose((4,), tf.float64),  # 132, 100
            choose((40,), np.float32),  # 132, 260
            choose((), bool),  # 133, 260
            choose(np.zeros((16,), "complex64")),  # 261, 260
            choose((8,), "float8_e4m3fn"),  # 261, 268
            choose((1,), "int4"),  # 262, 268
        )
    ]
    assert tasks == [0, 1, 1, 0, 1, 0, 0, 1, 0]


@pytest.mark.parametrize(
    "arguments",
    [((None, 3), "float32"), ((3,), "string"), ((3,), tf.resource)],
)
def test_bytes_that_are_not_known(arguments):
    choose = DeploymentConfig(num_ps_tasks=2).variables_device("greedy")
    with pytest.raises(ValueError, match=r"known shape.*Received: shape="):
        choose(*arguments)
    assert choose((1,), "int8") == "/job:ps/task:0/device:CPU:0"


def test_there_is_no_such_strategy():
    for config in (DeploymentConfig(), DeploymentConfig(num_ps_tasks=1)):
        with pytest.raises(ValueError, match="'round_robin' or 'greedy'"):
            config.variables_device("random")


def test_values_of_parameter_servers_stay_where_they_are_used():
    caching_device = DeploymentConfig(num_ps_tasks=1).caching_device()
    assert caching_device(SimpleNamespace(device="/job:worker")) == WORKER
    assert caching_device(SimpleNamespace(device="")) == ""


def test_replicas_without_parameter_servers_keep_their_own_variables():
    config = DeploymentConfig(2, num_replicas=3, replica_id=2)
    assert config.worker_device == "/job:worker/task:2"
    assert config.ps_device == ""
    assert config.clone_device(1) == "/job:worker/task:2/device:GPU:1"
    assert config.variables_device() == "/job:worker/task:2/device:CPU:0"
    assert config.inputs_device() == "/job:worker/task:2/device:CPU:0"
    assert config.optimizer_device() == "/job:worker/task:2/device:CPU:0"
    assert config.caching_device() is None


@pytest.mark.parametrize("more", [{"num_replicas": 2}, {"num_ps_tasks": 1}])
def test_several_replicas_need_a_cluster(more):
    config = DeploymentConfig(2, clone_on_cpu=True, **more)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    with pytest.raises(ValueError, match=r"keras_clones\.connect"):
        clone_model(model, config=config)


def test_devices_are_written_in_one_form():
    config = DeploymentConfig(3, devices=["gpu:1", "/device:CPU:0", "GPU"])
    assert config.devices == (
        "/device:GPU:1",
        "/device:CPU:0",
        "/device:GPU:0",
    )
    assert config.clone_device(0) == "/device:GPU:1"
    cluster = dataclasses.replace(config, num_ps_tasks=1)
    assert cluster.clone_device(0) == "/job:worker/device:GPU:1"


@pytest.mark.parametrize(
    "device",
    [
        "/cpu:1",
        "cpu:1",
        "device:CPU:1",
        "/device:cpu:1",
        "/job:localhost/replica:0/task:0/device:CPU:1",
        "/job:localhost/cpu:1",
        "/task:0/device:CPU:1",
        tf.config.LogicalDevice("/device:CPU:1", "CPU"),
    ],
    ids=str,
)
def test_devices_are_named_as_tensorflow_names_them(device):
    config = DeploymentConfig(2, devices=[device, "/gpu"])
    assert config.devices == ("/device:CPU:1", "/device:GPU:0")
    assert eval(repr(config)) == config
    repeated = re.escape("repeats ['/device:CPU:1']")
    with pytest.raises(ValueError, match=repeated):
        DeploymentConfig(2, devices=[device, "CPU:1"])


def test_devices_that_tensorflow_lists():
    listed = tf.config.list_logical_devices("CPU")[:2]
    model = clone_model(
        keras.Sequential([keras.layers.Dense(1)]), devices=listed
    )
    clones = deployment(model).clones
    assert [c.device for c in clones] == ["/device:CPU:0", "/device:CPU:1"]


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("TPU:0", "must be a CPU or a GPU.*'TPU:0'"),
        ("GPU:*", r"'GPU:\*'"),
        ("GPU:-1", "'GPU:-1'"),
        ("GPU:x", "'GPU:x'"),
        ("", "Received: ''"),
        ("/job:localhost", "must be a CPU or a GPU"),
        ("/cpu:0/gpu:1", "must be a CPU or a GPU"),
        (1, "Received: 1"),
        (
            tf.config.PhysicalDevice("/physical_device:GPU:0", "GPU"),
            "list_logical_devices.*physical_device:GPU:0",
        ),
        (
            "/job:worker/replica:0/task:0/GPU:0",
            r"keras_clones\.connect.*worker",
        ),
        ("/job:localhost/task:1/GPU:0", "one of this machine.*task:1"),
        ("/replica:1/GPU:0", "one of this machine"),
    ],
    ids=str,
)
def test_devices_that_are_none_of_this_machine(device, message):
    with pytest.raises(ValueError, match=message):
        DeploymentConfig(1, devices=[device])


def test_repeated_devices_are_not_sent_to_a_contradiction():
    with pytest.raises(ValueError, match="use_virtual_devices") as error:
        DeploymentConfig(2, devices=["CPU:1", "cpu:1"])
    assert "clone_on_cpu" not in str(error.value)


def test_it_is_frozen_and_can_be_a_key():
    config = DeploymentConfig(2, devices=["GPU:0", "GPU:1"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_clones = 3
    same = DeploymentConfig(2, devices=("gpu:0", "gpu:1"))
    assert config == same and {config: 1}[same] == 1
    assert eval(repr(config)) == config


def test_integers_of_numpy_are_integers():
    config = DeploymentConfig(
        np.int64(2),
        replica_id=np.uint8(1),
        num_replicas=np.int32(2),
        num_ps_tasks=np.array(3),
    )
    assert config == DeploymentConfig(2, False, 1, 2, 3)
    assert all(type(v) is not np.int64 for v in vars(config).values())
    assert config.clone_scope(np.int64(1)) == "clone_1"


INTEGERS = ["num_clones", "replica_id", "num_replicas", "num_ps_tasks"]


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize(
    "value", [True, np.True_, 1.0, np.float32(1), "1", None, [1]]
)
def test_fields_that_are_integers(name, value):
    with pytest.raises(TypeError, match=f"`{name}` must be .* integer"):
        DeploymentConfig(**{name: value})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_clones": 0}, "`num_clones` must be a positive integer"),
        ({"num_clones": -1}, "`num_clones` must be a positive integer"),
        ({"num_replicas": 0}, "`num_replicas` must be a positive integer"),
        ({"num_ps_tasks": -1}, "`num_ps_tasks` must be .* at least 0"),
        ({"replica_id": -1}, "`replica_id` must be .* at least 0"),
        ({"replica_id": 1}, "less than `num_replicas`.* num_replicas=1"),
        ({"replica_id": 2, "num_replicas": 2}, "less than `num_replicas`"),
        ({"worker_job_name": ""}, "`worker_job_name` must be a string"),
        ({"ps_job_name": "a/b"}, "`ps_job_name` must be a string.*'a/b'"),
        ({"ps_job_name": "ps:0"}, "`ps_job_name` must be a string"),
        ({"worker_job_name": "1st"}, "`worker_job_name` must be a string"),
        ({"worker_job_name": "w\n"}, "`worker_job_name` must be a string"),
    ],
)
def test_fields_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        DeploymentConfig(**arguments)


@pytest.mark.parametrize("name", ["worker_job_name", "ps_job_name"])
@pytest.mark.parametrize("value", [None, 1, b"worker"])
def test_job_names_are_strings(name, value):
    with pytest.raises(TypeError, match=f"`{name}` must be a string"):
        DeploymentConfig(**{name: value})


@pytest.mark.parametrize("value", [1, None, "yes", np.True_])
def test_clone_on_cpu_is_a_boolean(value):
    with pytest.raises(TypeError, match="`clone_on_cpu` must be a boolean"):
        DeploymentConfig(clone_on_cpu=value)


@pytest.mark.parametrize("index", [-1, 2, 1.0, None, "0", True])
def test_there_is_no_such_clone(index):
    config = DeploymentConfig(2)
    for method in (config.clone_device, config.clone_scope):
        with pytest.raises(ValueError, match="from 0 to 1"):
            method(index)
