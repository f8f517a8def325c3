"""``gradrank doctor PATH``: what a file or folder is, and whether it is whole."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from gradrank.cli import runfile
from gradrank.cli.doctor_findings import NO, NOTE, OK, Finding, guarded
from gradrank.core.errors import DataError
from gradrank.core.files import read_json
from gradrank.core.marker import is_complete
from gradrank.core.plan import Plan
from gradrank.record import RunRecord
from gradrank.report.text import clean, count, plural

Probe = Callable[[Path], Iterator[Finding]]
ADAPTER, CONFIG, PLAN, RECORD = "adapter_config.json", "config.json", "plan.json", "record.json"
MEASURED = "measurement.safetensors"
_AGAIN = "make it again, or fetch it again: what is there is not used"


def examine(path: Path) -> list[Finding]:
    """Find out what stands at a path and whether it is whole.

    Args:
        path: A file or a folder.

    Returns:
        The findings; one that is ``no`` means damage.

    Raises:
        DataError: If nothing is there.
    """
    if not path.exists():
        raise DataError(
            f"'{path}' does not exist. Give a model, an adapter, the folder of a run or of a "
            "comparison, or a plan.json, record.json, measurement or configuration file."
        )
    return _folder(path) if path.is_dir() else _one(path, _probe_of(path))


def _one(path: Path, probe: Probe) -> list[Finding]:
    section = f"'{path}'"
    found = guarded(section, clean(path.name), lambda: list(probe(path)))
    return [
        Finding(section, one.name, one.status, clean(one.text, 600),
                one.remedy or (_AGAIN if one.status == NO else ""))
        for one in found
    ]  # fmt: skip


def _probe_of(path: Path) -> Probe:
    """Choose by the file's name, and where that tells nothing by what JSON says it is."""
    known = {PLAN: _plan, RECORD: _record, MEASURED: _measurement}
    if path.name in known:
        return known[path.name]
    if path.suffix == ".json":
        schema = ""
        data = read_json(path, "file")
        if isinstance(data, dict):
            schema = str(data.get("schema", ""))
        return {"gradrank.plan/1": _plan, "gradrank.record/1": _record}.get(schema, _other)
    if path.suffix in {".yaml", ".yml"}:
        return _settings
    return _weights if path.suffix == ".safetensors" else _other


def _folder(path: Path) -> list[Finding]:
    found: list[Finding] = []
    if (path / ADAPTER).is_file():
        found += _one(path, _adapter)
    elif (path / CONFIG).is_file():
        found += _one(path, _model)
    elif (path / "recipe.yaml").is_file() and (path / "runs").is_dir():
        found += _one(path, _grid)
    elif any((path / name).exists() for name in (PLAN, RECORD, "config.yaml", "checkpoints")):
        found += _run(path)
    else:
        told = "a folder without a model, adapter, plan, record or comparison"
        found.append(Finding(f"'{path}'", clean(path.name), NOTE, told))
    left = sorted(item.name for item in path.glob(".*.tmp*"))
    if left:
        told = f"{plural(len(left), 'temporary file')} of a process that was killed ('{left[0]}')"
        found.append(Finding(f"'{path}'", "left over", NOTE, clean(told), "delete what no process "
                             "is writing any more"))  # fmt: skip
    return found


def _run(path: Path) -> list[Finding]:
    found: list[Finding] = []
    parts: Mapping[str, Probe] = {
        "config.yaml": _settings,
        PLAN: _plan,
        MEASURED: _measurement,
        RECORD: _record,
    }
    for name, probe in parts.items():
        if (path / name).is_file():
            found += _one(path / name, probe)
    if (path / "adapter" / ADAPTER).is_file():
        found += _one(path / "adapter", _adapter)
        found += _one(path, _agreement)
    if (path / "checkpoints").is_dir():
        found += _one(path / "checkpoints", _checkpoints)
    if not (path / RECORD).is_file() and not (path / PLAN).is_file():
        fix = "resume it with 'gradrank train --resume', if there is a whole checkpoint"
        found.append(Finding(f"'{path}'", "run", NOTE, "no record: the run has not ended", fix))
    return found


def _plan(path: Path) -> Iterator[Finding]:
    yield Finding("", "plan", OK, str(Plan.load(path)))


def _record(path: Path) -> Iterator[Finding]:
    record = RunRecord.load(path)
    if record.status == "finished":
        yield Finding("", "record", OK, f"{record!r}")
    else:
        fix = "'gradrank train --resume' continues it" if record.status == "interrupted" else ""
        yield Finding("", "record", NOTE, f"{record!r}", fix)


def _measurement(path: Path) -> Iterator[Finding]:
    from gradrank.signals.measurement import Measurement

    yield Finding("", "measurement", OK, repr(Measurement.load(path)))


def _settings(path: Path) -> Iterator[Finding]:
    data = runfile.read(path)
    what = "recipe of a comparison" if {"methods", "budgets"} <= set(data) else "configuration"
    if what.startswith("recipe"):
        from gradrank.lab.recipes import read

        read(path)
    yield Finding("", what, OK, f"{plural(len(data), 'key')}")


