"""What the steps of one deployment go by."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from keras_clones.clone.layer_losses import Kinds
from keras_clones.clone.state import Policies
from keras_clones.devices.balance import Balance
from keras_clones.devices.clocks import Clocks
from keras_clones.devices.homes import Homes
from keras_clones.devices.placement import Clone
from keras_clones.exchange.laying_out import Group
from keras_clones.plan.watch import Watch


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
    `Looks` that does so, `None` where nothing is looked at.
    """

    clones: tuple[Clone, ...]
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

    @property
    def home(self) -> str:
        """Where data arrives, metrics and seeds are, and the optimizer runs."""
        return self.homes.main

    @property
    def policies(self) -> Policies:
        """How variables that layers assign merge."""
        alone = len(self.clones) == 1
        return Policies(self.batch_norm, dict(self.state), alone)

    @property
    def scalar_losses(self) -> Kinds:
        """What scalars that layers pass to `add_loss` are of the rows."""
        return self.layer_losses if len(self.clones) > 1 else "mean"

    def group(
        self, clones: Sequence[Clone], training: bool, loss_scale: Any = 1.0
    ) -> Group:
        """Return what rows are laid out over: some of the clones."""
        clocks = self.clocks if training else None
        return Group(clones, self.home, self.random, clocks, loss_scale)
