"""Models with a train, test or predict step of their own run on clones.

Such a step runs once, on the global batch: its calls of layers run on clones.
"""

import threading

import cases
import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers as L  # noqa: N812
from keras import ops

from keras_clones import clone_model, deployment, unclone_model
from keras_clones.calls import sharing


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


@pytest.mark.full_but("synchronized-3")
@pytest.mark.parametrize(
    ("name", "num_clones"), [("super", 1), *((name, 3) for name in STEPS)]
)
def test_own_train_step(name, num_clones, float64):
    x, y = cases.arrays(33)["mlp"]
    results = []
    for cloned in (False, True):
        keras.utils.set_random_seed(3)
        model = STEPS[name]()
        if cloned:
            clone_model(model, num_clones)
        else:
            # Keras traces a step twice that makes variables.
            model.optimizer.build(model.trainable_variables)
        data = cases.batches(x, y, [10, 12, 10, 1])
        history = model.fit(data, epochs=2, verbose=0).history
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


@pytest.mark.full
def test_two_optimizers(float64):
    rng = np.random.default_rng(0)
    data = rng.normal(size=(33, 6)), rng.normal(size=(33, 4))
    results = []
    for cloned in (False, True):
        keras.utils.set_random_seed(3)
        model = Adversarial()
        if cloned:
            clone_model(model, 3)
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


def test_methods_are_as_they_were_after_a_step():
    x, y = cases.arrays(8)["mlp"]
    apply = keras.optimizers.Optimizer.apply
    update = keras.metrics.Mean.update_state
    model = clone_model(supervised(layers(Logged)), 2)
    model.fit(x, y, verbose=0)
    assert keras.optimizers.Optimizer.apply is apply
    assert keras.metrics.Mean.update_state is update


def rows_of(data, sizes=(8, 8, 4, 2)):
    """Return batches of an unknown number of rows, of these sizes."""
    rows = tf.data.Dataset.from_tensor_slices(data)
    parts = [
        rows.skip(sum(sizes[:i])).take(size).batch(size)
        for i, size in enumerate(sizes)
    ]
    batches = parts[0]
    for part in parts[1:]:
        batches = batches.concatenate(part)
    return batches


def reals(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def come_to(make, data, num_clones, compile_with=None, epochs=2, **kwargs):
    """Return what training comes to: in plain Keras for `None` clones.

    Models of `TRAIN_ALL` have all their variables, and one optimizer for them.
    """
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(3)
    model = make()
    if num_clones:
        clone_model(model, num_clones, **kwargs)
    model.compile(**{"optimizer": "adam", **(compile_with or {})})
    if not num_clones and isinstance(model, TRAIN_ALL):
        # Keras traces a step twice that makes variables.
        model.optimizer.build(model.trainable_variables)
    history = model.fit(data, epochs=epochs, verbose=0).history
    raw = [v for v in vars(model).values() if isinstance(v, tf.Variable)]
    variables = [*model.variables, *model.optimizer.variables, *raw]
    return {"variables": [v.numpy() for v in variables], "history": history}


def assert_alike(make, data, *args, num_clones=3, **kwargs):
    """Assert that clones come to what plain Keras comes to."""
    expected = come_to(make, data, None, *args)
    received = come_to(make, data, num_clones, *args, **kwargs)
    for part in expected:
        gap = cases.difference(expected[part], received[part])
        assert gap < 1e-10, (part, gap)
    return expected


def train(model, tape, loss, part=None):
    weights = (part or model).trainable_variables
    model.optimizer.apply(tape.gradient(loss, weights), weights)


class Assigning(keras.Model):
    """Assigns a counter, the learning rate, weights and a memory bank."""

    def __init__(self):
        super().__init__()
        self.net = cases.mlp()
        self.unbuilt = keras.Sequential([L.Rescaling(0.5), L.Dense(3)])
        self.replaced = L.Dense(7)
        self.bank = self.add_weight((6, 3), "zeros", trainable=False)
        self.steps = tf.Variable(0, dtype="int64")

    def train_step(self, data):
        x, y, weight, extra = data
        self.steps.assign_add(1)
        warm = tf.minimum(tf.cast(self.steps, "float64") / 9, 1.0)
        self.optimizer.learning_rate.assign(0.01 * warm)
        used = self.net.trainable_variables
        nudges = [0.01 * ops.sign(v) for v in used]
        for variable, nudge in zip(used, nudges, strict=True):
            variable.assign_add(nudge)
        with tf.GradientTape() as tape:
            hidden = self.net.layers[0](x)
            features = self.net.layers[1](hidden) + self.unbuilt(x)
            near = tf.matmul(features, self.bank, transpose_b=True)
            loss = weight * tf.square(features[:, 0] - y - extra)
            loss += tf.reduce_mean(near, axis=1) * warm
        trained = [*used, *self.unbuilt.trainable_variables]
        # The gradient of losses by row is that of their sum.
        gradients = tape.gradient(loss, trained)
        for variable, nudge in zip(used, nudges, strict=True):
            variable.assign_sub(nudge)
            variable.assign(0.99 * variable)
        self.optimizer.apply(gradients, trained)
        self.bank.assign(tf.concat([features, self.bank], axis=0)[:6])
        return {"loss": tf.reduce_mean(loss), "near": tf.reduce_mean(near)}


def test_a_step_assigns_what_it_likes(float64):
    data = reals(22, 6), reals(22), np.abs(reals(22)), reals(22, seed=1)
    assert_alike(Assigning, rows_of(data))


class Keeping(keras.Model):
    """Keeps a tensor on itself, and reads the layers' losses after `apply`."""

    def __init__(self):
        super().__init__()
        self.hidden = L.Dense(8, "tanh", activity_regularizer="l2")
        self.head = L.Dense(1, kernel_regularizer="l2")
        self.penalty = keras.metrics.Mean(name="penalty")

    def call(self, x):
        self.seen = self.hidden(x)
        return self.head(self.seen)

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(self(x) - y)) + sum(self.losses)
            loss += 0.1 * tf.reduce_mean(tf.abs(self.seen))
        train(self, tape, loss)
        self.penalty.update_state(sum(self.losses))
        return {"penalty": self.penalty.result(), "loss": loss}


