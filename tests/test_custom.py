"""Models with a train, test or predict step of their own run on clones."""

import cases
import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

from keras_clones import clone_model


class Logged(keras.Sequential):
    """Calls Keras's own step, and adds to its logs."""

    def train_step(self, data):
        logs = super().train_step(data)
        return {**logs, "twice": 2 * logs["loss"]}

    def test_step(self, data):
        logs = super().test_step(data)
        return {**logs, "half": logs["loss"] / 2}

    def predict_step(self, data):
        return {"probabilities": super().predict_step(data)}


class Twice(keras.Sequential):
    """Applies gradients twice a step, the second time at the new weights."""

    def train_step(self, data):
        x, y = data
        for _ in range(2):
            with tf.GradientTape() as tape:
                y_pred = self(x, training=True)
                loss = self.compute_loss(y=y, y_pred=y_pred)
            grads = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply(grads, self.trainable_variables)
        self._loss_tracker.update_state(loss, sample_weight=tf.shape(x)[0])
        return self.compute_metrics(x, y, y_pred)


class Adversarial(keras.Model):
    """A GAN, whose noise is a part of the data so that runs are alike."""

    def __init__(self):
        super().__init__()
        self.generator = keras.Sequential(
            [
                keras.Input((4,)),
                keras.layers.Dense(8, "relu"),
                keras.layers.Dense(6),
            ]
        )
        self.discriminator = keras.Sequential(
            [
                keras.Input((6,)),
                keras.layers.Dense(8, "relu"),
                keras.layers.Dense(1),
            ]
        )
        self.d_metric = keras.metrics.Mean(name="d_loss")
        self.g_metric = keras.metrics.Mean(name="g_loss")

    def compile(self, d_optimizer, g_optimizer):
        super().compile()
        self.d_optimizer = d_optimizer
        self.g_optimizer = g_optimizer
        self.loss_fn = keras.losses.BinaryCrossentropy(from_logits=True)

    @property
    def metrics(self):
        return [self.d_metric, self.g_metric]

    def train_step(self, data):
        real, noise = data
        size = tf.shape(real)[0]
        fake = self.generator(noise)
        both = tf.concat([fake, real], axis=0)
        labels = tf.concat([tf.ones((size, 1)), tf.zeros((size, 1))], axis=0)
        with tf.GradientTape() as tape:
            d_loss = self.loss_fn(labels, self.discriminator(both))
        grads = tape.gradient(d_loss, self.discriminator.trainable_weights)
        self.d_optimizer.apply_gradients(
            zip(grads, self.discriminator.trainable_weights, strict=True)
        )
        with tf.GradientTape() as tape:
            verdict = self.discriminator(self.generator(noise))
            g_loss = self.loss_fn(tf.zeros((size, 1)), verdict)
        grads = tape.gradient(g_loss, self.generator.trainable_weights)
        self.g_optimizer.apply(grads, self.generator.trainable_weights)
        self.d_metric.update_state(d_loss)
        self.g_metric.update_state(g_loss)
        return {m.name: m.result() for m in self.metrics}


class Distilled(keras.Model):
    """A student that learns from a frozen teacher, and averages itself."""

    def __init__(self):
        super().__init__()
        self.teacher = cases.mlp()
        self.student = cases.mlp()
        self.average = cases.mlp()
        self.teacher.trainable = False
        self.average.trainable = False

    def call(self, x, training=False):
        return self.student(x, training=training)

    def train_step(self, data):
        x, y = data
        target = self.teacher(x, training=False)
        with tf.GradientTape() as tape:
            y_pred = self.student(x, training=True)
            loss = self.compute_loss(x=x, y=y, y_pred=y_pred)
            loss += keras.losses.KLDivergence()(target, y_pred)
        weights = self.student.trainable_weights
        self.optimizer.apply(tape.gradient(loss, weights), weights)
        for mean, weight in zip(
            self.average.weights, self.student.weights, strict=True
        ):
            mean.assign(0.9 * mean + 0.1 * weight)
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss)
            else:
                metric.update_state(y, y_pred)
        return {m.name: m.result() for m in self.metrics}


def layers(model_class):
    model = model_class()
    for layer in cases.mlp().layers:
        model.add(layer)
    model.build((None, 6))
    return model


def normalized(model_class):
    model = model_class()
    model.add(keras.Input((6,)))
    model.add(keras.layers.Dense(8, use_bias=False))
    model.add(keras.layers.BatchNormalization(synchronized=True))
    model.add(keras.layers.Dense(3, "softmax"))
    return model


def supervised(model, **kwargs):
    model.compile("adam", **cases.DEFAULT_COMPILE, **kwargs)
    return model


STEPS = {
    "super": lambda: supervised(layers(Logged)),
    "twice": lambda: supervised(layers(Twice)),
    "distilled": lambda: supervised(Distilled()),
    "synchronized": lambda: supervised(normalized(Twice)),
    "eager": lambda: supervised(layers(Logged), run_eagerly=True),
}


