"""What is said of layers in which rows know each other."""

from collections.abc import Sequence

from keras_clones.calls import rows_apart
from keras_clones.warn import warn_or_refuse


def tell(found: Sequence[rows_apart.Finding], exact: bool) -> None:
    """Warn of layers in which rows know each other, or refuse them.

    Raises:
        ValueError: If there are any, and `exact`.
    """
    by_what: dict[str, list[str]] = {}
    for layer, what in found:
        names = by_what.setdefault(what, [])
        if layer.name not in names:
            names.append(layer.name)
    if by_what:
        told = [_SAID[what].format(n=names) for what, names in by_what.items()]
        every = list(dict.fromkeys(n for v in by_what.values() for n in v))
        warn_or_refuse(
            f"{' '.join(told)} A clone calls a layer on its own shard, so the "
            "model does not train what one device trains. "
            f"`clone_model(..., whole={every})` calls these on the global "
            "batch, and goes on cloning the layers inside of and around them; "
            "`check_rows=False` does not look.",
            exact,
            [one.layer for one in found],
        )


_SAID = {
    "outputs": (
        "Layers {n} mix the rows of a batch: what they return for some rows "
        "depends on the other rows."
    ),
    "kept": (
        "Layers {n} keep scalars on themselves that shards do not average to: "
        "they are no means over the rows, and a step of the model's own sees "
        "them."
    ),
    "losses": (
        "Layers {n} pass losses to `add_loss` that shards do not add up to: "
        "they are no means over the rows, or not what `layer_losses` says. "
        "Say `layer_losses={{name: 'sum'}}` of one that is a sum."
    ),
    "state": (
        "Layers {n} assign variables in the forward pass that shards do not "
        "merge to: they are not what `state` or `aggregation` says."
    ),
    "rows": (
        "Layers {n} run on the rows of a whole batch, and not on fewer: a "
        "batch size is fixed in them, or in `Input`."
    ),
}