def test_what_a_call_leaves_on_layers(float64):
    data = reals(22, 6), reals(22, 1)
    assert_alike(Keeping, rows_of(data), layer_losses="mean")


class Sum(L.Layer):
    """Adds a sum over the rows as a loss."""

    def call(self, x):
        self.add_loss(0.01 * ops.sum(ops.square(x)))
        return x


class Timed(keras.Model):
    """Calls Keras's own step with masks and losses of layers."""

    def train_step(self, data):
        logs = super().train_step(data)
        return {**logs, "rate": self.optimizer.learning_rate.value}


@pytest.mark.full
def test_super_with_masks_and_losses_of_layers(float64):
    def make():
        ids = keras.Input((5,), dtype="int32")
        x = L.LSTM(6, return_sequences=True)(
            L.Embedding(9, 4, mask_zero=True)(ids)
        )
        return Timed(ids, L.Dense(3, "softmax")(Sum()(x)))

    rng = np.random.default_rng(0)
    ids = rng.integers(1, 9, size=(22, 5))
    ids *= np.arange(5) < rng.integers(1, 6, size=(22, 1))
    data = ids, rng.integers(0, 3, size=(22, 5))
    arguments = cases.DEFAULT_COMPILE
    assert_alike(make, rows_of(data), arguments, layer_losses="sum")


