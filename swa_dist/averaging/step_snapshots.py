"""Snapshots by steps: taken on the device, in the training step itself."""

import contextlib
from typing import Any

import tensorflow as tf

from swa_dist.averaging.device_average import DeviceAverage
from swa_dist.distribution import LocalCopy, local_variable, read_local
from swa_dist.protocols import Model
from swa_dist.training.patches import before_training, patched
from swa_dist.training.sample_counter import SampleCounter, batch_tensors
from swa_dist.training.train_function import TrainFunction


class StepSnapshots(TrainFunction):
    """A model's train function that also averages its weights, after every n-th step.

    That is part of the traced step. So the weights are those after the n-th step also where several
    run in one execution, and nothing travels between devices or to the host.

    Args:
        model: A compiled Keras model, built.
        counter: Counts what the step is fed.
        average: Gets the weights.
        every: Steps from one snapshot to the next.
        steps: Steps that were counted before.

    Attributes:
        average: Gets the weights.
    """

    def __init__(
        self, model: Model, counter: SampleCounter, average: DeviceAverage, every: int, steps: int
    ) -> None:
        self.average, self._every = average, every
        self._strategy = model.distribute_strategy
        with self._strategy.scope():
            self._steps = local_variable(tf.constant(steps, tf.int64))
        self._until_next_fit = contextlib.ExitStack()
        train_step = model.train_step

        def averaged_train_step(data):  # type: ignore[no-untyped-def]
            counter.count(data)
            result = train_step(data)
            self._count(data)
            return result

        super().__init__(model, lambda: patched([(model, "train_step", averaged_train_step)]))

    @property
    def steps(self) -> int:
        """Steps that were counted."""
        return read_local(self._steps, self._strategy)

    def install(self) -> None:
        """Become the model's train function, until `uninstall` or until it is trained anew."""
        super().install()
        self._until_next_fit.enter_context(before_training(self._model, self.uninstall))

    def uninstall(self) -> None:
        """Give the model its earlier train function back."""
        self._until_next_fit.close()
        super().uninstall()

    @tf.autograph.experimental.do_not_convert
    def _count(self, data: Any) -> None:
        """Count a step after it has updated the weights, and take its snapshot if it is due."""
        steps = LocalCopy(self._steps)
        # At the end of the data the step runs once more, and fails for want of a batch.
        with tf.control_dependencies(batch_tensors(data)):
            counted = steps.add(tf.ones([], tf.int64))
        with tf.control_dependencies([counted]):
            if self._every == 1:
                self.average.update_replica()
                return
            is_due = steps.read() % self._every == 0
            tf.cond(is_due, self.average.update_replica, lambda: None)
