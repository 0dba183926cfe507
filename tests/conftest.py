"""Virtual devices, before anything else uses TensorFlow; and the fixtures of all rooms."""

import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

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
        "either_keras: of what is the same code under both, each test runs under one of them",
    ):
        config.addinivalue_line("markers", marker)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of tests that are marked `either_keras`, leave one of two, if the whole suite is run.

    In CI, and where some tests are chosen, none is left out.
    """
    chosen_ones = config.option.keyword or config.option.markexpr
    whole = [Path(argument).name for argument in config.args] == ["tests"]
    if os.environ.get("CI") or chosen_ones or not whole:
        return
    alike: dict[str, list[pytest.Item]] = {}
    for item in items:
        kit = getattr(item, "callspec", SimpleNamespace(params={})).params.get("kit")
        if isinstance(kit, Kit) and item.get_closest_marker("either_keras"):
            alike.setdefault(item.nodeid.replace(kit.name, ""), []).append(item)
    chosen = {twins[zlib.crc32(name.encode()) % len(twins)] for name, twins in alike.items()}
    dropped = {item for twins in alike.values() for item in twins} - chosen
    config.hook.pytest_deselected(items=[*dropped])
    items[:] = [item for item in items if item not in dropped]


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
