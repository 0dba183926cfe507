"""The running average of a model's weights, kept on every replica."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from swa_dist.replicas import (
    ReplicaFunction,
    Untracked,
    built_trainable_variables,
    check_eager,
    check_strategy,
    local_variable,
    read,
)

# Updates for which the buffers are sums. They take fewer streams of memory than a running mean, but
# lose digits as they grow: of weights that hardly move all of them are lost in the same direction.
_LONGEST_SUM = 32


class WeightAverage(tf.Module):
    """Average of the trainable weights that a model had at each `update`, exact on every replica.

    It is what the `SWA` callback is built on, for training loops of your own. The buffers are
    mirrored like the weights: one float32 for each, or one of a wider or complex weight's own
    dtype. Every replica reads and writes its own copies only; nothing is sent between replicas or
    to the host, and equal weights keep the copies bitwise equal.

    For the first 32 updates a buffer holds the sum s_n = s_(n-1) + w_n, and the average is s_n / n;
    from then on, and after a swap, it is the average, a_n = (a_(n-1) - a_(n-1) / n) + w_n / n.
    Relative to the largest weight of its variable it is within 1e-6 of the float64 mean of some 100
    updates, within 3e-6 of 500 and 2e-5 of 5,000, however the weights move.

    A `tf.train.Checkpoint` of it holds the buffers, and not the weights. To save or restore it
    while the average is in the model is an error; a checkpoint of the model alone then has the
    averaged weights.

    Args:
        model: A built Keras model, of either Keras, compiled or not. Its trainable weights are
            those of this moment; integers, such as counters, are not averaged.

    Raises:
        ValueError: The model has no trainable weights, or its strategy has no replicas that step
            together.

    Distribution:
        Create it, and call everything, in cross-replica context, on every worker. `update` may
        also be called within a `tf.function`, beside `strategy.run`, and every step if wanted.

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

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._strategy = strategy = model.distribute_strategy
        check_eager()
        variables = built_trainable_variables(model)
        check_strategy(strategy, variables)
        self._weights = Untracked(variables)
        self._own_weights = _OwnWeights(strategy)
        with strategy.scope():
            self.buffers = [
                local_variable(tf.zeros(v.shape, _buffer_dtype(v.dtype))) for v in variables
            ]
            self.count = local_variable(tf.zeros([], tf.int64))
            # What the buffers are to be divided by: the number of terms of a sum, 1 for a mean.
            self.divisor = local_variable(tf.zeros([], tf.int64))
            # While the average is in the model, its buffers hold the weights. What is narrower than
            # its buffer could not hold the average, which has to stay where it is.
            self._narrow = Untracked(
                local_variable(tf.zeros(v.shape, v.dtype)) if _is_narrow(v) else None
                for v in variables
            )
        self._update = ReplicaFunction(self._update_replica, strategy)
        self._copy = ReplicaFunction(self._copy_replica, strategy)
        self._settle = ReplicaFunction(self._settle_replica, strategy)
        self._swap_in = ReplicaFunction(self._swap_in_replica, strategy)
        self._swap_out = ReplicaFunction(self._swap_out_replica, strategy)

    @property
    def weights(self) -> list[tf.Variable]:
        """The weights that are averaged."""
        return list(self._weights)

    @property
    def swapped(self) -> bool:
        """Whether the average is in the model, and the weights in its place."""
        return not self._own_weights

    @property
    def is_in_model(self) -> bool:
        """Whether the weights are bitwise the average, on this worker's first replica."""
        if self.swapped:
            return True
        local, divisor = (
            self._strategy.experimental_local_results,
            read(self.divisor, self._strategy),
        )
        differs = [
            tf.reduce_any(tf.cast(local(buffer)[0] / divisor, v.dtype) != local(v)[0])
            for buffer, v in zip(self.buffers, self._weights, strict=True)
        ]
        return not tf.reduce_any(differs)

    @property
    def n_averaged(self) -> int:
        """Number of updates in the average.

        Raises:
            RuntimeError: It is asked, or a method asks, within a `tf.function`.
        """
        if not tf.executing_eagerly():
            raise RuntimeError(
                "Within a `tf.function`, a `WeightAverage` has `update` and `copy_to_model` only. "
                "Received: a call of something that needs `n_averaged`, a Python number."
            )
        return read(self.count, self._strategy)

    def update(self) -> None:
        """Take the model's present weights into the average, if all of them are finite.

        Values are taken for finite where their sum is: one look at memory, and no temporary.

        Raises:
            RuntimeError: The average is in the model.
        """
        self._own_weights.require("`update` must be called")
        self._update()

    def copy_to_model(self) -> None:
        """Assign the average to the weights, on every replica. The average stays as it is.

        Raises:
            RuntimeError: The average is in the model already, for a while.
        """
        self._own_weights.require("`copy_to_model` must be called")
        self._copy()

    def swap(self) -> None:
        """Exchange the model's weights and the average; the next call exchanges them back.

        Nothing is rounded: after two calls weights and average are bitwise what they were. At most
        one variable's worth of memory is needed on the way (half-precision weights have a copy of
        their own).

        Raises:
            RuntimeError: There is no average yet.
        """
        self._refuse_without_average()
        if self.swapped:
            self._swap_out()
            self._own_weights.certain = True
        else:
            self.settle()
            self._own_weights.certain = False
            self._swap_in()

    def settle(self) -> None:
        """Have the buffers hold the average itself, as they do after a swap.

        What follows a checkpoint that is made then is bitwise what follows a swap.

        Raises:
            RuntimeError: There is no average yet.
        """
        self._refuse_without_average()
        if not self.swapped:
            self._settle()

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Have the average in the model while open; afterwards all is bitwise as it was.

        Within itself it does nothing more. What is written into float32 or float64 weights
        meanwhile becomes the average: there is no third copy of either. What is written into
        narrower ones is dropped.

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
        local = self._strategy.experimental_local_results
        if self.swapped:
            return [np.array(local(v)[0].numpy(), copy=True) for v in self._weights]
        divisor = read(self.divisor, self._strategy)
        return [
            tf.cast(local(buffer)[0] / divisor, v.dtype).numpy()
            for buffer, v in zip(self.buffers, self._weights, strict=True)
        ]

    def first_non_finite(self) -> int | None:
        """Return the position of the first weight that `update` does not take for finite."""
        return next((i for i, v in enumerate(self._weights) if not _is_finite(v)), None)

    @property
    def layout(self) -> dict[str, str]:
        """What each weight is, in words: averages of other weights cannot be taken up."""
        return {
            f"weight {i}": f"{tuple(v.shape)} {v.dtype.name}"
            for i, v in enumerate(self._weights, 1)
        }

    def _refuse_without_average(self) -> None:
        if not self.n_averaged:
            raise RuntimeError("There is no average yet: no `update` has taken finite weights.")

    def _update_replica(self) -> None:
        self._own_weights.assertion("`update` must be called")
        # A mean with one value that is not finite is lost, so all are looked at before any is
        # added. The replicas hold the same values: each decides alone, and alike.
        finite: list[tf.Tensor] = []
        for variable in self._weights:
            # One converted copy in memory at a time.
            with tf.control_dependencies(finite[-1:] if _is_narrow(variable) else []):
                finite.append(_is_finite(variable))
        # On a TPU nothing comes of assertions.
        taken = tf.reduce_all([self._own_weights.flag, *finite])
        # After a swap the buffers hold means, and go on as such.
        terms = self.count.read_value()
        are_sums = tf.logical_and(self.divisor == terms, terms < _LONGEST_SUM)
        # One choice of three, not one within another: whatever is chosen from costs each variable.
        tf.switch_case(
            tf.where(taken, tf.where(are_sums, 1, 2), 0),
            [lambda: None, self._add_to_sums, self._move_means],
        )

    def _add_to_sums(self) -> None:
        self.count.assign_add(1)
        done: list[tf.Operation] = []
        for buffer, variable in zip(self.buffers, self._weights, strict=True):
            with tf.control_dependencies(done):
                value = tf.cast(variable, buffer.dtype)
                added = buffer.assign_add(value, read_value=False)
            if _is_narrow(variable):
                done = [added]  # one converted copy in memory at a time
        self.divisor.assign(self.count)

    def _move_means(self) -> None:
        self.count.assign_add(1)

        def move(buffer: tf.Variable, variable: tf.Variable, _: Any) -> tf.Operation:
            # Not a - (a - w) / n, whose one rounding goes the same way each time if w drifts. That
            # of a - a / n does not, as a / n is another fraction of a in each update.
            average, n = self._average(buffer), tf.cast(self.count, buffer.dtype)
            return buffer.assign(average - average / n + tf.cast(variable, buffer.dtype) / n)

        self._each(move)
        self.divisor.assign(1)

    def _copy_replica(self) -> None:
        own = self._own_weights.assertion("`copy_to_model` must be called")
        with tf.control_dependencies([own]):
            self._each(lambda buffer, v, _: v.assign(tf.cast(self._average(buffer), v.dtype)))

    def _settle_replica(self) -> None:
        def divide() -> None:
            self._each(lambda buffer, *_: buffer.assign(self._average(buffer)))
            self.divisor.assign(1)

        tf.cond(self.divisor > 1, divide, lambda: None)

    def _swap_in_replica(self) -> None:
        def swap(buffer: tf.Variable, variable: tf.Variable, narrow: Any) -> tf.Operation:
            average, weight = buffer.read_value(), variable.read_value()
            with tf.control_dependencies([average, weight]):
                kept = [variable.assign(tf.cast(average, variable.dtype))]
                kept += [(buffer if narrow is None else narrow).assign(weight)]
            return tf.group(kept)

        self._each(swap)
        self._own_weights.flag.assign(False)

    def _swap_out_replica(self) -> None:
        def swap(buffer: tf.Variable, variable: tf.Variable, narrow: Any) -> tf.Operation:
            if narrow is not None:
                return variable.assign(narrow)
            average, weight = variable.read_value(), buffer.read_value()
            with tf.control_dependencies([average, weight]):
                return tf.group(variable.assign(weight), buffer.assign(average))

        self._each(swap)
        self._own_weights.flag.assign(True)

    def _average(self, buffer: tf.Variable) -> tf.Tensor:
        return buffer / tf.cast(self.divisor, buffer.dtype)

    def _each(self, change: Callable[..., tf.Operation]) -> None:
        """Call `change` with each buffer, its weight, and what a narrow one has of its own.

        One after the other, so that no more than one of them is in memory twice.
        """
        done: list[tf.Operation] = []
        for each in zip(self.buffers, self._weights, self._narrow, strict=True):
            with tf.control_dependencies(done):
                done = [change(*each)]


