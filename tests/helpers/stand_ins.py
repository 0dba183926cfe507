"""A `fit` without a model: what a run decides, and in which order, in microseconds.

`Run` and `RunState` are the real ones. What they work on notes what it is told to do.
"""

import contextlib
import warnings
from types import SimpleNamespace
from typing import Any

import pytest

from swa_dist import final_average
from swa_dist import run as run_module
from swa_dist.plan.options import Options
from swa_dist.plan.plan import Plan
from swa_dist.plan.progress import Progress
from swa_dist.run import Run
from swa_dist.state import Position, RunState

RATE = 0.1


class StandInState(RunState):
    """The state of a run of a model that is not there.

    Args:
        options: The callback's options.
        epochs: Epochs of the run.
        steps: Steps per epoch; None: unknown.
        batch_norm: Whether the model has BN layers that train.
        not_finite: Epochs, counted from 1, whose weights are not finite.
    """

    def __init__(
        self, options: Options, epochs: int, steps: int | None, batch_norm: bool, not_finite: Any
    ) -> None:
        self.notes: list[str] = []
        self.options = options
        self.model = SimpleNamespace(
            stop_training=False,
            trainable_variables=[],
            variables=[],
            distribute_strategy=SimpleNamespace(experimental_local_results=list),
            notes=self.notes,
        )
        self.keras_api = _StandInKerasAPI(batch_norm)
        self.rates = _StandInRates(self.notes)
        self.position = Position(declared_steps=steps)
        self.progress = Progress()
        self.snapshots = _StandInSnapshots(self, not_finite)
        self._step_snapshots = None
        self._adopt(Plan.of(options, epochs, steps, RATE, batch_norm))
        self.counted = SimpleNamespace(batches=0, largest_batch=8, batches_with_empty_replica=0)

    @property
    def _counter(self) -> Any:
        return self.counted

    def print(self, line: str) -> None:
        if self.options.verbose:
            self.notes.append(f"print {line}")


class _StandInKerasAPI:
    is_keras_3 = True

    def __init__(self, batch_norm: bool) -> None:
        self._layers = [SimpleNamespace(keras_layer="a BN layer")] * batch_norm

    def steps_per_execution(self, model: Any, known: int | None = None) -> int:
        return 1

    def step_optimizers(self, model: Any) -> Any:
        return SimpleNamespace(read_rates=lambda: {"optimizer": RATE})

    def trainable_batch_norm(self, model: Any) -> list[Any]:
        return self._layers


class _StandInRates:
    def __init__(self, notes: list[str]) -> None:
        self._notes, self._rate = notes, RATE
        self.initial = {"optimizer": RATE}
        self.guessed_initial = None
        self.optimizers: Any = None

    def follow(self, plan: Plan) -> None:
        self._plan = plan

    def set(self, epoch: int, batch: int = 0) -> None:
        rate = self._plan.learning_rate(epoch, batch)
        self._rate = self._rate if rate is None else rate

    def check_used(self) -> None:
        pass

    def restore_unused_optimizers(self) -> None:
        pass

    def log_entries(self) -> dict[str, float]:
        return {"learning_rate": self._rate}


class _StandInSnapshots:
    """Notes what happens to the average; `model_has` says whose weights are in the model."""

    has_average, average_is_lost = True, False

    def __init__(self, state: StandInState, not_finite: Any) -> None:
        self._state, self._not_finite = state, {*not_finite}
        self.average_is_carried = False
        self.average = SimpleNamespace(
            carry=self._carry,
            copy_to_model=lambda: self._note("average into the model"),
            statistics_of_model="statistics",
            weights=SimpleNamespace(normalize=lambda: None, weights=[]),
            statistics=[],
            writing_statistics=contextlib.nullcontext,
        )

    def prepare(self) -> None:
        pass

    def new_weights(self) -> list[str]:
        return []

    def take(self) -> str | None:
        epoch = self._state.position.epoch
        finite = epoch is None or epoch + 1 not in self._not_finite
        self._note("snapshot" if finite else "no snapshot")
        return None if finite else "kernel"

    def end_carrying(self) -> bool:
        if self.average_is_carried:
            self._note("own weights back")
        self.average_is_carried = False
        return False

    def _carry(self) -> None:
        self.average_is_carried = True
        self._note("carry the average")

    def _note(self, what: str) -> None:
        self._state.notes.append(what)


