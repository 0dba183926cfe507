"""What importing the package does and does not do, what is public, and which module knows which."""

import ast
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import swa_dist
import swa_dist.keras
import swa_dist.tfkeras
from tests.kits import KITS

PACKAGE = Path(swa_dist.__file__).parent

# A module imports from lower floors only.
FLOORS = [
    ["plan", "schedules"],
    ["_tensorflow", "backup", "bn_layer", "moments", "optimizers", "replicas", "train_function"],
    ["batch_size", "bn_average", "bn_observers", "flavour", "weight_average"],
    ["bn_statistics", "data", "model_average"],
    ["bn_pass", "saved_run"],
    ["bn_update", "run"],
    ["callback"],
    ["keras", "tfkeras"],
    ["__init__"],
]
FLOOR = {module: floor for floor, modules in enumerate(FLOORS) for module in modules}
NEIGHBOURS = {("plan", "schedules")}  # a plan is made of schedules
FRAMEWORKS = {"plan": set(), "schedules": set(), "__init__": set()} | {
    "weight_average": {"numpy", "tensorflow"},
    "keras": {"keras"},
    "tfkeras": {"tf_keras"},
}

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
    out = subprocess.run(
        [sys.executable, "-c", f"{PRELUDE}\n{code}\nprint(json.dumps(told))"],
        env={**inherited, "PYTHONPATH": str(PACKAGE.parent), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout.splitlines()[-1])


def trees():
    return {path.stem: ast.parse(path.read_text("utf-8")) for path in PACKAGE.glob("*.py")}


def imports(tree):
    """Dotted names of all that a module imports, wherever in it, what it imports from included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = ".".join(filter(None, ["swa_dist" if node.level else "", node.module]))
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def test_public_names():
    assert swa_dist.__all__ == [
        "SWA", "WeightAverage", "__version__", "infer_batch_size", "peekable", "update_bn"
    ]  # fmt: skip
    assert swa_dist.keras.__all__ == ["SWA"]
    assert swa_dist.tfkeras.__all__ == ["SWA"]
    for module in (swa_dist, swa_dist.keras, swa_dist.tfkeras):
        for name in module.__all__:
            assert getattr(module, name)
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", swa_dist.__version__)
    with pytest.raises(AttributeError, match="no attribute 'SWAG'"):
        _ = swa_dist.SWAG


@pytest.mark.parametrize("kit", KITS, ids=lambda kit: kit.name)
def test_the_callback_is_one_of_its_keras_with_the_seeds_signature(kit):
    assert issubclass(kit.SWA, kit.keras.callbacks.Callback)
    parameters = inspect.signature(kit.SWA).parameters.values()
    assert [(p.name, p.default) for p in parameters if p.kind is not p.KEYWORD_ONLY] == [
        ("start_epoch", inspect.Parameter.empty),
        ("lr_schedule", "manual"),
        ("swa_lr", "auto"),
        ("swa_lr2", "auto"),
        ("swa_freq", 1),
        ("batch_size", None),
        ("verbose", 0),
    ]
    assert [(p.name, p.default) for p in parameters if p.kind is p.KEYWORD_ONLY] == [
        ("backup_dir", None),
        ("validate_average", False),
        ("bn_steps", None),
    ]


@pytest.mark.parametrize("kit", KITS, ids=lambda kit: kit.name)
def test_every_argument_and_attribute_of_the_callback_is_described(kit):
    doc = inspect.getdoc(kit.SWA)
    described = re.search(r"^Args:\n(.*?)^Attributes:\n(.*?)^\S", doc, re.DOTALL | re.MULTILINE)
    entries = [re.findall(r"^    (\w+): \S", part, re.MULTILINE) for part in described.groups()]
    assert entries == [
        list(inspect.signature(kit.SWA).parameters),
        ["n_averaged", "inferred_batch_size"],
    ]
    for section in ("Raises:", "Distribution:", "Example:", "Reference:"):
        assert f"\n{section}\n" in doc


def test_every_public_class_and_function_has_a_docstring():
    public = {}
    for module, tree in trees().items():
        public[module] = tree
        for node in tree.body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name[0] != "_":
                public[f"{module}.{node.name}"] = node
    assert {"plan.Plan", "schedules.cyclic", "callback.SWACallback", "keras.SWA"} <= set(public)
    without = {name for name, node in public.items() if not ast.get_docstring(node)}
    # Those two are given the docstring of the class that they bind.
    assert without == {"keras.SWA", "tfkeras.SWA"}
    for kit in KITS:
        assert "start_epoch: " in kit.SWA.__doc__


def test_every_module_has_its_floor():
    assert sorted(trees()) == sorted(FLOOR)


@pytest.mark.parametrize("module", sorted(FLOOR))
def test_imports_run_one_way(module):
    wrong = []
    for name in imports(trees()[module]):
        root, _, rest = name.partition(".")
        if root != "swa_dist":
            continue
        # `from swa_dist import SWA` is an import of the top floor.
        imported = rest.partition(".")[0] if rest.partition(".")[0] in FLOOR else "__init__"
        if FLOOR[imported] >= FLOOR[module] and (module, imported) not in NEIGHBOURS:
            wrong.append(name)
    assert wrong == []


@pytest.mark.parametrize("module", sorted(FLOOR))
def test_a_module_knows_no_framework_above_its_floor(module):
    roots = {name.partition(".")[0] for name in imports(trees()[module])}
    foreign = roots - set(sys.stdlib_module_names) - {"swa_dist"}
    assert foreign <= FRAMEWORKS.get(module, {"tensorflow"})


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


def test_the_version_is_that_of_the_distribution():
    assert swa_dist.__version__ == metadata.version("swa-dist")


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