class Critic(keras.Model):
    """A GAN with drawn noise, clipped weights and a penalty on a gradient."""

    def __init__(self):
        super().__init__()
        self.generator = keras.Sequential(
            [keras.Input((4,)), L.Dense(6, "tanh"), L.LayerNormalization()]
        )
        self.critic = keras.Sequential(
            [
                keras.Input((6,)),
                L.SpectralNormalization(L.Dense(8, "tanh")),
                L.Dense(1),
            ]
        )
        self.positions = L.Embedding(6, 1)
        self.positions.build(None)
        self.draws = keras.random.SeedGenerator(1)

    def judge(self, x):
        return self.critic(x + self.positions(tf.range(6))[:, 0], training=True)

    def noise(self, rows):
        return keras.random.normal((rows, 4), seed=self.draws)

    def train_step(self, real):
        size = tf.shape(real)[0]
        judges = [*self.critic.trainable_variables, *self.positions.variables]
        for _ in range(2):
            with tf.GradientTape() as tape:
                fake = self.generator(self.noise(size), training=True)
                share = keras.random.uniform((size, 1), seed=self.draws)
                mixed = real + share * (fake - real)
                with tf.GradientTape() as inner:
                    inner.watch(mixed)
                    verdict = self.judge(mixed)
                slope = tf.norm(inner.gradient(verdict, mixed), axis=1)
                both = self.judge(tf.concat([real, fake], axis=0))
                loss = tf.reduce_mean(both[size:]) - tf.reduce_mean(both[:size])
                loss += 10.0 * tf.reduce_mean(tf.square(slope - 1.0))
            self.optimizer.apply(tape.gradient(loss, judges), judges)
            for weight in self.critic.trainable_variables:
                weight.assign(tf.clip_by_value(weight, -0.5, 0.5))
        with tf.GradientTape() as tape:
            # Latents of another number of rows than the batch has.
            made = self.generator(self.noise(2 * size + 1), training=True)
            fooled = -tf.reduce_mean(self.judge(made))
        weights = self.generator.trainable_variables
        self.other_optimizer.apply(tape.gradient(fooled, weights), weights)
        samples = self.generator(self.noise(5))
        return {"critic": loss, "fooled": fooled, "samples": samples[0, 0]}

    def compile(self, optimizer):
        super().compile(optimizer)
        self.other_optimizer = keras.optimizers.RMSprop()


class Cyclic(keras.Model):
    """One persistent tape for four updates, and derivatives of all kinds."""

    def __init__(self):
        super().__init__()
        self.there, self.back = L.Dense(6, "tanh"), L.Dense(6, "tanh")
        self.heads = [L.Dense(2, "tanh", name=n) for n in "ab"]
        for layer in (self.there, self.back, *self.heads):
            layer.build((None, 6))

    def train_step(self, x):
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(x)
            fake = self.there(x)
            cycled = self.back(fake)
            loss = tf.reduce_mean(tf.abs(cycled - x))
            same = tf.reduce_mean(tf.square(self.back(x) - x)) + loss
            with tape.stop_recording():
                target = self.heads[0](fake)
            heads = [head(fake) for head in self.heads]
            apart = tf.reduce_mean(tf.square(heads[1] - target))
            by_column = tf.reduce_mean(heads[0], axis=0)
        jacobian = tape.jacobian(by_column, self.heads[0].kernel)
        slopes = tape.gradient(apart, x)
        by_row = tape.batch_jacobian(heads[1], x)
        self.optimizer.build(self.trainable_variables)
        train(self, tape, loss, self.there)
        train(self, tape, same, self.back)
        train(self, tape, apart, self.heads[1])
        self.heads[0].kernel.assign_sub(0.1 * tf.reduce_sum(jacobian, axis=0))
        return {
            "loss": loss,
            "slopes": tf.reduce_sum(tf.square(slopes)),
            "jacobian": tf.reduce_sum(tf.square(jacobian)),
            "by_row": tf.reduce_sum(tf.square(by_row)),
        }


class Flowing(keras.Model):
    """Calls layers and applies gradients inside of conditions and loops."""

    def __init__(self):
        super().__init__()
        self.net = cases.mlp()
        self.cell = L.Dense(6, "tanh")
        self.cell.build((None, 6))

    def build(self, shape):
        self.sums = [
            self.add_weight(v.shape, "zeros", trainable=False)
            for v in self.trainable_variables
        ]

    def train_step(self, x):
        weights, count = self.trainable_variables, self.optimizer.iterations
        with tf.GradientTape() as tape:
            state = tf.while_loop(
                lambda i, _: i < 2,
                lambda i, h: (i + 1, self.cell(h) + x),
                (0, x),
            )[1]
            y = tf.cond(
                self.steps % 2 == 0,
                lambda: self.net(state),
                lambda: 2.0 * self.net(x),
            )
            loss = tf.reduce_mean(tf.square(y))
        for total, g in zip(
            self.sums, tape.gradient(loss, weights), strict=True
        ):
            total.assign_add(g)

        def with_tape(_):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(self.cell(x)))
            return tape.gradient(loss, self.cell.kernel)

        slope = tf.while_loop(
            lambda i, _: i < 2,
            lambda i, _: (i + 1, with_tape(i)),
            (0, tf.zeros((6, 6), "float64")),
        )[1]
        self.sums[-2].assign_add(
            tf.cond(count % 2 == 0, lambda: slope, lambda: with_tape(0))
        )

        def apply():
            self.optimizer.apply([0.5 * g for g in self.sums], weights)
            for total in self.sums:
                total.assign(tf.zeros_like(total))
            return 1

        self.steps.assign_add(1)
        applied = tf.cond(self.steps % 2 == 0, apply, lambda: 0)
        return {"loss": loss, "applied": applied, "slope": slope[0, 0]}

    def compile(self, optimizer):
        super().compile(optimizer)
        self.steps = tf.Variable(0)


