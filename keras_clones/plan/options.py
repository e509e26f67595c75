"""What the steps of one deployment go by."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from keras_clones.clone.layer_losses import Kinds
from keras_clones.clone.state import Policies
from keras_clones.devices.balance import Balance
from keras_clones.devices.clocks import Clocks
from keras_clones.devices.homes import Homes
from keras_clones.devices.placement import PlacedClone
from keras_clones.exchange.laying_out import Group
from keras_clones.plan.watch import Watch
from keras_clones.tensors import pieces
from keras_clones.tensors.pieces import Pieces
from keras_clones.tensors.sharding import Shards


class StepOptions(NamedTuple):
    """What the steps of one deployment go by.

    `homes` says where each variable is at home.
    `state` maps patterns of variables' paths to how their values merge.
    `shares` are the fractions of the rows that the clones get, `None` for
    even ones. `balance` moves them while the model trains, by what `clocks`
    measure. `watch` gets what training steps come to, if anything wants to
    know. `towers` keeps the traced towers of calls while a step function is
    traced again.
    `random` says whose draws layers get, `whole` which layers see the global
    batch, `exact` whether what could differ from one device is refused, and
    `check_rows` whether layers that mix rows are looked for. `looks` is the
    `Looks` that does so, `None` where nothing is looked at. `update` says
    how optimizers update. `pieces` is how many pieces each clone works
    through, one after the other. `divided` names the embeddings whose rows
    are divided over homes.
    """

    clones: tuple[PlacedClone, ...]
    homes: Homes
    loss: str
    batch_norm: str
    layer_losses: Kinds
    jit_compile: bool | str
    state: tuple[tuple[str, str], ...] = ()
    shares: Any = None
    balance: Balance | None = None
    clocks: Clocks | None = None
    watch: Watch | None = None
    towers: dict[Any, Any] = {}  # noqa: RUF012
    random: str = "clones"
    whole: tuple[Any, ...] = ()
    exact: bool = False
    check_rows: bool = True
    looks: Any = None
    update: str = "auto"
    pieces: Any = 1
    divided: tuple[Any, ...] = ()

    @property
    def home(self) -> str:
        """Where data arrives, metrics and seeds are, and the optimizer runs."""
        return self.homes.main

    @property
    def policies(self) -> Policies:
        """How variables that layers assign merge."""
        alone = self.num_turns == 1
        return Policies(self.batch_norm, dict(self.state), alone)

    @property
    def num_turns(self) -> int:
        """How many shards a batch with rows enough is divided into.

        Pieces are clones that take turns: what holds of several clones holds
        of several pieces.
        """
        return len(self.clones) * self.pieces

    @property
    def may_meet(self) -> bool:
        """Whether clones may wait for each other within their towers.

        Of pieces that take turns, the first cannot wait for the last.
        """
        return self.pieces == 1

    @property
    def scalar_losses(self) -> Kinds:
        """What scalars that layers pass to `add_loss` are of the rows."""
        return self.layer_losses if self.num_turns > 1 else "mean"

    def divide(
        self, shards: Shards, clones: Sequence[PlacedClone]
    ) -> tuple[Pieces, Sequence[PlacedClone]]:
        """Divide the shards of clones into pieces.

        Returns:
            Tuple `(pieces, clones)`: `Pieces`, and a `PlacedClone` for each
            of them.
        """
        found = pieces.divide(shards, self.pieces)
        if self.pieces == 1:
            return found, clones
        return found, [
            PlacedClone(
                f"{clone.scope or 'clone_0'}/piece_{turn}", clone.device
            )
            for clone, own in zip(clones, found.turns, strict=True)
            for turn in range(len(own))
        ]

    def group(
        self,
        clones: Sequence[PlacedClone],
        training: bool,
        loss_scale: Any = 1.0,
        turns: Sequence[range] = (),
    ) -> Group:
        """Return what rows are laid out over: some of the clones."""
        clocks = self.clocks if training else None
        return Group(clones, self.home, self.random, clocks, loss_scale, turns)