def _adapter(path: Path) -> Iterator[Finding]:
    from gradrank.serving.engines.registry import ENGINES
    from gradrank.serving.facts import describe
    from gradrank.serving.reading import read_adapter

    facts = describe(path)
    read_adapter(path)  # refuses damage, and weights that are not finite
    ranks = sorted(set(facts.ranks.values()))
    spread = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    base = facts.base_model or "an unnamed model"
    told = f"{count(facts.parameters)} parameters in {plural(len(facts.ranks), 'target')}, "
    yield Finding("", "adapter", OK, f"{told}{spread}, for {base}")
    for name, engine in ENGINES.items():
        why = engine.judge(facts)
        if why:
            fix = f"gradrank export {path} --target {name} --out FOLDER"
            yield Finding("", f"as it is, in {name}", NOTE, "; ".join(why), fix)


def _agreement(path: Path) -> Iterator[Finding]:
    """Compare the ranks that were recorded last with those of the adapter."""
    from gradrank.serving.facts import describe

    if not (path / RECORD).is_file():
        return
    record = RunRecord.load(path / RECORD)
    if not record.ranks_over_time:
        return
    told = {name: rank for name, rank in record.ranks_over_time[-1][1].items() if rank}
    kept = {target.name: rank for target, rank in describe(path / "adapter").ranks.items()}
    odd = sorted(name for name in {*told, *kept} if told.get(name) != kept.get(name))
    if odd:
        first = f"'{odd[0]}': {told.get(odd[0], 0)} and {kept.get(odd[0], 0)}"
        text = f"record and adapter differ in the rank of {plural(len(odd), 'target')} ({first})"
        yield Finding("", "record and adapter", NO, text, "one of them is of another run")
    else:
        yield Finding("", "record and adapter", OK, "the same ranks")


def _checkpoints(path: Path) -> Iterator[Finding]:
    every = sorted(item for item in path.iterdir() if item.is_dir())
    whole = [item.name for item in every if is_complete(item)]
    told = f"{len(whole)} of {plural(len(every), 'checkpoint')} whole"
    fix = "'gradrank train --resume' takes the newest whole one"
    yield Finding("", "checkpoints", OK if len(whole) == len(every) else NOTE, told, fix)


def _grid(path: Path) -> Iterator[Finding]:
    from gradrank.lab.recipes import read

    read(path / "recipe.yaml")
    files = sorted((path / "runs").glob("*.json"))
    broken = []
    for file in files:
        try:
            RunRecord.load(file)
        except DataError as error:
            broken.append(str(error))
    told = f"{plural(len(files), 'record')} of a comparison"
    if broken:
        text = f"{told}, {len(broken)} of them damaged: {broken[0]}"
        yield Finding("", "comparison", NO, text, "delete the damaged records; 'gradrank compare' "
                      "runs them again")  # fmt: skip
    else:
        yield Finding("", "comparison", OK, told)


def _model(path: Path) -> Iterator[Finding]:
    config = read_json(path / CONFIG, "configuration")
    kind = config.get("model_type") if isinstance(config, dict) else None
    if not kind:
        text = "config.json names no model_type"
        yield Finding("", "model", NO, text, "save the model again with save_pretrained")
        return
    files = sorted(path.glob("*.safetensors"))
    if not files:
        pickles = sorted(path.glob("*.bin"))
        text = "only pickles (.bin), which can run code" if pickles else "no weights"
        fix = "save it again with save_pretrained, as .safetensors"
        yield Finding("", "weights", NO, f"{text}; only .safetensors files are read", fix)
        return
    missing = sorted(_shards(path) - {file.name for file in files})
    if missing:
        text = f"{plural(len(missing), 'shard')} missing ('{missing[0]}')"
        yield Finding("", "weights", NO, text, "fetch the model again")
    for file in files:
        yield from guarded("", file.name, lambda file=file: list(_weights(file)))
    yield Finding("", "model", OK, f"{kind}, {plural(len(files), 'file')} of weights")
    names = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "vocab.txt")
    if not any((path / name).is_file() for name in names):
        text = "neither a tokenizer nor an image processor stands beside the weights"
        yield Finding("", "tokenizer", NOTE, text, "save it into the same folder")


def _shards(path: Path) -> set[str]:
    index = path / "model.safetensors.index.json"
    data = read_json(index, "index") if index.is_file() else {}
    shards = data.get("weight_map", {}) if isinstance(data, dict) else {}
    return {str(name) for name in shards.values()} if isinstance(shards, dict) else set()


def _weights(path: Path) -> Iterator[Finding]:
    """Open a safetensors file: its header tells its exact size, so a cut one is refused."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:
            names = list(file.keys())
            own = json.loads((file.metadata() or {}).get("gradrank", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"'{path.name}' is damaged: {str(error)[:200]}.") from error
    if isinstance(own, dict) and own.get("schema") == "gradrank.measurement/1":
        yield from _measurement(path)
    else:
        yield Finding("", path.name, OK, f"{plural(len(names), 'tensor')}, whole")


def _other(path: Path) -> Iterator[Finding]:
    yield Finding("", clean(path.name), NOTE, "nothing that gradrank reads")
