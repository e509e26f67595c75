"""Begin a step: check its batch, and build what the model still lacks."""

import contextlib
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_clones import _keras, exactness, sharding, state
from keras_clones.balance import Balance
from keras_clones.placement import Clone, logical_devices
from keras_clones.state import Variables
from keras_clones.tables import large_tables
from keras_clones.watch import Watch


class StepOptions(NamedTuple):
    """What the steps of one deployment go by.

    `shares` are the fractions of the rows that the clones get, `None` for
    even ones. `balance` measures them while the model trains. `watch` gets
    what training steps come to, if anything wants to know.
    """

    clones: tuple[Clone, ...]
    home: str
    loss: str
    batch_norm: str
    layer_losses: str | None
    jit_compile: bool | str
    shares: Any = None
    balance: Balance | None = None
    watch: Watch | None = None


class Step(NamedTuple):
    """One step on one global batch; `training` is `None` to predict."""

    model: keras.Model
    options: StepOptions
    variables: Variables
    batch: tuple[Any, Any, Any]
    rows: sharding.Rows
    training: bool | None
    tables: Sequence[keras.Variable]
    jit_compile: bool


def begin(
    model: keras.Model, options: StepOptions, data: Any, training: bool | None
) -> Step:
    """Unpack and check a batch, and build what the model still lacks."""
    data = keras.tree.map_structure(as_tensor, data)
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    if training is None:
        y, sample_weight = None, None
    named = {"x": x, "y": y, "sample_weight": sample_weight}
    rows = sharding.count_rows(named)
    build(model, (x, y, sample_weight), options.home, bool(training))
    if len(options.clones) > 1:
        exactness.check_layers(model)
    jit_compile = resolve_jit_compile(model, options)
    return Step(
        model=model,
        options=options,
        variables=state.model_variables(model),
        batch=(x, y, sample_weight),
        rows=rows,
        training=training,
        tables=[] if jit_compile else large_tables(model),
        jit_compile=jit_compile,
    )


def as_tensor(value: Any) -> Any:
    """Return a leaf of a batch as a tensor; `None` stays `None`."""
    known = value is None or tf.is_tensor(value)
    return value if known else tf.convert_to_tensor(value)


def build(
    model: keras.Model,
    batch: Any,
    home: str,
    training: bool,
    own_step: bool = False,
) -> None:
    """Create at home what the first step would create.

    A tower must not create variables, so they have to be there before it.

    Raises:
        ValueError: If a model with a step of its own has layers that calling
            the model does not build.
    """
    with tf.init_scope(), tf.device(home):
        if not _keras.is_built(model):
            types = tf.nest.map_structure(tf.type_spec_from_value, batch)
            rehearsal = tf.function(
                functools.partial(_rehearse, model), autograph=False
            )
            # A model with a step of its own may not be one to call.
            with contextlib.suppress(*[Exception] if own_step else []):
                rehearsal.get_concrete_function(*types)
            unbuilt = [
                layer.name
                for layer in _keras.layers(model)
                if layer is not model and not layer.built
            ]
            if own_step and unbuilt:
                raise ValueError(
                    "Expected the layers of a model with a step of its own to "
                    f"be built before it runs on clones. Received: {unbuilt}, "
                    "which are not. Build them, or call them once on data."
                )
        if training:
            build_optimizer(model)


def build_ahead(model: keras.Model, home: str) -> None:
    """Create at home the optimizer's variables, if the model has its own.

    TensorFlow traces a function twice that creates variables, and most of the
    time of a first step goes into its trace. So what can be built is built
    before. A step of the user's own says itself what its optimizer updates.
    """
    known = all(layer.built for layer in _keras.layers(model))
    if known and not exactness.overrides(model, "train_step"):
        with tf.device(home):
            build_optimizer(model)


def build_optimizer(model: keras.Model) -> None:
    """Create the variables of a model's optimizer, if it has not."""
    optimizer = model.optimizer
    if optimizer is not None and not optimizer.built:
        with keras.name_scope(optimizer.name, caller=optimizer):
            optimizer.build(model.trainable_variables)


def _rehearse(model: keras.Model, x: Any, y: Any, sample_weight: Any) -> None:
    with keras.StatelessScope(collect_losses=True), keras.SymbolicScope():
        y_pred = _keras.call(model, x, training=False)
        if model.compiled and y is not None:
            _keras.compute_loss(model, x, y, y_pred, sample_weight, False)
            model.compute_metrics(x, y, y_pred, sample_weight)


def resolve_jit_compile(model: keras.Model, options: StepOptions) -> bool:
    """Say whether XLA compiles what each clone of a compiled model runs."""
    if options.jit_compile != "auto":
        return bool(options.jit_compile)
    # Keras settles its own "auto" by whether the machine has a GPU. Without
    # one, a true value is what the user asked `compile` for.
    on_gpu = all("GPU" in clone.device for clone in options.clones)
    return model.jit_compile and (on_gpu or not logical_devices("GPU"))
