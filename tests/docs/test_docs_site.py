"""The documentation site builds without a warning, loads nothing, and leaves no name out."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import gradrank as gr
from docs_cases import ROOT
from gradrank.cli.main import VERBS
from gradrank.methods.method import describe_options

pytest.importorskip("sphinx", reason="the site needs the extra 'docs'")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, as `make docs` builds it: every warning is an error, and no reference is missing.

    Where `make docs` has just built it, the caller may name the folder instead.
    """
    if built := os.environ.get("GRADRANK_SITE"):
        return Path(built)
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "-n", "--keep-going", "-q", "-b", "html"]
    command += ["-d", str(out / "trees"), str(ROOT / "docs"), str(out / "html")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    return out / "html"


class Loads(HTMLParser):
    """Addresses that a page would fetch without being asked."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        fetched = given.get("src") or (given.get("href") if tag == "link" else None) or ""
        if re.match(r"(https?:)?//", fetched):
            self.found.append(fetched)


def test_pages_load_nothing_from_a_network(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 40
    found = {}
    for page in pages:
        loads = Loads()
        loads.feed(page.read_text(encoding="utf-8"))
        if loads.found:
            found[page.name] = loads.found
    assert found == {}
    styles = [file.read_text(encoding="utf-8") for file in site.rglob("*.css")]
    assert not [text[:80] for text in styles if re.search(r"(url\(|@import)\W*https?:", text)]


def test_a_loader_is_seen() -> None:
    loads = Loads()
    loads.feed('<a href="https://x"></a><img src="//x/y.png"><link href="https://x/z.css">')
    assert loads.found == ["//x/y.png", "https://x/z.css"]


def test_every_public_name_and_every_verb_has_its_place(site: Path) -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in site.glob("reference/*.html"))
    missing = [n for n in gr.__all__ if f'id="gradrank.{n}"' not in pages and n != "__version__"]
    missing += [verb for verb in VERBS if f'id="gradrank-{verb}"' not in pages]
    assert missing == []


def test_formulas_are_drawn_without_a_script(site: Path) -> None:
    page = (site / "methods" / "gard.html").read_text(encoding="utf-8")
    assert page.count("<math") > 5
    assert 'class="eqno"' in page
    assert not re.search(r"<script[^>]*mathjax", page, re.IGNORECASE)


def test_reports_of_the_gallery_are_there(site: Path) -> None:
    page = (site / "gallery" / "index.html").read_text(encoding="utf-8")
    links = re.findall(r'href="(pages/[\w-]+\.html)"', page)
    assert len(links) > 4
    assert [link for link in links if not (site / "gallery" / link).is_file()] == []


@pytest.mark.parametrize("name", sorted(gr.METHODS))
def test_pages_of_methods_name_every_option(name: str) -> None:
    own = ROOT / "docs" / "methods" / f"{name}.md"
    page = own if own.exists() else own.with_name("controls.md")
    text = page.read_text(encoding="utf-8")
    # Methods that prune share the options of this page.
    if "as in [`igu`](igu.md)" in text:
        text += own.with_name("igu.md").read_text(encoding="utf-8")
    options = {option["name"] for option in describe_options(gr.METHODS[name])}
    shared = {"r_min", "r_max", "sketch_dim"} if page.stem == "controls" else set()
    assert [option for option in options - shared if f"`{option}" not in text] == []


@pytest.mark.parametrize(
    "heading", ["Idea", "Options", "When it helps|When they help", "Cost", "Source"]
)
def test_pages_of_methods_answer_the_same_questions(heading: str) -> None:
    pages = [page for page in ROOT.glob("docs/methods/*.md") if page.stem != "index"]
    wanted = re.compile(rf"^## ({heading})", re.MULTILINE)
    lacking = [p.name for p in pages if not wanted.search(p.read_text(encoding="utf-8"))]
    assert (len(pages) > 8, lacking) == (True, [])
    assert [p.name for p in pages if "```{figure}" not in p.read_text(encoding="utf-8")] == []
