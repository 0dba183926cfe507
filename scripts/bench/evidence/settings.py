"""What is compared with what: data, networks, budgets, and the rates that are tried."""

from dataclasses import asdict, dataclass
from typing import Any

Json = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One network on one set of digits, trained as the paper trains its networks, or not.

    Args:
        data: "MNIST-5k" or "digits".
        network: "residual" or "plain".
        regularized: Whether there is weight decay, and every image is shifted at random.
    """

    data: str
    network: str
    regularized: bool = True

    @property
    def name(self) -> str:
        """Its name in tables."""
        return f"{self.data}, {self.network}" + ("" if self.regularized else ", not regularized")


CASES = (
    Case("MNIST-5k", "residual"),
    Case("MNIST-5k", "plain"),
    Case("digits", "residual"),
    Case("digits", "plain"),
    Case("digits", "residual", regularized=False),
)


@dataclass(frozen=True)
class Settings:
    """How long everything trains, how often, and what is tried before.

    Args:
        cases: Networks and data.
        epochs: The whole budget of each contender, in passes over the data.
        trunk: Epochs that all contenders of a seed share; averaging begins after them.
        cycle: Epochs in a cycle of the cyclic schedule.
        seeds: Each is a split of the data, initial weights and an order of the batches.
        tuning_seeds: Seeds on which rates are chosen; disjoint from `seeds`.
        initial_rates: Initial learning rates of SGD that are tried.
        swa_shares: Learning rates of SWA that are tried, as shares of the initial rate.
        points: Positions on the line through the SGD solution (0) and the SWA solution (1).
        train_rows: Rows to train on, at most.
    """

    cases: tuple[Case, ...] = CASES
    epochs: int = 32
    trunk: int = 21
    cycle: int = 2
    seeds: tuple[int, ...] = tuple(range(10))
    tuning_seeds: tuple[int, ...] = (1000, 1001)
    initial_rates: tuple[float, ...] = (0.0125, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8)
    swa_shares: tuple[float, ...] = (0.25, 0.5, 1.0)
    points: tuple[float, ...] = tuple(round(-0.5 + 0.1 * i, 1) for i in range(21))
    train_rows: int = 4000

    def as_json(self) -> Json:
        """Return what a run depends on, and is not told by its arguments."""
        return {
            name: value
            for name, value in asdict(self).items()
            if name in ("epochs", "trunk", "cycle", "points", "train_rows")
        }

    @classmethod
    def from_json(cls, settings: Json) -> "Settings":
        """Return settings that agree in all that `as_json` returned."""
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in settings.items()
        }
        return cls(**values)


FULL = Settings()
QUICK = Settings(
    cases=(CASES[0], CASES[3]),
    epochs=4,
    trunk=1,
    seeds=(0, 1),
    tuning_seeds=(1000,),
    initial_rates=(0.05, 0.1),
    swa_shares=(0.5,),
    points=(-0.5, 0.0, 1.0, 1.5),
    train_rows=640,
)
