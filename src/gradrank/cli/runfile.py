"""``--config run.yaml`` and ``--preset NAME``: the flags of a verb as keys; flags override them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import yaml

from gradrank.core.errors import DataError, OptionError, nearest
from gradrank.core.files import write_text
from gradrank.presets.strict import read_yaml
from gradrank.record.checks import shown

_CONFIG, _PRESET, _UNUSED = "gradrank.config", "gradrank.preset", "gradrank.unused"
# Two ways to say one thing: where a file gives one of them, a preset's other one is not looked at.
_EITHER = ("steps", "epochs")


def use(context: click.Context, _parameter: click.Parameter, path: Path | None) -> None:
    """Read the file and make its values the defaults of the verb's flags (a click callback).

    Args:
        context: Context of the verb.
        path: The file, or None.
    """
    if path is not None:
        set_defaults(context, read(path), f"config '{path}'")


def use_preset(context: click.Context, _parameter: click.Parameter, name: str | None) -> str | None:
    """Make a preset's values the defaults of the verb's flags, below the file's (a callback).

    Args:
        context: Context of the verb.
        name: The preset's name, or None.

    Returns:
        The name.
    """
    if name is not None:
        from gradrank.presets import find_preset

        context.meta[_PRESET] = typed(context, find_preset(name).run, f"preset '{name}'")
        _merge(context)
    return name


def only_typed(context: click.Context, parameter: click.Parameter, value: bool) -> bool:
    """Refuse what a file may not ask for, such as running code (a click callback).

    Args:
        context: Context of the verb.
        parameter: The flag.
        value: Its value.

    Returns:
        The value.

    Raises:
        OptionError: If it is on, and not the command line said so.
    """
    source = context.get_parameter_source(str(parameter.name))
    if value and source is not click.core.ParameterSource.COMMANDLINE:
        raise OptionError(untyped(key_of(parameter), "the configuration"))
    return value


def untyped(key: str, where: str) -> str:
    """Return the message for a key that only the command line may set.

    Args:
        key: The key.
        where: What asks for it.
    """
    flag = "--" + key.replace("_", "-")
    return (
        f"{where} has {key}: true, which runs code that comes with a model; a file may not ask for "
        f"that. If you trust the model, add {flag} to the command; if not, take the key out."
    )


def set_defaults(context: click.Context, data: Mapping[str, Any], where: str) -> None:
    """Make values the defaults of the verb's flags.

    Args:
        context: Context of the verb.
        data: Values by key.
        where: Where they come from, for messages.
    """
    context.meta[_CONFIG] = typed(context, data, where)
    _merge(context)
    mine = {key_of(p) for p in context.command.params}
    context.meta[_UNUSED] = [key for key in map(_key, data) if key not in mine]


def _merge(context: click.Context) -> None:
    preset, config = from_preset(context), from_file(context)
    covered = _EITHER if any(key in config for key in _EITHER) else ()
    kept = {key: value for key, value in preset.items() if key not in covered}
    context.default_map = {**kept, **config}


def typed(context: click.Context, data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Check keys and types, and convert the values.

    Args:
        context: Context of the verb.
        data: Values by key, hyphens or underscores.
        where: Where they come from, for messages.

    Returns:
        Values by the flags' variable names.

    Raises:
        OptionError: If a key is unknown or a value has the wrong type.
    """
    from gradrank.cli.options import known_keys

    parameters = {key_of(p): p for p in context.command.params if p.expose_value}
    # One file may serve 'plan' and 'train': what only the other takes is no mistake.
    shared = known_keys() if "method" in parameters or "methods" in parameters else set()
    values: dict[str, Any] = {}
    for raw, value in data.items():
        key = _key(raw)
        if key in parameters and str(parameters[key].name) in values:
            raise OptionError(f"{where} has the key '{raw}' twice. Leave one of them out.")
        if key in parameters and value is not None:
            values[str(parameters[key].name)] = _typed(parameters[key], value, key, where, context)
        elif key not in parameters and key not in shared:
            raise OptionError(f"{where} has the unknown key '{raw}'. {nearest(key, parameters)}")
    return values