def flowing():
    model = Flowing()
    model.build((None, 6))
    return model


@pytest.mark.full_but("flowing")
@pytest.mark.parametrize("make", [Critic, Cyclic, flowing])
def test_tapes_conditions_and_loops(make, float64):
    assert_alike(make, rows_of(reals(22, 6)))


class Within(L.Layer):
    """Its own layers learn of `training` from the call around them."""

    def __init__(self):
        super().__init__()
        self.inner = L.SpectralNormalization(L.Dense(6, "tanh"))
        self.inner.build((None, 6))

    def call(self, x):
        return self.inner(x)


class Sloped(keras.Model):
    """Trains on the gradient of a layer, which a tape calls again."""

    def __init__(self):
        super().__init__()
        self.within = Within()

    def train_step(self, x):
        with tf.GradientTape() as tape:
            with tf.GradientTape() as inner:
                inner.watch(x)
                y = self.within(x, training=True)
            loss = tf.reduce_mean(inner.gradient(y, x) ** 2)
        weights = self.within.trainable_variables
        self.optimizer.apply(tape.gradient(loss, weights), weights)
        return {"loss": loss}


@pytest.mark.full
def test_a_call_that_is_made_again_knows_of_training(float64):
    assert_alike(Sloped, rows_of(reals(22, 6)))


class Encoder(L.Layer):
    """Takes tensors of all kinds by position, by name and in a dict."""

    def __init__(self):
        super().__init__()
        self.hashed = L.Hashing(7)
        self.words = L.Embedding(7, 4)
        self.tokens = L.SimpleRNN(4)
        self.flags = L.Dense(4)

    def build(self, *_):
        self.words.build(None)
        self.tokens.build((None, 3, 2))
        self.flags.build((None, 5))

    def call(self, inputs, other, mask, pieces, prototypes, scale):
        found = self.tokens(inputs["series"], mask=mask) + self.flags(other)
        found += self.words(self.hashed(inputs["text"]))
        lengths = tf.cast(pieces.row_lengths(), "float64")[:, None]
        found += tf.reduce_sum(pieces, axis=1)[:, None] / lengths
        return {"found": found, "near": scale * tf.matmul(found, prototypes)}


class Fed(keras.Model):
    """Calls a layer with dicts, masks, strings, ragged and sparse tensors."""

    def __init__(self):
        super().__init__()
        self.encoder = Encoder()
        self.encoder.build()
        self.prototypes = self.add_weight((4, 3), "glorot_normal")
        self.scale = self.add_weight((3,), "ones")

    def train_step(self, data):
        inputs, sparse, pieces = data
        mask = inputs["series"][..., 0] > -0.5
        mask = tf.concat([tf.ones_like(mask[:, :1]), mask[:, 1:]], axis=1)
        with tf.GradientTape() as tape:
            out = self.encoder(
                {k: inputs[k] for k in ("series", "text")},
                sparse,
                mask=mask,
                pieces=pieces,
                prototypes=tf.convert_to_tensor(self.prototypes),
                # Three entries that are no rows, also in a batch of three.
                scale=tf.abs(self.scale),
            )
            loss = tf.reduce_mean(tf.square(out["near"]))
            loss += tf.reduce_mean(out["found"][:, 0])
        train(self, tape, loss)
        return {"sum": loss}


