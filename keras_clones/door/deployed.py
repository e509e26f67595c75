"""The deployment of a model: what a user asks about its clones."""

import os
import weakref
from collections.abc import MutableMapping, MutableSet, Sequence
from typing import Any

import keras

from keras_clones.calls.looks import Looks
from keras_clones.devices import balance, clocks
from keras_clones.devices.config import DeploymentConfig, check_integer
from keras_clones.devices.placement import PlacedClone, short_name, short_names
from keras_clones.look import footprint, page, picture, report
from keras_clones.look.labels import label
from keras_clones.plan import watch
from keras_clones.plan.options import StepOptions
from keras_clones.tensors import sharding


def _option(name: str) -> Any:
    """Return an attribute that is one of the options."""
    return property(lambda made: getattr(made.options, name))


class Deployment:
    """The clones of a model, and where its parts live.

    Attributes:
        config: The `DeploymentConfig` the clones were made by.
        clones: Tuple of `PlacedClone(scope, device)`.
        variables_device: Device string, home of every variable, or a tuple
            of those that the weights of the model are divided among.
        inputs_device: Device string, where the global batch arrives.
        optimizer_device: Device string, where the optimizer runs. Weights
            that are at home elsewhere are updated there.
        loss: String, `"auto"`, `"clones"` or `"gather"`.
        batch_norm: String, `"mean"`, `"first"` or `"sync"`.
        layer_losses: String, `"mean"` or `"sum"`, a dict of layer names to
            these, or `None`.
        state: Dict of patterns of variables' paths to `"mean"`, `"sum"`,
            `"first"`, `"max"` or `"min"`, how the clones' values merge.
        random: String, `"clones"` or `"global"`, whose draws layers get.
        whole: Tuple of the layers that see the global batch, as they were
            given.
        exact: Boolean, whether what could differ from one device is refused.
        check_rows: Boolean, whether layers that mix rows are looked for.
        jit_compile: Boolean or `"auto"`, whether XLA compiles each clone.
        shares: Tuple of the clones' shares of the rows, which add up to 1,
            `"auto"`, or `None` for even ones.
        update: String, `"auto"` or `"keras"`, how optimizers update.
        pieces: Integer, in how many pieces each clone works through its
            shard by now.
        divided: Tuple of the embeddings whose rows are divided over homes, as
            they were given.
    """

    clones = _option("clones")
    loss = _option("loss")
    batch_norm = _option("batch_norm")
    layer_losses = _option("layer_losses")
    random = _option("random")
    whole = _option("whole")
    exact = _option("exact")
    check_rows = _option("check_rows")
    jit_compile = _option("jit_compile")
    shares = _option("shares")
    balance = _option("balance")
    towers = _option("towers")
    looks = _option("looks")
    update = _option("update")
    pieces = _option("pieces")
    divided = _option("divided")

    def __init__(
        self,
        config: DeploymentConfig,
        clones: tuple[PlacedClone, ...],
        options: StepOptions,
        model: keras.Model | None = None,
    ) -> None:
        self.config = config
        home = options.home
        self.inputs_device = self.optimizer_device = home
        measured = options.shares == "auto"
        self.pieces_grow = options.pieces == "auto"
        pieces = 1 if self.pieces_grow else options.pieces
        many = len(clones) * pieces > 1
        self.options = options._replace(
            clones=clones,
            balance=balance.start(len(clones), home) if measured else None,
            towers={},
            looks=Looks() if options.check_rows and many else None,
            pieces=pieces,
        )
        self._reported = False
        self._reported_pieces = 1
        # By who watches the training: a callback whose training failed takes
        # its watch along when it goes.
        self.watches: MutableMapping[Any, watch.Watch] = (
            weakref.WeakKeyDictionary()
        )
        # Those who want to know when what the clones come to is there.
        self.timed_by: MutableSet[Any] = weakref.WeakSet()
        self._clocks: clocks.Clocks | None = None
        # The model holds this, which must not keep the model alive.
        self._model = None if model is None else weakref.ref(model)

    def __getstate__(self) -> dict[str, Any]:
        # A weak reference cannot be pickled.
        options = self.options._replace(looks=None, towers={})
        kept: dict[str, Any] = {
            "options": options,
            "watches": {},
            "timed_by": set(),
            "_clocks": None,
            "_model": None,
        }
        return {**vars(self), **kept}

    @property
    def variables_device(self) -> Any:
        """Return the home of the model's weights, or their homes."""
        devices = self.options.homes.devices
        return devices if len(devices) > 1 else devices[0]

    def step_options(self) -> StepOptions:
        """Return what the model's steps go by."""
        timed = self.balance is not None or bool(self.timed_by)
        if timed and self._clocks is None:
            self._clocks = clocks.make(len(self.clones), self.options.home)
        return self.options._replace(
            shares=self.fractions,
            watch=watch.join(self.watches.values()),
            clocks=self._clocks if timed else None,
        )

    @property
    def state(self) -> dict[str, str]:
        """Return how variables merge, by patterns of their paths."""
        return dict(self.options.state)

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

    def grow(self) -> None:
        """Double the pieces that each clone works through."""
        looks = self.looks or (Looks() if self.check_rows else None)
        self.options = self.options._replace(
            pieces=2 * self.pieces, looks=looks
        )

    def call_whole(self, layers: Sequence[keras.Layer]) -> None:
        """Call more layers whole from now on."""
        whole = (*self.options.whole, *layers)
        self.options = self.options._replace(whole=whole)
        self.looks.start_again()

    def report_pieces(self) -> None:
        """Print what `pieces="auto"` came to, once it is known to fit."""
        if self.pieces > self._reported_pieces:
            self._reported_pieces = self.pieces
            print(
                f"pieces='auto': each clone works through its shard in "
                f"{self.pieces} pieces, since memory did not suffice for "
                f"{self.pieces // 2}."
            )

    def shard_sizes(self, batch_size: int) -> list[int]:
        """Return the rows that each clone gets of a global batch.

        Args:
            batch_size: Integer, the rows of the global batch.
        """
        num_shards = sharding.enough(batch_size, len(self.clones))
        fractions = self.fractions if num_shards == len(self.clones) else None
        if self.balance is not None and fractions is not None:
            fractions = fractions.numpy().tolist()
        sizes = sharding.shard_sizes(batch_size, num_shards, fractions)
        return sizes + [0] * (len(self.clones) - num_shards)

    def summary(self, batch_size: int | None = None) -> None:
        """Print where everything is: a table of clones, parts and bytes.

        It shows which clone runs where, where the variables, the optimizer's
        slots, the batch and the optimizer are, the bytes of each, and what a
        training step moves to and from each clone. What depends on the batch
        follows from the model's inputs, outputs and losses, so these figures
        say "about". Parts of a model that is not built or compiled show once
        they are there. In a notebook the tables show as HTML.

        Args:
            batch_size: Integer, the rows of a global batch, to also show
                the rows and bytes of each clone's shard. Defaults to `None`.

        Raises:
            TypeError: If `batch_size` is not an integer.
            ValueError: If `batch_size` is less than 1.
        """
        page.show(self._page(batch_size))

    def plot(
        self,
        path: str | os.PathLike[str] = "clones.png",
        batch_size: int | None = None,
    ) -> None:
        """Draw the clones: data, shards, towers and home, with the bytes.

        Args:
            path: String or path, the file to write. Its extension says in
                which format, such as `".png"`, `".svg"` or `".pdf"`.
                Defaults to `"clones.png"`.
            batch_size: Integer, the rows of a global batch, to also show
                the rows and bytes of each clone's shard. Defaults to `None`.

        Raises:
            ImportError: If there is no matplotlib.
            TypeError: If an argument has the wrong type.
            ValueError: If `batch_size` is less than 1, the extension is not
                one that matplotlib knows, or the file cannot be written.
        """
        path = picture.check_path(path)
        rows = self._rows(batch_size)
        size, why_not = self._footprint()
        labels = label(self.clones, self._homes(), rows, size, why_not)
        picture.draw(labels).savefig(path)

    def _page(self, batch_size: int | None = None) -> page.Page:
        rows = self._rows(batch_size)
        size, why_not = self._footprint()
        made = report.deployment_page(
            self.clones, self._homes(), rows, size, why_not
        )
        return made._replace(notes=[*made.notes, *self._notes()])

    def _notes(self) -> list[str]:
        """Return what else there is to know, a sentence each."""
        notes = []
        homes = self.options.homes
        if homes.tables:
            paths = ", ".join(table.path for table in homes.tables)
            notes.append(
                f"Rows of {paths} are divided over {short_names(homes.rows)}."
            )
        if self.whole:
            names = [getattr(x, "name", x) for x in self.whole]
            notes.append(f"Called whole, on the global batch: {names}.")
        if self.pieces > 1 or self.pieces_grow:
            grow = " until memory ends" if self.pieces_grow else ""
            notes.append(
                f"Clones work through their shards in {self.pieces} "
                f"piece(s){grow}."
            )
        return notes

    def _rows(self, batch_size: int | None) -> list[int] | None:
        if batch_size is None:
            return None
        return self.shard_sizes(check_integer("batch_size", batch_size, 1))

    def _homes(self) -> dict[str, tuple[str, ...]]:
        return {
            "variables": self.options.homes.devices,
            "optimizer": self.options.homes.devices,
            "inputs": (self.inputs_device,),
        }

    def _footprint(self) -> tuple[footprint.Footprint | None, str]:
        """Return the bytes of the model, or why they are not known."""
        model = self._model() if self._model is not None else None
        if model is None:
            return None, "model is gone"
        if not footprint.is_built(model):
            return None, "not built"
        return footprint.measure(model, self.step_options()), ""

    def _repr_html_(self) -> str:
        return self._page()._repr_html_()

    def __repr__(self) -> str:
        clones = ", ".join(
            f"{c.scope or 'clone_0'} on {short_name(c.device)}"
            for c in self.clones
        )
        home = short_names(self.options.homes.devices)
        return f"<Deployment {clones}; variables on {home}>"
