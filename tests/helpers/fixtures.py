"""The fixtures of all rooms."""

from collections.abc import Iterator

import pytest
import tensorflow as tf

from tests.helpers import settings
from tests.helpers.devices import mirrored
from tests.helpers.kit import KITS, Kit


@pytest.fixture(autouse=True)
def graph_optimization(request: pytest.FixtureRequest) -> Iterator[None]:
    """Graphs as users have them, where sums are compared with oracles."""
    if not request.node.get_closest_marker("optimized_graphs"):
        yield
        return
    with settings.optimized_graphs():
        yield


@pytest.fixture(params=KITS, ids=lambda kit: kit.name)
def kit(request: pytest.FixtureRequest) -> Kit:
    """Keras 3, then tf_keras."""
    kit: Kit = request.param
    kit.clear_session()
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