class StandInPass:
    """A BN pass that has statistics once it was fed."""

    in_force, unobserved = True, ()

    def __init__(self, model: Any, *_: Any, **arguments: Any) -> None:
        self._model, self.arguments, self.has_statistics = model, arguments, False
        self.is_fed, self.is_finished = False, False

    def begin(self) -> None:
        pass

    def feed(self) -> None:
        """What one execution of the training step does."""
        self.is_fed = True
        if self.arguments["bn_steps"]:
            self._model.stop_training = True

    def finish(self) -> None:
        self.is_finished, self.has_statistics = True, self.is_fed

    def reapply(self) -> list[str]:
        return []


class StandInForwardPass:
    """A pass over `bn_data`, which the model notes."""

    unobserved: tuple[str, ...] = ()

    def __init__(self, model: Any, keras_api: Any, unwritten: Any) -> None:
        self.keras_layers, self._notes = ["a BN layer"], model.notes

    def run(self, *_: Any) -> None:
        self._notes.append("pass over bn_data")

    def reapply(self) -> None:
        self._notes.append("its statistics again")


class StandInFit:
    """`fit` as Keras calls the hooks.

    Args:
        monkeypatch: Puts `StandInPass` into the run.
        epochs: Epochs of the run.
        steps: Steps per epoch, as `fit` declares them; None: unknown.
        batch_norm: Whether the model has BN layers that train.
        not_finite: Epochs, counted from 1, whose weights are not finite.
        options: What `Options` takes.

    Attributes:
        notes: What has happened, in order.
        logs: The logs of each epoch.
        warnings: What was warned of.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        epochs: int,
        *options: Any,
        steps: int | None = 3,
        batch_norm: bool = True,
        not_finite: Any = (),
        **more_options: Any,
    ) -> None:
        monkeypatch.setattr(run_module, "BatchNormPass", StandInPass)
        monkeypatch.setattr(final_average, "ForwardPass", StandInForwardPass)
        self.epochs, self.steps = epochs, steps or 3
        options_ = Options(*options, **more_options)
        self.state = StandInState(options_, epochs, steps, batch_norm, not_finite)
        self.model, self.notes = self.state.model, self.state.notes
        self.logs: list[dict[str, Any]] = []
        self.warnings: list[str] = []

    def train(
        self,
        first: int = 1,
        validated: bool = False,
        stop_before: tuple[int, str] | None = None,
        stop_after: tuple[int, str] | None = None,
        fed: Any = None,
        withdraw_after: int | None = None,
    ) -> "StandInFit":
        """Run the epochs from `first` on, counted from 1.

        Args:
            first: The first epoch.
            validated: Whether each epoch ends with validation.
            stop_before: Epoch and hook in which a callback before SWA stops training.
            stop_after: Epoch and hook in which a callback after SWA stops training.
            fed: Steps of each epoch; those that were declared unless given.
            withdraw_after: Epoch at whose end a callback after SWA withdraws a stop.
        """
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self._train(first, validated, stop_before, stop_after, fed, withdraw_after)
        self.warnings = [str(w.message) for w in caught]
        return self

    def _train(
        self, first: int, validated: bool, before: Any, after: Any, fed: Any, withdraw: int | None
    ) -> None:
        run, state, model = Run(self.state), self.state, self.model

        def hook(epoch: int, name: str, ours: Any) -> None:
            if before == (epoch, name):
                model.stop_training = True
            ours()
            if after == (epoch, name):
                model.stop_training = True

        for epoch in range(first, self.epochs + 1):
            hook(epoch, "epoch begin", lambda: run.begin_epoch(epoch - 1))  # noqa: B023
            self.notes.append(f"epoch {epoch}")
            for batch in range((fed or {}).get(epoch, self.steps)):
                run.begin_batch(batch)
                state.counted.batches += 1
                bn_pass = state.position.bn_pass
                if bn_pass:
                    bn_pass.feed()
                hook(epoch, "batch end", run.end_batch)
                if model.stop_training:
                    break
            # Keras evaluates at the end of an epoch, stopped or not.
            if validated:
                run.begin_test()
                self.notes.append("validate")
            logs: dict[str, Any] = {}
            hook(epoch, "epoch end", lambda: run.end_epoch(epoch - 1, logs))  # noqa: B023
            if withdraw == epoch:
                model.stop_training = False
            self.logs.append(logs)
            if model.stop_training:
                break
        run.end()
