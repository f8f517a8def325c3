"""README and docs: python runs on a tiny model, commands and recipes are checked, links exist."""

import ast
import re
from pathlib import Path

import pytest
import yaml

from cases import CASES, batches
from docs_cases import PAGES, ROOT, blocks, commands, wrong_with
from gradrank.lab.recipes import read

LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#]+)")
NAMED = re.compile(r"`((?:benchmarks|tests|docs|src|results|recipes)/[\w./-]+)`")
# What may stand in a block: run, checked, or no code at all. "py" is a fragment that compiles.
LANGUAGES = {"python", "py", "sh", "console", "yaml", "text", "json"}


def of(*languages: str) -> list[object]:
    """The blocks of these languages, one test each."""
    found = [(p, lang, text, i) for p in PAGES for i, (lang, text) in enumerate(blocks(p))]
    return [pytest.param(p, b, id=f"{p.name}-{i}") for p, lang, b, i in found if lang in languages]


@pytest.mark.parametrize(("page", "block"), of("python"))
def test_python_blocks_run(
    page: Path, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    case = CASES["llama"]
    rows = [{key: value[0] for key, value in batch.items()} for batch in batches(case, 24)]
    names = {"model": case.model(), "batches": batches(case, 4), "train_dataset": rows}
    exec(compile(block, str(page), "exec"), names)


@pytest.mark.parametrize(("page", "block"), of("py"))
def test_fragments_compile(page: Path, block: str) -> None:
    assert ast.parse(block, str(page)).body


@pytest.mark.parametrize(("page", "block"), of("sh", "console"))
def test_commands_are_ones_that_the_program_takes(page: Path, block: str) -> None:
    assert [wrong for words in commands(block) if (wrong := wrong_with(words))] == []


@pytest.mark.parametrize(("page", "block"), of("yaml"))
def test_recipes_on_pages_are_whole(page: Path, block: str, tmp_path: Path) -> None:
    data = yaml.safe_load(block)
    assert isinstance(data, dict)
    if str(data.get("schema", "")).startswith("gradrank.recipe/"):
        path = tmp_path / f"{data['name']}.yaml"
        path.write_text(block, encoding="utf-8")
        assert read(path).variants


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_named_files_exist_and_blocks_say_what_they_are(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    missing = [link for link in LINK.findall(text) if not (page.parent / link).exists()]
    missing += [name for name in NAMED.findall(text) if not (ROOT / name).exists()]
    assert missing == []
    assert {lang for lang, _ in blocks(page) if not lang.startswith("{")} <= LANGUAGES


def test_wrong_commands_are_caught() -> None:
    (right,) = commands("$ gradrank plan --budget uniform:8 \\\n    --method gard  # a remark\n")
    assert right == ["plan", "--budget", "uniform:8", "--method", "gard"]
    assert wrong_with(right) is None
    assert "verb" in str(wrong_with(["plann"]))
    assert "--budgett" in str(wrong_with(["plan", "--budgett", "uniform:8"]))
    assert "head" in str(wrong_with(["plan", "--head", "lmm"]))
    assert "gardd" in str(wrong_with(["plan", "--method", "gardd"]))
    assert "energyy" in str(wrong_with(["plan", "--method", "gard", "--option", "energyy=1"]))
    assert "tiny-lmm" in str(wrong_with(["plan", "--task", "tiny-lmm"]))
    assert "does not exist" in str(wrong_with(["compare", "recipes/none.yaml"]))
    assert "budget" in str(wrong_with(["train", "--budget", "rank 8"]))


def test_there_is_something_to_check() -> None:
    for languages in (("python",), ("sh",), ("yaml",)):
        assert len(of(*languages)) > 2
