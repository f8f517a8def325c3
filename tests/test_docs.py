"""README and docs: python blocks run on a tiny model, relative links and named files exist."""

import re
from pathlib import Path

import pytest

from cases import CASES, batches

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")])
FENCE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#]+)")
NAMED = re.compile(r"`((?:benchmarks|tests|docs|src|results)/[\w./-]+)`")

BLOCKS = [
    pytest.param(page, block, id=f"{page.name}-{i}")
    for page in PAGES
    for i, block in enumerate(FENCE.findall(page.read_text(encoding="utf-8")))
]


@pytest.mark.parametrize(("page", "block"), BLOCKS)
def test_python_blocks_run(
    page: Path, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    case = CASES["llama"]
    rows = [{key: value[0] for key, value in batch.items()} for batch in batches(case, 24)]
    names = {"model": case.model(), "batches": batches(case, 4), "train_dataset": rows}
    exec(compile(block, str(page), "exec"), names)


def test_there_are_blocks_to_run() -> None:
    assert any(param.values[0].name == "README.md" for param in BLOCKS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_named_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    missing = [link for link in LINK.findall(text) if not (page.parent / link).exists()]
    missing += [name for name in NAMED.findall(text) if not (ROOT / name).exists()]
    assert missing == []
