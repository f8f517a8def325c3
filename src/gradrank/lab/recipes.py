"""Recipes: which tasks, methods, budgets and seeds are compared, as one readable file.

A recipe is data and nothing in it is executed. Everything that can be checked without a model is
checked when it is read, so that a mistake in its last line costs no night of training.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradrank.core.budget import Budget
from gradrank.core.errors import DataError, OptionError, nearest
from gradrank.lab.baselines.registry import create_baseline, find_baseline, is_baseline
from gradrank.lab.compare.recipe import Rates, Recipe, TaskEntry, Variant
from gradrank.lab.epochs import options_in_steps
from gradrank.lab.recipe_checks import check_whole
from gradrank.methods.registry import METHODS, create
from gradrank.presets.strict import read_yaml
from gradrank.record.checks import shown

SCHEMA = "gradrank.recipe/1"
_NEEDED = {"schema", "name", "about", "source", "run", "budgets", "seeds", "methods"}
_KEYS = _NEEDED | {"tasks", "learning_rates", "tuning_seeds", "calibration_seeds", "reference"}
_METHOD_KEYS = {"label", "method", "option", "run", "budgets", "learning_rates"}


def read(path: Path) -> Recipe:
    """Read a recipe and check all that can be checked without a model.

    Args:
        path: The file.

    Returns:
        The recipe.

    Raises:
        DataError: If it is missing, too large or no recipe.
        OptionError: If a method, an option, a setting or a budget is wrong.
    """
    data, where = _mapping(path), f"recipe '{path.name}'"
    _check_keys(data, where)
    variants = tuple(_variant(entry, where) for entry in data["methods"])
    entries = data.get("tasks") or [{}]
    tasks = tuple(_task(entry, data["run"], where) for entry in entries)
    for what, labels in (
        ("methods", [v.label for v in variants]),
        ("tasks", [t.label for t in tasks]),
    ):
        names = [file_name(label) for label in labels]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise OptionError(f"{where} has two {what} labelled '{twice}'. Give them labels.")
    recipe = Recipe(
        name=str(data["name"]),
        about=str(data["about"]),
        source=str(data["source"]),
        run=data["run"],
        tasks=tasks,
        budgets=_budgets(data["budgets"], where),
        seeds=_seeds(data["seeds"], "seeds", where),
        variants=variants,
        rates=_rates(data.get("learning_rates"), where),
        tuning_seeds=_seeds(data.get("tuning_seeds", [1000]), "tuning_seeds", where),
        calibration_seeds=_seeds(data.get("calibration_seeds", []), "calibration_seeds", where),
        reference=str(data.get("reference", "uniform")),
    )
    check_whole(recipe, where)
    return recipe


def file_name(label: str) -> str:
    """Return a label as a part of a file name.

    Args:
        label: The label.

    Examples:
        >>> file_name("r'=2/warm")
        'r-=2-warm'
    """
    return "".join(c if c.isascii() and (c.isalnum() or c in "._=") else "-" for c in label)


def _check_keys(data: Mapping[str, Any], where: str) -> None:
    unknown = [key for key in data if key not in _KEYS]
    if unknown:
        raise DataError(
            f"{where} has the unknown key '{unknown[0]}'. {nearest(str(unknown[0]), _KEYS)}"
        )
    missing = sorted(_NEEDED - set(data))
    if missing or data["schema"] != SCHEMA:
        what = f"lacks {', '.join(missing)}" if missing else f"has schema {data['schema']!r}"
        raise DataError(f"{where} {what}; it must be '{SCHEMA}' and whole.")
    for key, kind in (("run", dict), ("budgets", list), ("seeds", list), ("methods", list)):
        if not isinstance(data[key], kind) or not data[key]:
            raise DataError(f"{where}: '{key}' must be a {kind.__name__}, not empty.")
    if not isinstance(data.get("tasks", []), list):
        raise DataError(f"{where}: 'tasks' must be a list.")


def _mapping(path: Path) -> dict[str, Any]:
    data = read_yaml(path, "recipe")
    if not isinstance(data, dict):
        raise DataError(f"recipe '{path.name}' is no mapping.")
    return data


def _variant(entry: Any, where: str) -> Variant:
    if isinstance(entry, str):
        entry = {"method": entry}
    if not isinstance(entry, dict) or "method" not in entry:
        raise DataError(
            f"{where}: a method is a name, or a mapping with 'method' and, if need be, "
            f"{', '.join(sorted(_METHOD_KEYS - {'method'}))}; found {shown(entry)}."
        )
    unknown = [key for key in entry if key not in _METHOD_KEYS]
    if unknown:
        hint = nearest(str(unknown[0]), _METHOD_KEYS)
        raise DataError(f"{where}: a method has the unknown key '{unknown[0]}'. {hint}")
    options, run = entry.get("option") or {}, entry.get("run") or {}
    for key, value in (("option", options), ("run", run)):
        if not isinstance(value, dict):
            raise DataError(f"{where}: '{key}' must be a mapping; found {shown(value)}.")
    name = str(entry["method"])
    # How many steps an epoch has is not known yet, and makes no option right or wrong.
    known = {key: _text(value) for key, value in options_in_steps(options, 1, 1).items()}
    if is_baseline(name):
        create_baseline(name, known)
    elif name in METHODS:
        create(name, known)
    else:
        find_baseline(name)
    return Variant(
        label=str(entry.get("label", name)),
        method=name,
        options={key: _text(value) for key, value in options.items()},
        run=run,
        budgets=_budgets(entry.get("budgets") or [], where),
        rates=_rates(entry.get("learning_rates"), where),
    )


def _task(entry: Any, run: Mapping[str, Any], where: str) -> TaskEntry:
    if isinstance(entry, str):
        entry = {"task": entry}
    if not isinstance(entry, dict):
        raise DataError(
            f"{where}: a task is a name or a mapping of settings; found {shown(entry)}."
        )
    own = dict(entry)
    budgets = _budgets(own.pop("budgets", None) or [], where)
    rates = _rates(own.pop("learning_rates", None), where)
    label = str(
        own.pop("label", None)
        or own.get("task")
        or own.get("data")
        or run.get("task")
        or run.get("data")
    )
    return TaskEntry(label, own, budgets, rates)


def _budgets(found: Any, where: str) -> tuple[str, ...]:
    if not isinstance(found, list):
        raise DataError(f"{where}: 'budgets' must be a list; found {shown(found)}.")
    for item in found:
        Budget.parse(item if isinstance(item, int) else str(item))
    return tuple(dict.fromkeys(str(item) for item in found))


def _seeds(found: Any, key: str, where: str) -> tuple[int, ...]:
    good = isinstance(found, list) and all(type(s) is int and 0 <= s < 2**32 for s in found)
    if not good or len(set(found)) != len(found):
        raise DataError(
            f"{where}: '{key}' must be a list of different whole numbers of 0 or more; found "
            f"{shown(found)}."
        )
    return tuple(found)


def _rates(found: Any, where: str) -> Rates:
    if not isinstance(found, dict):
        return Rates(_list_of_rates(found, where))
    if not found:
        raise DataError(
            f"{where}: 'learning_rates' is an empty mapping. Give a list of rates, or one for each "
            "budget."
        )
    return Rates(at={_budgets([b], where)[0]: _list_of_rates(r, where) for b, r in found.items()})


def _list_of_rates(found: Any, where: str) -> tuple[float, ...]:
    try:
        rates = tuple(float(rate) for rate in found or ())
    except (TypeError, ValueError):
        rates = (0.0,)
    if not all(0 < rate < float("inf") for rate in rates) or len(set(rates)) != len(rates):
        raise DataError(
            f"{where}: 'learning_rates' must be a list of different positive numbers, or one such "
            f"list for each budget; found {shown(found)}."
        )
    return rates


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
