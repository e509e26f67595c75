"""Which parameter server gets which variable."""

import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any


def round_robin(devices: Sequence[str]) -> Callable[..., str]:
    """Return a function that gives each variable the next device in turn.

    Args:
        devices: Sequence of device strings, one a parameter server.
    """
    turns = itertools.cycle(devices)

    def choose(variable: Any = None, dtype: Any = None) -> str:
        return next(turns)

    return choose


def greedy(devices: Sequence[str]) -> Callable[..., str]:
    """Return a function that gives each variable the least loaded device.

    The load of a device is the bytes of the variables it was given so far. Of
    several least loaded devices, the first gets the variable.

    Args:
        devices: Sequence of device strings, one a parameter server.

    Reference:

    - `tf.contrib.training.GreedyLoadBalancingStrategy` of TensorFlow 1, with
        `byte_size_load_fn`.
    """
    loads = [0] * len(devices)

    def choose(variable: Any, dtype: Any = None) -> str:
        num_bytes = count_bytes(variable, dtype)
        task = loads.index(min(loads))
        loads[task] += num_bytes
        return devices[task]

    return choose


def count_bytes(variable: Any, dtype: Any = None) -> int:
    """Return the bytes of a variable's value.

    Args:
        variable: A variable, or a shape if `dtype` is given.
        dtype: A dtype, or its name. Defaults to `None`: the variable's.

    Raises:
        ValueError: If an axis of the shape, or the size of the dtype, is not
            known.
    """
    shape = variable if dtype is not None else variable.shape
    dtype = variable.dtype if dtype is None else dtype
    axes = [-1 if axis is None else int(axis) for axis in shape]
    name = getattr(dtype, "name", None) or getattr(dtype, "__name__", dtype)
    # Names such as `float8_e4m3fn` say the bits first.
    bits = 8 if name == "bool" else re.search(r"\d+", str(name))
    if bits is None or min(axes, default=0) < 0:
        raise ValueError(
            "Expected a variable of a known shape, and of a dtype whose size "
            f"is known, to count its bytes. Received: shape={tuple(shape)}, "
            f"dtype={name}"
        )
    width = bits if isinstance(bits, int) else int(bits.group())
    return math.ceil(math.prod(axes) * width / 8)
