"""Recipes: which methods, budgets and seeds are compared, as one readable file.

A recipe is one run's configuration with lists where runs differ. Every combination is a complete
configuration of ``gradrank train --config``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from gradrank.core.budget import Budget
from gradrank.core.errors import DataError, OptionError, nearest
from gradrank.lab.epochs import options_in_steps
from gradrank.methods.registry import create

SCHEMA = "gradrank.recipe/1"
_LARGEST = 1 << 20
_KEYS = {"schema", "name", "about", "source", "run", "budgets", "seeds", "methods"}
_METHOD_KEYS = {"label", "method", "option"}


@dataclass(frozen=True, slots=True)
class Variant:
    """One line of a comparison.

    Attributes:
        label: What it is called in tables; unique in the recipe.
        method: Name of the method.
        options: Its options.
    """

    label: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Recipe:
    """A comparison.

    Attributes:
        name: Short name, a file name without its ending.
        about: What it asks, in a sentence.
        source: Paper and table or figure.
        run: What all runs have in common, keys of ``gradrank train --config``.
        budgets: Budgets.
        seeds: Seeds.
        variants: Methods and options.
    """

    name: str
    about: str
    source: str
    run: Mapping[str, Any]
    budgets: tuple[str, ...]
    seeds: tuple[int, ...]
    variants: tuple[Variant, ...]

    def runs(self) -> dict[str, dict[str, Any]]:
        """Return every run's configuration.

        Returns:
            Configurations by a name that can be a folder's, seeds innermost.
        """
        return {
            f"{_file_name(v.label)}--{_file_name(budget)}--seed{seed}": {
                **self.run,
                "method": v.method,
                **(
                    {"option": {k: _text(value) for k, value in v.options.items()}}
                    if v.options
                    else {}
                ),
                "budget": budget,
                "seed": seed,
            }
            for v in self.variants
            for budget in self.budgets
            for seed in self.seeds
        }


def read(path: Path) -> Recipe:
    """Read a recipe and check all that can be checked without a model.

    Args:
        path: The file.

    Returns:
        The recipe.

    Raises:
        DataError: If it is missing, too large or no recipe.
        OptionError: If a method, an option or a budget is wrong.
    """
    data = _mapping(path)
    unknown = [key for key in data if key not in _KEYS]
    if unknown:
        raise DataError(
            f"recipe '{path.name}' has the unknown key '{unknown[0]}'. "
            f"{nearest(str(unknown[0]), _KEYS)}"
        )
    missing = sorted(_KEYS - set(data))
    if missing or data["schema"] != SCHEMA:
        what = f"lacks {', '.join(missing)}" if missing else f"has schema {data['schema']!r}"
        raise DataError(f"recipe '{path.name}' {what}; it must be '{SCHEMA}' and whole.")
    for key, kind in (("run", dict), ("budgets", list), ("seeds", list), ("methods", list)):
        if not isinstance(data[key], kind) or not data[key]:
            raise DataError(f"recipe '{path.name}': '{key}' must be a {kind.__name__}, not empty.")
    variants = tuple(_variant(entry, path.name) for entry in data["methods"])
    labels = [_file_name(variant.label) for variant in variants]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise OptionError(f"recipe '{path.name}' has two methods labelled '{twice}'.")
    return Recipe(
        name=str(data["name"]),
        about=str(data["about"]),
        source=str(data["source"]),
        run=data["run"],
        budgets=tuple(_budget(text) for text in data["budgets"]),
        seeds=tuple(int(seed) for seed in data["seeds"]),
        variants=variants,
    )


def _mapping(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LARGEST:
            raise DataError(f"recipe '{path.name}' is larger than {_LARGEST:,} bytes.")
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"recipe '{path}' does not exist.") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"recipe '{path.name}' could not be read: {reason}") from error
    if not isinstance(data, dict):
        raise DataError(f"recipe '{path.name}' is no mapping.")
    return data


def _variant(entry: Any, where: str) -> Variant:
    if not isinstance(entry, dict) or "method" not in entry or set(entry) - _METHOD_KEYS:
        raise DataError(
            f"recipe '{where}': a method is a mapping with 'method' and, if need be, 'label' and "
            f"'option'; found {entry!r}."
        )
    options = entry.get("option") or {}
    if not isinstance(options, dict):
        raise DataError(f"recipe '{where}': 'option' must be a mapping; found {options!r}.")
    # How many steps an epoch has is not known yet, and makes no option right or wrong.
    create(str(entry["method"]), options_in_steps(options, 1, 1))
    return Variant(str(entry.get("label", entry["method"])), str(entry["method"]), options)


def _budget(text: Any) -> str:
    Budget.parse(text if isinstance(text, int) else str(text))
    return str(text)


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _file_name(label: str) -> str:
    return "".join(c if c.isalnum() or c in "._=" else "-" for c in label)
