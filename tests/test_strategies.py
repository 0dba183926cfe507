"""Every strategy is served, or refused before the first batch.

The other tests run without one, and under MirroredStrategy that reduces to its first device.
"""

import pytest
import tensorflow as tf

from tests.devices import devices
from tests.fits import assert_exact, build, fit
from tests.tolerances import assert_bitwise

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
