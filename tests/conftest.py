"""Virtual devices, before anything else uses TensorFlow, and which tests run."""

import os
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest


def pytest_configure(config: pytest.Config) -> None:
    for marker in (
        "exactness: what must be exact everywhere; the short run for older versions",
        "optimized_graphs: with TensorFlow's graph optimization, as users have it",
        "either_keras: of what is the same code under both, each test runs under one of them",
    ):
        config.addinivalue_line("markers", marker)
    if getattr(config.option, "numprocesses", 0):
        return  # tests run in processes of xdist, and importing TensorFlow takes long
    from tests.helpers import devices, fixtures

    devices.set_up()
    config.pluginmanager.register(fixtures)


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
        if hasattr(kit, "name") and item.get_closest_marker("either_keras"):
            alike.setdefault(item.nodeid.replace(kit.name, ""), []).append(item)
    chosen = {twins[zlib.crc32(name.encode()) % len(twins)] for name, twins in alike.items()}
    dropped = {item for twins in alike.values() for item in twins} - chosen
    config.hook.pytest_deselected(items=[*dropped])
    items[:] = [item for item in items if item not in dropped]
