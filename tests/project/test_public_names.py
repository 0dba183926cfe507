"""What is public, and that it is described."""

import ast
import copy
import inspect
import pickle
import re
from importlib import metadata

import pytest

import swa_dist
import swa_dist.keras
import swa_dist.tfkeras
from tests.helpers.kit import KITS
from tests.helpers.sources import trees


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
        ("snapshot_freq", "epoch"),
        ("ema_momentum", None),
        ("bn_data", None),
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


def test_a_weight_average_says_how_to_copy_it():
    kit = KITS[0]
    model = kit.keras.Sequential([kit.keras.layers.Input((3,)), kit.keras.layers.Dense(1)])
    for make_copy in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="checkpoint of this one into it"):
            make_copy(swa_dist.WeightAverage(model))


@pytest.mark.parametrize("kit", KITS, ids=lambda kit: kit.name)
def test_the_callback_is_shown_and_named_as_it_is_written(kit):
    assert repr(kit.SWA(3)) == "SWA(start_epoch=3)"
    shown = repr(kit.SWA(0.5, "constant", swa_lr=0.1, bn_steps=4))
    assert shown == "SWA(start_epoch=0.5, lr_schedule='constant', swa_lr=0.1, bn_steps=4)"
    with pytest.raises(TypeError, match=re.escape("SWA.__init__() missing")):
        kit.SWA()


def test_the_version_is_that_of_the_distribution():
    assert swa_dist.__version__ == metadata.version("swa-dist")
