"""Putting clone steps on a model: the only file that changes a user's model."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras

from keras_clones import _keras, checks
from keras_clones.cluster import watch
from keras_clones.devices import hosts
from keras_clones.devices.homes import Homes
from keras_clones.door import growing, guarded
from keras_clones.door.deployed import Deployment
from keras_clones.door.step_function import StepFunction
from keras_clones.plan import at_home, dividing, exactness
from keras_clones.plan.watch import Watch
from keras_clones.step import asynchronous, steps

_STEPS = ("train_step", "test_step", "predict_step")
_MAKERS = ("make_train_function", "make_test_function", "make_predict_function")
# What a user calls that may wait for hosts of a cluster.
_METHODS = (
    *("fit", "evaluate", "predict"),
    *("train_on_batch", "test_on_batch", "predict_on_batch"),
)
# The underscores keep it out of what Keras walks through to save a model.
_KEY = "__keras_clones__"


def attach(model: keras.Model, made: Deployment) -> None:
    """Put clone steps on the model object; its class stays what it is."""
    move_home(model, made.options.homes)
    # `vars` passes by the model's own tracking of what it is given.
    vars(model)[_KEY] = made
    own = {name: vars(model).get(name) for name in _STEPS}
    vars(model).setdefault(exactness.OWN_STEPS, own)
    _put_steps(model, made, _STEPS)
    if hosts.cluster() is not None:
        for name in _METHODS:
            method = getattr(type(model), name).__get__(model)
            vars(model)[name] = watch.naming_lost_hosts(method)
    for name in _MAKERS:
        make = getattr(type(model), name).__get__(model)
        vars(model)[name] = _maker(
            model, made, name.removeprefix("make_"), make
        )
    _forget_functions(model)


def _put_steps(
    model: keras.Model, made: Deployment, names: Sequence[str]
) -> None:
    """Put steps on a model that go by what its deployment goes by now."""
    options = made.step_options()
    for name in names:
        vars(model)[name] = functools.partial(
            getattr(steps, name), model, options
        )


def detach(model: keras.Model) -> None:
    """Take the clone steps off a model again, and join what is divided."""
    homes = vars(model)[_KEY].options.homes
    if homes.tables:
        _forget_moved(model, at_home.join(model, homes))
    for name in (*_STEPS, *_MAKERS, *_METHODS, "get_metrics_result", _KEY):
        vars(model).pop(name, None)
    own = vars(model).pop(exactness.OWN_STEPS)
    vars(model).update({k: step for k, step in own.items() if step is not None})
    _forget_functions(model)


def deployment_of(model: keras.Model) -> Deployment | None:
    """Return what clones a model has, `None` for a plain one."""
    return vars(model).get(_KEY)


def _maker(
    model: keras.Model, made: Deployment, name: str, make: Callable[..., Any]
) -> Callable[..., Any]:
    """Return a `make_..._function` that keeps XLA off the step as a whole.

    XLA compiles a step for one device and forgets the others without a word.
    The clones compile what each of them runs instead.
    """

    def make_function(force: bool = False) -> None:
        checks.check_no_strategy()
        if made.options.homes.tables:
            dividing.check_optimizers(model)
        move_home(model, made.options.homes)
        if getattr(model, name) is not None and not force:
            return
        if name == "train_function" and not made.config.sync:
            _step_apart(model, made)
            return
        # What was traced before may go by what has changed since.
        made.towers.clear()
        jit_compile = model.jit_compile
        model.jit_compile = False
        try:
            make(force=force)
        finally:
            model.jit_compile = jit_compile
        step = StepFunction(
            model,
            made,
            name,
            getattr(model, name),
            functools.partial(at_home.all_variables, model),
            functools.partial(_make_anew, model, made, name),
        )
        function = guarded.guard(step)
        if made.pieces_grow:
            function = growing.Growing(step._replace(function=function))
        setattr(model, name, function)

    return make_function


def _make_anew(model: keras.Model, made: Deployment, name: str) -> None:
    """Put steps on a model by its options now, and make functions it had."""
    names = [make.removeprefix("make_") for make in _MAKERS]
    had = [one for one in names if getattr(model, one) is not None]
    _put_steps(model, made, _STEPS)
    _forget_functions(model)
    for one in {*had, name}:
        vars(model)[f"make_{one}"]()


def _step_apart(model: keras.Model, made: Deployment) -> None:
    """Let each replica of a model step by itself."""
    if model.run_eagerly:
        raise ValueError(
            "Replicas that step by themselves run functions, in threads of "
            "their own: pass `run_eagerly=False` to `compile`, or `sync=True` "
            "to `DeploymentConfig`. Received: run_eagerly=True, sync=False"
        )
    groups: dict[str, tuple[Any, ...]] = {}
    for clone in made.clones:
        host = hosts.host_of(clone.device)
        groups[host] = (*groups.get(host, ()), clone)
    model.train_function = asynchronous.make_replicas(
        model,
        made.step_options(),
        groups,
        made.config.max_staleness,
        functools.partial(_do_without, model, made),
    )
    vars(model)["get_metrics_result"] = asynchronous.get_metrics_result(
        model, model.train_function
    )


def _do_without(model: keras.Model, made: Deployment, prefix: str) -> None:
    """Let no step use the clones of a process that is lost."""
    left = [c for c in made.clones if hosts.host_of(c.device) != prefix]
    made.options = made.options._replace(clones=tuple(left))
    _put_steps(model, made, ("test_step", "predict_step"))
    model.test_function = model.predict_function = None


def watch_training(
    model: keras.Model, watcher: Any, told: Watch | None
) -> None:
    """Let the training steps of a cloned model tell one more watch.

    Args:
        model: A cloned `keras.Model`.
        watcher: The callback that wants to know. It has one watch at a time.
        told: A `Watch`, or `None` to tell this watcher nothing any more.
    """
    made = vars(model)[_KEY]
    made.watches.pop(watcher, None)
    if told is not None:
        made.watches[watcher] = told
    _put_steps(model, made, ("train_step",))
    model.train_function = None


def time_clones(model: keras.Model, watcher: Any, wanted: bool) -> None:
    """Let the training steps of a cloned model time what its clones take.

    Args:
        model: A cloned `keras.Model`.
        watcher: The callback that wants to know.
        wanted: Boolean, `False` if it does not any more.
    """
    timed_by = vars(model)[_KEY].timed_by
    (timed_by.add if wanted else timed_by.discard)(watcher)
    _put_steps(model, vars(model)[_KEY], ("train_step",))
    model.train_function = None


def move_home(model: keras.Model, homes: Homes) -> None:
    """Move every variable there is so far to its home.

    A function that was traced before reads a variable where it was. So every
    model that has one of those that moved forgets its functions.
    """
    _forget_moved(model, at_home.move(model, homes))


def _forget_moved(model: keras.Model, moved: list[keras.Variable]) -> None:
    ids = {id(variable) for variable in moved}
    for other in _keras.living_models(model) if moved else []:
        if any(
            id(variable) in ids for variable in at_home.all_variables(other)
        ):
            for optimizer in _keras.optimizers(other):
                _keras.reindex_optimizer(optimizer)
            _forget_functions(other)


def _forget_functions(model: keras.Model) -> None:
    model.train_function = None
    model.test_function = None
    model.predict_function = None
