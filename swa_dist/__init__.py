"""Stochastic weight averaging for TensorFlow, exact on every replica.

`SWA` is the callback for what `tf.keras` is: Keras 3, or tf_keras if `TF_USE_LEGACY_KERAS=1`.
`swa_dist.keras.SWA` and `swa_dist.tfkeras.SWA` are those of one version. TensorFlow is imported
when a name that needs it is first used.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swa_dist.averaging.weight_average import WeightAverage
    from swa_dist.batch_norm.update_bn import update_bn
    from swa_dist.data.infer_batch_size import infer_batch_size, peekable
    from swa_dist.keras import SWA
    from swa_dist.plan.messages import SWAWarning
    from swa_dist.plan.plan import Plan

__all__ = [
    "SWA",
    "Plan",
    "SWAWarning",
    "WeightAverage",
    "__version__",
    "infer_batch_size",
    "peekable",
    "update_bn",
]

__version__ = "0.1.0"

_MODULES = {
    "Plan": "plan.plan",
    "SWAWarning": "plan.messages",
    "WeightAverage": "averaging.weight_average",
    "infer_batch_size": "data.infer_batch_size",
    "peekable": "data.infer_batch_size",
    "update_bn": "batch_norm.update_bn",
}


def __getattr__(name: str) -> Any:
    if name == "SWA":
        # The rule by which TensorFlow decides what `tf.keras` is. Asking it would import Keras.
        legacy = os.environ.get("TF_USE_LEGACY_KERAS") in ("1", "true", "True")
        return import_module(f"{__name__}.{'tfkeras' if legacy else 'keras'}").SWA
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _MODULES[name]
    if not module.startswith("plan."):
        import_module(f"{__name__}._tensorflow")  # for its message if there is none
    return getattr(import_module(f"{__name__}.{module}"), name)


def __dir__() -> list[str]:
    return __all__
