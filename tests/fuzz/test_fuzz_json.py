"""Plans, records, states and measurements that anybody may have written or damaged."""

import functools
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from safetensors.torch import save_file

import gradrank as gr
from cases import CASES, batches, hand_plan, tiny_llama
from evidence.evidence_cases import record
from fuzz.mutations import SEEDS, damaged, fuzzed, read_or_refused, spoilt
from gradrank.adapters import sidecar
from gradrank.core import marker
from gradrank.core.files import read_json
from gradrank.core.plan import Plan
from gradrank.core.text import json_text
from gradrank.evidence.comparison import compare
from gradrank.lab.checkpoints import STATE, last_complete, read_state, seal
from gradrank.record import RunRecord
from gradrank.signals.measurement import Measurement

MODEL = tiny_llama()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@functools.cache
def measured() -> Measurement:
    made = batches(CASES["llama"], 4)
    return gr.measure(MODEL, made, signal=("spectrum", "mean-gradient"), targets="all-linear")


@pytest.fixture(scope="module")
def plan() -> dict[str, Any]:
    return gr.allocate(measured(), method="gard", budget="uniform:2").to_dict()


def round_trip(path: Path, kind: Any) -> None:
    """What was read can be written, and is then read as the same."""
    found = read_or_refused(lambda: kind.load(path))
    if found is not None:
        again = path.with_suffix(".again")
        found.save(again, overwrite=True)
        assert kind.load(again) == found
        str(found)


def both(folder: Path, data: Any, seed: int, kind: Any) -> None:
    path = folder / "file.json"
    path.write_text(json.dumps(damaged(data, seed)), encoding="utf-8")
    round_trip(path, kind)
    path.write_bytes(spoilt(json_text(data).encode(), seed))
    round_trip(path, kind)


@fuzzed(60)
@given(seed=SEEDS)
def test_plans(folder: Path, plan: dict[str, Any], seed: int) -> None:
    both(folder, plan, seed, Plan)