class _OwnWeights(tf.train.experimental.PythonState):
    """Whether the model has its own weights, without which an average is not to be checkpointed.

    While it has not, the buffers are the weights: they would be taken for an average later.

    Args:
        strategy: The `tf.distribute.Strategy` of the model.

    Attributes:
        flag: It, on each replica, written in the graph that swaps: right after an interruption,
            and for graphs that were traced before.
        certain: Whether it is so for certain, and the device, still at work, need not be asked.
    """

    def __init__(self, strategy: tf.distribute.Strategy) -> None:
        super().__init__()
        self._strategy = strategy
        self.certain = True
        with strategy.scope():
            self.flag = local_variable(tf.constant(True))

    def __bool__(self) -> bool:
        with tf.init_scope():  # `update` asks while a graph is traced, too
            return self.certain or bool(self._strategy.experimental_local_results(self.flag)[0])

    def require(self, what: str) -> None:
        """Refuse what needs the model's own weights."""
        if not self:
            raise RuntimeError(_refusal(what))

    def assertion(self, what: str) -> tf.Operation:
        """Refuse it in a graph, too, which may have been traced before a swap."""
        return tf.debugging.Assert(self.flag, [_refusal(what)])

    def serialize(self) -> str:
        """Refuse to be saved, if need be."""
        self.require("A `WeightAverage` must be saved")
        return ""

    def deserialize(self, string_value: str) -> None:
        """Refuse to be restored, if need be. TensorFlow calls this before it assigns anything."""
        self.require("A `WeightAverage` must be restored")


def _refusal(what: str) -> str:
    return (
        f"{what} while the model has its own weights. Received: a call while the average is in the "
        "model. Swap back, or leave `averaged_weights`, first."
    )


def _is_narrow(variable: tf.Variable) -> bool:
    return variable.dtype != _buffer_dtype(variable.dtype)


def _buffer_dtype(dtype: tf.DType) -> tf.DType:
    return dtype if dtype.size > tf.float32.size else tf.float32


def _is_finite(variable: tf.Variable) -> tf.Tensor:
    total = tf.reduce_sum(tf.cast(variable, _buffer_dtype(variable.dtype)))
    if total.dtype.is_complex:
        return tf.math.is_finite(tf.math.real(total)) & tf.math.is_finite(tf.math.imag(total))
    return tf.math.is_finite(total)
