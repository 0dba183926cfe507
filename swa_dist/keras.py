"""SWA for Keras 3 on the TensorFlow backend: `from swa_dist.keras import SWA`."""

import os

from swa_dist import _tensorflow  # noqa: F401  (first, for its message)

try:
    import keras
except ImportError as error:
    raise ImportError(
        "swa_dist.keras needs Keras 3 on its TensorFlow backend, but `import keras` fails: "
        f"{error}. Received: KERAS_BACKEND={os.environ.get('KERAS_BACKEND')}. Install Keras 3, and "
        "set KERAS_BACKEND=tensorflow before it is imported."
    ) from error

from swa_dist.callback import SWACallback
from swa_dist.keras_api import KerasAPI

if not keras.__version__.startswith("3."):
    raise ImportError(
        f"swa_dist.keras needs Keras 3. Received: keras {keras.__version__}. Install Keras 3, or "
        "use `from swa_dist.tfkeras import SWA` with tf_keras."
    )
if keras.backend.backend() != "tensorflow":
    raise ImportError(
        "swa_dist.keras needs the TensorFlow backend of Keras 3. Received: "
        f"{keras.backend.backend()!r}. Set the environment variable KERAS_BACKEND=tensorflow "
        "before Keras is imported."
    )

__all__ = ["SWA"]


class SWA(SWACallback, keras.callbacks.Callback):  # noqa: D101  (it is the shared one)
    __doc__ = SWACallback.__doc__
    keras_api = KerasAPI(keras)
