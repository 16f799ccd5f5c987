"""English that every reader has: sentences of the docstrings of Python's own standard library.

Files are parsed, not imported. Modules are dealt out whole, so that no text of one part comes from a module of the
other.
"""

from __future__ import annotations

import ast
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

__all__ = ["split_sentences"]

_LEFT_OUT = ("test", "tests", "idlelib", "lib2to3", "site-packages", "__pycache__", "turtledemo")
_LETTERS = (30, 300)  # of a sentence
_WORDS = 6  # at the least


def split_sentences(seed: int, calibration: int, held_out: int) -> tuple[list[str], list[str]]:
    """Draw sentences for calibration, and others to judge by, from disjoint modules.

    Args:
        seed: Of the draw.
        calibration: Number of the first.
        held_out: Number of the second.

    Raises:
        ValueError: If the library holds fewer.
    """
    draw = random.Random(seed)
    modules = sorted(_modules(Path(sysconfig.get_paths()["stdlib"])).items())
    draw.shuffle(modules)
    parts: tuple[dict[str, None], dict[str, None]] = ({}, {})  # dicts keep their order and drop repetitions
    for number, (_, sentences) in enumerate(modules):
        parts[number % 2].update(dict.fromkeys(sentences))
    drawn = []
    for part, other, count in zip(parts, reversed(parts), (calibration, held_out), strict=True):
        own = [sentence for sentence in part if sentence not in other]
        if len(own) < count:
            raise ValueError(f"the docstrings at hand give {len(own)} sentences, {count} were asked for: ask for fewer")
        drawn.append(draw.sample(own, count))
    return drawn[0], drawn[1]


def _modules(library: Path) -> dict[str, list[str]]:
    """Return the sentences of each top-level module or package."""
    found: dict[str, list[str]] = {}
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if any(part in _LEFT_OUT or part.startswith("test_") for part in parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError, OSError):
            continue
        found.setdefault(parts[0], []).extend(_sentences(tree))
    return found


def _sentences(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for paragraph in re.split(r"\n\s*\n", ast.get_docstring(node) or ""):
            if re.search(r"^\s*(>>>|[-+*=|:~]{2,})|\s{4,}\S", paragraph, re.MULTILINE):
                continue  # code and tables
            for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(paragraph.split())):
                if _LETTERS[0] <= len(sentence) <= _LETTERS[1] and len(sentence.split()) >= _WORDS:
                    yield sentence
