"""`DeploymentConfig` gives device strings, and refuses what makes no sense."""

import dataclasses

import pytest

from keras_clones import DeploymentConfig


def test_one_clone_a_gpu():
    config = DeploymentConfig(num_clones=2)
    assert [config.clone_device(i) for i in range(2)] == [
        "/device:GPU:0",
        "/device:GPU:1",
    ]
    assert [config.clone_scope(i) for i in range(2)] == ["clone_0", "clone_1"]
    assert config.variables_device() == "/device:CPU:0"
    assert config.inputs_device() == "/device:CPU:0"
    assert config.optimizer_device() == "/device:CPU:0"


def test_one_clone_has_no_scope():
    assert DeploymentConfig().clone_scope(0) == ""


def test_clones_on_the_cpu():
    config = DeploymentConfig(3, clone_on_cpu=True)
    assert config.clone_device(2) == "/device:CPU:0"


def test_devices_are_written_in_one_form():
    config = DeploymentConfig(3, devices=["gpu:1", "/device:CPU:0", "GPU"])
    assert config.devices == (
        "/device:GPU:1",
        "/device:CPU:0",
        "/device:GPU:0",
    )
    assert config.clone_device(0) == "/device:GPU:1"


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DeploymentConfig().num_clones = 2


@pytest.mark.parametrize("index", [-1, 2, 1.0, None, "0"])
def test_there_is_no_such_clone(index):
    config = DeploymentConfig(2)
    for method in (config.clone_device, config.clone_scope):
        with pytest.raises(ValueError, match="from 0 to 1"):
            method(index)
