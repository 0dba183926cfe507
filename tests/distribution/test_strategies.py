"""Every strategy is served, or refused before the first batch."""

import pytest
import tensorflow as tf

from tests.helpers.assertions import assert_bitwise, assert_exact
from tests.helpers.devices import devices
from tests.helpers.fits import fit
from tests.helpers.forks import Fork
from tests.helpers.models import build

pytestmark = [pytest.mark.optimized_graphs, pytest.mark.either_keras]


DEVICES = devices(4)


@pytest.mark.parametrize(
    "make",
    [
        lambda: tf.distribute.OneDeviceStrategy(DEVICES[1]),
        lambda: tf.distribute.MirroredStrategy(
            DEVICES[:2],
            cross_device_ops=tf.distribute.ReductionToOneDevice(reduce_to_device=DEVICES[3]),
        ),
        lambda: tf.distribute.MirroredStrategy(
            DEVICES[:2], cross_device_ops=tf.distribute.HierarchicalCopyAllReduce()
        ),
    ],
    ids=["one device", "to another", "copies"],
)
def test_served(kit, make):
    strategy = make()
    model = build(kit, strategy)
    recorder, *_ = fit(kit, model, epochs=4)
    assert_exact(kit, model, recorder, [2, 3])


def test_central_storage_is_refused(kit):
    strategy = tf.distribute.experimental.CentralStorageStrategy(DEVICES[:2], DEVICES[0])
    model = build(kit, strategy, norm=False)
    before = model.get_weights()
    with pytest.raises(ValueError, match=r"its own copy of the weights.*CentralStorage"):
        fit(kit, model, epochs=5)
    assert_bitwise(model.get_weights(), before)


PARAMETER_SERVER = """
import os
import tensorflow as tf
from tests.helpers.kit import KITS
from tests.helpers.processes import kept_ports

with kept_ports(2) as (worker, ps):
    cluster = {"worker": [worker], "ps": [ps]}
    servers = [
        tf.distribute.Server(cluster, job_name=job, task_index=0, protocol="grpc", start=True)
        for job in cluster
    ]
resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
    tf.train.ClusterSpec(cluster), rpc_layer="grpc"
)
strategy = tf.distribute.ParameterServerStrategy(resolver)
for kit in KITS:
    with strategy.scope():
        model = kit.keras.Sequential([kit.keras.layers.Input((3,)), kit.keras.layers.Dense(1)])
        model.compile("sgd", "mse")
    swa = kit.SWA(2)
    swa.set_model(model)
    swa.set_params({"epochs": 3, "steps": 1, "verbose": 0})
    try:
        swa.on_train_begin()
    except ValueError as error:
        assert "replicas step together" in str(error), error
        assert "ParameterServerStrategyV2" in str(error), error
        print(kit.name, flush=True)
os._exit(0)
"""


def test_a_parameter_server_strategy_is_refused():
    result = Fork(PARAMETER_SERVER).result()
    assert result.stdout.split() == ["keras3", "tf_keras"], result.stderr[-4000:]
