"""The deployment of a model: what a user asks about its clones."""

from typing import Any

from keras_clones import balance, report, sharding
from keras_clones.config import DeploymentConfig
from keras_clones.placement import Clone


class Deployment:
    """The clones of a model, and where its parts live.

    Attributes:
        config: The `DeploymentConfig` the clones were made by.
        clones: Tuple of `Clone(scope, device)`.
        variables_device: Device string, home of every variable.
        inputs_device: Device string, where the global batch arrives.
        optimizer_device: Device string, where the optimizer runs.
        loss: String, `"auto"`, `"clones"` or `"gather"`.
        batch_norm: String, `"mean"`, `"first"` or `"sync"`.
        layer_losses: String, `"mean"` or `"sum"`, or `None`.
        jit_compile: Boolean or `"auto"`, whether XLA compiles each clone.
        shares: Tuple of the clones' shares of the rows, which add up to 1,
            `"auto"`, or `None` for even ones.
    """

    def __init__(
        self,
        config: DeploymentConfig,
        clones: tuple[Clone, ...],
        loss: str,
        batch_norm: str,
        layer_losses: str | None,
        jit_compile: bool | str,
        shares: tuple[float, ...] | str | None = None,
    ) -> None:
        self.config = config
        self.clones = clones
        self.variables_device = config.variables_device()
        self.inputs_device = config.inputs_device()
        self.optimizer_device = config.optimizer_device()
        self.loss = loss
        self.batch_norm = batch_norm
        self.layer_losses = layer_losses
        self.jit_compile = jit_compile
        self.shares = shares
        self.balance = None
        if shares == "auto":
            self.balance = balance.start(len(clones), self.variables_device)
        self._reported = False

    @property
    def fractions(self) -> Any:
        """Return each clone's fraction of the rows, `None` for even ones."""
        return self.balance.fractions if self.balance else self.shares

    def report_balance(self) -> None:
        """Print once what `shares="auto"` came to, when it has settled."""
        if self.balance is None or self._reported:
            return
        if balance.is_settled(self.balance):
            self._reported = True
            print(balance.report_line(self.balance))

    def shard_sizes(self, batch_size: int) -> list[int]:
        """Return the rows that each clone gets of a global batch.

        Args:
            batch_size: Integer, the rows of the global batch.
        """
        num_shards = len(self.clones) if batch_size >= len(self.clones) else 1
        fractions = self.fractions if num_shards > 1 else None
        if self.balance is not None and fractions is not None:
            fractions = fractions.numpy().tolist()
        sizes = sharding.shard_sizes(batch_size, num_shards, fractions)
        return sizes + [0] * (len(self.clones) - num_shards)

    def summary(self, batch_size: int | None = None) -> None:
        """Print which clone runs where, and where the model's parts live.

        Args:
            batch_size: Integer, the rows of a global batch, to also print
                the rows that each clone gets. Defaults to `None`.
        """
        homes = {
            "variables": self.variables_device,
            "optimizer": self.optimizer_device,
            "inputs": self.inputs_device,
        }
        rows = None if batch_size is None else self.shard_sizes(batch_size)
        print(report.placement_table(self.clones, homes, rows))

    def __repr__(self) -> str:
        clones = ", ".join(f"{c.scope}: {c.device}" for c in self.clones)
        return f"<Deployment {clones}; variables: {self.variables_device}>"
