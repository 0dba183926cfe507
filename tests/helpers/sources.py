"""The package's modules, as text and as syntax trees."""

import ast
from pathlib import Path

import swa_dist

PACKAGE = Path(swa_dist.__file__).parent


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
