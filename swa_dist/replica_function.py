"""Functions that run on every replica, and sums over all of them."""

import contextlib
import functools
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, wait
from typing import Any, TypeVar

import tensorflow as tf

# What a replica computes; it yields values and is sent their sums over all replicas.
T = TypeVar("T")
Communicating = Generator[list[tf.Tensor], list[tf.Tensor], T]

# To trace and optimize a graph takes as long as some fifty calls without one, and `fit` makes few.
EAGER_CALLS = 8
_IN_ONE_PROCESS = (tf.distribute.MirroredStrategy, tf.distribute.OneDeviceStrategy)


class ReplicaFunction:
    """A function without arguments that runs on every replica.

    The first calls run operation by operation, later ones as a graph; under strategies for which
    replicas can run in graphs only, and within a `tf.function`, all do. Ctrl-C does not interrupt a
    call: it comes through when all replicas have finished.

    Args:
        function: What each replica runs. Where it communicates it is a generator: it yields a list
            of tensors, and is sent the list of their sums over all replicas. Every replica must
            yield as many, of the same shapes.
        strategy: The `tf.distribute.Strategy` of the replicas.

    Distribution:
        In cross-replica context, on every worker.
    """

    def __init__(
        self, function: Callable[[], Communicating[None] | None], strategy: tf.distribute.Strategy
    ) -> None:
        self._function = function
        self._strategy = strategy
        self._calls = 0

    def __call__(self) -> None:
        """Run the function on every replica."""
        self._calls += 1
        if self._calls > EAGER_CALLS or not _can_run_eagerly(self._strategy):
            self.graph()
        else:
            _run_to_the_end(self._run_eagerly)

    @functools.cached_property
    def graph(self) -> Callable[[], None]:
        """The function as a graph, traced when it is first asked for."""
        # A `tf.function` alone would take the fifth instance of a class for the fifth retracing,
        # and warn of it: in five-fold cross-validation, say.
        graph: Callable[[], None] = tf.function(
            lambda: self._strategy.run(self._run_in_graph), autograph=False
        ).get_concrete_function()
        return graph

    def _run_in_graph(self) -> None:
        replica = self._start()
        with contextlib.suppress(StopIteration):
            values = next(replica)
            while True:
                values = replica.send(_sum_in_graph(values))

    def _run_eagerly(self) -> None:
        replicas = [(context, self._start()) for context in _replica_contexts(self._strategy)]
        sums: Any = None  # which starts a generator
        while True:
            values = []
            for context, replica in replicas:
                with context(), contextlib.suppress(StopIteration):
                    values.append(replica.send(sums))
            if not values:
                return
            sums = [tf.add_n(terms) for terms in zip(*values, strict=True)]

    def _start(self) -> Communicating[None]:
        replica = self._function()
        if replica is not None:
            yield from replica


def mean_over_replicas(
    values: Sequence[tuple[tf.Tensor, tf.Tensor]], fractions: Sequence[tf.Tensor]
) -> Communicating[tuple[list[tf.Tensor], list[tf.Tensor]]]:
    """Return each value's mean over all replicas, and this replica's deviation from it.

    Means are taken relative to one rounded mean, c, so that small differences keep their digits.

    Args:
        values: Each an unevaluated sum high + low.
        fractions: This replica's weight in each mean. Over all replicas they add up to 1.
    """
    centers = yield [fraction * high for fraction, (high, _) in zip(fractions, values, strict=True)]
    offsets = [(high - c) + low for (high, low), c in zip(values, centers, strict=True)]
    means = yield [fraction * offset for fraction, offset in zip(fractions, offsets, strict=True)]
    return (
        [c + mean for c, mean in zip(centers, means, strict=True)],
        [offset - mean for offset, mean in zip(offsets, means, strict=True)],
    )


def _run_to_the_end(function: Callable[[], None]) -> None:
    """Call a function, which a signal such as Ctrl-C cannot end midway: it comes through later."""
    # Signals interrupt the main thread only.
    outcome: Future[None] = Future()

    def run() -> None:
        if not outcome.set_running_or_notify_cancel():
            return
        try:
            function()
        except BaseException as error:
            outcome.set_exception(error)
        else:
            outcome.set_result(None)

    try:
        threading.Thread(target=run).start()
        outcome.result()
    except BaseException:
        if not outcome.cancel():  # it runs, or has run
            wait([outcome])
        raise


def _can_run_eagerly(strategy: tf.distribute.Strategy) -> bool:
    """Return whether replicas can run here one after the other, without a graph."""
    if not tf.executing_eagerly():
        return False
    return isinstance(strategy, _IN_ONE_PROCESS) or not _has_replicas(strategy)


def _has_replicas(strategy: tf.distribute.Strategy) -> bool:
    """Return whether it is a strategy at all, and not what there is without one."""
    with tf.init_scope(), strategy.scope():
        return tf.distribute.has_strategy()


def _replica_contexts(strategy: tf.distribute.Strategy) -> Iterator[Callable[[], Any]]:
    """Yield for each replica what makes the context in which it runs."""
    if not _has_replicas(strategy):
        yield contextlib.nullcontext
        return
    for i, device in enumerate(strategy.extended.worker_devices):

        @contextlib.contextmanager
        def context(i: int = i, device: str = device) -> Iterator[None]:
            with tf.device(device), tf.distribute.ReplicaContext(strategy, i):
                yield

        yield context


def _sum_in_graph(values: list[tf.Tensor]) -> list[tf.Tensor]:
    if not values:
        return []
    # Not `ReplicaContext.all_reduce`: for its gradient it keeps every graph it is in alive.
    return tf.distribute.get_replica_context().merge_call(_reduce, args=values)


def _reduce(strategy: tf.distribute.Strategy, *values: Any) -> list[Any]:
    pairs = [(value, value) for value in values]
    return strategy.extended.batch_reduce_to(tf.distribute.ReduceOp.SUM, pairs)
