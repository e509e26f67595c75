"""What a deployment is asked to be: numbers and device strings."""

import dataclasses
import operator
import re
from collections.abc import Sequence

CPU = "/device:CPU:0"
_DEVICE = re.compile(r"^(?:/?device:)?(CPU|GPU)(?::(\d+))?$", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class DeploymentConfig:
    """Say where the clones of a model run and where its variables live.

    Args:
        num_clones: Integer, how many clones to make, at least 1. Defaults
            to 1.
        clone_on_cpu: Boolean, whether every clone runs on `CPU:0`. Defaults
            to `False`: clone `i` runs on `GPU:i`.
        devices: Sequence of strings such as `["GPU:0", "GPU:2"]`, one a
            clone, which takes the place of the rule above. Defaults to
            `None`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, a device is repeated, or
            `devices` contradicts another argument.

    Example:

    >>> from keras_clones import DeploymentConfig
    >>> config = DeploymentConfig(num_clones=2)
    >>> config.clone_device(1), config.clone_scope(1)
    ('/device:GPU:1', 'clone_1')
    >>> config.variables_device()
    '/device:CPU:0'

    Reference:

    - TF-Slim, `deployment/model_deploy.py`, whose `DeploymentConfig` gives
        the same device strings for one machine.
    """

    num_clones: int = 1
    clone_on_cpu: bool = False
    devices: Sequence[str] | None = None

    def __post_init__(self) -> None:
        num_clones = check_num_clones(self.num_clones)
        object.__setattr__(self, "num_clones", num_clones)
        if not isinstance(self.clone_on_cpu, bool):
            raise TypeError(
                "Argument `clone_on_cpu` must be a boolean. "
                f"Received: clone_on_cpu={self.clone_on_cpu!r}"
            )
        if self.devices is None:
            return
        object.__setattr__(self, "devices", check_devices(self.devices))
        if self.clone_on_cpu:
            raise ValueError(
                "Arguments `devices` and `clone_on_cpu=True` exclude each "
                f"other: pass one of them. Received: devices={self.devices}"
            )
        if len(self.devices) != num_clones:
            raise ValueError(
                "Argument `devices` must name one device a clone. "
                f"Received: num_clones={num_clones}, devices={self.devices}"
            )

    def clone_device(self, clone_index: int) -> str:
        """Return the device string of one clone.

        Args:
            clone_index: Integer from 0 to `num_clones - 1`.

        Raises:
            ValueError: If there is no such clone.
        """
        index = self._check_index(clone_index)
        if self.devices is not None:
            return self.devices[index]
        return CPU if self.clone_on_cpu else f"/device:GPU:{index}"

    def clone_scope(self, clone_index: int) -> str:
        """Return the name scope of one clone, `""` where there is only one.

        Args:
            clone_index: Integer from 0 to `num_clones - 1`.

        Raises:
            ValueError: If there is no such clone.
        """
        index = self._check_index(clone_index)
        return f"clone_{index}" if self.num_clones > 1 else ""

    def variables_device(self) -> str:
        """Return the device string where every variable lives."""
        return CPU

    def inputs_device(self) -> str:
        """Return the device string where the global batch arrives."""
        return CPU

    def optimizer_device(self) -> str:
        """Return the device string where the optimizer updates variables."""
        return CPU

    def _check_index(self, clone_index: int) -> int:
        try:
            index = operator.index(clone_index)
        except TypeError:
            index = -1
        if not 0 <= index < self.num_clones:
            raise ValueError(
                "Argument `clone_index` must be an integer from 0 to "
                f"{self.num_clones - 1}. Received: clone_index={clone_index!r}"
            )
        return index


def check_num_clones(num_clones: int) -> int:
    """Return `num_clones` as a plain integer, or say what is wrong with it."""
    if isinstance(num_clones, bool) or not hasattr(num_clones, "__index__"):
        raise TypeError(
            "Argument `num_clones` must be a positive integer. "
            f"Received: num_clones={num_clones!r} "
            f"(of type {type(num_clones).__name__})"
        )
    if operator.index(num_clones) < 1:
        raise ValueError(
            "Argument `num_clones` must be a positive integer. "
            f"Received: num_clones={num_clones}"
        )
    return operator.index(num_clones)


def check_devices(devices: Sequence[str]) -> tuple[str, ...]:
    """Return device strings in the form `/device:GPU:0`, each once."""
    if isinstance(devices, str) or not isinstance(devices, Sequence):
        raise TypeError(
            "Argument `devices` must be a list of device strings, such as "
            f"['GPU:0', 'GPU:1']. Received: devices={devices!r}"
        )
    if not devices:
        raise ValueError(
            "Argument `devices` must name at least one device. "
            f"Received: devices={devices!r}"
        )
    canonical = tuple(canonical_device(device) for device in devices)
    repeated = sorted({d for d in canonical if canonical.count(d) > 1})
    if repeated:
        raise ValueError(
            "Argument `devices` must name each device once. "
            f"Received: devices={list(devices)!r}, which repeats {repeated}. "
            "To put every clone on the CPU, pass `clone_on_cpu=True`."
        )
    return canonical


def canonical_device(device: str) -> str:
    """Return `"gpu:1"` or `"/device:GPU:1"` as `"/device:GPU:1"`."""
    match = _DEVICE.match(device) if isinstance(device, str) else None
    if match is None:
        raise ValueError(
            "A device must be a string such as 'GPU:0' or '/device:CPU:1'. "
            f"Received: {device!r}"
        )
    kind, index = match.groups()
    return f"/device:{kind.upper()}:{int(index or 0)}"
