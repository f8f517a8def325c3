"""The public surface: names, documents, types, and what importing costs."""

import importlib
import inspect
import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import gradrank as gr

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", gr.__all__)
def test_every_public_name_resolves_and_is_described(name: str) -> None:
    value = getattr(gr, name)
    if name not in {"__version__", "METHODS"}:
        assert inspect.getdoc(value), f"{name} has no docstring"
        assert value.__module__.startswith("gradrank.")


def test_dir_lists_the_public_names_and_others_are_refused() -> None:
    assert dir(gr) == sorted(gr.__all__) or set(dir(gr)) == set(gr.__all__)
    with pytest.raises(AttributeError, match="no attribute 'plann'"):
        _ = gr.plann  # type: ignore[attr-defined]


def test_no_public_name_is_hidden_by_a_module_of_the_same_name() -> None:
    modules = {module.name for module in pkgutil.iter_modules(gr.__path__)}
    assert not modules & set(gr.__all__)


def test_the_table_for_type_checkers_is_the_table_of_names() -> None:
    source = Path(gr.__file__).read_text()
    for name, module in gr._NAMES.items():
        assert f"from {module} import {name} as {name}\n" in source


def test_the_package_is_typed_and_knows_its_version() -> None:
    assert (Path(gr.__file__).parent / "py.typed").is_file()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert gr.__version__ == project["version"]


def python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120
    ).stdout


def test_importing_loads_no_torch() -> None:
    heavy = ("torch", "peft", "transformers", "matplotlib", "numpy", "scipy", "safetensors")
    check = f"print([m for m in {heavy!r} if m in sys.modules])"
    assert python(f"import sys, gradrank; {check}").strip() == "[]"
    words = (
        "gradrank.Budget, gradrank.Plan, gradrank.Target, gradrank.RunRecord, gradrank.PlanError"
    )
    assert python(f"import sys, gradrank; {words}; {check}").strip() == "[]"


def test_listing_method_names_loads_no_torch() -> None:
    code = "import sys, gradrank; print(list(gradrank.METHODS), 'torch' in sys.modules)"
    assert python(code).strip() == f"{list(gr.METHODS)} False"
    mistake = (
        "import sys\nfrom gradrank.methods.registry import create\n"
        "try:\n    create('gardd')\nexcept ValueError:\n    print('torch' in sys.modules)"
    )
    assert python(mistake).strip() == "False"


FLOORS = ("core", "ops", "signals", "methods", "adapters")


@pytest.mark.parametrize("floor", FLOORS)
def test_every_module_and_public_function_is_described(floor: str) -> None:
    package = importlib.import_module(f"gradrank.{floor}")
    assert package.__doc__
    for info in pkgutil.iter_modules(package.__path__, f"gradrank.{floor}."):
        module = importlib.import_module(info.name)
        assert module.__doc__, info.name
        for name, value in vars(module).items():
            own = getattr(value, "__module__", None) == info.name
            if own and not name.startswith("_") and callable(value) and inspect.getmodule(value):
                assert inspect.getdoc(value), f"{info.name}.{name}"
