"""The devices of this machine: `python -m keras_clones devices`."""

import argparse
import os
import platform
import warnings
from typing import Any

import tensorflow as tf

from keras_clones import _tf
from keras_clones.cluster.resolve import Spec, resolve
from keras_clones.devices import placement
from keras_clones.devices.naming import canonical_device
from keras_clones.look.page import Page, Table, readable


def add_command(commands: Any) -> None:
    """Add `devices` to the commands of a parser."""
    parser = commands.add_parser(
        "devices",
        help="list the devices, and what clone_model would choose",
        description="List the devices of this machine, their memory, and the "
        "clones that clone_model(model) would make.",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the devices, and return the exit code."""
    print(page())
    return 0


def page() -> Page:
    """Return the devices, and what `clone_model` would choose by default."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = placement.choose_config(None, None, False)
        clones = placement.place_clones(config)
    chosen = [
        [clone.scope or "clone_0", placement.short_name(clone.device)]
        for clone in clones
    ]
    found = placement.find_homes(config, None)
    homes = {
        "variables": placement.short_names(found.devices),
        "optimizer": placement.short_name(found.main),
        "inputs": placement.short_name(found.main),
    }
    on_gpu = placement.logical_devices("GPU")
    notes = [] if on_gpu else [placement.no_gpu(config.num_clones)]
    tables = [
        Table(["physical device", "memory", "what it is"], _physical()),
        Table(["logical device", "memory"], _logical()),
        Table(
            ["clone_model(model)", "device"],
            [*chosen, *map(list, homes.items())],
        ),
    ]
    spec = resolve(None, os.environ)
    if spec is not None:
        tables.insert(0, Table(["task", "address", "what it is"], _tasks(spec)))
        notes.append(
            "The devices are those of this machine: `connect()` adds those of "
            "the other tasks, and `deployment(model).summary()` shows them all."
        )
    return Page(tables, notes)


def _tasks(spec: Spec) -> list[list[str]]:
    """Return a row for each process of the cluster there is told of."""
    rows = []
    for host in spec.hosts:
        what = "home of variables" if host.job == "ps" else "takes clones"
        if host == spec.controller:
            what = "controller, takes clones"
        if host == spec.here:
            what += "; this process"
        rows.append([host.name, host.address, what])
    return rows


def _physical() -> list[list[str]]:
    """Return a row for each device that the machine has."""
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    rows = []
    for device in tf.config.list_physical_devices():
        details = tf.config.experimental.get_device_details(device)
        name = device.name.removeprefix("/physical_device:")
        if device.device_type == "CPU":
            what = f"{os.cpu_count()} cores {platform.machine()}"
            rows.append([name, readable(ram), what])
            continue
        what = details.get("device_name", device.device_type)
        if capability := details.get("compute_capability"):
            what += ", compute capability " + ".".join(map(str, capability))
        rows.append([name, "see below", what])
    return rows


def _logical() -> list[list[str]]:
    """Return a row for each device that TensorFlow computes on."""
    found = tf.config.list_logical_devices()
    on_gpu = any(device.device_type == "GPU" for device in found)
    limits = {
        device.name: device.memory_limit
        for device in (_tf.list_local_devices() if on_gpu else [])
    }
    rows = []
    for logical in found:
        name = canonical_device(logical.name.removeprefix("/"))
        memory = "the machine's"
        if logical.device_type == "GPU":
            limit = limits.get(name)
            memory = "not known" if limit is None else readable(limit)
        rows.append([placement.short_name(name), memory])
    return rows
