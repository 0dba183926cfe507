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

PURE_PYTHON = {"plan/schedules", "plan/messages", "plan/options", "plan/progress", "plan/plan"}
FRAMEWORKS = {module: set() for module in PURE_PYTHON | {"__init__"}} | {
    "averaging/weight_average": {"numpy", "tensorflow"},
    "keras": {"keras"},
    "tfkeras": {"tf_keras"},
}
MOST_LINES = 300


def layers():
    """The layer of each module, as the package's README tells it."""
    rows = re.findall(r"^\| (\d+) \| (.*?) \|", (PACKAGE / "README.md").read_text(), re.MULTILINE)
    return {
        module.removesuffix(".py"): int(layer)
        for layer, modules in rows
        for module in re.findall(r"`(.*?)`", modules)
    }


LAYERS = layers()

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


def sources():
    """The text of each module, by its path in the package without the ending."""
    return {
        str(path.relative_to(PACKAGE).with_suffix("")): path.read_text("utf-8")
        for path in PACKAGE.rglob("*.py")
    }


def trees():
    """Each module as a syntax tree; of a folder's own `__init__` there is only a docstring."""
    parsed = {name: ast.parse(text) for name, text in sources().items()}
    for name in [name for name in parsed if name.endswith("/__init__")]:
        (docstring,) = parsed.pop(name).body
        assert docstring.value.value, f"{name} says what its folder is for, and nothing else"
    return parsed


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
        "SWA", "Plan", "SWAWarning", "WeightAverage", "__version__", "infer_batch_size", "peekable",
        "update_bn",
    ]  # fmt: skip
    assert dir(swa_dist) == sorted(swa_dist.__all__)
    assert issubclass(swa_dist.SWAWarning, UserWarning)
    assert swa_dist.keras.__all__ == ["SWA"]
    assert swa_dist.tfkeras.__all__ == ["SWA"]
    for module in (swa_dist, swa_dist.keras, swa_dist.tfkeras):
        for name in module.__all__:
            assert getattr(module, name)
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", swa_dist.__version__)
    with pytest.raises(AttributeError, match="no attribute 'SWAG'"):
        _ = swa_dist.SWAG


@pytest.mark.parametrize("kit", KITS, ids=lambda kit: kit.name)
def test_the_callback_has_the_base_of_its_keras_version_and_the_signature_of_keras_swa(kit):
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
    assert {"plan/plan.Plan", "plan/schedules.cyclic", "keras.SWA", "run.Run"} <= set(public)
    without = {name for name, node in public.items() if not ast.get_docstring(node)}
    # Those two are given the docstring of the class that they bind.
    assert without == {"keras.SWA", "tfkeras.SWA"}
    for kit in KITS:
        assert "start_epoch: " in kit.SWA.__doc__


def test_every_module_has_its_layer():
    assert sorted(trees()) == sorted(LAYERS)


@pytest.mark.parametrize("module", sorted(LAYERS))
def test_imports_run_one_way(module):
    wrong = []
    for name in imports(trees()[module]):
        root, *path = name.split(".")
        if root != "swa_dist":
            continue
        prefixes = ("/".join(path[:n]) for n in range(len(path), 0, -1))
        # `from swa_dist import SWA` is an import of the top layer.
        imported = next((prefix for prefix in prefixes if prefix in LAYERS), "__init__")
        if LAYERS[imported] >= LAYERS[module]:
            wrong.append(name)
    assert wrong == []


@pytest.mark.parametrize("module", sorted(LAYERS))
def test_a_module_imports_no_framework_above_its_layer(module):
    roots = {name.partition(".")[0] for name in imports(trees()[module])}
    foreign = roots - set(sys.stdlib_module_names) - {"swa_dist"}
    assert foreign <= FRAMEWORKS.get(module, {"tensorflow"})


def test_no_module_is_too_long_to_be_one_idea():
    long = {name: n for name, text in sources().items() if (n := text.count("\n")) > MOST_LINES}
    assert not long


def test_every_warning_is_of_the_packages_class():
    for name, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn":
                assert ast.unparse(node.args[1]) == "SWAWarning", f"{name}, line {node.lineno}"


def test_a_weight_average_shows_what_is_documented():
    kit = KITS[0]
    model = kit.keras.Sequential([kit.keras.layers.Input((3,)), kit.keras.layers.Dense(1)])
    average = swa_dist.WeightAverage(model)
    shown = [name for name in dir(average) if not name.startswith("_")]
    assert shown == [
        "averaged_weights", "copy_to_model", "get_weights", "n_averaged", "swap", "swapped",
        "update",
    ]  # fmt: skip
    for name in shown:
        assert inspect.getdoc(getattr(type(average), name))


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
