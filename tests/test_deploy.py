"""`clone_model` and its errors; saving; where every variable lives."""

import copy
import inspect
import json
import pickle
import re
import subprocess
import sys
import textwrap
import zipfile

import cases
import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_clones
from keras_clones import (
    CloneProfiler,
    DeploymentConfig,
    PlacedClone,
    clone_model,
    create_clones,
    deploy,
    deployment,
    split_batch,
    unclone_model,
    use_virtual_devices,
)
from keras_clones.devices import placement, virtual

CPUS = [f"/device:CPU:{i}" for i in range(8)]


def test_the_model_stays_the_object_and_class_it_was():
    model = cases.make("mlp")
    plain = cases.make("mlp")
    cloned = clone_model(model, 4)
    assert cloned is model
    assert type(model) is keras.Sequential
    assert [layer.name for layer in model.layers] == [
        layer.name.replace("_2", "").replace("_3", "_1")
        for layer in plain.layers
    ]
    assert model.count_params() == plain.count_params()
    assert isinstance(model, keras.Model)


def test_deployment_tells_the_clones_and_devices():
    model = clone_model(cases.mlp(), 3)
    made = deployment(model)
    assert made.clones == tuple(
        PlacedClone(f"clone_{i}", CPUS[i]) for i in range(3)
    )
    assert made.config.num_clones == 3
    # As it was called.
    assert keras_clones.Clone is PlacedClone
    assert made.variables_device == "/device:CPU:0"
    assert made.inputs_device == "/device:CPU:0"
    assert made.optimizer_device == "/device:CPU:0"
    assert made.shard_sizes(8) == [3, 3, 2]
    assert made.shard_sizes(2) == [1, 1, 0]
    assert "CPU:2" in repr(made)
    assert deployment(cases.mlp()) is None


def test_clones_share_devices_where_there_are_fewer_cpus():
    made = deployment(clone_model(cases.mlp(), 10))
    assert [c.device for c in made.clones] == [*CPUS, *CPUS[:2]]


def test_clones_on_one_cpu():
    made = deployment(clone_model(cases.mlp(), 3, clone_on_cpu=True))
    assert [c.device for c in made.clones] == ["/device:CPU:0"] * 3


def test_devices_are_taken_as_given():
    made = deployment(clone_model(cases.mlp(), devices=["CPU:5", "cpu:2"]))
    assert [c.device for c in made.clones] == [CPUS[5], CPUS[2]]


def test_config_in_place_of_the_arguments():
    config = DeploymentConfig(2, devices=["CPU:1", "CPU:2"])
    assert deployment(clone_model(cases.mlp(), config=config)).config == config


def test_no_number_of_clones_takes_every_device():
    assert len(deployment(clone_model(cases.mlp())).clones) == 8


@pytest.fixture
def no_gpu_is_news(monkeypatch):
    """Let the process be one that has heard nothing of devices yet."""
    monkeypatch.setattr(virtual, "_known", False)


def graph_of_clones(config):
    @tf.function
    def step(x):
        return create_clones(config, lambda x: x, [split_batch(x, 2)])[0].scope

    step(tf.ones((4, 1)))


@pytest.mark.parametrize(
    "make",
    [
        lambda config: clone_model(cases.mlp(), 2),
        lambda config: clone_model(cases.mlp(), config=config),
        lambda config: create_clones(config, lambda x: x, [1.0]),
        lambda config: deploy(config, lambda x: x),
        graph_of_clones,
    ],
)
def test_one_warning_without_a_gpu(make, no_gpu_is_news, recwarn):
    with pytest.warns(UserWarning, match="There is no GPU: 2 clone") as caught:
        make(DeploymentConfig(2))
    assert len(caught) == 1
    assert caught[0].filename == __file__
    line = inspect.getsourcelines(make)[1]
    assert line <= caught[0].lineno <= line + 5
    make(DeploymentConfig(2))
    assert not recwarn.list


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_clones": 1},
        {"num_clones": 2, "clone_on_cpu": True},
        {"devices": ["CPU:0", "CPU:1"]},
    ],
)
def test_no_warning_where_the_cpu_is_meant(arguments, no_gpu_is_news, recwarn):
    clone_model(cases.mlp(), **arguments)
    assert not recwarn.list


@pytest.mark.full
def test_whoever_makes_virtual_devices_needs_no_warning():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", ALONE],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


