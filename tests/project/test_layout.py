"""Which module may import which, and how long it is."""

import ast
import re
import sys

from tests.helpers.processes import ROOT
from tests.helpers.sources import PACKAGE, imports, sources, trees

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


def test_every_module_has_its_layer():
    assert sorted(trees()) == sorted(LAYERS)


def test_imports_run_one_way():
    wrong = []
    for module, tree in trees().items():
        for name in imports(tree):
            root, *path = name.split(".")
            if root != "swa_dist":
                continue
            prefixes = ("/".join(path[:n]) for n in range(len(path), 0, -1))
            # `from swa_dist import SWA` is an import of the top layer.
            imported = next((prefix for prefix in prefixes if prefix in LAYERS), "__init__")
            if LAYERS[imported] >= LAYERS[module]:
                wrong.append((module, name))
    assert not wrong


def test_a_module_imports_no_framework_above_its_layer():
    wrong = []
    for module, tree in trees().items():
        roots = {name.partition(".")[0] for name in imports(tree)}
        foreign = roots - set(sys.stdlib_module_names) - {"swa_dist"}
        wrong += [(module, name) for name in foreign - FRAMEWORKS.get(module, {"tensorflow"})]
    assert not wrong


def test_no_module_is_too_long_to_be_one_idea():
    long = {name: n for name, text in sources().items() if (n := text.count("\n")) > MOST_LINES}
    assert not long


def test_test_modules_share_helpers_and_import_nothing_from_each_other_or_from_scripts():
    wrong = []
    for path in (ROOT / "tests").rglob("*.py"):
        for name in imports(ast.parse(path.read_text("utf-8"))):
            shared = name.startswith("tests.helpers")
            if name.startswith("scripts") or (name.startswith("tests") and not shared):
                wrong.append((path.name, name))
    assert not wrong
