"""Virtual devices, before anything else uses TensorFlow; and the two Kerases as fixtures."""

import gc
from collections.abc import Iterator

import pytest
import tensorflow as tf

from tests import devices
from tests.devices import mirrored
from tests.kits import KITS, Kit

# Keras keeps a graph of each model alive. To look through them all again and again for garbage
# would take as long as the tests: the fixture `kit` does it, and only through what is new.
gc.disable()

devices.set_up()


@pytest.fixture(params=KITS, ids=lambda kit: kit.name)
def kit(request: pytest.FixtureRequest) -> Kit:
    """One Keras after the other."""
    kit: Kit = request.param
    kit.keras.backend.clear_session()
    gc.collect()
    gc.freeze()
    kit.keras.utils.set_random_seed(7)
    return kit


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "exactness: what must be exact everywhere; the short run for older versions"
    )


tf_keras_only = pytest.mark.parametrize("kit", KITS[1:], indirect=True, ids=lambda kit: kit.name)
with_renorm = pytest.mark.parametrize(
    "kit", [kit for kit in KITS if kit.has_renorm], indirect=True, ids=lambda kit: kit.name
)


@pytest.fixture(scope="module")
def unoptimized_graphs() -> Iterator[None]:
    """TensorFlow's graph optimization off: a sixth of the time, for graphs that run a few times.

    For tests of what happens when. Those of sums and statistics have graphs as users have them.
    """
    options = tf.config.optimizer.set_experimental_options
    options({"disable_meta_optimizer": True})
    yield
    options({"disable_meta_optimizer": False})


@pytest.fixture(params=[1, 2, 4], ids=lambda n: f"{n}replicas")
def strategy(request: pytest.FixtureRequest) -> tf.distribute.Strategy:
    """MirroredStrategy over 1, 2 and 4 virtual devices."""
    return mirrored(request.param)


@pytest.fixture
def two_replicas() -> tf.distribute.Strategy:
    return mirrored(2)


@pytest.fixture
def four_replicas() -> tf.distribute.Strategy:
    return mirrored(4)