def test_inputs_of_every_kind(float64):
    pieces = [list(reals(1 + i % 3, seed=i)) for i in range(21)]
    sparse = reals(21, 5) * (reals(21, 5, seed=1) > 0.5)
    text = np.array(["one", "two", "three"] * 7)
    data = (
        {"series": reals(21, 3, 2), "text": text},
        tf.sparse.from_dense(sparse),
        tf.ragged.constant(pieces, dtype="float64"),
    )
    sgd = {"optimizer": "sgd"}
    assert_alike(Fed, rows_of(data, (8, 8, 3, 2)), sgd)


class Squares(keras.Model):
    """A loss of its own in a step of its own."""

    def train_step(self, x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(self(x)))
        train(self, tape, loss)
        return {"squares": loss}


@pytest.mark.full
def test_sparse_input_with_adam(float64):
    def make():
        x = keras.Input((5,), sparse=True)
        return Squares(x, L.Dense(4)(x))

    data = reals(22, 5) * (reals(22, 5, seed=1) > 0.5)
    assert_alike(make, rows_of(tf.sparse.from_dense(data)))


class Near(L.Layer):
    def call(self, x, bank):
        return ops.max(ops.matmul(x, ops.transpose(bank)), axis=1)


class Banked(keras.Model):
    """Compares rows with a bank that has as many."""

    def __init__(self):
        super().__init__()
        self.near = Near()
        self.bank = self.add_weight((8, 4), "glorot_normal")

    def train_step(self, x):
        with tf.GradientTape() as tape:
            near = tf.reduce_mean(self.near(x, 2.0 * self.bank))
        train(self, tape, near)
        return {"near": near}


@pytest.mark.full
def test_a_bank_of_as_many_rows_as_a_batch(float64):
    rows = tf.data.Dataset.from_tensor_slices(reals(8, 4))
    assert_alike(Banked, rows.batch(8, drop_remainder=True))


class Gram(L.Layer):
    def call(self, x):
        return ops.matmul(ops.transpose(x), x)


class Compared(keras.Model):
    def __init__(self):
        super().__init__()
        self.gram = Gram(name="gram_of_rows")

    def train_step(self, x):
        return {"loss": ops.mean(self.gram(x))}


@pytest.mark.parametrize("eager", [False, True])
def test_an_output_that_clones_cannot_join(eager):
    model = clone_model(Compared(), 2, check_rows=False)
    model.compile("adam", run_eagerly=eager)
    with pytest.raises(ValueError, match="gram_of_rows"):
        model.fit(rows_of(reals(8, 3), [8]), verbose=0)