ALONE = """
import warnings
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import keras
    from keras_clones import clone_model, use_virtual_devices
use_virtual_devices(2)
clone_model(keras.Sequential([keras.layers.Dense(1)]), 2)
"""


@pytest.fixture
def two_gpus(monkeypatch):
    """Let the placement see two GPUs, which are not there."""
    real = placement.logical_devices
    monkeypatch.setattr(
        placement,
        "logical_devices",
        lambda kind: (
            ["/device:GPU:0", "/device:GPU:1"] if kind == "GPU" else real(kind)
        ),
    )


def test_gpus_are_taken_in_order(two_gpus):
    made = deployment(clone_model(cases.mlp()))
    assert [c.device for c in made.clones] == [
        "/device:GPU:0",
        "/device:GPU:1",
    ]
    made = deployment(clone_model(cases.mlp(), 1))
    assert [c.device for c in made.clones] == ["/device:GPU:0"]
    made = deployment(clone_model(cases.mlp(), devices=["GPU:1", "CPU:0"]))
    assert [c.device for c in made.clones] == ["/device:GPU:1", CPUS[0]]


def test_more_clones_than_gpus(two_gpus):
    model = cases.mlp()
    with pytest.raises(ValueError, match=r"GPU:1.*Pass `num_clones=2`"):
        clone_model(model, 3)
    assert deployment(model) is None


def under_a_strategy():
    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
        return cases.mlp()


@pytest.mark.parametrize(
    ("make", "kwargs", "error", "message"),
    [
        (lambda: "model", {}, TypeError, "must be a `keras.Model`"),
        (lambda: keras.layers.Dense(1), {}, TypeError, "`keras.Model`"),
        (cases.mlp, {"num_clones": 0}, ValueError, "positive integer"),
        (cases.mlp, {"num_clones": -2}, ValueError, "positive integer"),
        (cases.mlp, {"num_clones": True}, TypeError, "positive integer"),
        (cases.mlp, {"num_clones": "4"}, TypeError, "positive integer"),
        (cases.mlp, {"num_clones": 2.0}, TypeError, "positive integer"),
        (cases.mlp, {"devices": ["CPU:0", "CPU:99"]}, ValueError, "CPU:99"),
        (cases.mlp, {"devices": ["TPU:0"]}, ValueError, "'GPU:0'"),
        (cases.mlp, {"devices": [3]}, ValueError, "'GPU:0'"),
        (cases.mlp, {"devices": "CPU:0"}, TypeError, "list of device"),
        (cases.mlp, {"devices": []}, ValueError, "at least one"),
        (
            cases.mlp,
            {"devices": ["CPU:1", "/device:cpu:1"]},
            ValueError,
            "repeats",
        ),
        (
            cases.mlp,
            {"num_clones": 3, "devices": ["CPU:1", "CPU:2"]},
            ValueError,
            "one device a clone",
        ),
        (
            cases.mlp,
            {"clone_on_cpu": True, "devices": ["CPU:1"]},
            ValueError,
            "exclude each other",
        ),
        (cases.mlp, {"clone_on_cpu": 1}, TypeError, "boolean"),
        (cases.mlp, {"config": 4}, TypeError, "`DeploymentConfig`"),
        (
            cases.mlp,
            {"config": DeploymentConfig(), "num_clones": 1},
            ValueError,
            "takes the place",
        ),
        (cases.mlp, {"loss": "mean"}, ValueError, "must be one of"),
        (cases.mlp, {"batch_norm": "none"}, ValueError, "must be one of"),
        (cases.mlp, {"jit_compile": "yes"}, ValueError, "must be one of"),
        (cases.mlp, {"layer_losses": "max"}, ValueError, "must be one of"),
        (under_a_strategy, {}, ValueError, "outside of every `tf.distribute`"),
    ],
)
def test_bad_input_leaves_the_model_as_it_was(make, kwargs, error, message):
    with tf.device("CPU:1"):
        model = make()
    before = dict(vars(model)) if isinstance(model, keras.Layer) else {}
    with pytest.raises(error, match=message):
        clone_model(model, **{"num_clones": None, **kwargs})
    if before:
        assert vars(model) == before
        assert all("CPU:0" not in v.value.device for v in model.variables) or (
            make is under_a_strategy
        )