@fuzzed(30)
@given(seed=SEEDS)
def test_plans_with_partitions(folder: Path, seed: int) -> None:
    data = hand_plan(MODEL).to_dict()
    for target in data["targets"].values():
        half = (1 << target["d_out"] // 2) - 1
        target["partition"] = {
            "d_out": target["d_out"], "rank": 2, "supplementary_rank": 1, "dominant": f"{half:x}",
        }  # fmt: skip
        target["rank"] = 3
    data["budget"]["parameters"] = data["budget"]["value"] = 10**6
    assert Plan.from_dict(data).partitions
    both(folder, data, seed, Plan)


@fuzzed(30)
@given(seed=SEEDS)
def test_plans_that_load_can_be_used(plan: dict[str, Any], seed: int) -> None:
    found = read_or_refused(lambda: Plan.from_dict(json.loads(json.dumps(damaged(plan, seed)))))
    if found is not None:
        read_or_refused(lambda: gr.apply(found, tiny_llama()))


@fuzzed(60)
@given(seed=SEEDS)
def test_records(folder: Path, seed: int) -> None:
    data = json.loads(json.dumps(record().to_dict()))
    both(folder, data, seed, RunRecord)


@fuzzed(30)
@given(seed=SEEDS)
def test_comparisons(seed: int) -> None:
    runs = [
        json.loads(json.dumps(record(method=method, seed=number).to_dict()))
        for method in ("uniform", "gard")
        for number in (0, 1)
    ]
    broken = [damaged(run, seed + i, 2) for i, run in enumerate(runs)]

    def work() -> Any:
        records = [RunRecord.from_dict(data) for data in (*broken[:2], *runs[2:])]
        return compare(records)

    found = read_or_refused(work)
    if found is not None:
        read_or_refused(lambda: gr_report(found))


def gr_report(found: Any) -> None:
    from gradrank.report.comparison import build_comparison

    assert "<script>x" not in build_comparison(found)


STATE_OF_A_RUN = {
    "settings": {"lr": 0.1, "seed": 0},
    "step": 2,
    "losses": [[1, 0.5], [2, 0.4]],
    "eval_losses": [[2, 0.4]],
    "tokens": 64,
    "train_seconds": 1.5,
    "eval_seconds": 0.5,
}


@fuzzed(50)
@given(seed=SEEDS)
def test_states_of_checkpoints(tmp_path_factory: Any, folder: Path, seed: int) -> None:
    place = folder / "checkpoint-2"
    place.mkdir(exist_ok=True)
    seal(place, STATE_OF_A_RUN)
    (place / STATE).write_text(json.dumps(damaged(STATE_OF_A_RUN, seed)))
    (place / marker.MARKER).unlink()
    marker.seal(place)
    found = read_or_refused(lambda: read_state(place, {"lr": 0.1, "seed": 0}))
    if found is not None:
        assert found["step"] >= 0
        assert all(len(point) == 2 for point in found["losses"])
    (place / STATE).write_bytes(spoilt(json_text(STATE_OF_A_RUN).encode(), seed))
    assert last_complete(folder) in {None, place}


@fuzzed(40)
@given(seed=SEEDS)
def test_markers(folder: Path, seed: int) -> None:
    place = folder / "checkpoint-3"
    place.mkdir(exist_ok=True)
    seal(place, STATE_OF_A_RUN)
    good = json.loads((place / marker.MARKER).read_text())
    good["files"]["/dev/zero"] = {"bytes": 0, "sha256": ""}
    good["files"]["../checkpoint-3/x"] = {"bytes": 0, "sha256": ""}
    (place / marker.MARKER).write_text(json.dumps(damaged(good, seed)))
    read_or_refused(lambda: marker.is_complete(place, STATE))
    (place / marker.MARKER).write_bytes(spoilt(json_text(good).encode(), seed))
    read_or_refused(lambda: marker.is_complete(place, STATE))


def safetensors_bytes(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def rewritten(path: Path, header: Any, data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@fuzzed(60)
@given(seed=SEEDS)
def test_measurements(folder: Path, seed: int) -> None:
    path = folder / "m.safetensors"
    measured().save(path, overwrite=True, sketches=bool(seed % 2))
    header, data = safetensors_bytes(path)
    about = json.loads(header["__metadata__"]["gradrank"])
    kind = seed % 3
    if kind == 0:
        header["__metadata__"]["gradrank"] = json.dumps(damaged(about, seed))
        rewritten(path, header, data)
    elif kind == 1:
        rewritten(path, damaged(header, seed), data)
    else:
        path.write_bytes(spoilt(path.read_bytes(), seed))
    found = read_or_refused(lambda: Measurement.load(path))
    if found is not None:
        found.save(path, overwrite=True)
        assert Measurement.load(path).targets == found.targets
        read_or_refused(lambda: found.summary(0.9))
        read_or_refused(lambda: gr.allocate(found, method="gard", budget="uniform:2"))


@fuzzed(50)
@given(seed=SEEDS)
def test_sidecars(folder: Path, seed: int) -> None:
    path = folder / sidecar.FILE
    facts = {"step": 2, "ranks": {"a": 2}, "partitions": {}, "scaling": {"a": 1.0}}
    facts["partitions"] = {"a": {"d_out": 8, "rank": 2, "supplementary_rank": 1, "dominant": "0f"}}
    sidecar.write(path, facts, {"course/x": torch.ones(3)})
    header, data = safetensors_bytes(path)
    if seed % 2:
        about = json.loads(header["__metadata__"]["gradrank"])
        header["__metadata__"]["gradrank"] = json.dumps(damaged(about, seed))
        rewritten(path, header, data)
    else:
        path.write_bytes(spoilt(path.read_bytes(), seed))
    read_or_refused(lambda: sidecar.read(path))
    read_or_refused(lambda: sidecar.stored_partitions(path))


@fuzzed(30)
@given(seed=SEEDS)
def test_ranks_of_adapters(folder: Path, seed: int) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({f"base_model.model.{n}.lora_A.weight": torch.ones(2, 3) for n in "ab"}, path)
    header, data = safetensors_bytes(path)
    rewritten(path, damaged(header, seed), data)
    read_or_refused(lambda: sidecar.stored_ranks(folder))


@pytest.mark.parametrize("kind", ["fifo", "device", "loop", "folder", "dangling"])
def test_what_is_no_ordinary_file(tmp_path: Path, kind: str) -> None:
    import os

    path = tmp_path / "x.json"
    makers = {
        "fifo": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
        "loop": lambda: path.symlink_to(path),
        "folder": path.mkdir,
        "dangling": lambda: path.symlink_to(tmp_path / "absent"),
    }
    makers[kind]()
    assert read_or_refused(lambda: read_json(path, "plan")) is None
    assert read_or_refused(lambda: Measurement.load(path)) is None