def from_file(context: click.Context) -> Mapping[str, Any]:
    """Return the values that came from the configuration file, by the flag's variable name.

    Args:
        context: Context of the verb.
    """
    return context.meta.get(_CONFIG, {})


def from_preset(context: click.Context) -> Mapping[str, Any]:
    """Return the values that came from a preset, by the flag's variable name.

    Args:
        context: Context of the verb.
    """
    return context.meta.get(_PRESET, {})


def unused(context: click.Context) -> Sequence[str]:
    """Return the keys of the file that this verb does not take, but another does.

    Args:
        context: Context of the verb.
    """
    return context.meta.get(_UNUSED, ())


def key_of(parameter: click.Parameter) -> str:
    """Return the key of a flag: its long name with underscores.

    Args:
        parameter: The flag or argument.
    """
    long = [name for name in parameter.opts if name.startswith("--")]
    return (long[0][2:] if long else str(parameter.name)).replace("-", "_")


def read(path: Path) -> dict[str, Any]:
    """Read a configuration file.

    Args:
        path: The file.

    Returns:
        Its values by key.

    Raises:
        DataError: If it is missing, too large, or no YAML mapping.
    """
    data = read_yaml(path, "config")
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise DataError(f"config '{path}' holds {type(data).__name__}; it must map keys to values.")
    return data


def write(path: Path, values: Mapping[str, Any], verb: str) -> None:
    """Write a configuration that replays a run.

    Args:
        path: The file; replaced if it exists.
        values: Values by key; None is left out, being the default.
        verb: The verb that reads it.
    """
    head = f"# Replay: gradrank {verb} --config {path.name} --out OTHER\n"
    known = {key: value for key, value in values.items() if value is not None}
    write_text(path, head + yaml.safe_dump(known, sort_keys=False, allow_unicode=True))


def _typed(
    parameter: click.Parameter, value: Any, key: str, where: str, context: click.Context
) -> Any:
    """Return a value from YAML as click's own text form would give it, or refuse its type."""
    wants = _wanted(parameter)
    if key == "option" and isinstance(value, dict):
        value = [f"{name}={_plain(item)}" for name, item in value.items()]
    if parameter.multiple or parameter.nargs == -1:
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, str) for item in items):
            raise OptionError(f"{where}: key '{key}' is {shown(value)}; it takes a list of texts.")
        return tuple(items)
    if isinstance(value, list) and wants == "text" and all(isinstance(i, str) for i in value):
        return ",".join(value)
    if not _fits(value, wants, key):
        raise OptionError(f"{where}: key '{key}' is {shown(value)}; it takes {_ARTICLES[wants]}.")
    try:
        # YAML 1.1 reads 1e-3 as text; click's own conversion reads it as the number it is.
        return parameter.type_cast_value(context, str(value) if wants == "text" else value)
    except click.BadParameter as error:
        raise OptionError(f"{where}: key '{key}': {error.message}") from error


_ARTICLES = {
    "switch": "true or false",
    "whole": "a whole number",
    "number": "a number",
    "text": "a text",
}


def _wanted(parameter: click.Parameter) -> str:
    if getattr(parameter, "is_flag", False):
        return "switch"
    if isinstance(parameter.type, click.types.IntParamType):
        return "whole"
    return "number" if isinstance(parameter.type, click.types.FloatParamType) else "text"


def _fits(value: Any, wants: str, key: str) -> bool:
    if wants == "switch" or isinstance(value, bool):
        return wants == "switch" and isinstance(value, bool)
    if wants == "whole":
        return isinstance(value, int)
    if wants == "number":
        return isinstance(value, int | float | str)
    return isinstance(value, str) or (key == "budget" and isinstance(value, int))


def _key(raw: Any) -> str:
    return str(raw).replace("-", "_")


def _plain(value: Any) -> str:
    return "none" if value is None else str(value)
