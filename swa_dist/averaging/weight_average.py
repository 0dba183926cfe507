"""The running average of a model's weights, kept on every replica."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import NoReturn

import numpy as np
import tensorflow as tf

from swa_dist.averaging.device_average import DeviceAverage
from swa_dist.distribution import read_local
from swa_dist.model_checks import check_eager, check_strategy, check_trainable_variables
from swa_dist.plan.options import check_ema_momentum
from swa_dist.protocols import Model


class WeightAverage(DeviceAverage):
    """Average of the trainable weights that a model had at each `update`, exact on every replica.

    The `SWA` callback is built on it; use it in custom training loops. The buffers are
    mirrored like the weights: one float32 for each, or one of a wider or complex weight's own
    dtype. Every replica reads and writes its own copies only; nothing is sent between replicas or
    to the host, and equal weights keep the copies bitwise equal.

    With `ema_momentum`, b, it is the exponential moving average: update k of n has the weight
    (1 - b) b^(n-k) / (1 - b^n). The divisor corrects the bias of an average that has only begun
    (Kingma & Ba, 2015, section 3), so that it needs no initial value. It is within 1e-6 of float64
    for any number of updates, for which there is a second buffer for each weight.

    Without it, for the first 32 updates a buffer holds the sum s_n = s_(n-1) + w_n, and the average
    is s_n / n; from then on, and after a swap, a_n = (a_(n-1) - a_(n-1) / n) + w_n / n. Relative to
    the largest weight of its variable it is within 1e-6 of the float64 mean of some 100 updates,
    within 3e-6 of 500 and 2e-5 of 5,000, however the weights move.

    A `tf.train.Checkpoint` of it holds `buffers`, in the order of the weights, `count` (updates)
    and `divisor` (of the buffers), with `ema_momentum` also `remainders` and `next_weight`, not the
    weights. To save or restore it while the average is in the model is an error; a checkpoint of
    the model alone then has the averaged weights.

    Args:
        model: A built model of Keras 3 or tf_keras, compiled or not. The weights are those that
            are trainable at this time; integers, such as counters, are not averaged.
        ema_momentum: A number in (0, 1), the factor by which an update loses weight with each
            later one; None: all have equal weights.

    Raises:
        RuntimeError: Eager execution was disabled.
        ValueError: `ema_momentum` is out of range, the model has no trainable weights, or the
            replicas of its strategy do not step together.

    Distribution:
        Create it, and call all methods, in cross-replica context, on every worker. `update` and
        `copy_to_model` may also be called within a `tf.function`, beside `strategy.run`.

    Example:
        >>> average = WeightAverage(model)
        >>> for batch in strategy.experimental_distribute_dataset(data):
        ...     train_step(batch)
        ...     average.update()
        >>> with average.averaged_weights():
        ...     validate(model)
        >>> average.copy_to_model()

    Reference:
        Izmailov et al., arXiv 1803.05407, Algorithm 1: w_SWA is the mean of the w visited.
    """

    _momentum_of_means: float | None = None

    def __init__(self, model: Model, *, ema_momentum: float | None = None) -> None:
        strategy = model.distribute_strategy
        check_eager()
        check_ema_momentum(ema_momentum)
        variables = check_trainable_variables(model)
        check_strategy(strategy, variables)
        momentum = self._momentum_of_means if ema_momentum is None else float(ema_momentum)
        super().__init__(variables, strategy, momentum)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse to be copied or pickled.

        Raises:
            TypeError: With what to do instead.
        """
        raise TypeError(
            "A `WeightAverage` cannot be copied or pickled, as it works on a model's weights. "
            "Received: a copy or pickle of one. Make one for the other model, and restore a "
            "checkpoint of this one into it."
        )

    def __dir__(self) -> list[str]:
        """Return the public names; `tf.Module` has more."""
        return [
            "averaged_weights",
            "copy_to_model",
            "get_weights",
            "n_averaged",
            "swap",
            "swapped",
            "update",
        ]

    @property
    def swapped(self) -> bool:
        """Whether the average is in the model, and the weights in its place."""
        return not self._own_weights

    @property
    def equals_model(self) -> bool:
        """Whether the weights are bitwise the average, on this worker's first replica."""
        if self.swapped:
            return True
        weights = self._first_copies(self._weights)
        differs = [
            tf.reduce_any(average != group.pack([weights[i].read_value() for i in group.indices]))
            for group, average in zip(self._groups, self._averages(), strict=True)
        ]
        return not tf.reduce_any(differs)

    @property
    def n_averaged(self) -> int:
        """Number of updates in the average.

        Raises:
            RuntimeError: Within a `tf.function`, as in methods that need it.
        """
        if not tf.executing_eagerly():
            raise RuntimeError(
                "Within a `tf.function`, a `WeightAverage` has `update` and `copy_to_model` only. "
                "Received: a call of something that needs `n_averaged`, a Python number."
            )
        return read_local(self.count, self._strategy)

    def update(self) -> None:
        """Average the model's present weights with the earlier ones, if all of them are finite.

        The values of a variable count as finite if their sum is: that reads memory once, without a
        temporary.

        Raises:
            RuntimeError: The average is in the model.
        """
        self._own_weights.require("`update` must be called")
        self._update()

    def copy_to_model(self) -> None:
        """Assign the average to the weights, on every replica. The average stays as it is.

        Within a `tf.function` it leaves the weights alone while there is no average.

        Raises:
            RuntimeError: There is no average yet, or it is in the model, until the next swap.
        """
        self._own_weights.require("`copy_to_model` must be called")
        if tf.executing_eagerly():
            self._refuse_without_average()
        self._copy()

    def swap(self) -> None:
        """Exchange the model's weights and the average; the next call exchanges them back.

        Nothing is rounded: after two calls weights and average are bitwise what they were. At most
        one variable is in memory twice at a time (half-precision weights have a copy of their own).

        Raises:
            RuntimeError: There is no average yet.
        """
        self._refuse_without_average()
        if self.swapped:
            self._swap()
            self._own_weights.certain = True
        else:
            self.normalize()
            self._own_weights.certain = False
            self._swap()

    def normalize(self) -> None:
        """Turn sums into means, as a swap does.

        A run that is resumed from a checkpoint continues bitwise like one that has swapped.

        Raises:
            RuntimeError: There is no average yet.
        """
        self._refuse_without_average()
        if not self.swapped:
            self._normalize()

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Have the average in the model while open; afterwards all is bitwise as it was.

        Within itself it does nothing more. BN statistics are left alone: `update_bn` computes those
        of the average. What is written into float32 or float64 weights meanwhile becomes the
        average, as there is no third copy of either. What is written into narrower ones is dropped.

        Raises:
            RuntimeError: There is no average yet.
        """
        if self.swapped:
            yield
            return
        try:
            self.swap()
            yield
        finally:
            if self.swapped:
                self.swap()

    def get_weights(self) -> list[np.ndarray]:
        """Return the average as NumPy arrays, in the order of `model.trainable_variables`.

        Those that are not averaged, such as integers, are left out.

        Raises:
            RuntimeError: There is no average yet.
        """
        self._refuse_without_average()
        if self.swapped:
            return [np.array(v.numpy(), copy=True) for v in self._first_copies(self._weights)]
        arrays = {
            i: value.numpy()
            for group, average in zip(self._groups, self._averages(), strict=True)
            for i, value in zip(group.indices, group.unpack(average), strict=True)
        }
        return [arrays[i] for i in sorted(arrays)]

    def _averages(self) -> list[tf.Tensor]:
        """Return the average of each group, on this worker's first replica."""
        (divisor,) = self._first_copies([self.divisor])
        buffers = self._first_copies(self.buffers)
        remainders = self._first_copies(self.remainders) or [None] * len(buffers)
        return [
            tf.cast(self._sum.average(buffer, remainder, divisor), group.dtype)
            for group, buffer, remainder in zip(self._groups, buffers, remainders, strict=True)
        ]

    def _first_copies(self, variables: Iterable[tf.Variable]) -> list[tf.Variable]:
        return [self._strategy.experimental_local_results(v)[0] for v in variables]

    def _refuse_without_average(self) -> None:
        if not self.n_averaged:
            raise RuntimeError("There is no average yet: no `update` has taken finite weights.")


class LongWeightAverage(WeightAverage):
    """A `WeightAverage` that is as exact of any number of updates as of a hundred.

    For that there is a second buffer for each weight.
    """

    _momentum_of_means = 1.0
