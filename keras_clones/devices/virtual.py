"""Logical devices, where there are fewer than clones; who knows of that."""

import tensorflow as tf

from keras_clones.warn import warn

# Whoever was told once, or made logical devices, knows that there is no GPU.
_known = False


def use_virtual_devices(
    n: int, device_type: str = "CPU", memory_limit: int | None = None
) -> None:
    """Split the first device of a type into `n` logical devices.

    Call it before TensorFlow starts its devices: first thing in a program or
    in a test suite's `conftest.py`. Logical CPU devices show how a model
    behaves on several devices where there is only one; they share its cores,
    so they do not make it faster.

    Args:
        n: Integer, how many logical devices to make, at least 1.
        device_type: String, `"CPU"` or `"GPU"`. Defaults to `"CPU"`.
        memory_limit: Integer, MiB of memory a logical GPU gets. Must be given
            for `"GPU"`, and only there. Defaults to `None`.

    Raises:
        RuntimeError: If TensorFlow has started its devices already.
        ValueError: If there is no such device, or an argument is out of
            range.

    Example:

    ```python
    from keras_clones import use_virtual_devices

    use_virtual_devices(4)
    ```
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(
            f"Argument `n` must be a positive integer. Received: n={n!r}"
        )
    if device_type not in ("CPU", "GPU"):
        raise ValueError(
            "Argument `device_type` must be 'CPU' or 'GPU'. "
            f"Received: device_type={device_type!r}"
        )
    if (memory_limit is None) == (device_type == "GPU"):
        raise ValueError(
            "Argument `memory_limit` (MiB a logical device) must be given for "
            "'GPU', and only there. "
            f"Received: device_type={device_type!r}, "
            f"memory_limit={memory_limit!r}"
        )
    physical = tf.config.list_physical_devices(device_type)
    if not physical:
        raise ValueError(
            f"There is no {device_type} to split on this machine. "
            f"Received: device_type={device_type!r}"
        )
    global _known
    logical = tf.config.LogicalDeviceConfiguration(memory_limit=memory_limit)
    try:
        tf.config.set_logical_device_configuration(physical[0], [logical] * n)
    except RuntimeError as error:
        raise RuntimeError(
            "`use_virtual_devices` must be called before TensorFlow starts "
            "its devices, that is before the first tensor, variable or model "
            "is made. Move the call to the top of the program."
        ) from error
    _known = True


def tell_of_no_gpu(num_clones: int, text: str) -> None:
    """Warn once that clones share a processor, if that may come unexpected."""
    global _known
    if num_clones > 1 and not _known:
        _known = True
        warn(text)
