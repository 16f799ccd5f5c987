"""Imports go one way, from the numerics up to the command line, and never in a circle."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "swap_prune"
LEVELS = (  # a module or package imports from lower levels, and from itself
    ("checks", "defences", "progress", "randomness", "report", "transport"),
    ("files", "process_memory", "schedule"),
    ("samples",),
    ("distributed", "network"),
    ("losses", "meeting", "selection"),
    ("surgery",),
    ("fisher", "weights_file"),
    ("regression", "training"),
    ("artifact", "integrations", "memory", "problem", "sample_defence"),
    ("console", "methods"),
    ("options", "request"),
    ("stages",),
    ("pipeline",),
    ("experiments",),
    ("cli",),
)
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}


def dotted(path: Path) -> str:
    """Return the name of a module below the package."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


PATHS = (path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != PACKAGE or not path.name.startswith("_"))
MODULES = {dotted(path): path for path in PATHS}


def imports(path: Path) -> set[str]:
    """Return the modules of the package that a file imports, be it inside of a function or for types alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("swap_prune."):
            origin = (node.module or "").removeprefix("swap_prune.")
            names = (f"{origin}.{alias.name}" for alias in node.names)
            found |= {name if name in MODULES else origin for name in names}
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_come_from_lower_levels(module: str) -> None:
    own = module.split(".")[0]
    for other in imports(MODULES[module]):
        name = other.split(".")[0]
        assert name == own or LEVEL_OF[name] < LEVEL_OF[own], f"{module} imports {other}"


def test_no_import_runs_in_a_circle() -> None:
    order = list(TopologicalSorter({module: imports(path) for module, path in MODULES.items()}).static_order())
    assert set(order) == set(MODULES)


def test_every_module_has_a_level() -> None:
    assert {module.split(".")[0] for module in MODULES} == set(LEVEL_OF)
