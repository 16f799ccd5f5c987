"""Imports go one way: numerics <- methods <- request, stages <- pipeline <- experiments <- cli."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "swap_prune"
MODULES = sorted(PACKAGE.rglob("*.py"))
LAYERS = {
    "fisher": 0,
    "transport": 0,
    "regression": 1,
    "methods": 2,
    "request": 3,
    "stages": 3,
    "pipeline": 4,
    "experiments": 5,
    "options": 5,
    "cli": 6,
}


def layer(module: str) -> int | None:
    """Return the layer of a dotted name below the package; helpers that every layer may use have none."""
    return LAYERS.get(module.split(".")[0])


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_import_runs_back_up(path: Path) -> None:
    own = layer(".".join(path.relative_to(PACKAGE).with_suffix("").parts))
    if path == PACKAGE / "__init__.py" or path == PACKAGE / "__main__.py":
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("swap_prune."):
            other = layer(node.module.removeprefix("swap_prune."))
            limit = 1 if own is None else own  # helpers may use the numerics at the most
            assert other is None or other <= limit, f"{path.name} imports {node.module}"


def test_the_layers_exist() -> None:
    for name in LAYERS:
        assert (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()
