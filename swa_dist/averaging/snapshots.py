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
    """

    def __init__(self, model: Model, keras_api: KerasAPI) -> None:
        self._model = model
        self._keras_api = keras_api
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
        self._average = ModelAverage(model, self._keras_api.trainable_batch_norm(model))
        self._weight_names = self._keras_api.weight_names(model)  # later some may be frozen

    def new_weights(self) -> list[str]:
        """Return the names of weights that have been built, or begun to train, since."""
        # By `id`: variables compare by value.
        known = {id(v) for v in self._average.weights.weights} if self._average else set()
        return [v.name for v in trainable_variables(self._model) if id(v) not in known]

    def take(self) -> str | None:
        """Take a snapshot; return the name of the first weight that is not finite, if one is."""
        if self.average.update():
            return None
        return self._weight_names[self.average.weights.first_non_finite() or 0]

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
