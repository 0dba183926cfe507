"""Stochastic weight averaging for TensorFlow, exact on every replica.

`SWA` is the callback for whatever `tf.keras` is: Keras 3, or tf_keras where
`TF_USE_LEGACY_KERAS=1`. `swa_dist.keras.SWA` and `swa_dist.tfkeras.SWA` say which. Nothing heavy is
imported before one of them is asked for.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swa_dist.bn_update import update_bn
    from swa_dist.data import infer_batch_size, peekable
    from swa_dist.keras import SWA
    from swa_dist.weight_average import WeightAverage

__all__ = [
    "SWA",
    "WeightAverage",
    "__version__",
    "infer_batch_size",
    "peekable",
    "update_bn",
]

__version__ = "0.1.0"

_HOMES = {
    "WeightAverage": "weight_average",
    "infer_batch_size": "data",
    "peekable": "data",
    "update_bn": "bn_update",
}


def __getattr__(name: str) -> Any:
    if name == "SWA":
        # TensorFlow's own rule for what `tf.keras` is; to ask `tf.keras` itself would import it.
        legacy = os.environ.get("TF_USE_LEGACY_KERAS") in ("1", "true", "True")
        return import_module(f"{__name__}.{'tfkeras' if legacy else 'keras'}").SWA
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import_module(f"{__name__}._tensorflow")  # it says what to do where there is none
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
