"""Row factors in a measurement: kept when asked for, merged, saved, checked when read."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import gradrank as gr
from cases import CASES, batches
from gradrank.lab.measured import narrow
from gradrank.signals.measurement import Measurement, merge
from oracles.gradients import weight_gradients

LLAMA = CASES["llama"]
DATA = batches(LLAMA, 6)
PARTS = {"whole": slice(None), "even": slice(0, None, 2), "odd": slice(1, None, 2)}


def measure(indices: Any = range(6), rows: bool = True, directions: int = 40) -> Measurement:
    chosen = [DATA[i] for i in indices]
    signal = gr.MeanGradient(directions, rows=rows)
    return gr.measure(
        LLAMA.model(), chosen, signal, ["q_proj", "down_proj"], num_batches=len(chosen)
    )


@pytest.fixture(scope="module")
def found() -> Measurement:
    return measure()


def grams(measurement: Measurement) -> dict[tuple[str, str], torch.Tensor]:
    kept = measurement.need_mean_gradient().rows
    return {
        (part, name): factors.double() @ factors.double().T
        for part, named in kept.items()
        for name, factors in named.items()
    }


@pytest.mark.parametrize("part", list(PARTS))
def test_they_are_those_of_the_dense_mean_gradient(found: Measurement, part: str) -> None:
    names = [target.name for target in found.targets]
    dense = weight_gradients(LLAMA.model(), DATA, names)
    for name in names:
        mean = torch.stack(dense[name][PARTS[part]]).mean(0)
        wanted = mean @ mean.T
        torch.testing.assert_close(
            grams(found)[part, name], wanted, rtol=1e-3, atol=1e-4 * float(wanted.max())
        )


def test_they_are_kept_only_when_asked_for(found: Measurement) -> None:
    plain = measure(rows=False)
    assert plain.need_mean_gradient().rows == {}
    assert (plain.info["rows"], found.info["rows"]) == (False, True)
    for part, named in plain.need_mean_gradient().values.items():
        for name, values in named.items():
            assert torch.equal(values, found.need_mean_gradient().values[part][name])


def test_they_survive_saving_and_are_float32(found: Measurement, tmp_path: Path) -> None:
    found.save(tmp_path / "m")
    again = Measurement.load(tmp_path / "m")
    for part, named in found.need_mean_gradient().rows.items():
        for name, factors in named.items():
            assert factors.dtype == torch.float32
            assert torch.equal(again.need_mean_gradient().rows[part][name], factors)
    plan = gr.allocate(found, "hybrid", "uniform:2")
    assert gr.allocate(again, "hybrid", "uniform:2").to_dict() == plan.to_dict()


def test_parts_measured_apart_merge_to_the_whole(found: Measurement) -> None:
    merged = merge([measure([0, 1]), measure([2, 3, 4, 5])])
    for key, gram in grams(found).items():
        torch.testing.assert_close(
            grams(merged)[key], gram, rtol=1e-3, atol=1e-4 * float(gram.max())
        )
    with pytest.raises(gr.MeasurementError, match="row factors"):
        merge([measure([0, 1]), measure([2, 3], rows=False)])


def test_narrowing_leaves_what_a_method_would_have_measured(found: Measurement) -> None:
    plain = measure(rows=False)
    part = narrow(found, gr.Waterfill().signals())
    assert part.need_mean_gradient().rows == {}
    assert part.info["rows"] == plain.info["rows"]
    kept = narrow(found, gr.Hybrid().signals())
    assert kept.need_mean_gradient().rows
    assert kept.info == found.info


def _drop(tensors: dict[str, torch.Tensor], key: str) -> None:
    del tensors[key]


def _scale(tensors: dict[str, torch.Tensor], key: str) -> None:
    tensors[key] = tensors[key] * 2


def _nan(tensors: dict[str, torch.Tensor], key: str) -> None:
    tensors[key][0, 0] = float("nan")


def _cut(tensors: dict[str, torch.Tensor], key: str) -> None:
    tensors[key] = tensors[key][1:].contiguous()


def _stray(tensors: dict[str, torch.Tensor], key: str) -> None:
    tensors[key + "x"] = tensors[key].clone()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_drop, "no row factors"),
        (_scale, "hold the energy"),
        (_nan, "no finite numbers"),
        (_cut, "has the shape"),
        (_stray, "do not belong"),
    ],
)
def test_damaged_ones_are_refused(
    found: Measurement, tmp_path: Path, change: Any, words: str
) -> None:
    found.save(tmp_path / "m")
    with safe_open(str(tmp_path / "m"), framework="pt") as file:
        header = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    change(tensors, f"mean-gradient/rows-odd/{found.targets[1].name}")
    save_file(tensors, tmp_path / "m", metadata=header)
    with pytest.raises(gr.MeasurementError, match=words):
        Measurement.load(tmp_path / "m")
