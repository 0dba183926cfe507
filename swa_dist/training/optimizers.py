"""The optimizers of a training step, and their learning rates."""

from collections.abc import Mapping, Set
from typing import Any

import tensorflow as tf

from swa_dist.protocols import Optimizer


class OptimizerLearningRate:
    """The learning rate of one optimizer, whether a number, a schedule or a function.

    Args:
        optimizer: A Keras optimizer.
        schedule_type: The class of the learning rate schedules of its Keras version.

    Attributes:
        settable: Whether it is a number that can be set.
    """

    def __init__(self, optimizer: Optimizer, schedule_type: Any) -> None:
        self._optimizer = optimizer
        self._schedule_type = schedule_type
        self.settable = self._is_settable()

    def read(self) -> float | None:
        """Return the present learning rate, or None if there is none."""
        try:
            rate = self._optimizer.learning_rate
        except AttributeError:  # one made of several with a rate each, or of TensorFlow 1
            return None
        if isinstance(rate, self._schedule_type):  # as tf_keras's legacy optimizers return it
            rate = rate(self._optimizer.iterations)
        return float(tf.convert_to_tensor(rate).numpy())

    def write(self, rate: float) -> None:
        """Set the learning rate, if it can be set."""
        if self.settable:
            self._optimizer.learning_rate = rate

    @property
    def updates(self) -> int | None:
        """How often the optimizer has updated weights; None if it does not count."""
        variables = getattr(self._optimizer, "variables", None)
        if variables is not None and not (variables() if callable(variables) else variables):
            return 0  # reading `iterations` makes tf_keras's legacy optimizers create it
        iterations = getattr(self._optimizer, "iterations", None)
        return None if iterations is None else int(tf.convert_to_tensor(iterations))

    def _is_settable(self) -> bool:
        rate = self.read()
        if rate is None:
            return False
        # tf_keras's legacy optimizers would let a function, or a schedule, be overwritten. (Private
        # for want of a public name; checked with tf_keras 2.16 and 2.21.)
        hyper = getattr(self._optimizer, "_hyper", None)
        if hyper is not None:
            return not callable(hyper["learning_rate"])
        try:  # no public property of an optimizer tells
            self._optimizer.learning_rate = rate
        except (TypeError, AttributeError):
            return False
        return True


class StepOptimizers:
    """The optimizers that a training step may use, each under the name of its attribute.

    Which of them it does use shows in their counts of updates once it has run.

    Args:
        learning_rates: Their learning rates, by name.
        of_frozen_models: Names of those that belong to models without trainable weights, such as a
            teacher.
    """

    def __init__(
        self, learning_rates: Mapping[str, OptimizerLearningRate], of_frozen_models: Set[str]
    ) -> None:
        self._learning_rates = dict(learning_rates)
        self.of_frozen_models = of_frozen_models

    @property
    def settable_rates(self) -> dict[str, float | None]:
        """Present learning rates; None for one that is not a number that can be set."""
        rates = self._learning_rates.items()
        return {name: rate.read() if rate.settable else None for name, rate in rates}

    @property
    def updates(self) -> dict[str, int | None]:
        """How often each has updated weights; None for one that does not count."""
        return {name: rate.updates for name, rate in self._learning_rates.items()}

    def read_rates(self) -> dict[str, float]:
        """Return the present learning rates, of those that have one."""
        rates = {name: rate.read() for name, rate in self._learning_rates.items()}
        return {name: rate for name, rate in rates.items() if rate is not None}

    def write_rates(self, rates: Mapping[str, float | None]) -> None:
        """Set learning rates, those that can be set; None leaves one alone."""
        for name, rate in rates.items():
            if rate is not None and name in self._learning_rates:
                self._learning_rates[name].write(rate)
