"""What every replica runs: the same with a graph and without, and never half of it."""

import _thread
import signal
import time

import numpy as np
import pytest
import tensorflow as tf

from swa_dist import replica_function
from swa_dist.distribution import local_variable
from swa_dist.replica_function import EAGER_CALLS, ReplicaFunction
from tests.helpers.assertions import assert_bitwise
from tests.helpers.devices import NO_STRATEGY
from tests.helpers.processes import FOREVER
from tests.helpers.variables import average_of, copies, mirrored_variables

pytestmark = pytest.mark.optimized_graphs


def made_in(strategy, *values):
    with strategy.scope():
        return [local_variable(tf.constant(value)) for value in values]


def on_each(strategy, variable):
    return [v.numpy() for v in strategy.experimental_local_results(variable)]


def assert_all_bitwise(actual, expected):
    for ours, theirs in zip(actual, expected, strict=True):
        assert_bitwise(ours, theirs)


@pytest.mark.parametrize("calls", [1, EAGER_CALLS, EAGER_CALLS + 3])
def test_replicas_write_their_own_copies(strategy, calls):
    (total,) = made_in(strategy, 0)

    def add():
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        total.assign_add(1 + replica)

    function = ReplicaFunction(add, strategy)
    for _ in range(calls):
        function()
    n = strategy.num_replicas_in_sync
    assert on_each(strategy, total) == [calls * (1 + i) for i in range(n)]


@pytest.mark.parametrize("calls", [1, EAGER_CALLS + 1])
def test_what_replicas_yield_is_summed(strategy, calls):
    first, second = made_in(strategy, 0.0, [0.0, 0.0])

    def communicate():
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        own = tf.cast(1 + replica, tf.float32)
        total, totals = yield [own, tf.stack([own, -own])]
        nothing = yield []
        assert nothing == []
        (of_totals,) = yield [total]
        first.assign(of_totals)
        second.assign(totals)

    function = ReplicaFunction(communicate, strategy)
    for _ in range(calls):
        function()
    n = strategy.num_replicas_in_sync
    total = n * (n + 1) / 2
    assert on_each(strategy, first) == [n * total] * n
    np.testing.assert_array_equal(on_each(strategy, second), [[total, -total]] * n)


def test_a_graph_does_the_same_bit_by_bit(strategy, monkeypatch):
    variables = mirrored_variables(strategy, ["float32", "bfloat16", "float64", "complex64"])
    eager = average_of(variables, strategy)
    monkeypatch.setattr(replica_function, "EAGER_CALLS", 0)
    traced = average_of(variables, strategy)
    rng = np.random.default_rng(0)

    def both(method):
        monkeypatch.setattr(replica_function, "EAGER_CALLS", 10**9)
        getattr(eager, method)()
        after = copies(strategy, variables)
        if method == "swap":  # its weights are one average's at a time
            eager.swap()
        monkeypatch.setattr(replica_function, "EAGER_CALLS", 0)
        getattr(traced, method)()
        assert_all_bitwise(copies(strategy, variables), after)
        if method == "swap":
            traced.swap()
        assert_all_bitwise(copies(strategy, traced.buffers), copies(strategy, eager.buffers))

    for n in range(40):  # sums, then means
        for v in variables:
            v.assign(tf.cast(rng.normal(size=v.shape), v.dtype))
        both("update")
        if n == 20:
            both("swap")
    both("copy_to_model")
    assert "graph" in vars(traced._update)
    assert "graph" not in vars(eager._update)


@pytest.fixture
def interruptible():
    """Ctrl-C raises, also in a process that was started to ignore it, as in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("replicas", [0, 2])
@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_comes_through_when_all_replicas_have_finished(replicas, request):
    strategy = request.getfixturevalue("two_replicas") if replicas else NO_STRATEGY
    first, last = made_in(strategy, 0, 0)
    interrupts = [_thread.interrupt_main]

    def write():
        first.assign(1)
        while interrupts:
            interrupts.pop()()
        last.assign(1)

    def call():
        ReplicaFunction(write, strategy)()
        time.sleep(FOREVER)  # the interpreter may raise it a little after the call

    with pytest.raises(KeyboardInterrupt):
        call()
    for variable in (first, last):
        assert set(on_each(strategy, variable)) == {1}


def test_an_error_is_raised(two_replicas):
    def fail():
        raise ValueError("of a replica")

    with pytest.raises(ValueError, match="of a replica"):
        ReplicaFunction(fail, two_replicas)()


def test_a_scope_that_is_open_does_not_matter(two_replicas):
    (total,) = made_in(two_replicas, 0)

    def add():
        total.assign_add(1)

    with two_replicas.scope():
        ReplicaFunction(add, two_replicas)()
    assert on_each(two_replicas, total) == [1, 1]


def test_within_a_graph_it_is_a_part_of_it(two_replicas):
    (total,) = made_in(two_replicas, 0)

    def add():
        total.assign_add(1)

    function = ReplicaFunction(add, two_replicas)
    outer = tf.function(lambda: function())
    for _ in range(3):
        outer()
    assert on_each(two_replicas, total) == [3, 3]
