"""What importing the package does and does not do."""

import json
import os
import shutil
import subprocess
import sys

import swa_dist
import swa_dist.keras
import swa_dist.tfkeras
from tests.helpers.settings import HIDDEN_FROM_KERAS
from tests.helpers.sources import PACKAGE

PRELUDE = """
import json, sys

told = {}

def imported():
    return sorted({"tensorflow", "keras", "tf_keras"} & set(sys.modules))

def error(statement):
    try:
        exec(statement, {})
    except ImportError as error:
        return str(error)
    return "no ImportError"
"""


def ask(code, **environment):
    """What a fresh interpreter puts into `told`."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in {"TF_USE_LEGACY_KERAS", "KERAS_BACKEND"}
    }
    hide = f"sys.modules |= dict.fromkeys({HIDDEN_FROM_KERAS})"
    out = subprocess.run(
        [sys.executable, "-c", f"{PRELUDE}\n{hide}\n{code}\nprint(json.dumps(told))"],
        env={**inherited, "PYTHONPATH": str(PACKAGE.parent), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout.splitlines()[-1])


def test_without_the_variable_the_callback_is_keras_3s_and_nothing_is_configured():
    told = ask("""
import swa_dist
told["import swa_dist"] = imported()
from swa_dist import SWA
told["from swa_dist import SWA"] = imported()
import keras, swa_dist.keras
told["is"] = SWA is swa_dist.keras.SWA and issubclass(SWA, keras.callbacks.Callback)
told["import swa_dist.keras"] = imported()
names = {}
exec("from swa_dist import *", names)
told["from swa_dist import *"] = names["SWA"] is SWA
import swa_dist.tfkeras
import tensorflow as tf
from tensorflow.python.eager import context
told["devices are set up"] = context.context()._context_handle is not None
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 3)
told["devices"] = len(tf.config.list_logical_devices("CPU"))

del sys.modules["swa_dist.keras"]
keras.backend.backend = lambda: "jax"
told["backend"] = error("import swa_dist.keras")
""")
    remedy = told.pop("backend")
    assert told == {
        "import swa_dist": [],
        "from swa_dist import SWA": ["keras", "tensorflow"],
        "is": True,
        "import swa_dist.keras": ["keras", "tensorflow"],
        "from swa_dist import *": True,
        "devices are set up": False,
        "devices": 3,
    }
    assert "Received: 'jax'" in remedy
    assert "KERAS_BACKEND=tensorflow" in remedy


def test_with_the_variable_the_callback_is_tf_keras_and_keras_3_stays_out():
    told = ask(
        """
import swa_dist
told["import swa_dist"] = imported()
import swa_dist.tfkeras
told["import swa_dist.tfkeras"] = imported()
from swa_dist import SWA
told["from swa_dist import SWA"] = imported()
import tf_keras
told["is"] = SWA is swa_dist.tfkeras.SWA and issubclass(SWA, tf_keras.callbacks.Callback)
import swa_dist.keras, keras
told["explicitly"] = issubclass(swa_dist.keras.SWA, keras.callbacks.Callback)
""",
        TF_USE_LEGACY_KERAS="1",
    )
    assert told == {
        "import swa_dist": [],
        "import swa_dist.tfkeras": ["tensorflow", "tf_keras"],
        "from swa_dist import SWA": ["tensorflow", "tf_keras"],
        "is": True,
        "explicitly": True,
    }


def test_without_tensorflow_the_error_says_what_to_install():
    told = ask("""
sys.modules["tensorflow"] = None
import swa_dist
for statement in ("from swa_dist import SWA", "import swa_dist.keras", "import swa_dist.tfkeras"):
    told[statement] = error(statement)
told["imported"] = [name for name in imported() if sys.modules[name]]
""")
    assert told.pop("imported") == []
    for statement, message in told.items():
        assert "needs TensorFlow" in message, statement
        assert "`pip install swa-dist[tensorflow]`" in message, statement


def test_without_tf_keras_the_error_says_what_to_install():
    told = ask(
        """
sys.modules["tf_keras"] = None
import swa_dist
for statement in ("import swa_dist.tfkeras", "from swa_dist import SWA"):
    told[statement] = error(statement)
""",
        TF_USE_LEGACY_KERAS="1",
    )
    for statement, message in told.items():
        assert "needs tf_keras" in message, statement
        assert "`pip install swa-dist[legacy]`" in message, statement
        assert "`from swa_dist.keras import SWA`" in message, statement


def test_a_keras_that_does_not_serve_is_refused_with_what_to_do():
    told = ask(
        """
import swa_dist
told["backend"] = error("import swa_dist.keras")
told["backend of SWA"] = error("from swa_dist import SWA")
import swa_dist.tfkeras

import types
sys.modules["keras"] = types.ModuleType("keras")
sys.modules["keras"].__version__ = "2.15.0"
told["version"] = error("import swa_dist.keras")
""",
        KERAS_BACKEND="numpy",
    )
    version = told.pop("version")
    assert "Received: keras 2.15.0" in version
    assert "`from swa_dist.tfkeras import SWA`" in version
    for message in told.values():
        assert "numpy" in message
        assert "KERAS_BACKEND=tensorflow" in message


def test_a_folder_of_the_sources_is_enough(tmp_path):
    """As people have it in a kernel without the package index: on `sys.path`, and not installed."""
    shutil.copytree(PACKAGE, tmp_path / "swa_dist")
    told = ask(
        """
import importlib.metadata

def not_installed(name):
    raise importlib.metadata.PackageNotFoundError(name)

importlib.metadata.version = importlib.metadata.distribution = not_installed
sys.path.remove("")  # where this runs, the package is
import swa_dist
told.update(file=swa_dist.__file__, version=swa_dist.__version__)
""",
        PYTHONPATH=str(tmp_path),
    )
    assert told == {
        "file": str(tmp_path / "swa_dist/__init__.py"),
        "version": swa_dist.__version__,
    }


def test_graph_mode_is_refused_with_what_to_do():
    """As old kernels have it: tf_keras trains in it, SWA cannot."""
    told = ask(
        """
import numpy as np, tensorflow as tf, tf_keras
from swa_dist import WeightAverage, update_bn
from swa_dist.tfkeras import SWA

tf.compat.v1.disable_eager_execution()
layers = tf_keras.layers
model = tf_keras.Sequential([layers.Input((3,)), layers.BatchNormalization(), layers.Dense(1)])
model.compile("sgd", "mse")
x = np.ones((8, 3), "float32")
model.fit(x, x[:, :1], verbose=0)
for name, use in {
    "SWA": lambda: model.fit(x, x[:, :1], epochs=4, verbose=0, callbacks=[SWA(2)]),
    "WeightAverage": lambda: WeightAverage(model),
    "update_bn": lambda: update_bn(model, x),
}.items():
    try:
        use()
    except RuntimeError as error:
        told[name] = str(error)
""",
        TF_USE_LEGACY_KERAS="1",
        TF_CPP_MIN_LOG_LEVEL="2",
    )
    assert set(told) == {"SWA", "WeightAverage", "update_bn"}
    for message in told.values():
        assert "needs eager execution" in message
        assert "Remove `tf.compat.v1.disable_eager_execution()`" in message
