"""BN layers of one dtype together: their channels, and their statistics, as one vector each."""

from collections.abc import Iterable, Sequence

import tensorflow as tf

from swa_dist.averaging.packing import pack, unpack
from swa_dist.batch_norm.layer import BatchNormLayer
from swa_dist.distribution import LocalCopy


class LayerGroup:
    """BN layers whose statistics are accumulated in one dtype.

    Apart from reads and writes of variables, all work on them is on vectors: a graph costs about
    1 ms for each operation on each replica, to trace.

    Args:
        layers: The layers.
        dtype: The dtype.

    Attributes:
        layers: The layers.
        dtype: The dtype.
        channels: How many channels each has.

    Distribution:
        What reads or writes statistics is for replica context.
    """

    def __init__(self, layers: Sequence[BatchNormLayer], dtype: tf.DType) -> None:
        self.layers = layers
        self.dtype = dtype
        self.channels = [layer.channels for layer in layers]
        self._variables = [v for layer in layers for v in layer.variables]
        self._sizes = [layer.channels * len(layer.variables) for layer in layers]

    @classmethod
    def of(cls, layers: Sequence[BatchNormLayer]) -> "list[LayerGroup]":
        """Divide layers into groups."""
        dtypes = dict.fromkeys(layer.dtype for layer in layers)
        return [cls([layer for layer in layers if layer.dtype == d], d) for d in dtypes]

    @property
    def n_statistics(self) -> int:
        """How many numbers the layers' moving statistics are."""
        return sum(self._sizes)

    def read_statistics(self) -> tf.Tensor:
        """Return all moving statistics of all layers, as one vector."""
        return self._read(self._variables)

    def write_statistics(self, statistics: tf.Tensor) -> None:
        """Assign what `read_statistics` has returned, or what is like it."""
        values = unpack(statistics, [v.shape for v in self._variables])
        for variable, value in zip(self._variables, values, strict=True):
            LocalCopy(variable).assign(tf.cast(value, variable.dtype))

    def read_mean_and_variance(self) -> tf.Tensor:
        """Return the moving means, and the moving variances, of all channels: shape (2, n)."""
        means = self._read([layer.mean for layer in self.layers])
        return tf.stack([means, self._read([layer.variance for layer in self.layers])])

    def statistics_of(self, mean: tf.Tensor, variance: tf.Tensor) -> tf.Tensor:
        """Return the moving statistics that go with a mean and a variance of each channel."""
        means, variances = (tf.split(values, self.channels) for values in (mean, variance))
        moments = zip(self.layers, means, variances, strict=True)
        return pack([value for layer, m, v in moments for value in layer.values(m, v)])

    def of_each_channel(self, of_layers: tf.Tensor) -> tf.Tensor:
        """Return what a vector has for each layer, for each channel."""
        return tf.gather(of_layers, _repeated(self.channels))

    def of_each_statistic(self, of_layers: tf.Tensor) -> tf.Tensor:
        """Return what a vector has for each layer, for each of its moving statistics."""
        return tf.gather(of_layers, _repeated(self._sizes))

    def any_channel(self, flags: tf.Tensor) -> tf.Tensor:
        """Return for each layer whether any of its channels has a flag."""
        return _any_of_each(flags, self.channels)

    def any_statistic(self, flags: tf.Tensor) -> tf.Tensor:
        """Return for each layer whether any of its moving statistics has a flag."""
        return _any_of_each(flags, self._sizes)

    def _read(self, variables: Iterable[tf.Variable]) -> tf.Tensor:
        return pack([tf.cast(LocalCopy(v).read(), self.dtype) for v in variables])


def _repeated(times: Sequence[int]) -> list[int]:
    """Return 0, 1, 2 and so on, each so many times."""
    return [i for i, n in enumerate(times) for _ in range(n)]


def _any_of_each(flags: tf.Tensor, sizes: Sequence[int]) -> tf.Tensor:
    numbers = tf.cast(flags, tf.int32)
    return tf.math.unsorted_segment_max(numbers, _repeated(sizes), len(sizes)) > 0
