"""The examples of the documentation run as they stand."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from swap_prune import METHODS
from swap_prune.experiments.results import read_results
from swap_prune.experiments.tables import as_markdown, summarise
from swap_prune.fisher.noise import NOISE_MODELS

ROOT = Path(__file__).parent.parent
PAGES = sorted(str(p.relative_to(ROOT)) for p in [*ROOT.glob("docs/*.md"), ROOT / "README.md"])


@pytest.mark.parametrize(
    "page", ["README.md", *(f"docs/{name}.md" for name in ("extending", "finetuning", "migrating", "transformers"))]
)
def test_python_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(METHODS, "diagonal", METHODS["magnitude"])  # both tables are restored afterwards
    monkeypatch.setitem(NOISE_MODELS, "lost", NOISE_MODELS["gradient"])
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    scope: dict[str, object] = {"__name__": page}
    for block in blocks:
        if block.startswith("# mine.py"):
            (tmp_path / "mine.py").write_text(block)
        else:
            exec(compile(block, page, "exec", dont_inherit=True), scope)


def test_the_tables_are_what_the_report_makes_of_the_lines() -> None:
    lines = as_markdown(summarise(read_results(ROOT / "results" / "mlpnet"))).splitlines()
    shown = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| ") and "±" in line]
    accuracies, others = rows[:12], rows[12:]
    assert len(accuracies) == 12 and set(accuracies) <= set(shown)
    assert len(set(others) & set(shown)) >= 17, "differences, and the losses of the best"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
        if "://" not in link:
            assert ((ROOT / page).parent / link).exists(), link


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives the headings of a page."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_a_heading(page: str) -> None:
    path = ROOT / page
    for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", path.read_text(encoding="utf-8")):
        assert anchor in anchors(path.parent / target if target else path), f"{target}#{anchor}"


def test_settings_are_those_of_the_methods() -> None:
    page = (ROOT / "docs/reference.md").read_text(encoding="utf-8")
    table = page.split("## Settings of the methods")[1].split("\n## ")[0]
    found = {
        (method, name): ast.literal_eval(default)
        for methods, name, default in re.findall(r"^\| (`.*?`) \| `(\w+)` \| `(.*?)` \|", table, re.MULTILINE)
        for method in re.findall(r"`(\w+)`", methods)
    }
    real = {(name, one.name): one.default for name, method in METHODS.items() for one in dataclasses.fields(method)}
    assert found == real


def test_constants_are_those_of_the_code() -> None:
    table = (ROOT / "docs/reference.md").read_text(encoding="utf-8").split("## Constants")[1]
    rows = re.findall(r"^\| `(\w+)` \| `([\w.]+)` \| `(.*?)` \|", table, re.MULTILINE)
    assert len(rows) > 30
    for name, module, value in rows:
        assert getattr(importlib.import_module(f"swap_prune.{module}"), name) == ast.literal_eval(value), name


@pytest.fixture
def update_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, in a folder of its own, with results beside it."""
    rows = [{"method": "dense", "clean": 98.5, "noisy": None}, {"method": "ewr", "clean": 97.25, "noisy": 96.5}]
    (tmp_path / "results.json").write_text(json.dumps({"rows": rows}), encoding="utf-8")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    script = importlib.import_module("update_readme")
    monkeypatch.setattr(script, "__file__", str(tmp_path / "scripts" / "update_readme.py"))
    return script


def test_figures_of_the_demo_are_written_between_the_marks(update_readme: ModuleType, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- demo -->\nold\n<!-- /demo -->\nafter\n", encoding="utf-8")
    for _ in range(2):
        update_readme.main(tmp_path / "results.json")
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("before\n<!-- demo -->\n| ") and text.endswith("|\n<!-- /demo -->\nafter\n")
    assert "| dense | 98.50 |  |\n| ewr | 97.25 | 96.50 |\n" in text and "old" not in text


@pytest.mark.parametrize("text", ["no marks", "<!-- demo -->\nold\n", "<!-- /demo --> <!-- demo -->"])
def test_a_readme_without_marks_is_an_error(update_readme: ModuleType, tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit, match=r"README.md has no <!-- demo --> \.\.\. <!-- /demo -->"):
        update_readme.main(tmp_path / "results.json")
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == text


def test_the_readme_has_the_marks() -> None:
    assert re.search("<!-- demo -->.*<!-- /demo -->", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def texts_of(tree: ast.AST) -> list[str]:
    """The texts in code, with ... for what varies, but for those that are parts of others and docstrings."""
    within = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(str(p.value) if isinstance(p, ast.Constant) else "..." for p in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and not {id(node)} & (within | alone):
            found.append(node.value)
    return found


def test_every_note_at_the_end_of_a_run_has_a_row() -> None:
    """Either may have ``...`` for what the other says."""
    text = (ROOT / "docs" / "files.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| ", text.split("### Notes")[1].split("### ")[0], re.MULTILINE)
    tree = ast.parse((ROOT / "src" / "swap_prune" / "stages" / "accounting.py").read_text(encoding="utf-8"))
    notes = [said for said in texts_of(tree) if said.count(" ") > 4]
    assert len(notes) > 12

    def covers(general: str, special: str) -> bool:
        return re.match(".*".join(map(re.escape, general.split("..."))), special) is not None

    assert [note for note in notes if not any(covers(row, note) or covers(note, row) for row in rows)] == []
