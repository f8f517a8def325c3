"""Presets: settings of published experiments, packaged, for ``--preset NAME``.

A file holds what one table of a paper says: keys of ``gradrank train --config`` that all its
columns share, and per column the keys in which it differs.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import yaml

from gradrank.core.errors import OptionError, nearest

_FILES = ("pilora-commonsense", "pilora-glue", "pilora-images")


@dataclass(frozen=True, slots=True)
class Preset:
    """Settings of a published experiment.

    Attributes:
        name: What ``--preset`` takes.
        about: What it is for, and what it leaves to be given.
        source: Paper and table.
        run: Settings, keys of ``gradrank train --config``.
    """

    name: str
    about: str
    source: str
    run: Mapping[str, Any]


@functools.cache
def presets() -> dict[str, Preset]:
    """Return every preset by name, in the order of the papers' tables."""
    found: dict[str, Preset] = {}
    for stem in _FILES:
        text = files("gradrank.presets").joinpath(f"{stem}.yaml").read_text(encoding="utf-8")
        data = yaml.safe_load(text)
        for variant, own in data["variants"].items():
            name = f"{stem}-{variant}"
            run = {**data["run"], **own}
            found[name] = Preset(name, " ".join(data["about"].split()), data["source"], run)
    return found


def find_preset(name: str) -> Preset:
    """Look a preset up.

    Args:
        name: Its name.

    Returns:
        The preset.

    Raises:
        OptionError: If there is none of that name.
    """
    known = presets()
    if name not in known:
        raise OptionError(f"preset '{name}' is unknown. {nearest(name, known)}")
    return known[name]
