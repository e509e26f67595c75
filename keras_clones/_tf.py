"""Every private name of TensorFlow that this package reaches, with its why.

`tests/test_keras_private.py` fails when one of them moves.
"""

import functools

import tensorflow as tf

from keras_clones._private import reach

# The versions are those that the tests passed on.
_private = functools.partial(
    reach,
    library="TensorFlow",
    installed=tf.__version__,
    known="2.18 to 2.21",
)

# No public name tells how much memory of a GPU there is.
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
