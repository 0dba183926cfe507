"""Marks that several modules use."""

import pytest

from tests.helpers.kit import KITS

tf_keras_only = pytest.mark.parametrize("kit", KITS[1:], indirect=True, ids=lambda kit: kit.name)
with_renorm = pytest.mark.parametrize(
    "kit", [kit for kit in KITS if kit.has_renorm], indirect=True, ids=lambda kit: kit.name
)
ran_out = pytest.mark.filterwarnings("ignore:Your input ran out of data")  # Keras 3's own
