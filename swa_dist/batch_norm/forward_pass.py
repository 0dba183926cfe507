"""Forward passes over data, in which the statistics of a model's BN layers are recomputed."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from swa_dist.batch_norm.bn_pass import observe_forward_pass
from swa_dist.batch_norm.statistics import BatchNormStatistics
from swa_dist.data.data_kinds import count_samples
from swa_dist.data.inputs import distributed_inputs
from swa_dist.distribution import local_variable, read_local
from swa_dist.keras_api import KerasAPI
from swa_dist.protocols import Model
from swa_dist.replica_function import Communicating, ReplicaFunction
from swa_dist.training.patches import writing

# Parts of a count that float32 holds, and sums over 4,096 replicas, exactly. Not every accelerator
# can sum integers.
_PART = 2**12


class ForwardPass:
    """Recomputes the statistics of a model's trainable BN layers, as often as it is run.

    Batches of equal shapes are traced once.

    Args:
        model: A built model, with trainable BN layers.
        keras_api: Its Keras version.
        unwritten: Variables that the forward pass does not write, although a layer would: the
            kernel under `SpectralNormalization`, say.

    Attributes:
        unobserved: Names of layers that could not be observed in the last run.

    Distribution:
        Everything in cross-replica context, on every worker.
    """

    def __init__(
        self, model: Model, keras_api: KerasAPI, unwritten: Sequence[tf.Variable] = ()
    ) -> None:
        self._keras_api, self._strategy = keras_api, model.distribute_strategy
        self._layers = keras_api.trainable_batch_norm(model)
        self._statistics = BatchNormStatistics(self._layers, self._strategy)
        self._patches = [*keras_api.untraced(model), *writing(unwritten, _leave)]
        self._count = _SampleCount(self._strategy)
        self.unobserved: list[str] = []

        def forward(x: Any) -> None:
            model(x, training=True)
            self._count.add(x)

        # With autograph: tf_keras converts a model's `call` only if this is converted.
        @tf.function(reduce_retracing=True)
        def step(x: Any) -> None:
            self._strategy.run(forward, args=(x,))

        self._step = step

    @property
    def keras_layers(self) -> list[Any]:
        """The BN layers."""
        return [layer.keras_layer for layer in self._layers]

    def run(self, data: Any, batch_size: int | None, steps: int | None, verbose: int) -> int:
        """Run over data; return the number of samples. See `update_bn`.

        On an exception, or Ctrl-C, the statistics are restored bitwise.

        Raises:
            ValueError: See `distributed_inputs`; or the data has no samples.
            TypeError: The data is nothing that could be batched.
        """
        inputs, length = distributed_inputs(data, self._strategy, batch_size, steps)
        progress = self._keras_api.progress_bar(length, verbose)
        done = 0
        self._count.reset()
        self._statistics.begin()
        try:
            for done, x in enumerate(inputs, 1):
                with observe_forward_pass(self._statistics, self._layers, self._patches):
                    # Called directly, the fifth pass of a program would be taken for the fifth
                    # retracing, and warned of.
                    self._step.get_concrete_function(x)(x)
                progress.update(done)
            total = self._count.total
            if not total:
                raise ValueError(f"`data` must have samples. Received: {done} batches without any.")
            self._statistics.pool()
        except BaseException:
            self._statistics.restore()
            raise
        if done != length:  # the bar cannot tell that it is finished
            progress.update(done, finalize=True)
        self.unobserved = [layer.name for layer in self._statistics.unobserved]
        return total

    def reapply(self) -> None:
        """Assign the statistics of the last run once more."""
        self._statistics.pool()


def _leave(variable: tf.Variable, assign: Any) -> tf.Variable:
    return variable


class _SampleCount:
    """Samples, counted on each replica and summed over all when asked."""

    def __init__(self, strategy: tf.distribute.Strategy) -> None:
        self._strategy = strategy
        with strategy.scope():
            self._own = local_variable(tf.zeros([], tf.int64))
            self._total = local_variable(tf.zeros([], tf.int64))
        self._sum = ReplicaFunction(self._sum_replica, strategy)

    def reset(self) -> None:
        self._own.assign(0)

    def add(self, inputs: Any) -> None:
        self._own.assign_add(count_samples(inputs))

    @property
    def total(self) -> int:
        self._sum()
        return read_local(self._total, self._strategy)

    def _sum_replica(self) -> Communicating[None]:
        parts = [self._own // _PART, self._own % _PART]
        sums = yield [tf.cast(part, tf.float32) for part in parts]
        high, low = (tf.cast(part, tf.int64) for part in sums)
        self._total.assign(high * _PART + low)