def profile(config):
    model = cases.compiled("mlp")
    x, y = cases.arrays(8)["mlp"]
    model.fit(x, y, callbacks=[CloneProfiler((0, 1))], verbose=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda config: clone_model(cases.mlp(), config=config),
        lambda config: create_clones(config, lambda x: x, [1.0]),
        lambda config: deploy(config, lambda x: x, [1.0]),
        profile,
    ],
)
def test_another_backend_is_refused(make, monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    message = r"KERAS_BACKEND=tensorflow.*Received: backend='jax'"
    with pytest.raises(ValueError, match=message):
        make(DeploymentConfig(2, clone_on_cpu=True))


def fit_clones(model):
    x, y = cases.arrays(8)["mlp"]
    model.fit(x, y, verbose=0)


@pytest.mark.parametrize(
    ("make", "call"),
    [
        (cases.mlp, lambda model: clone_model(model, 2)),
        (
            lambda: DeploymentConfig(2),
            lambda config: create_clones(config, lambda x: x, [1.0]),
        ),
        (
            lambda: DeploymentConfig(2),
            lambda config: deploy(config, lambda x: x, [1.0]),
        ),
        (lambda: clone_model(cases.compiled("mlp"), 2), fit_clones),
    ],
)
def test_the_scope_of_a_strategy_is_named(make, call):
    made = make()
    scope = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope()
    message = r"within the scope of MirroredStrategy.*strategy.scope\(\)"
    with scope, pytest.raises(ValueError, match=message):
        call(made)
    if isinstance(made, keras.Model):
        # Outside of it, all is well.
        cases.compiled("mlp", clone_model(made, 2))
        fit_clones(made)


def test_virtual_devices_after_tensorflow_started():
    with pytest.raises(RuntimeError, match="top of the program"):
        use_virtual_devices(4)
    for bad in (0, True, "2"):
        with pytest.raises(ValueError, match="positive integer"):
            use_virtual_devices(bad)
    with pytest.raises(ValueError, match="'CPU' or 'GPU'"):
        use_virtual_devices(2, "TPU")
    with pytest.raises(ValueError, match="memory_limit"):
        use_virtual_devices(2, "GPU")
    with pytest.raises(ValueError, match="no GPU to split"):
        use_virtual_devices(2, "GPU", memory_limit=1024)


def test_inputs_that_disagree_on_the_rows():
    x, y = cases.arrays(8)["two_by_two"]
    model = clone_model(cases.compiled("two_by_two"), 2)
    before = cases.weights(model)
    message = r"x\[1\].*\(5, 4\)"
    with pytest.raises(ValueError, match=message):
        model.train_on_batch([x[0], x[1][:5]], y)

    def generate():
        yield (tuple(x), tuple(y))
        yield ((x[0], x[1][:5]), tuple(y))

    spec = tf.nest.map_structure(
        lambda a: tf.TensorSpec([None, *a.shape[1:]], a.dtype), (x, y)
    )
    data = tf.data.Dataset.from_generator(generate, output_signature=spec)
    # Steps of Keras 3.16 know the rows before they run.
    known = r"'x\[0\]': \(8, 6\), 'x\[1\]': \(5, 4\)"
    message = rf"(x\[0\] 8 x\[1\] 5 |{known}).*for each row"
    with pytest.raises(ValueError, match=message):
        model.fit(data.skip(1), verbose=0)
    assert cases.difference(before, cases.weights(model)) == 0
    model.fit(data.take(1), verbose=0)
    assert cases.difference(before, cases.weights(model)) > 0


def test_rank_0_inputs_go_to_every_clone(float64):
    x, y = cases.arrays(7)["mlp"]

    class Scaled(keras.Model):
        def __init__(self):
            super().__init__()
            self.head = keras.layers.Dense(3, "softmax")

        def call(self, inputs):
            return self.head(inputs["rows"]) * inputs["scale"]

    results = []
    for num_clones in (None, 3):
        keras.utils.set_random_seed(1)
        model = Scaled()
        if num_clones:
            clone_model(model, num_clones)
        model.compile("adam", "sparse_categorical_crossentropy")
        inputs = {"rows": x, "scale": np.float64(0.5)}
        data = tf.data.Dataset.from_tensors((inputs, y)).repeat(3)
        model.fit(data, verbose=0)
        results.append(cases.weights(model))
    assert cases.difference(*results) < 1e-12


def test_an_output_that_clones_cannot_join_is_refused():
    class Total(keras.Model):
        def call(self, x):
            return keras.ops.sum(x, axis=0)

    model = clone_model(Total(), 2, check_rows=False)
    with pytest.raises(ValueError, match="to have the rows of its input"):
        model.predict(np.ones((6, 2)), verbose=0)


def homes(model):
    variables = [
        *model.variables,
        *model.metrics_variables,
        *model.optimizer.variables,
        *(v for layer in model.layers for v in layer.variables),
    ]
    assert variables
    return {tf.DeviceSpec.from_string(v.value.device) for v in variables}


@pytest.mark.full_but("trained")
@pytest.mark.parametrize("when", ["before", "after", "lazily", "trained"])
def test_every_variable_lives_on_the_cpu(when):
    x, y = cases.arrays(9)["subclassed"]
    options = {
        "optimizer": keras.optimizers.Adam(use_ema=True),
        "loss": "sparse_categorical_crossentropy",
        "metrics": ["accuracy", keras.metrics.SparseCategoricalCrossentropy()],
    }
    with tf.device("CPU:3"):
        model = cases.make("subclassed")
        model.hidden = keras.Sequential(
            [
                keras.layers.Dense(4),
                keras.layers.BatchNormalization(),
                keras.layers.Dropout(0.1),
            ]
        )
        if when in ("before", "trained"):
            model.build((None, 6))
            model.compile(**options)
        if when == "trained":
            model.fit(x, y, verbose=0)
            assert any(home.device_index == 3 for home in homes(model))
        clone_model(model, devices=["CPU:1", "CPU:2"])
        if when in ("after", "lazily"):
            model.compile(**options)
        if when == "after":
            model.build((None, 6))
    held = cases.weights(model) if model.built else []
    with tf.device("CPU:3"):
        model.fit(x, y, epochs=2, validation_data=(x, y), verbose=0)
        model.predict(x, verbose=0)
    assert {(h.device_type, h.device_index) for h in homes(model)} == {
        ("CPU", 0)
    }
    assert not held or cases.difference(held, cases.weights(model)) > 0


@pytest.mark.full
def test_moved_variables_keep_their_values_and_train_on(float64):
    x, y = cases.arrays(24)["mlp"]
    trained = []
    for device in ("CPU:0", "CPU:3"):
        with tf.device(device):
            model = cases.compiled("mlp")
            model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
        clone_model(model, 2)
        model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
        trained.append(cases.weights(model))
    assert cases.difference(*trained) == 0


def test_cloning_again_replaces_the_deployment(float64):
    x, y = cases.arrays(24)["mlp"]
    model = clone_model(cases.compiled("mlp"), 2)
    model.fit(x, y, verbose=0)
    assert len(deployment(clone_model(model, 4)).clones) == 4
    model.fit(x, y, verbose=0)
    unclone_model(model)
    assert deployment(model) is None
    assert "train_step" not in vars(model)
    model.fit(x, y, verbose=0)
    assert int(model.optimizer.iterations) == 3
    assert unclone_model(model) is model


@pytest.mark.full
def test_jit_compile_in_compile_is_kept_off_the_step():
    x, y = cases.arrays(16)["mlp"]
    model = clone_model(cases.mlp(), 2)
    model.compile("sgd", "sparse_categorical_crossentropy", jit_compile=True)
    model.fit(x, y, verbose=0)
    assert model.jit_compile is True

    @tf.function
    def step(x, y):
        return model.train_step((x, y))

    graph = step.get_concrete_function(tf.constant(x), tf.constant(y)).graph
    compiled = [
        operation.device
        for operation in graph.get_operations()
        if "PartitionedCall" in operation.type
        if operation.node_def.attr["_XlaMustCompile"].b
    ]
    assert compiled == ["/device:CPU:0", "/device:CPU:1"]


def test_copies_and_pickles_are_plain(float64):
    x, y = cases.arrays(16)["mlp"]
    model = clone_model(cases.compiled("mlp"), 2)
    model.fit(x, y, verbose=0)
    for other in (
        copy.copy(model),
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        keras.models.clone_model(model),
    ):
        assert deployment(other) is None
        assert "train_step" not in vars(other)


def archive(path):
    """Return the configuration and the arrays of a `.keras` file."""
    arrays = {}
    with zipfile.ZipFile(path) as file:
        text = file.read("config.json").decode()
        # An identity of a Python object, another one in every run.
        config = json.loads(re.sub(r'"shared_object_id": \d+', '"": 0', text))
        names = sorted(file.namelist())
        with file.open("model.weights.h5") as weights, h5py.File(weights) as h5:
            h5.visititems(
                lambda name, item: (
                    arrays.update({name: np.asarray(item)})
                    if isinstance(item, h5py.Dataset)
                    else None
                )
            )
    return names, config, arrays


def test_saved_files_are_what_plain_keras_writes(tmp_path, float64):
    x, y = cases.arrays(16)["mlp"]
    files = []
    for num_clones in (None, 1):
        keras.backend.clear_session(free_memory=False)
        model = cases.make("mlp")
        if num_clones:
            clone_model(model, num_clones)
        cases.compiled("mlp", model)
        model.fit(x, y, verbose=0, shuffle=False)
        model.save(tmp_path / f"{num_clones}.keras")
        model.save_weights(tmp_path / f"{num_clones}.weights.h5")
        files.append(archive(tmp_path / f"{num_clones}.keras"))
    (names, config, arrays), (clone_names, clone_config, clone_arrays) = files
    assert names == clone_names
    assert config == clone_config
    assert arrays.keys() == clone_arrays.keys()
    assert all((arrays[k] == clone_arrays[k]).all() for k in arrays)


@pytest.mark.full
def test_saved_files_load_without_this_package(tmp_path):
    x, y = cases.arrays(16)["mlp"]
    model = clone_model(cases.compiled("mlp"), 4)
    model.fit(x, y, verbose=0)
    model.save(tmp_path / "model.keras")
    model.export(tmp_path / "exported", verbose=False)
    np.savez(tmp_path / "data.npz", x=x, y=y, p=model.predict(x, verbose=0))
    script = """
        import sys
        sys.modules["keras_clones"] = None
        import keras, numpy as np, tensorflow as tf
        data = np.load("data.npz")
        model = keras.models.load_model("model.keras")
        np.testing.assert_allclose(
            model.predict(data["x"], verbose=0), data["p"], rtol=1e-5
        )
        assert int(model.optimizer.iterations) == 1
        model.fit(data["x"], data["y"], verbose=0)
        loaded = tf.saved_model.load("exported")
        served = loaded.serve(data["x"])
        np.testing.assert_allclose(served, data["p"], rtol=1e-5)
    """
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=tmp_path,
        check=True,
    )


