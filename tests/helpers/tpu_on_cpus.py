"""The real TPUStrategy and its variable classes, on CPUs: what can be tested of TPUs without one.

The devices are logical CPUs, and `tpu.replicate`, which would compile the replicas' program for
TPU cores, is a stand-in that traces it once for each replica, on that replica's CPU. A sum over
replicas waits until every replica has come to it. All else is TensorFlow's own.
"""

import threading

import tensorflow as tf
from tensorflow.python.distribute import tpu_strategy
from tensorflow.python.tpu.tpu_system_metadata import TPUSystemMetadata


class _Resolver(tf.distribute.cluster_resolver.ClusterResolver):
    def __init__(self, n):
        self._n = n

    def get_tpu_system_metadata(self):
        devices = [
            tf.config.LogicalDevice(f"/job:localhost/replica:0/task:0/device:TPU:{i}", "TPU")
            for i in range(self._n)
        ]
        return TPUSystemMetadata(
            num_cores=self._n,
            num_hosts=1,
            num_of_cores_per_host=self._n,
            topology=None,
            devices=devices,
        )

    def master(self, *args, **kwargs):
        return ""

    def cluster_spec(self):
        return tf.train.ClusterSpec({})

    def num_accelerators(self, *args, **kwargs):
        return {"TPU": self._n}


def tpu_on_cpus(n, monkeypatch):
    """A TPUStrategy of n replicas on CPU:0 to CPU:n-1."""
    strategy = tf.distribute.TPUStrategy(_Resolver(n))
    cpus = [f"/job:localhost/replica:0/task:0/device:CPU:{i}" for i in range(n)]
    extended = strategy.extended
    extended._tpu_devices[:, 0] = cpus
    extended._host_device = cpus[0]
    extended._device_input_worker_devices = {cpus[0]: cpus}
    extended._host_input_worker_devices = {cpus[0]: [cpus[0]] * n}

    replicas = _Replicas(cpus)
    monkeypatch.setattr(tpu_strategy.tpu, "replicate", replicas.replicate)
    monkeypatch.setattr(extended, "_reduce_to", replicas.reduced(extended._reduce_to))

    # Older Keras 3 hands it a `tf.function`, which only one thread at a time can trace.
    def run(fn, *args, run=strategy.run, **kwargs):
        return run(getattr(fn, "python_function", fn), *args, **kwargs)

    monkeypatch.setattr(strategy, "run", run)
    return strategy


class _Replicas:
    """The threads that trace a program once for each replica, one at a time."""

    def __init__(self, devices):
        self._devices = devices
        self._replica = threading.local()

    def replicate(self, computation, inputs, **_):
        n = len(inputs)
        self._turn = threading.Condition()
        self._next, self._left = 0, set(range(n))
        self._sums = [[] for _ in range(n)]
        outputs, errors = [None] * n, []
        graph = tf.compat.v1.get_default_graph()
        strategy = tf.distribute.get_strategy()

        def trace(i):
            self._replica.id = i
            self._wait(i)
            try:
                with graph.as_default(), strategy.scope(), tf.device(self._devices[i]):
                    outputs[i] = computation(*inputs[i])
            except BaseException as error:
                errors.append(error)
            finally:
                self._left.discard(i)
                self._pass_on(i)

        threads = [threading.Thread(target=trace, args=(i,)) for i in range(n)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return [[o for o in tf.nest.flatten(out) if o is not None] for out in outputs]

    def reduced(self, original):
        def reduce_to(op, value, destinations, *args, **kwargs):
            i = getattr(self._replica, "id", None)
            if i is None or not tf.is_tensor(value):
                return original(op, value, destinations, *args, **kwargs)
            assert op == tf.distribute.ReduceOp.SUM
            self._sums[i].append(value)
            place = len(self._sums[i]) - 1
            self._pass_on(i)
            self._wait(i)
            return tf.add_n([sums[place] for sums in self._sums])

        return reduce_to

    def _wait(self, i):
        with self._turn:
            self._turn.wait_for(lambda: self._next == i)

    def _pass_on(self, i):
        with self._turn:
            after = [j for j in self._left if j > i] or sorted(self._left)
            self._next = min(after, default=None)
            self._turn.notify_all()
