"""SWA for tf_keras, the legacy Keras 2: `from swa_dist.tfkeras import SWA`."""

from swa_dist import _tensorflow  # noqa: F401  (first, for its message)

try:
    import tf_keras
except ImportError as error:
    raise ImportError(
        "swa_dist.tfkeras needs tf_keras. Install it with `pip install swa-dist[legacy]`, or use "
        "`from swa_dist.keras import SWA` with Keras 3."
    ) from error

from swa_dist.callback import SWACallback
from swa_dist.keras_api import KerasAPI

__all__ = ["SWA"]


class SWA(SWACallback, tf_keras.callbacks.Callback):  # noqa: D101  (it is the shared one)
    __doc__ = SWACallback.__doc__
    keras_api = KerasAPI(tf_keras)
