"""What is shipped: the wheel and the source archive, built here without network."""

import email
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "gradrank"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
KINDS = {".py", ".yaml", ".html", ".css", ".js", ".typed"}
MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return what builds a kind of distribution, once; in the process of pip's own back end."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("built")
    done: dict[str, Path] = {}

    def build(kind: str) -> Path:
        if kind not in done:
            code = f"import hatchling.build as b; print(b.build_{kind}({str(folder)!r}))"
            made = subprocess.run(
                [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
            )
            done[kind] = folder / made.stdout.split()[-1]
        return done[kind]

    return build


@pytest.fixture(scope="module")
def wheel(built: Callable[[str], Path]) -> Path:
    return built("wheel")


def shipped() -> set[str]:
    """Return the package's files as they stand in the source folder."""
    every = (path for path in SOURCE.rglob("*") if path.is_file())
    return {
        path.relative_to(SOURCE.parent).as_posix()
        for path in every
        if "__pycache__" not in path.parts
        and "tests" not in path.relative_to(SOURCE).parts
        and not path.name.startswith(".")
    }


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if ".dist-info/" not in n and n[-1] != "/"}
        about = {n.split("/", 1)[1] for n in archive.namelist() if ".dist-info/" in n}
    assert names == shipped()
    assert {Path(name).suffix for name in names} <= KINDS
    assert {"gradrank/py.typed", "gradrank/report/templates/report.html"} <= names
    assert {"gradrank/presets/pilora-glue.yaml", "gradrank/cli/main.py"} <= names
    assert {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"} == about
    assert wheel.stat().st_size < 2 * MEGABYTE


def test_the_metadata_is_sane(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith("METADATA"))
        text = archive.read(name).decode("utf-8")
        points = archive.read(name.replace("METADATA", "entry_points.txt")).decode("utf-8")
    found = email.message_from_string(text)
    assert (found["Name"], found["Version"]) == ("gradrank", PROJECT["version"])
    assert found["License-Expression"] == "Apache-2.0"
    assert found["Requires-Python"] == ">=3.11"
    assert found["Summary"]
    assert found["Description-Content-Type"] == "text/markdown"
    assert "gradrank = gradrank.cli.main:main" in points
    head = text.partition("\n\n")[0]
    assert not re.search(r"localhost|127\.0\.0\.1|file:|/home/|/root/|@", head)
    for value in found.get_all("Project-URL") or []:
        assert re.search(r", https://[\w.-]+\.\w+/", value), value
    needed = [one for one in found.get_all("Requires-Dist") or [] if "extra ==" not in one]
    assert len(needed) == len(PROJECT["dependencies"])
    assert all(re.search(r"[><=~]", one) for one in needed), "a dependency without a range"


def test_the_source_archive_holds_what_a_build_needs_and_is_small(
    built: Callable[[str], Path],
) -> None:
    path = built("sdist")
    with tarfile.open(path) as archive:
        members = archive.getmembers()
    names = {member.name.split("/", 1)[1] for member in members if "/" in member.name}
    assert {"pyproject.toml", "LICENSE", "README.md", "PKG-INFO", "src/gradrank/py.typed"} <= names
    assert {f"src/{name}" for name in shipped()} <= names
    assert not {name for name in names if name.startswith(("results/", ".", "site/"))} - {
        ".gitignore"
    }
    assert max(member.size for member in members) < MEGABYTE
    assert path.stat().st_size < 5 * MEGABYTE


def test_an_installed_wheel_runs(wheel: Path, tmp_path: Path) -> None:
    """In an environment of its own; the packages it depends on are lent to it."""
    venv.create(tmp_path / "env", with_pip=False)
    folder = next((tmp_path / "env").glob("lib/python*/site-packages"), None)
    folder = folder or tmp_path / "env" / "Lib" / "site-packages"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    (folder / "lent.pth").write_text(
        "".join(f"{path}\n" for path in sys.path if path.endswith("site-packages"))
    )
    made = (tmp_path / "env" / place for place in ("bin/python", "Scripts/python.exe"))
    python = next(path for path in made if path.exists())
    code = (
        "import gradrank, sys; from importlib import metadata; print(gradrank.__file__)\n"
        "print(metadata.version('gradrank'))\n"
        "from gradrank.presets import presets; print(len(presets()) > 3)\n"
        "from gradrank.cli.main import main; main(['--help'])\n"
    )
    # What this process was told about paths does not hold for another environment.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path, env=env
    )
    where, version, presets, *help_text = done.stdout.splitlines()
    assert Path(where).is_relative_to(folder)
    assert (version, presets) == (PROJECT["version"], "True")
    assert "Verbs:" in help_text
