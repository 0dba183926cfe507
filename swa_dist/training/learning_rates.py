"""The learning rates that the plan gives to the optimizers of a training step."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from swa_dist.plan.options import Options
from swa_dist.plan.plan import Plan
from swa_dist.training.optimizers import StepOptimizers


@dataclass(frozen=True)
class InitialOptimizers:
    """What a model's optimizers were before any callback's `on_train_begin`.

    There, BackupAndRestore sets the learning rate that a run had when it was interrupted.

    Attributes:
        rates: Learning rates, by the optimizers' names; None for one that cannot be set.
        updates: How often each had updated weights; None for one that does not count.
    """

    rates: Mapping[str, float | None]
    updates: Mapping[str, int | None]

    @classmethod
    def of(cls, optimizers: StepOptimizers) -> "InitialOptimizers":
        """Return what optimizers are at present."""
        return cls(optimizers.settable_rates, optimizers.updates)


class PlannedLearningRates:
    """The learning rates of one run: each optimizer follows the plan from its own initial rate.

    Args:
        options: The callback's options.
        optimizers: The optimizers that the training step may use.
        before: What they were before the run.

    Attributes:
        initial: Learning rates before training, by the optimizers' names; None for one that
            cannot be set.
        optimizers: The optimizers; to be replaced when the model is compiled anew.

    Raises:
        ValueError: An optimizer cannot follow the schedule, and the training step may use it.
    """

    def __init__(
        self, options: Options, optimizers: StepOptimizers, before: InitialOptimizers
    ) -> None:
        self._is_manual = options.lr_schedule == "manual"
        self._before = before
        self._plans: dict[str, Plan] = {}
        self._refusals: dict[str, ValueError] = {}
        self._shown: list[str] = []
        self.optimizers = optimizers
        now = optimizers.settable_rates
        # A rate reads 0 when a BN pass was interrupted; by now that has been undone.
        self.initial = {name: before.rates.get(name) or now[name] for name in now}
        for name, rate in self.initial.items() or [("", None)]:
            try:
                options.check_initial_rate(rate, name if len(now) > 1 else "")
            except ValueError as error:
                if name not in optimizers.of_frozen_models:
                    raise
                self._refusals[name] = error

    @property
    def guessed_initial(self) -> float | None:
        """An initial rate that an earlier part of the run may have changed, if there is one."""
        updates = self._before.updates
        used = (rate for name, rate in self.initial.items() if updates.get(name) != 0)
        return next(used, None) or None

    def follow(self, plan: Plan) -> None:
        """Take up a plan, or a new one.

        Raises:
            ValueError: No optimizer can follow it.
        """
        self._plans = {}
        for name, rate in self.initial.items():
            if name in self._refusals:
                continue
            try:
                self._plans[name] = replace(plan, initial_learning_rate=rate or None)
            except ValueError as error:  # which matters only if the step uses this optimizer
                self._refusals[name] = ValueError(f"{error} That is with the model's `{name}`.")
        if self._refusals and not self._plans:
            raise next(iter(self._refusals.values()))

    def check_used(self) -> None:
        """Refuse optimizers that have turned out to be used, and cannot follow the plan.

        Raises:
            ValueError: One of them cannot.
        """
        if not self._refusals:  # nothing need be read from the device
            return
        for name in self._used:
            if name in self._refusals:
                raise self._refusals[name]

    def set(self, epoch: int, batch: int = 0) -> None:
        """Set the learning rates of a batch; epoch and batch count from 0."""
        self.optimizers.write_rates(
            {name: plan.learning_rate(epoch, batch) for name, plan in self._plans.items()}
        )

    def log_entries(self) -> dict[str, float]:
        """Return the entries of Keras's `logs`, of the optimizers that the step uses."""
        rates = self.optimizers.read_rates()
        # Those that are used first come first: "learning_rate" stays the same one's.
        self._shown += [name for name in self._used if name not in self._shown]
        shown = [name for name in self._shown if name in rates] or list(rates)[:1]
        if not shown:
            return {}
        each = {f"learning_rate_{name}": rates[name] for name in shown} if len(shown) > 1 else {}
        return {"learning_rate": rates[shown[0]], **each}

    def restore_unused_optimizers(self) -> None:
        """Give optimizers that the training step has never used the rates that they had."""
        if not self._is_manual and len(self.initial) > 1:
            used = self._used
            self.optimizers.write_rates(
                {name: self.initial[name] for name in self._plans if name not in used}
            )

    @property
    def _used(self) -> list[str]:
        """Names of the optimizers that have updated weights in this run, or may have."""
        before, now = self._before.updates, self.optimizers.updates
        return [n for n, count in now.items() if count is None or count != before.get(n)]
