"""Where a model is: built here, carried by a package, in a folder, or on a hub."""

import difflib
from collections.abc import Callable
from pathlib import Path

from gradrank.core.errors import DataError, OptionError, nearest
from gradrank.lab.assets import ASSETS, fetch_asset
from gradrank.lab.tiny import TINY_MODELS

Say = Callable[[str], None] | None


def known_models() -> list[str]:
    """Return the names that need neither a folder nor a hub."""
    return [name for name, asset in ASSETS.items() if asset.kind == "model"] + list(TINY_MODELS)


def locate(spec: str, say: Say) -> tuple[str | None, str, str]:
    """Find a model.

    Args:
        spec: What the user gave.
        say: Receives one line for each thing that takes time.

    Returns:
        Where to load it from (None: it is built here), its name, and its source in words.

    Raises:
        OptionError: If the name is that of data.
        DataError: If it cannot be anything but a name or path that does not exist.
    """
    if spec in TINY_MODELS:
        return None, spec, "built here with seeded random weights"
    if spec in ASSETS:
        asset = ASSETS[spec]
        if asset.kind != "model":
            raise OptionError(f"'{spec}' is data, not a model. {nearest(spec, known_models())}")
        return str(fetch_asset(spec, say)), spec, f"{asset.source}, {asset.licence}"
    path = Path(spec).expanduser()
    if path.exists():
        _check_folder(path)
        return str(path), path.resolve().name, "local folder"
    close = difflib.get_close_matches(spec, known_models(), n=1, cutoff=0.8)
    if close or path.is_absolute() or spec.startswith((".", "~")) or len(path.parts) > 2:
        # Asking a hub for a mistyped name or a path would only cost the user a long wait.
        raise DataError(
            f"model '{spec}' does not exist: no such folder. {nearest(spec, known_models())}"
        )
    return spec, spec, "model hub"


def _check_folder(path: Path) -> None:
    if not path.is_dir():
        raise DataError(f"model '{path}' is a file. Give the folder that holds config.json.")
    if not (path / "config.json").is_file():
        extra = (
            " It holds an adapter: give the folder of its base model."
            if (path / "adapter_config.json").is_file()
            else ""
        )
        raise DataError(f"folder '{path}' holds no model: config.json is missing.{extra}")
    if not list(path.glob("*.safetensors")):
        pickles = sorted(item.name for item in path.glob("*.bin"))
        found = f"only pickle files ({', '.join(pickles)})" if pickles else "no weights"
        raise DataError(
            f"folder '{path}' holds {found}; weights are read from .safetensors files only, "
            f"because a pickle can run code. Save the model again with save_pretrained."
        )