class TwoHeaded(keras.Model):
    """A model of two heads, whose loss uses one."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            used, _ = self(x, training=True)
            loss = tf.reduce_mean(tf.square(used - y))
        train(self, tape, loss)
        return {"squares": loss}

    def test_step(self, data):
        used, idle = self(data[0], training=False)
        return {"apart": tf.reduce_max(tf.abs(used - idle))}

    def predict_step(self, data):
        return dict(zip("ab", self(data[0], training=False), strict=True))


def two_headed():
    x = keras.Input((6,))
    hidden = L.Dense(5, "tanh")(x)
    return TwoHeaded(x, [L.Dense(1, name=n)(hidden) for n in ("used", "idle")])


def test_a_head_without_a_loss_does_not_decay(float64):
    data = rows_of((reals(22, 6), reals(22, 1)))
    found = []
    for num_clones in (None, 3):
        keras.utils.set_random_seed(3)
        model = two_headed()
        idle = [w.numpy() for w in model.get_layer("idle").weights]
        if num_clones:
            clone_model(model, num_clones)
        model.compile(keras.optimizers.AdamW(weight_decay=0.1))
        history = model.fit(data, epochs=2, verbose=0).history
        assert cases.difference(idle, model.get_layer("idle").weights) == 0
        evaluated = model.evaluate(data, verbose=0, return_dict=True)
        predicted = model.predict(data, verbose=0)
        slots = [v.numpy() for v in model.optimizer.variables]
        found.append(
            (cases.weights(model), slots, history, evaluated, predicted)
        )
    assert cases.difference(*found) < 1e-10


class Decorated(Twice):
    @tf.function
    def train_step(self, data):
        return super().train_step(data)


@pytest.mark.full_but("decorated")
@pytest.mark.parametrize(
    ("model_class", "arguments"),
    [
        (Decorated, {}),
        (Twice, {"run_eagerly": True}),
        (Twice, {"steps_per_execution": 2}),
        (Twice, {"jit_compile": True}),
    ],
    ids=["decorated", "eager", "several", "xla"],
)
def test_ways_to_run(model_class, arguments, float64):
    x, y = cases.arrays(22)["mlp"]
    arguments = {**cases.DEFAULT_COMPILE, **arguments}
    data = rows_of((x, y), (8, 8, 2))
    assert_alike(lambda: layers(model_class), data, arguments)


@pytest.mark.full
def test_train_on_batch(float64):
    x, y = cases.arrays(22)["mlp"]
    found = []
    for num_clones in (None, 3):
        keras.utils.set_random_seed(3)
        model = supervised(layers(Logged))
        if num_clones:
            clone_model(model, num_clones)
        logs = [
            model.train_on_batch(x[rows], y[rows], return_dict=True)
            for rows in (slice(8), slice(8, 20), slice(20, 22))
        ]
        found.append((cases.weights(model), logs))
    assert cases.difference(*found) < 1e-10


class Student(keras.Model):
    """Learns from a teacher that it shares with others."""

    seen = ()

    def __init__(self, teacher):
        super().__init__()
        self.teacher, self.student = teacher, cases.mlp()

    def train_step(self, data):
        x, y = data
        Student.seen += (keras_classes(),)
        with tf.GradientTape() as tape:
            apart = self.student(x) - self.teacher(x, training=False)
            loss = tf.reduce_mean(tf.square(apart) * tf.abs(y[:, None]))
        train(self, tape, loss, self.student)
        return {"apart": loss}


def keras_classes():
    classes = (
        *(keras.Layer, keras.Model, keras.Sequential, L.Dense),
        *(keras.Metric, keras.metrics.Mean),
        *(keras.Optimizer, keras.optimizers.Adam, tf.GradientTape),
    )
    return [dict(vars(one)) for one in classes]


TRAIN_ALL = (Twice, Flowing, Sloped, Fed)


@pytest.mark.full
def test_two_threads_share_a_frozen_teacher(float64):
    before = keras_classes()
    data = [rows_of((reals(22, 6, seed=i), reals(22))) for i in range(2)]
    found = []
    for num_clones in (None, 3):
        keras.utils.set_random_seed(3)
        teacher = cases.mlp()
        teacher.trainable = False
        models = [Student(teacher) for _ in range(2)]
        for model in models:
            model.compile("adam")
            if num_clones:
                clone_model(model, num_clones)
        inner = [*models, *(m.student for m in models), teacher]
        inner += [layer for m in inner[2:] for layer in m.layers]
        own = [set(vars(layer)) for layer in inner]
        losses = [None, None]

        def fit(i, models=models, losses=losses):
            history = models[i].fit(data[i], epochs=3, verbose=0)
            losses[i] = history.history["apart"]

        threads = [threading.Thread(target=fit, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
            if not num_clones:
                thread.join()
        for thread in threads:
            thread.join()
        for layer, names in zip(inner, own, strict=True):
            extra = {
                name
                for name in set(vars(layer)) - names
                if callable(vars(layer)[name])
            }
            assert not extra - {"train_function"}, (layer.name, extra)
        found.append((losses, [cases.weights(m) for m in models]))
    assert cases.difference(*found) < 1e-10
    assert Student.seen and all(one == before for one in Student.seen)
    assert keras_classes() == before


def test_a_step_runs_on_the_first_clone_and_updates_at_home(
    monkeypatch, float64
):
    noted = []
    options = deployment(clone_model(cases.make("mlp"), 2)).step_options()
    on_gpu = options.clones[0]._replace(device="/device:GPU:0")
    assert sharing.device_of_step(options) == "/device:CPU:0"
    options = options._replace(clones=(on_gpu, *options.clones[1:]))
    assert sharing.device_of_step(options) == "/device:GPU:0"

    class Noted(keras.optimizers.SGD):
        def apply(self, grads, trainable_variables=None):
            noted.append(tf.zeros([]).device)
            super().apply(grads, trainable_variables)

    class Own(keras.Sequential):
        def train_step(self, data):
            noted.append(tf.zeros([]).device)
            return super().train_step(data)

    def train(cloned):
        keras.utils.set_random_seed(3)
        model = Own([keras.Input((6,)), keras.layers.Dense(3, "softmax")])
        if cloned:
            clone_model(model, devices=["CPU:1", "CPU:2"])
        model.compile(Noted(0.1), "sparse_categorical_crossentropy")
        x, y = cases.arrays(10)["mlp"]
        model.fit(x, y, batch_size=7, shuffle=False, verbose=0)
        return cases.weights(model)

    plain = train(False)
    # Logical CPUs stand for GPUs.
    monkeypatch.setattr(
        sharing, "device_of_step", lambda options: "/device:CPU:1"
    )
    noted.clear()
    assert cases.difference(plain, train(True)) < 1e-10
    assert {device[-5:] for device in noted[::2]} == {"CPU:1"}
    assert {device[-5:] for device in noted[1::2]} == {"CPU:0"}


@pytest.mark.full
def test_the_way_back_is_of_the_trace_that_runs(float64):
    """State that looks alike is looked at again, in a trace of any size."""

    class Counting(L.Layer):
        def build(self, shape):
            self.n = self.add_weight(
                shape=(), initializer="zeros", trainable=False
            )

        def call(self, x):
            self.n.assign(self.n + 1.0)
            flat = tf.reshape(x, [tf.shape(x)[0], 20])
            return flat + tf.reduce_mean(flat, axis=1, keepdims=True)

    class Own(keras.Model):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(self(x, training=True) - y))
            weights = self.trainable_variables
            self.optimizer.apply(tape.gradient(loss, weights), weights)
            return {"own": loss}

    rng = np.random.default_rng(0)
    pairs = rng.normal(size=(12, 4, 3)), rng.normal(size=(12, 1))
    data = tf.data.Dataset.from_tensor_slices(pairs)
    data = data.batch(6, drop_remainder=True)
    trained = []
    for num_clones in (None, 3):
        keras.utils.set_random_seed(1)
        inputs = keras.Input((4, 3))
        x = L.SpectralNormalization(L.Dense(5, "tanh"))(inputs)
        model = Own(inputs, L.Dense(1)(Counting()(x)))
        if num_clones:
            clone_model(model, num_clones)
        model.compile("adam")
        model.fit(data, epochs=2, verbose=0)
        trained.append(cases.weights(model))
    assert cases.difference(*trained) < 1e-10


class InTurns(keras.Model):
    """Freezes two halves alike in turns, and reads targets without a tape."""

    def __init__(self):
        super().__init__()
        self.halves = [
            keras.Sequential([keras.Input((6,)), L.Dense(6, "tanh")])
            for _ in range(2)
        ]
        self.both = keras.Sequential(self.halves)
        self.by_half = {"optimizers": [keras.optimizers.SGD(0.1), None]}
        self.by_half["optimizers"][1] = keras.optimizers.RMSprop()

    def train_step(self, x):
        logs = {}
        for i, optimizer in enumerate(self.by_half["optimizers"]):
            for half in self.halves:
                half.trainable = half is self.halves[i]
            target = self.both(x)
            weights = self.both.trainable_variables
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(weights[0].value)
                loss = tf.reduce_mean(tf.square(self.both(2.0 * x) - target))
                tape.watch(weights[1].value)
                loss += tf.reduce_mean(tf.abs(self.both(x) - x))
            optimizer.apply(tape.gradient(loss, weights), weights)
            logs[f"half_{i}"] = loss
        return logs


def test_parts_that_are_frozen_in_turns(float64):
    assert_alike(InTurns, rows_of(reals(22, 6)))


class Gaussian:
    """What an encoder returns: no tensor, but an object that has some."""

    def __init__(self, mean, spread):
        self.parameters = {"mean": mean, "spread": spread}

    def divergence(self):
        mean, spread = self.parameters.values()
        return tf.reduce_sum(mean**2 + spread**2, axis=1)


class Styled(L.Layer):
    """Goes by what the step has set on it, and notes what it saw."""

    def __init__(self):
        super().__init__()
        self.inner, self.settings = L.Dense(6, "tanh"), {"squared": False}
        self.style, self.scale, self.seen = None, 1.0, []
        self.inner.build((None, 6))

    def call(self, x, between=tf.identity):
        y = between(self.inner(x)) * self.scale
        if self.style is not None:
            y = y * self.style[:, :1] + self.style[:, 1:]
        self.seen.append(y)
        y = y**2 if self.settings["squared"] else y
        return Gaussian(y, 0.5 * y)


class Setting(keras.Model):
    """Sets tensors and settings on a layer between its calls."""

    def __init__(self):
        super().__init__()
        self.styled, self.styles = Styled(), L.Dense(2)
        self.styles.build((None, 6))
        self.rate = self.add_weight((), "ones")

    def train_step(self, x):
        styled = self.styled
        with tf.GradientTape() as tape:
            loss = 0.0
            styled.style = self.styles(x)
            for scale in (tf.exp(self.rate), 2.0 * self.rate):
                styled.scale = scale
                loss += tf.reduce_mean(styled(x[::-1]).divergence())
            styled.scale = 1.0
            styled.settings["squared"] = True
            shift = tf.abs(self.rate) + tf.reduce_mean(x)
            if tf.executing_eagerly():
                # Nothing there tells what a function takes from the step.
                shift = tf.stop_gradient(shift)
            found = styled(x, between=lambda y: y + shift)
            loss += tf.reduce_mean(found.divergence())
            first, *others = styled.seen
            loss += tf.reduce_mean([one * first for one in others])
        styled.settings["squared"], styled.style = False, None
        styled.seen.clear()
        train(self, tape, loss)
        return {"loss": loss, "seen": len(others)}


@pytest.mark.full_but("False")
@pytest.mark.parametrize("eager", [False, True])
def test_what_a_step_sets_on_layers(eager, float64):
    compiled = {"run_eagerly": eager}
    assert_alike(Setting, rows_of(reals(22, 6)), compiled)


class Queries(L.Layer):
    def build(self, queries_shape, memory_shape):
        self.values = L.Dense(3)
        self.values.build(memory_shape)

    def call(self, queries, memory):
        scores = tf.einsum("qd,ntd->nqt", queries, memory)
        return tf.matmul(tf.nn.softmax(scores), self.values(memory))


class Detecting(keras.Model):
    """Calls a layer with queries that have no rows, and come first."""

    def __init__(self):
        super().__init__()
        self.decoder = Queries()
        self.queries = self.add_weight((7, 4), "glorot_normal")

    def train_step(self, x):
        with tf.GradientTape() as tape:
            queries = tf.convert_to_tensor(self.queries)
            loss = tf.reduce_mean(tf.square(self.decoder(queries, x)))
        train(self, tape, loss)
        return {"loss": loss}


@pytest.mark.full
def test_queries_before_rows(float64):
    assert_alike(Detecting, rows_of(reals(22, 5, 4)))


def test_steps_and_losses_that_are_put_on_the_object(float64):
    def make(step):
        model = cases.mlp()
        if not step:
            model.compute_loss = lambda x, y, y_pred, *_, **__: ops.std(y_pred)
            model.compute_metrics = lambda x, y, y_pred, *_, **__: {
                "top": ops.max(y_pred)
            }
            return model

        def train_step(data):
            with tf.GradientTape() as tape:
                loss = ops.std(model(data[0]))
            train(model, tape, loss)
            return {"mine": loss}

        model.train_step = train_step
        return model

    x, y = cases.arrays(22)["mlp"]
    for step in (True, False):
        assert_alike(lambda step=step: make(step), rows_of((x, y)))
    model = make(True)
    own = model.train_step
    clone_model(clone_model(model, 2), 3)
    assert unclone_model(model).train_step is own


class Energetic(keras.Model):
    """Returns the slope of an inner model, by a tape of its own."""

    def __init__(self):
        super().__init__()
        self.energy = cases.mlp()

    def call(self, x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            energy = self.energy(x)[:, 0]
        return 2.0 * tape.gradient(energy, x)


@pytest.mark.full
def test_a_tape_inside_of_a_call(float64):
    data = rows_of((reals(22, 6), reals(22, 6)))
    compiled = {"loss": "mse", "optimizer": "sgd"}
    assert_alike(Energetic, data, compiled)
