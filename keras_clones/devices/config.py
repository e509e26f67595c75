"""What a deployment is asked to be: numbers and device strings."""

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any

from keras_clones.devices import choosers
from keras_clones.devices.naming import check_devices, check_job_name

CPU = "/device:CPU:0"
# The least value of every field that is an integer.
_LEAST = {
    "num_clones": 1,
    "replica_id": 0,
    "num_replicas": 1,
    "num_ps_tasks": 0,
}


@dataclasses.dataclass(frozen=True)
class DeploymentConfig:
    """Say where the clones of a model run and where its variables live.

    Every method returns what `tf.device` takes, or says so. On one machine
    these are `/device:GPU:1` and the like. With parameter servers
    (`num_ps_tasks`) the clones run on the job of the workers, and variables
    live on the job of the parameter servers.

    In a cluster (see `connect`), `clone_model` puts `num_clones` clones on
    each of the `num_replicas`, and variables on the parameter servers, if
    there are any. With one replica, which is the default, it takes the
    devices of the whole cluster in order.

    Args:
        num_clones: Integer, how many clones each replica has, at least 1.
            Defaults to 1.
        clone_on_cpu: Boolean, whether every clone runs on `CPU:0`. Defaults
            to `False`: clone `i` runs on `GPU:i`.
        replica_id: Integer from 0 to `num_replicas - 1`, which replica this
            process is. Defaults to 0.
        num_replicas: Integer, how many replicas there are, at least 1.
            Defaults to 1.
        num_ps_tasks: Integer, how many parameter servers there are. Defaults
            to 0: there are none.
        worker_job_name: String, the name of the replicas' job. Defaults to
            `"worker"`.
        ps_job_name: String, the name of the parameter servers' job. Defaults
            to `"ps"`.
        devices: Sequence of strings such as `["GPU:0", "GPU:2"]`, one a
            clone, which takes the place of the rule above. Passed by name.
            TensorFlow's other ways to name a device, and
            `tf.config.LogicalDevice`s, come to the same. In a cluster they
            may be of any of its tasks. Defaults to `None`.
        sync: Boolean, whether all replicas step together, on one global
            batch. With `False` each replica steps by itself in `fit`, on a
            batch of its own and on variables as they are, and its update is
            applied as it comes. Passed by name. Defaults to `True`.
        max_staleness: Integer, how many updates of others may be applied at
            most while a replica computes its own, of those that step by
            themselves. Passed by name. Defaults to `None`: any number.

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
        the same devices for the same arguments. It refuses several replicas
        without parameter servers.
    """

    num_clones: int = 1
    clone_on_cpu: bool = False
    replica_id: int = 0
    num_replicas: int = 1
    num_ps_tasks: int = 0
    worker_job_name: str = "worker"
    ps_job_name: str = "ps"
    devices: Sequence[str] | None = dataclasses.field(
        default=None, kw_only=True
    )
    sync: bool = dataclasses.field(default=True, kw_only=True)
    max_staleness: int | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = check_integer(name, getattr(self, name), least)
            object.__setattr__(self, name, value)
        if self.replica_id >= self.num_replicas:
            raise ValueError(
                "Argument `replica_id` must be less than `num_replicas`. "
                f"Received: replica_id={self.replica_id}, "
                f"num_replicas={self.num_replicas}"
            )
        for name in ("worker_job_name", "ps_job_name"):
            check_job_name(name, getattr(self, name))
        if not isinstance(self.clone_on_cpu, bool):
            raise TypeError(
                "Argument `clone_on_cpu` must be a boolean. "
                f"Received: clone_on_cpu={self.clone_on_cpu!r}"
            )
        self._check_sync()
        if self.devices is None:
            return
        object.__setattr__(self, "devices", check_devices(self.devices))
        if self.clone_on_cpu:
            raise ValueError(
                "Arguments `devices` and `clone_on_cpu=True` exclude each "
                f"other: pass one of them. Received: devices={self.devices}"
            )
        if len(self.devices) != self.num_clones:
            raise ValueError(
                "Argument `devices` must name one device a clone. Received: "
                f"num_clones={self.num_clones}, devices={self.devices}"
            )

    def _check_sync(self) -> None:
        if not isinstance(self.sync, bool):
            raise TypeError(
                "Argument `sync` must be a boolean. "
                f"Received: sync={self.sync!r}"
            )
        if self.max_staleness is None:
            return
        value = check_integer("max_staleness", self.max_staleness, 0)
        object.__setattr__(self, "max_staleness", value)
        if self.sync:
            raise ValueError(
                "Argument `max_staleness` is of replicas that step by "
                "themselves: pass `sync=False` with it, or leave it out. "
                f"Received: sync=True, max_staleness={value}"
            )

    @property
    def worker_device(self) -> str:
        """The prefix of devices of this replica, `""` on one machine."""
        if self.num_ps_tasks:
            return f"/job:{self.worker_job_name}"
        if self.num_replicas > 1:
            return f"/job:{self.worker_job_name}/task:{self.replica_id}"
        return ""

    @property
    def ps_device(self) -> str:
        """The prefix of devices of parameter servers, `""` without them."""
        return f"/job:{self.ps_job_name}" if self.num_ps_tasks else ""

    def clone_device(self, clone_index: int) -> str:
        """Return the device string of one clone.

        Args:
            clone_index: Integer from 0 to `num_clones - 1`.

        Raises:
            ValueError: If there is no such clone.
        """
        index = self._check_index(clone_index)
        if self.devices is not None:
            device = self.devices[index]
            named = device.startswith("/job:")
            return device if named else self.worker_device + device
        device = CPU if self.clone_on_cpu else f"/device:GPU:{index}"
        return self.worker_device + device

    def clone_scope(self, clone_index: int) -> str:
        """Return the name scope of one clone, `""` where there is only one.

        Args:
            clone_index: Integer from 0 to `num_clones - 1`.

        Raises:
            ValueError: If there is no such clone.
        """
        index = self._check_index(clone_index)
        return f"clone_{index}" if self.num_clones > 1 else ""

    def variables_device(self, strategy: str = "round_robin") -> Any:
        """Return where variables live: a device string, or what chooses one.

        With parameter servers it is a function of a variable, or of a shape
        and a dtype, that returns the device string of one of them. It keeps
        count, so make one and call it once a variable, in a fixed order.

        Args:
            strategy: String, how parameter servers share the variables.
                `"round_robin"` takes them in turn, `"greedy"` takes the one
                with the fewest bytes so far, the first of these if there are
                several. Defaults to `"round_robin"`.

        Raises:
            ValueError: If there is no such strategy.
        """
        make = {
            "round_robin": choosers.round_robin,
            "greedy": choosers.greedy,
        }.get(strategy)
        if make is None:
            raise ValueError(
                "Argument `strategy` must be 'round_robin' or 'greedy'. "
                f"Received: strategy={strategy!r}"
            )
        if not self.num_ps_tasks:
            return self.worker_device + CPU
        return make(
            [
                f"{self.ps_device}/task:{task}{CPU}"
                for task in range(self.num_ps_tasks)
            ]
        )

    def caching_device(self) -> Callable[[Any], str] | None:
        """Return where values of variables are kept between uses.

        Returns:
            `None` without parameter servers: nothing is kept, since the
            variables are on this machine. With them, a function that returns
            the device of what it is given, so that a value stays where it is
            used.
        """
        return operator.attrgetter("device") if self.num_ps_tasks else None

    def inputs_device(self) -> str:
        """Return the device string where the global batch arrives."""
        return self.worker_device + CPU

    def optimizer_device(self) -> str:
        """Return the device string where gradients are merged and applied."""
        return self.worker_device + CPU

    def _check_index(self, clone_index: int) -> int:
        index = _plain_integer(clone_index)
        if index is None or not 0 <= index < self.num_clones:
            raise ValueError(
                "Argument `clone_index` must be an integer from 0 to "
                f"{self.num_clones - 1}. Received: clone_index={clone_index!r}"
            )
        return index


def check_integer(name: str, value: int, least: int) -> int:
    """Return an argument as a plain integer, or say what is wrong with it."""
    wanted = "a positive integer" if least else "an integer of at least 0"
    number = _plain_integer(value)
    if number is None:
        raise TypeError(
            f"Argument `{name}` must be {wanted}. "
            f"Received: {name}={value!r} (of type {type(value).__name__})"
        )
    if number < least:
        raise ValueError(
            f"Argument `{name}` must be {wanted}. Received: {name}={value}"
        )
    return number


def _plain_integer(value: Any) -> int | None:
    """Return an integer as Python's own, and `None` for anything else."""
    # Python's booleans are integers, and so are NumPy's before NumPy 2.
    if isinstance(value, bool) or getattr(value, "dtype", None) == "bool":
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None
