"""Clone a model, take the clones off, and ask for its deployment."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_clones import _keras, checks
from keras_clones.devices import placement
from keras_clones.devices.config import DeploymentConfig
from keras_clones.devices.homes import Homes
from keras_clones.door import option_checks, steps_on
from keras_clones.door.deployed import Deployment
from keras_clones.look import footprint
from keras_clones.plan import dividing, in_pieces
from keras_clones.plan.options import StepOptions


def clone_model(
    model: keras.Model,
    num_clones: int | None = None,
    *,
    devices: Sequence[str | tf.config.LogicalDevice] | None = None,
    clone_on_cpu: bool = False,
    config: DeploymentConfig | None = None,
    loss: str = "auto",
    batch_norm: str | None = None,
    random: str | None = None,
    layer_losses: str | Mapping[str, str] | None = None,
    state: Mapping[str, str] | None = None,
    whole: Sequence[str | keras.Layer | type] = (),
    exact: bool = False,
    check_rows: bool = True,
    jit_compile: bool | str = "auto",
    shares: Sequence[float] | str | None = None,
    variables: str | None = None,
    update: str = "auto",
    pieces: int | str = 1,
    divided: Sequence[str | keras.Layer] = (),
) -> keras.Model:
    """Train, evaluate and predict a Keras model on clones of it.

    Each step splits its batch over the clones, one a device, and updates the
    one set of variables on `CPU:0` with the gradient of the whole batch. The
    model's own `fit`, `evaluate`, `predict`, `save` and the rest stay what
    they were, and so do its results.

    Args:
        model: The `keras.Model` to clone: Sequential, functional or
            subclassed, built or not, compiled or not. A cloned model gets
            this deployment in place of the one it has.
        num_clones: Integer, how many clones to make. Defaults to `None`: one
            a GPU, or one a logical CPU device where there is no GPU.
        devices: List of device strings such as `["GPU:0", "GPU:2"]`, or of
            `tf.config.LogicalDevice`s, one a clone. Defaults to `None`: clone
            `i` runs on `GPU:i`, or on the CPU devices in turn where there is
            no GPU.
        clone_on_cpu: Boolean, whether every clone runs on `CPU:0`. Defaults
            to `False`.
        config: A `DeploymentConfig`, in place of the three arguments above.
            Defaults to `None`.
        loss: String. `"clones"` computes the loss in the clones and averages
            it by their rows, `"gather"` computes it once on the outputs of
            all clones. Defaults to `"auto"`: in the clones where that is
            exact, else once on all outputs.
        batch_norm: String, what `BatchNormalization` layers do. `"mean"` and
            `"first"` normalize each shard by itself; the moving statistics
            are averaged over the clones by their rows, or taken from the
            first clone. `"sync"` normalizes over the global batch, as one
            device does and as a layer made with `synchronized=True` always
            does; XLA compiles no clone then. Defaults to `None`: `"mean"`, or
            `"sync"` where `exact=True`.
        random: String, what layers draw at random. `"clones"` lets each clone
            draw numbers of its own, `"global"` gives it those that one device
            draws for its rows. Defaults to `None`: `"clones"`, or `"global"`
            where `exact=True`.
        layer_losses: String, `"mean"` or `"sum"`: what the scalars that layers
            pass to `add_loss` are of the rows of a batch. Or a dict of layer
            names to these, such as `{"vq": "sum"}`. Activity regularizers
            are means in any case. Defaults to `None`: means, with a warning
            that names the layers, as for those that a dict leaves out.
        state: Dict of patterns of variables' paths, such as
            `{"*/norm/count": "sum"}`, to what becomes of a variable that the
            forward pass assigns: `"mean"` averages the clones' values by
            their rows, `"sum"` adds up what the clones added, `"max"` and
            `"min"` take the largest and the smallest entries, `"first"` the
            first clone's. The first pattern that fits counts, before the
            variable's own `aggregation`. Defaults to `None`: what every
            clone assigns alike is assigned; else floating values are
            averaged and the first clone's whole numbers count, with a
            warning that names the variables.
        whole: List of layers whose `call` sees the global batch, each by its
            name, as an object, or by its class. It runs once, on the first
            clone's device; the layers inside of it and around it go on being
            cloned. Defaults to none.
        exact: Boolean, whether to refuse, with the layer's name, whatever
            could train to other weights than one device does. Includes
            `batch_norm="sync"` and `random="global"`. Defaults to `False`.
        check_rows: Boolean, whether the first step looks for layers
            that come to something else on shards (they mix rows, or assign
            variables that nothing says how to merge), calls them whole from
            then on, and warns of it. Defaults to `True`.
        jit_compile: Boolean, whether XLA compiles the function that each
            clone runs. Defaults to `"auto"`: on GPUs, if the model supports
            it, or where `compile` got `jit_compile=True`.
        shares: List with one positive number a clone: the clones get rows in
            that proportion, for devices of uneven speed. `"auto"` measures
            the clones in the first steps of training, then settles and
            prints what it chose. Defaults to `None`: even shards.
        variables: String, where the weights are at home in a cluster, each
            with the optimizer's slots beside it, where its update runs.
            `"controller"`: on its `CPU:0`. `"spread"`: divided by bytes among
            the CPUs of all replicas. `"greedy"` or `"round_robin"`: divided
            among the parameter servers, by bytes or in turn. Defaults to
            `None`: `"greedy"` where there are parameter servers, else
            `"controller"`. On one machine they are on `CPU:0`.
        update: String, how Keras's own optimizers update a variable.
            `"keras"` as they do by themselves; then one clone equals plain
            Keras bit for bit. Other optimizers always do so. Defaults to
            `"auto"`: in one pass, by a kernel of TensorFlow's or one that XLA
            compiles, where that is faster and comes to the same, up to
            rounding.
        pieces: Integer, in how many pieces each clone works through its
            shard, one after the other. Pieces are clones that take turns: they
            add up their gradients on their device, whose memory holds what the
            layers compute of one piece. `"auto"` starts with 1 and doubles
            the pieces when a device runs out of memory, runs the same batch
            again and prints what it came to. Defaults to 1.
        divided: List of `Embedding` layers, by name or as objects, whose
            table is divided by rows over the CPUs of all replicas of a
            cluster, or over the parameter servers where weights are on these.
            Only rows that are looked up, and their gradients, travel, and are
            updated where they are, with the optimizer's slots beside them.
            Weights, files and checkpoints stay those of a plain `Embedding`.
            On one machine it is the logical CPU devices of the clones.
            Defaults to none.

    Returns:
        The same model.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, the devices are not
            there, or the model cannot be cloned. The model is unchanged.

    Example:

    >>> import keras
    >>> from keras_clones import clone_model
    >>> model = keras.Sequential([keras.layers.Dense(1)])
    >>> model = clone_model(model, num_clones=2, clone_on_cpu=True)
    >>> model.compile("sgd", "mse")
    >>> x, y = keras.ops.ones((5, 3)), keras.ops.ones((5, 1))
    >>> history = model.fit(x, y, batch_size=5, verbose=0)

    Reference:

    - TF-Slim, `deployment/model_deploy.py`.
    """
    given = locals()
    _check_model(model)
    # What is an option has the same name in both.
    fields = [name for name in StepOptions._fields if name in given]
    asked = StepOptions((), Homes(""), **{name: given[name] for name in fields})
    options = option_checks.check_options(model, asked, variables)
    chosen = (num_clones, devices, clone_on_cpu)
    config = option_checks.choose_config(config, *chosen)
    _attach(model, config, options, variables)
    return model


def _attach(
    model: keras.Model,
    config: DeploymentConfig,
    options: StepOptions,
    variables: str | None,
) -> None:
    """Put clones on a model, which what is wrong leaves as it is."""
    if options.divided and not config.sync:
        raise ValueError(
            "Argument `divided` cannot be used with replicas that step by "
            "themselves: leave it out, or pass a config with `sync=True`. "
            f"Received: divided={list(options.divided)!r}, and a config with "
            "sync=False"
        )
    clones = placement.place_clones(config)
    options = options._replace(
        shares=option_checks.check_shares(model, options.shares, len(clones)),
        homes=_divide(
            model,
            placement.find_homes(config, variables),
            clones,
            options.divided,
        ),
    )
    made = Deployment(config, clones, options, model)
    if made.pieces_grow and not config.sync:
        raise ValueError(
            "Argument `pieces='auto'` runs a batch again when memory ends, "
            "which replicas that step by themselves cannot. Pass an integer, "
            "such as `pieces=2`. Received: pieces='auto', and a config with "
            "sync=False"
        )
    if footprint.is_built(model):
        in_pieces.check(model, made.options, training=True)
    steps_on.attach(model, made)


def _divide(
    model: keras.Model,
    homes: Homes,
    clones: Sequence[placement.PlacedClone],
    named: Sequence[Any],
) -> Homes:
    """Return the homes with those that the rows of tables are divided over."""
    if not named:
        return homes
    rows = placement.homes_of_rows(homes, clones)
    tables = dividing.tables_of(model, named, rows)
    dividing.check_optimizers(model)
    return homes.dividing(tables, rows)


def unclone_model(model: keras.Model) -> keras.Model:
    """Take the clones off a model: it is plain Keras again.

    Its variables stay where they are, on `CPU:0`. A table that is divided
    by rows is joined again, there.

    Args:
        model: A `keras.Model`. One without clones stays as it is.

    Returns:
        The same model.

    Raises:
        TypeError: If `model` is not a `keras.Model`.

    Example:

    >>> import keras
    >>> from keras_clones import clone_model, deployment, unclone_model
    >>> model = keras.Sequential([keras.layers.Dense(1)])
    >>> model = clone_model(model, num_clones=2, clone_on_cpu=True)
    >>> deployment(unclone_model(model)) is None
    True
    """
    _check_is_model(model)
    if deployment(model) is not None:
        steps_on.detach(model)
    return model


def deployment(model: keras.Model) -> Deployment | None:
    """Return the deployment of a cloned model, `None` for a plain one.

    Args:
        model: A `keras.Model`.

    Returns:
        A `Deployment` with its `config`, its `clones` and the devices where
        the model's parts live, or `None`.

    Raises:
        TypeError: If `model` is not a `keras.Model`.

    Example:

    >>> import keras
    >>> from keras_clones import clone_model, deployment
    >>> model = keras.Sequential([keras.layers.Dense(1)])
    >>> model = clone_model(model, num_clones=2, clone_on_cpu=True)
    >>> deployment(model).clones[1]
    PlacedClone(scope='clone_1', device='/device:CPU:0')
    """
    _check_is_model(model)
    return steps_on.deployment_of(model)


def _check_is_model(model: keras.Model) -> None:
    if not isinstance(model, keras.Model):
        raise TypeError(
            "Argument `model` must be a `keras.Model`. "
            f"Received: model={model!r} (of type {type(model).__name__})"
        )


def _check_model(model: keras.Model) -> None:
    checks.check_backend()
    _check_is_model(model)
    strategy = _keras.distribution_strategy(model)
    if strategy is not None:
        raise ValueError(
            "Expected a model that was made outside of every `tf.distribute` "
            "scope: clones take the place of a strategy. "
            f"Received: a model made under {type(strategy).__name__}. Make "
            "it again outside of `strategy.scope()`."
        )
    checks.check_no_strategy()