@pytest.mark.parametrize("num_clones", [1, 2, 3])
@pytest.mark.parametrize("name", STEPS)
def test_own_train_step(name, num_clones, float64):
    x, y = cases.arrays(33)["mlp"]
    results = []
    for cloned in (False, True):
        keras.utils.set_random_seed(3)
        model = STEPS[name]()
        if cloned:
            clone_model(model, num_clones)
        data = cases.batches(x, y, [10, 12, 10, 1])
        history = model.fit(data, epochs=3, verbose=0).history
        results.append(
            {
                "variables": [v.numpy() for v in model.variables],
                "optimizer": [v.numpy() for v in model.optimizer.variables],
                "history": history,
                "evaluate": model.evaluate(data, verbose=0, return_dict=True),
                "predict": model.predict(data, verbose=0),
            }
        )
    for part, expected in results[0].items():
        assert cases.difference(expected, results[1][part]) < 1e-10, part


@pytest.mark.parametrize("num_clones", [2, 3])
def test_two_optimizers(num_clones, float64):
    rng = np.random.default_rng(0)
    data = rng.normal(size=(33, 6)), rng.normal(size=(33, 4))
    results = []
    for cloned in (False, True):
        keras.utils.set_random_seed(3)
        model = Adversarial()
        if cloned:
            clone_model(model, num_clones)
        model.compile(keras.optimizers.Adam(), keras.optimizers.RMSprop())
        batches = cases.batches(*data, [10, 12, 10, 1])
        history = model.fit(batches, epochs=3, verbose=0).history
        results.append((cases.weights(model), history))
    (expected, logs), (received, clone_logs) = results
    assert cases.difference(expected, received) < 1e-10
    assert cases.difference(logs, clone_logs) < 1e-10


def test_every_optimizer_lives_on_the_cpu():
    rng = np.random.default_rng(0)
    data = rng.normal(size=(8, 6)), rng.normal(size=(8, 4))
    with tf.device("CPU:3"):
        model = clone_model(Adversarial(), devices=["CPU:1", "CPU:2"])
        model.compile(keras.optimizers.Adam(), keras.optimizers.RMSprop())
        model.fit(*(a.astype("float32") for a in data), verbose=0)
    for optimizer in (model.d_optimizer, model.g_optimizer):
        assert len(optimizer.variables) > 2
        for variable in optimizer.variables:
            assert variable.value.device.endswith("CPU:0"), variable.path


class Conditional(keras.Sequential):
    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(y=y, y_pred=self(x, training=True))
        grads = tape.gradient(loss, self.trainable_variables)

        def apply():
            self.optimizer.apply(grads, self.trainable_variables)
            return 1

        tf.cond(self.optimizer.iterations % 2 == 0, apply, lambda: 0)
        return {"loss": loss}


class Decorated(keras.Sequential):
    @tf.function
    def train_step(self, data):
        return super().train_step(data)


@pytest.mark.parametrize("model_class", [Conditional, Decorated])
def test_clones_cannot_meet_inside_a_condition_or_function(model_class):
    x, y = cases.arrays(8)["mlp"]
    model = clone_model(supervised(layers(model_class)), 2)
    before = cases.weights(model)
    with pytest.raises(ValueError, match="gradient_accumulation_steps"):
        model.fit(x, y, verbose=0)
    assert cases.difference(before, cases.weights(model)) == 0


def test_layers_must_be_built():
    class Unbuilt(keras.Model):
        def __init__(self):
            super().__init__()
            self.head = keras.layers.Dense(3)

        def train_step(self, data):
            return {"loss": ops.mean(self.head(data[0]))}

    x, y = cases.arrays(8)["mlp"]
    model = clone_model(Unbuilt(), 2)
    model.compile("adam")
    with pytest.raises(ValueError, match=r"Received: \['dense'\]"):
        model.fit(x, y, verbose=0)


def test_a_metric_must_get_rows_or_a_scalar():
    class Odd(keras.Sequential):
        def train_step(self, data):
            self.seen.update_state(tf.zeros(3))
            return {"seen": self.seen.result()}

    model = Odd([keras.Input((6,)), keras.layers.Dense(3)])
    model.seen = keras.metrics.Mean()
    model.compile("sgd", "mse")
    clone_model(model, 2)
    x, y = cases.arrays(8)["mlp"]
    with pytest.raises(ValueError, match="a scalar that is a mean"):
        model.train_on_batch(x, y)


def test_methods_are_as_they_were_after_a_step():
    x, y = cases.arrays(8)["mlp"]
    apply = keras.optimizers.Optimizer.apply
    update = keras.metrics.Mean.update_state
    model = clone_model(supervised(layers(Logged)), 2)
    model.fit(x, y, verbose=0)
    assert keras.optimizers.Optimizer.apply is apply
    assert keras.metrics.Mean.update_state is update
