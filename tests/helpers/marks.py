"""Marks that several modules use."""

import pytest

from tests.helpers.kit import KITS, Kit


def _under(*kits: Kit) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("kit", kits, indirect=True, ids=lambda kit: kit.name)


def _but_for(name: str, version: str) -> pytest.MarkDecorator:
    """Not under a version of which the guide says that it fails with and without SWA."""
    at_fault = name, version
    return _under(*(kit for kit in KITS if (kit.name, kit.keras.__version__[:4]) != at_fault))


tf_keras_only = _under(KITS[1])
with_renorm = _under(*(kit for kit in KITS if kit.has_renorm))
takes_missing_inputs = _but_for("keras3", "3.10")
resumes_after_the_end_with_use_ema = _but_for("tf_keras", "2.16")
ran_out = pytest.mark.filterwarnings("ignore:Your input ran out of data")  # Keras 3's own
