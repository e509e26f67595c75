"""Logical CPU devices for the whole suite, made once, before TensorFlow."""

import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["KERAS_BACKEND"] = "tensorflow"

import keras
import pytest
import tensorflow as tf

from keras_clones import use_virtual_devices

use_virtual_devices(8)
tf.get_logger().setLevel("ERROR")


@pytest.fixture(params=["float64", "float32"])
def floatx(request):
    """Run a test once in each precision."""
    keras.config.set_floatx(request.param)
    yield request.param
    keras.config.set_floatx("float32")


@pytest.fixture
def float64():
    """Run a test where rounding hides nothing."""
    keras.config.set_floatx("float64")
    yield
    keras.config.set_floatx("float32")


@pytest.fixture(autouse=True)
def _fresh_names():
    """Let every test number its layers from zero."""
    keras.backend.clear_session()
