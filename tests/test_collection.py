"""Every folder with tests is one that pytest looks into."""

import fnmatch
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def test_no_folder_with_tests_is_passed_over(pytestconfig: pytest.Config) -> None:
    patterns = pytestconfig.getini("norecursedirs")
    folders = {file.parent.name for file in TESTS.rglob("test_*.py")}
    assert "dist" in folders
    passed_over = [f for f in folders for p in patterns if fnmatch.fnmatch(f, p)]
    assert passed_over == []
