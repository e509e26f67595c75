"""The tables of `scale.md`: what hosts send a step, and how long that takes.

    python docs/scale.py

writes them into the page. `P` is the bytes of the weights, which are those of
the gradients. `tests/test_cluster.py` counts the same in steps that ran.
"""

import pathlib

PAGE = pathlib.Path(__file__).parent / "scale.md"
HOSTS = (1, 2, 4, 8, 16, 64, 256, 1024)
PARAMETERS = {"25 M": 25e6, "100 M": 100e6, "1 G": 1e9}
GIGABITS = (25, 100, 400)
BYTES_A_PARAMETER = 4


def controller(hosts):
    """Return P that the controller sends a step; it gets as much."""
    return hosts - 1


def spread(hosts):
    """Return P that each host sends a step; it gets as much.

    Mirrors of its part of the weights go to all others, and gradients of
    their parts to them.
    """
    return 2 * (hosts - 1) / hosts


def servers(hosts, ps):
    """Return P that each of some parameter servers sends a step."""
    return hosts / ps


def bytes_table():
    lines = [
        "| hosts with clones | controller: its link | spread: each link "
        "| 1 ps: its link | a ps a host: each ps's link |",
        "|---:|---:|---:|---:|---:|",
    ]
    for hosts in HOSTS:
        lines.append(
            f"| {hosts:,} | {controller(hosts):,} P | {spread(hosts):.3g} P "
            f"| {servers(hosts, 1):,.0f} P | {servers(hosts, hosts):.0f} P |"
        )
    return lines


def seconds(share, parameters, gigabits):
    """Return the seconds that a link takes for a share of the weights."""
    return share * parameters * BYTES_A_PARAMETER * 8 / (gigabits * 1e9)


def readable(time):
    if time == 0:
        return "0"
    if time >= 100:
        return f"{time:,.0f} s"
    for unit, size in (("s", 1), ("ms", 1e-3)):
        if time >= size:
            return f"{time / size:.3g} {unit}"
    return f"{time * 1e6:.3g} µs"


def time_table(name):
    share = {"controller": controller, "spread": spread}[name]
    lines = [
        "| parameters | Gbit/s | 2 hosts | 8 hosts | 64 hosts | 1,024 hosts |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for label, parameters in PARAMETERS.items():
        for gigabits in GIGABITS:
            cells = [
                readable(seconds(share(hosts), parameters, gigabits))
                for hosts in (2, 8, 64, 1024)
            ]
            lines.append(f"| {label} | {gigabits} | {' | '.join(cells)} |")
    return lines


TABLES = {
    "bytes": bytes_table,
    "controller": lambda: time_table("controller"),
    "spread": lambda: time_table("spread"),
}


def page(text):
    """Return a page with its tables as they are computed."""
    for name, table in TABLES.items():
        before, _, rest = text.partition(f"<!-- {name} -->\n")
        _, _, after = rest.partition("<!-- end -->")
        lines = "\n".join(table())
        text = f"{before}<!-- {name} -->\n{lines}\n<!-- end -->{after}"
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
