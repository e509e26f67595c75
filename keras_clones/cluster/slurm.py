"""The tasks of a Slurm step, by the variables that `srun` sets in each."""

import re
from collections.abc import Mapping
from typing import Any

# Below the ports that systems give out by themselves, which begin at 32768.
_FIRST_PORT = 10_000
_PORTS_A_STEP = 64
_STEPS = 350


def slurm_step(environ: Mapping[str, str]) -> dict[str, Any] | None:
    """Return a Slurm step as `TF_CONFIG` would have it, all tasks workers.

    Tasks are numbered node by node (Slurm's `--distribution=block`, its
    default).

    Args:
        environ: Mapping of the names of environment variables to strings.

    Returns:
        Dict with `"cluster"` and `"task"`, or `None` outside of a step of
        several tasks.
    """
    nodes = environ.get("SLURM_STEP_NODELIST")
    tasks = environ.get(
        "SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", "1")
    )
    if not nodes or tasks == "1":
        return None
    names = expand_nodes(nodes)
    counts = expand_counts(_value(environ, "SLURM_STEP_TASKS_PER_NODE"))
    if len(names) != len(counts):
        raise ValueError(
            "Expected SLURM_STEP_TASKS_PER_NODE to have a number for each of "
            f"the {len(names)} nodes of the step. Received: "
            f"SLURM_STEP_NODELIST={nodes!r}, SLURM_STEP_TASKS_PER_NODE="
            f"{environ['SLURM_STEP_TASKS_PER_NODE']!r}"
        )
    ports = _ports(environ, max(counts))
    workers = [
        f"{name}:{port}"
        for name, count in zip(names, counts, strict=True)
        for port in ports[:count]
    ]
    index = int(_value(environ, "SLURM_PROCID"))
    return {
        "cluster": {"worker": workers},
        "task": {"type": "worker", "index": index},
    }


def expand_nodes(nodes: str) -> list[str]:
    """Return the names that a list of nodes stands for.

    Args:
        nodes: String, such as `"gpu[01-02,7],login"`.
    """
    return [
        name
        for part in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", nodes)
        for name in _expand(part)
    ]


def expand_counts(counts: str) -> list[int]:
    """Return the numbers that such a list as `"2(x3),1"` stands for."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", counts)
    return [int(n) for n, times in found for _ in range(int(times or 1))]


def _expand(part: str) -> list[str]:
    """Return the names of one part, whose brackets may be several."""
    match = re.fullmatch(r"([^\[]*)\[([^\]]*)\](.*)", part)
    if match is None:
        return [part]
    before, numbers, after = match.groups()
    ends = _expand(after)
    return [
        f"{before}{number}{end}" for number in _numbers(numbers) for end in ends
    ]


def _numbers(text: str) -> list[str]:
    """Return the numbers of such a list as `"01-03,7"`, as they are written."""
    found = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        numbers = range(int(first), int(last or first) + 1)
        found += [str(number).zfill(len(first)) for number in numbers]
    return found


def _ports(environ: Mapping[str, str], most: int) -> list[int]:
    """Return a port for each task of a node: those of the step, or by its id.

    Ports by an id let two steps on one node go on side by side.
    """
    if reserved := environ.get("SLURM_STEP_RESV_PORTS"):
        ports = [int(number) for number in _numbers(reserved)]
        if len(ports) >= most:
            return ports
    step = int(environ.get("SLURM_JOB_ID", "0")) + int(
        environ.get("SLURM_STEP_ID", "0")
    )
    first = _FIRST_PORT + step % _STEPS * _PORTS_A_STEP
    return list(range(first, first + most))


def _value(environ: Mapping[str, str], name: str) -> str:
    if name not in environ:
        raise ValueError(
            f"Expected {name}, which `srun` sets in each task of a step. "
            "Received: SLURM_STEP_NODELIST="
            f"{environ['SLURM_STEP_NODELIST']!r} without it. Start the script "
            "with `srun`, or set TF_CONFIG."
        )
    return environ[name]