def test_a_saved_file_trains_on_another_number_of_clones(tmp_path, float64):
    x, y = cases.arrays(32)["mlp"]
    model = cases.compiled("mlp")
    model.fit(x, y, batch_size=8, epochs=4, shuffle=False, verbose=0)
    stopped = clone_model(cases.compiled("mlp"), 2)
    stopped.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    stopped.save(tmp_path / "model.keras")
    resumed = keras.models.load_model(tmp_path / "model.keras")
    assert deployment(resumed) is None
    clone_model(resumed, 3)
    resumed.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    assert cases.difference(cases.weights(model), cases.weights(resumed)) < (
        1e-10
    )


def test_nested_models(float64):
    def nested():
        inner = keras.Sequential([keras.layers.Dense(5, "relu"), cases.mlp()])
        return keras.Sequential(
            [keras.Input((4,)), keras.layers.Dense(6), inner.layers[1]]
        )

    x, y = cases.arrays(20)["two_by_two"][0][1], cases.arrays(20)["mlp"][1]
    results = []
    for num_clones in (None, 3):
        keras.utils.set_random_seed(4)
        model = nested()
        if num_clones:
            clone_model(model, num_clones)
        cases.compiled("mlp", model)
        model.fit(x, y, batch_size=8, epochs=2, verbose=0)
        results.append(cases.weights(model))
    assert cases.difference(*results) < 1e-10


def test_progress_bar_and_callbacks(capsys):
    x, y = cases.arrays(32)["mlp"]
    seen = []
    model = clone_model(cases.compiled("mlp"), 2)
    callback = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append((batch, dict(logs))),
        on_epoch_end=lambda epoch, logs: seen.append((epoch, dict(logs))),
    )
    model.fit(x, y, batch_size=8, callbacks=[callback], validation_split=0.25)
    assert len(seen) == 4
    assert set(seen[0][1]) == {"loss", "accuracy"}
    assert "val_loss" in seen[-1][1]
    assert "3/3" in capsys.readouterr().out
