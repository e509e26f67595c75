"""The bytes that a training step moves over the links between hosts."""

from collections.abc import Mapping, Sequence

from keras_clones.devices.hosts import host_name, host_of
from keras_clones.devices.placement import PlacedClone
from keras_clones.look.footprint import Flow, Footprint


def bytes_by_link(
    clones: Sequence[PlacedClone],
    main: str,
    rows: Sequence[int] | None,
    footprint: Footprint,
) -> dict[tuple[str, str], int | None]:
    """Return what a training step moves from one host to another.

    The mirrors of the weights at a home cross once to each host with clones,
    and their gradients come back added up. Rows of a divided table come from
    their homes, and their gradients go there. The rows of the batch, and what
    is computed of them at home, go to and from each clone.

    Args:
        clones: Sequence of `PlacedClone`s.
        main: Device string, where the batch arrives and losses are added up.
        rows: Sequence of integers, the rows of each clone, or `None`.
        footprint: `Footprint` of the model.

    Returns:
        Dict of bytes by the names of two hosts. `None` stands for what
        depends on a batch that is not known. Without a cluster it is empty.
    """
    found: dict[tuple[str, str], int | None] = {}

    def add(source: str, target: str, size: int | None) -> None:
        if source != target and size != 0:
            ends = host_name(source), host_name(target)
            found[ends] = _sum(found.get(ends, 0), size)

    for host, its in _by_host(clones, rows).items():
        for home, (mirrors, gradients) in footprint.by_home.items():
            add(host_of(home), host, mirrors)
            add(host, host_of(home), gradients)
        for table in footprint.divided:
            for home in table.homes:
                number = len(table.homes)
                add(host_of(home), host, _part(its, table.received, number))
                add(host, host_of(home), _part(its, table.sent, number))
        received = sum(one.received for one in footprint.divided)
        sent = sum(one.sent for one in footprint.divided)
        add(host_of(main), host, _rest(footprint.received, its, received))
        add(host, host_of(main), _rest(footprint.sent, its, sent))
    return found


def _by_host(
    clones: Sequence[PlacedClone], rows: Sequence[int] | None
) -> Mapping[str, int | None]:
    """Return the rows of each host's clones."""
    found: dict[str, int | None] = {}
    for i, clone in enumerate(clones):
        host = host_of(clone.device)
        its = None if rows is None else rows[i]
        found[host] = _sum(found.get(host, 0), its)
    return found


def _sum(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else one + other


def _part(rows: int | None, size: int, number: int) -> int | None:
    """Return what one of some homes has of the bytes of rows."""
    return None if rows is None else rows * size // number


def _rest(flow: Flow | None, rows: int | None, divided: int) -> int | None:
    """Return what depends on the rows: weights and gradients count by home.

    Args:
        flow: `Flow` to or from a clone, or `None`.
        rows: Integer, the rows of the batch, or `None`.
        divided: Integer, the bytes of a row that other homes have.
    """
    if flow is None or not flow.a_row:
        return 0
    return None if rows is None else rows * (flow.a_row - divided)
