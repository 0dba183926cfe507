"""The snapshots of a run: the average that they enter, and the weights that they are of."""

from swa_dist.averaging.model_average import ModelAverage
from swa_dist.keras_api import KerasAPI
from swa_dist.model_checks import trainable_variables
from swa_dist.protocols import Model


class Snapshots:
    """The average of a model while it is trained, and of which of its weights it is.

    Until `prepare` there is none: `fit` builds a model without weights in its first step.

    Args:
        model: The model.
        keras_api: Its Keras version.
        ema_momentum: See `SWA`.
        of_steps: Whether snapshots are taken by steps.
    """

    def __init__(
        self, model: Model, keras_api: KerasAPI, ema_momentum: float | None, of_steps: bool
    ) -> None:
        self._model = model
        self._keras_api = keras_api
        self._ema_momentum, self._of_steps = ema_momentum, of_steps
        self._average: ModelAverage | None = None
        self._weight_names: list[str] = []

    @property
    def has_average(self) -> bool:
        """Whether there is an average, be it without snapshots."""
        return self._average is not None

    @property
    def average(self) -> ModelAverage:
        """The average, once it is prepared."""
        assert self._average, "The model has weights by now."
        return self._average

    @property
    def average_is_carried(self) -> bool:
        """Whether the model carries the average."""
        return self._average is not None and self._average.is_carried

    @property
    def average_is_lost(self) -> bool:
        """Whether the average was overwritten while the model carried it."""
        return self._average is not None and self._average.is_lost

    def prepare(self) -> None:
        """Begin an average of the weights that the model has at present.

        Raises:
            ValueError: It has none, or they are not those of the model's strategy.
        """
        model = self._model
        layers = self._keras_api.trainable_batch_norm(model)
        self._average = ModelAverage(model, layers, self._ema_momentum, self._of_steps)
        self._weight_names = self._keras_api.weight_names(model)  # later some may be frozen

    def new_weights(self) -> list[str]:
        """Return the names of weights that have been built, or begun to train, since."""
        # By `id`: variables compare by value.
        known = {id(v) for v in self._average.weights.weights} if self._average else set()
        return [v.name for v in trainable_variables(self._model) if id(v) not in known]

    def take(self) -> str | None:
        """Take a snapshot; return the name of the first weight that is not finite, if one is."""
        return None if self.average.update() else self.first_non_finite() or self._weight_names[0]

    def note_steps(self, known: int) -> int:
        """Take up the snapshots that were taken in training steps.

        Args:
            known: Snapshots in the average when it was asked last.

        Returns:
            Snapshots in the average.
        """
        n_averaged = self.average.weights.n_averaged
        if n_averaged > known:
            self.average.update_statistics(n_averaged - known)
        return n_averaged

    def first_non_finite(self) -> str:
        """Return the name of the first weight that is not finite; empty if all are."""
        index = self.average.weights.first_non_finite()
        return "" if index is None else self._weight_names[index]

    def end_carrying(self) -> bool:
        """Give the model its own weights back; return whether the average was lost meanwhile.

        A lost average is followed by a new one, without snapshots.
        """
        if not self._average:
            return False
        self._average.end_carrying()
        lost = self._average.is_lost
        if lost:
            self.prepare()
        return lost
