"""Every private name of TensorFlow that this package reaches, with its why.

`tests/test_keras_private.py` fails when one of them moves.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import tensorflow as tf

from keras_clones._private import reach

# The versions are those that the tests passed on.
_private = functools.partial(
    reach,
    library="TensorFlow",
    installed=tf.__version__,
    known="2.18 to 2.21",
)

# Tapes: no public name stops them all, tells them of an operation with several
# inputs and outputs, or says which of them watch a tensor.
_record = _private("tensorflow.python.eager.record")
_tapes = _private("tensorflow.python.pywrap_tfe")
_variable_accessed = _private(
    "tensorflow.python.ops.resource_variable_ops.variable_accessed"
)

# Functions with gradients of one's own ask for those of `tf.Variable`s alone.
custom_gradients = _private("tensorflow.python.ops.custom_gradient")
DECORATORS = ("_graph_mode_decorator", "_eager_mode_decorator")

# No public name tells how much memory a GPU has.
list_local_devices = _private(
    "tensorflow.python.client.device_lib.list_local_devices"
)

# No public name reports the graphs that ran.
ensure_initialized = _private(
    "tensorflow.python.eager.context.ensure_initialized"
)
enable_graph_collection = _private(
    "tensorflow.python.eager.context.enable_graph_collection"
)
export_run_metadata = _private(
    "tensorflow.python.eager.context.export_run_metadata"
)
disable_graph_collection = _private(
    "tensorflow.python.eager.context.disable_graph_collection"
)

# No public name reads what is reported of a graph that ran.
function_def_to_graph_def = _private(
    "tensorflow.python.framework.function_def_to_graph."
    "function_def_to_graph_def"
)

# No public name lets operations run beside those of other threads.
_new_executor = _private("tensorflow.python.eager.executor.new_executor")
_executor_scope = _private("tensorflow.python.eager.context.executor_scope")

_apart: list[Any] = []

# No public name tells which cluster this process was connected to.
_get_server_def = _private("tensorflow.python.eager.context.get_server_def")

# No public name tells whether TensorFlow has started its devices, or what it
# was told of them: how many, how much memory, which are seen.
_context = _private("tensorflow.python.eager.context.context")

# No public name makes a nest of tensors one argument of a `tf.function` whose
# structure is that of the data, as `tf.data.Iterator` is one.
CompositeTensor = _private(
    "tensorflow.python.framework.composite_tensor.CompositeTensor"
)

# No public name waits until other processes have done what they were told.
wait_for_all = _private("tensorflow.python.eager.context.async_wait")

# Where `tf.random`, and so Keras, makes the operations that draw. No public
# name tells of them, and callbacks for operations cannot replace what one gives
# back outside of a graph.
_DRAWING = tuple(
    _private(f"tensorflow.python.ops.gen_{name}")
    for name in (
        "stateless_random_ops_v2",
        "stateless_random_ops",
        "random_ops",
        "stateful_random_ops",
        "candidate_sampling_ops",
    )
)

# What a `tf.function` is traced again for besides its arguments. No public name
# lets it be traced again inside of another function.
_function_context = _private(
    "tensorflow.python.eager.polymorphic_function.function_context"
)

# No public name tells that a function is being traced which XLA compiles, and
# so cannot call Python.
is_within_xla = _private("tensorflow.python.ops.control_flow_util.InXlaContext")

# What a function, a branch or a loop says it only reads.
_READS = "_read_only_resource_inputs"
_READING_OPS = ("ReadVariableOp", "ResourceGather", "VariableShape")


def server_definition() -> Any:
    """Return the cluster and this process's task in it, `None` without."""
    return _get_server_def()


def has_devices() -> bool:
    """Return whether TensorFlow has started its devices."""
    return _context()._initialized


def session_config() -> tf.compat.v1.ConfigProto:
    """Return the devices of this process, for a server that offers them.

    Does not start them.
    """
    return _context().config


def forget_task(job: str, task: int) -> None:
    """Take a task that is gone out of the cluster that is connected to.

    TensorFlow waits for all tasks of a cluster where a program waits for its
    operations, and for one that is gone without an end.
    """
    definition = server_definition()
    changed = type(definition)()
    changed.CopyFrom(definition)
    for one in changed.cluster.job:
        if one.name == job and task in one.tasks:
            del one.tasks[task]
    _context().update_server_def(changed)


