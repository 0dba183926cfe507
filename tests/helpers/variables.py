"""Variables on every replica, and averages of them, without a model."""

from types import SimpleNamespace

import tensorflow as tf

from swa_dist import WeightAverage

SHAPES = [(7, 5), (5,), (), (3, 2, 4)]


def stand_in(variables, strategy):
    """What an average asks of a model."""
    return SimpleNamespace(trainable_variables=variables, distribute_strategy=strategy)


def average_of(variables, strategy, ema_momentum=None):
    """The average of variables that are the weights of no model."""
    return WeightAverage(stand_in(variables, strategy), ema_momentum=ema_momentum)


def mirrored_variables(strategy, dtypes):
    """Variables of `SHAPES`, of one dtype each."""
    with strategy.scope():
        return [
            tf.Variable(tf.zeros(shape, dtype)) for shape, dtype in zip(SHAPES, dtypes, strict=True)
        ]


def copies(strategy, variables):
    """The values of variables: [replica][variable]."""
    local = [strategy.experimental_local_results(v) for v in variables]
    return [[v.numpy() for v in replica] for replica in zip(*local, strict=True)]


def graphs_of(function):
    """The graph of a function that has run, and those of its conditions' branches."""
    graph = function.graph.graph
    return [graph, *(f.graph for f in graph._functions.values() if hasattr(f, "graph"))]


def random_weights(strategy, variables, generator, mean=0):
    """Assign random values, and return them."""
    values = [generator.normal(size=v.shape) * 3 + mean for v in variables]
    for v, value in zip(variables, values, strict=True):
        v.assign(tf.cast(value, v.dtype))
    return copies(strategy, variables)[0]
