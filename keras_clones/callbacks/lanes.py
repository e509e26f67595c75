"""Which lane and phase of a timeline an operation of a step belongs to."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import keras

from keras_clones import _keras
from keras_clones.callbacks.away import Hosts
from keras_clones.devices import hosts
from keras_clones.devices.placement import logical_devices, short_name
from keras_clones.door.attach import deployment
from keras_clones.exchange.laying_out import ARRIVALS
from keras_clones.look.timeline import PIPELINE

WAITING = "waiting for input"
# Name scopes of the step, outside of the clones' own.
SCOPES = {
    "split_batch": "mirror",
    "send_mirrors": "mirror",
    "bring_home": "gradient transfer",
    "merge_gradients": "gradient transfer",
    "update_metrics": "metrics",
    ARRIVALS: "other",
}
# What name scopes of transfers say of the device: kind, index, job, task.
_DEVICE = re.compile(
    r"/on_([A-Z]+)_(\d+)(?:_of_([A-Za-z]\w*?)_(\d+)(?=/|_\d+/))?"
)
# Name scopes of a backward pass: TensorFlow's two, and that of the tower.
BACKWARD = {"gradient_tape", "gradients", "backward_pass"}
# What a GPU calls the copies between it and other devices.
COPIES = {
    "MemcpyH2D": "mirror",
    "MemcpyD2H": "gradient transfer",
    "MemcpyP2P": "gradient transfer",
}


class Places(NamedTuple):
    """Which lanes there are, and what shows that an operation is of one.

    Attributes:
        home: String, the lane of the variables device.
        clones: Dict of lanes by name scopes of clones.
        devices: Dict of lanes by devices such as `"CPU:1"`.
        optimizers: Set of the names of the model's optimizers.
        forward: Set of the name scopes of a forward pass outside of clones.
        hosts: `Hosts` of the clones' lanes.
    """

    home: str
    clones: Mapping[str, str]
    devices: Mapping[str, str]
    optimizers: frozenset[str]
    forward: frozenset[str]
    hosts: Hosts = Hosts()

    def lanes(self) -> list[str]:
        """Return the names of the lanes in their order from the top."""
        lanes = [PIPELINE, WAITING, self.home, *self.clones.values()]
        return list(dict.fromkeys([*lanes, *self.devices.values()]))


def find_places(model: keras.Model) -> Places:
    """Return the lanes of a model's training steps."""
    made = deployment(model)
    optimizers = frozenset(o.name for o in _keras.optimizers(model))
    forward = frozenset((model.name, "compile_loss"))
    if made is None:
        home = "GPU:0" if logical_devices("GPU") else "CPU:0"
        return Places(home, {}, {home: home}, optimizers, forward)
    short = [short_name(clone.device) for clone in made.clones]
    home_device = short_name(made.options.home)
    clones = {
        clone.scope or "clone": f"{clone.scope or 'clone_0'} on {device}"
        for clone, device in zip(made.clones, short, strict=True)
    }
    home = f"{home_device} (variables)"
    devices = {home_device: home}
    for device, lane in zip(short, clones.values(), strict=True):
        devices.setdefault(device, lane)
    return Places(
        home, clones, devices, optimizers, forward, _find_hosts(made, clones)
    )


def _find_hosts(made: Any, lanes: Mapping[str, str]) -> Hosts:
    """Return which hosts the lanes of clones are of, in a cluster."""
    cluster = hosts.cluster()
    if cluster is None:
        return Hosts()
    names = [hosts.host_name(hosts.host_of(c.device)) for c in made.clones]
    of_lanes = dict(zip(lanes.values(), names, strict=True))
    shared = made.balance is not None
    return Hosts(of_lanes, cluster.controller.name, shared=shared)


def classify(path: str, places: Places) -> tuple[str, str]:
    """Return the lane and the phase of an operation, by its name.

    Args:
        path: String, the operation's name and type with the names of the
            calls that it runs in, such as
            `"clone_0/PartitionedCall/dense/MatMul:MatMul"`.
        places: `Places` of the model.
    """
    name, _, kind = path.rpartition(":")
    parts = name.split("/")
    clone = known(name, places.clones)
    lane = places.clones.get(clone, places.home)
    if scope := known(name, SCOPES):
        device = _device(name)
        return places.devices.get(device, lane), SCOPES[scope]
    if known(name, places.optimizers):
        return places.home, "update"
    if clone and kind == "_Send":
        return lane, "gradient transfer"
    if not BACKWARD.isdisjoint(parts):
        return lane, "backward"
    if clone or known(name, places.forward):
        return lane, "forward"
    # Keras gives metrics no scope of their own.
    return lane, "other" if places.clones else "metrics"


def _device(name: str) -> str:
    """Return the device that a transfer's name tells of, as it is printed."""
    where = _DEVICE.search(name)
    if where is None:
        return ""
    kind, index, job, task = where.groups()
    prefix = f"/job:{job}/task:{task}/" if job else ""
    return f"{prefix}{kind}:{index}"


def known(name: str, scopes: Iterable[str]) -> str:
    """Return the first part of a name that is a scope, or a scope again.

    A scope that is entered again gets a number at its end.
    """
    for part in name.split("/"):
        head, _, number = part.rpartition("_")
        if part in scopes:
            return part
        if number.isdigit() and head in scopes:
            return head
    return ""