class Apart:
    """Runs operations that wait for none of those of other threads.

    Operations of a process share executors, and wait for each other there.
    """

    def __init__(self) -> None:
        self._executor = _new_executor(enable_async=False)
        # What comes back late from a host that was lost must find it there.
        _apart.append(self._executor)

    def run(self, function: Callable[[], Any]) -> Any:
        """Return what a function returns, or raise what it raises."""
        try:
            with _executor_scope(self._executor):
                return function()
        except BaseException:
            # It would raise this once more at the next operation.
            self._executor.clear_error()
            raise


def stop_recording() -> AbstractContextManager[None]:
    """Stop every tape of this thread: `tape.stop_recording` stops one."""
    return _record.stop_recording()


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Let tapes record, also where `tf.init_scope` stops all of them."""
    stopped = _tapes.TFE_Py_TapeSetIsStopped()
    if stopped:
        _tapes.TFE_Py_TapeSetRestartOnThread()
    try:
        yield
    finally:
        if stopped:
            _tapes.TFE_Py_TapeSetStopOnThread()


def record_operation(
    name: str,
    outputs: Sequence[tf.Tensor],
    inputs: Sequence[tf.Tensor],
    backward: Callable[..., Sequence[Any]],
) -> None:
    """Tell every tape how outputs came from inputs.

    `tf.custom_gradient` does so too, but gives zeros for variables that a
    function reads, and copies every input.
    """
    _record.record_operation(name, list(outputs), list(inputs), backward)


def num_watching(tensors: Sequence[tf.Tensor]) -> int:
    """Return how many tapes watch any of some tensors: 0, 1, or 2 for more.

    A persistent tape counts as 2.
    """
    return _tapes.TFE_Py_TapeSetPossibleGradientTypes(list(tensors))


def variable_accessed(variable: tf.Variable) -> None:
    """Tell every tape that a variable is used, as reading it does."""
    _variable_accessed(variable)


def tell_watchers(tensor: tf.Tensor) -> None:
    """Tell what asks which variables are read of a tensor; not tapes."""
    _tapes.TFE_Py_VariableWatcherVariableAccessed(_Watched(tensor))


def tell_tapes(tensor: tf.Tensor) -> None:
    """Let tapes that watch variables that are read watch a tensor."""
    _tapes.TFE_Py_TapeVariableAccessed(_Watched(tensor))


class _Watched(NamedTuple):
    """A tensor in the place of a variable: what is asked of it."""

    handle: tf.Tensor

    def ref(self) -> Any:
        return self.handle.ref()


def drawing_functions() -> dict[str, tuple[Any, Callable[..., Any]]]:
    """Return the functions that make operations which draw, by their names.

    Returns:
        Dict of names, such as `"stateless_random_normal_v2"`, to the module
        that holds a function, where another can take its place, and the
        function itself.
    """
    return {
        name: (module, function)
        for module in _DRAWING
        for name, function in vars(module).items()
        if inspect.isfunction(function)
        and function.__module__ == module.__name__
    }


def maker_of_context() -> tuple[Any, str]:
    """Return where the function is that says what functions are traced for.

    Returns:
        The module that holds it, and its name there. It returns a named tuple
        whose `context` can be anything that has a hash.
    """
    return _function_context, "make_function_context"


def num_writes(value: tf.Tensor) -> int:
    """Return how often a graph wrote to the variable that gave a value."""
    operation = value.op
    while operation.type != "ReadVariableOp":
        operation = operation.inputs[0].op
    handle = operation.inputs[0]
    return sum(not _only_reads(op, handle) for op in handle.consumers())


def mark_of_writes(variable: tf.Variable) -> Any:
    """Return what changes when a variable is assigned."""
    if tf.executing_eagerly():
        return variable.numpy().tobytes()
    graph = tf.compat.v1.get_default_graph()
    captured = getattr(graph, "captures", [])
    return sum(
        not _only_reads(op, handle)
        for outer, handle in captured
        if outer is variable.handle
        for op in handle.consumers()
    )


def _only_reads(operation: Any, handle: tf.Tensor) -> bool:
    if operation.type in _READING_OPS:
        return True
    try:
        read = operation.get_attr(_READS)
    except ValueError:
        return False
    inputs = list(operation.inputs)
    return all(i in read for i, t in enumerate(inputs) if t is handle)


def dataset_handle(dataset: tf.data.Dataset) -> tf.Tensor:
    """Return the tensor that stands for a dataset.

    A subclass of `tf.data.Dataset` has to have one, even if it is iterated in
    a way of its own. No public name gives it.
    """
    return dataset._variant_tensor
