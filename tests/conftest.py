"""Virtual devices, before anything else uses TensorFlow; and the fixtures of all rooms."""

from collections.abc import Iterator

import pytest
import tensorflow as tf

from tests.helpers import devices, settings
from tests.helpers.devices import mirrored
from tests.helpers.kit import KITS, Kit

devices.set_up()


def pytest_configure(config: pytest.Config) -> None:
    for marker in (
        "exactness: what must be exact everywhere; the short run for older versions",
        "optimized_graphs: with TensorFlow's graph optimization, as users have it",
    ):
        config.addinivalue_line("markers", marker)


@pytest.fixture(autouse=True)
def graph_optimization(request: pytest.FixtureRequest) -> Iterator[None]:
    """Graphs as users have them, where exactness is tested."""
    markers = ("exactness", "optimized_graphs")
    if not any(request.node.get_closest_marker(name) for name in markers):
        yield
        return
    with settings.optimized_graphs():
        yield


@pytest.fixture(params=KITS, ids=lambda kit: kit.name)
def kit(request: pytest.FixtureRequest) -> Kit:
    """Keras 3, then tf_keras."""
    kit: Kit = request.param
    kit.keras.backend.clear_session()
    settings.collect_garbage()
    kit.keras.utils.set_random_seed(7)
    return kit


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
