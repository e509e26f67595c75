"""Where each variable of a model is at home."""

from collections.abc import Iterable, Sequence

import keras

from keras_clones.devices import choosers

STRATEGIES = ("controller", "spread", "greedy", "round_robin")


class Homes:
    """Where the variables of a model are at home.

    Attributes:
        main: Device string, home of what belongs to no one weight: metrics,
            seeds, the optimizer's counters and rates.
        devices: Tuple of device strings, which the weights are divided
            among. One is home to all of them.
        tables: Tuple of `keras.Variable`s whose rows are divided.
        rows: Tuple of device strings, which these are divided over.

    Args:
        main: As above.
        devices: As above. Defaults to none: `main` is home to all.
        strategy: String. `"spread"` gives each weight, the largest first, to
            the device with the fewest bytes; `"greedy"` does so in the order
            of the weights, and `"round_robin"` takes devices in turn.
    """

    def __init__(
        self,
        main: str,
        devices: Sequence[str] = (),
        strategy: str = "greedy",
    ) -> None:
        self.main = main
        self.devices = tuple(devices) or (main,)
        self._largest_first = strategy == "spread"
        in_turn = strategy == "round_robin"
        make = choosers.round_robin if in_turn else choosers.greedy
        self._choose = make(self.devices)
        self._chosen: dict[int, str] = {}
        self.tables: tuple[keras.Variable, ...] = ()
        self.rows: tuple[str, ...] = ()

    def dividing(
        self, tables: Sequence[keras.Variable], rows: Sequence[str]
    ) -> "Homes":
        """Return these homes, with the rows of tables divided over some."""
        self.tables, self.rows = tuple(tables), tuple(rows)
        return self

    @property
    def divide(self) -> bool:
        """Whether weights are at home elsewhere than all else."""
        return self.devices != (self.main,) or bool(self.tables)

    @property
    def all(self) -> set[str]:
        """All devices that are home to anything."""
        return {self.main, *self.devices, *self.rows}

    def choose(
        self, weights: Iterable[keras.Variable]
    ) -> list[tuple[keras.Variable, str | tuple[str, ...]]]:
        """Return the home of each weight, which never changes.

        Args:
            weights: Iterable of weights of the model, in its order.

        Returns:
            List of pairs of a weight and its home, a device string, or a
            tuple of those that its rows are divided over.
        """
        weights = list(weights)
        divided = {id(table) for table in self.tables}
        alone = [weight for weight in weights if id(weight) not in divided]
        homes: dict[int, str | tuple[str, ...]] = {
            **self._choose_each(alone),
            **dict.fromkeys(divided, self.rows),
        }
        return [(weight, homes[id(weight)]) for weight in weights]

    def _choose_each(self, weights: list[keras.Variable]) -> dict[int, str]:
        if len(self.devices) == 1:
            return {id(weight): self.devices[0] for weight in weights}
        new = {id(w): w for w in weights if id(w) not in self._chosen}
        order = list(new.values())
        if self._largest_first:
            order.sort(key=choosers.count_bytes, reverse=True)
        for weight in order:
            self._chosen[id(weight)] = self._choose(weight)
        return self._chosen

    def __reduce__(self) -> tuple[type, tuple[str]]:
        # A copy of a deployment is of a plain model, on one machine.
        return Homes, (self.main,)
