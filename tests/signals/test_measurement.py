"""Measurements: saved, loaded, merged, halved, summarised; damaged files refused."""

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import gradrank as gr
from cases import CASES, batches
from gradrank.ops.spectrum import effective_rank, eigenvalues, gram_matrix
from gradrank.signals.measurement import Measurement, merge

LLAMA = CASES["llama"]
DATA = batches(LLAMA, 6)
SIGNALS: list[Any] = [gr.Spectrum(sketch_dim=8), gr.MeanGradient(7)]


def measure(indices: Any = range(6), signal: Any = SIGNALS, **options: Any) -> Measurement:
    chosen = [DATA[i] for i in indices]
    options.setdefault("targets", ["q_proj", "up_proj"])
    return gr.measure(LLAMA.model(), chosen, signal, num_batches=len(chosen), **options)


@pytest.fixture(scope="module")
def whole() -> Measurement:
    return measure()


def assert_equal(found: Measurement, wanted: Measurement, tolerance: float = 0.0) -> None:
    assert found.targets == wanted.targets
    for target in wanted.targets:
        name = target.name
        torch.testing.assert_close(
            found.gram(name), wanted.gram(name), rtol=tolerance, atol=tolerance * 1e-3
        )
        for part in ("whole", "even", "odd"):
            torch.testing.assert_close(
                found.need_mean_gradient().values[part][name],
                wanted.need_mean_gradient().values[part][name],
                rtol=max(tolerance, 1e-12) * 1e3,
                atol=1e-7,
            )


@pytest.mark.parametrize("sketches", [False, True])
def test_round_trip(tmp_path: Path, whole: Measurement, sketches: bool) -> None:
    path = tmp_path / "m.safetensors"
    whole.save(path, sketches=sketches)
    again = Measurement.load(path)
    assert_equal(again, whole)
    assert again.info == json.loads(json.dumps(dict(whole.info)))
    assert again.batches == whole.batches == 6
    assert again.need_mean_gradient().counts == {"whole": 6, "even": 3, "odd": 3}
    assert bool(again.need_spectrum().rows) == sketches
    assert again.summary() == whole.summary()
    with pytest.raises(gr.OutputError, match="exists"):
        whole.save(path)
    whole.save(path, overwrite=True)


def test_round_trip_of_each_signal_alone(tmp_path: Path) -> None:
    for signal in ("spectrum", "mean-gradient", gr.Spectrum("dense")):
        found = measure(signal=signal)
        found.save(tmp_path / "m", overwrite=True)
        again = Measurement.load(tmp_path / "m")
        assert (again.spectrum is None) == (found.spectrum is None)
        assert again.batches == 6
        assert again.summary() == found.summary()


def test_a_missing_signal_is_asked_for_by_name() -> None:
    with pytest.raises(gr.MeasurementError, match="no 'mean-gradient' signal"):
        measure(signal="spectrum").need_mean_gradient()
    with pytest.raises(gr.MeasurementError, match="no 'spectrum' signal"):
        measure(signal="mean-gradient").gram("x")


# --- merging ---------------------------------------------------------------------------------


def test_parts_measured_apart_merge_to_the_whole(whole: Measurement) -> None:
    parts = [measure([0, 1]), measure([2, 3]), measure([4, 5])]
    merged = merge(parts)
    assert_equal(merged, whole, 1e-5)
    assert merged.info["examples"] == whole.info["examples"]
    assert merged.info["tokens"] == whole.info["tokens"]


def test_merging_is_associative() -> None:
    a, b, c = measure([0, 1]), measure([2, 3]), measure([4, 5])
    assert_equal(merge([merge([a, b]), c]), merge([a, merge([b, c])]), 1e-6)


def test_interleaving_deals_batches_in_turn(whole: Measurement) -> None:
    merged = merge([measure([0, 2, 4, 5]), measure([1, 3])], interleave=True)
    for target in whole.targets:
        torch.testing.assert_close(merged.gram(target.name), whole.gram(target.name))


def test_merging_after_loading_needs_the_sketches(tmp_path: Path) -> None:
    a, b = measure([0, 1], "spectrum"), measure([2, 3], "spectrum")
    a.save(tmp_path / "a", sketches=True)
    a.save(tmp_path / "b")
    merged = merge([Measurement.load(tmp_path / "a"), b])
    name = a.targets[0].name
    torch.testing.assert_close(merged.gram(name), merge([a, b]).gram(name))
    with pytest.raises(gr.MeasurementError, match="loaded without its sketches"):
        merge([Measurement.load(tmp_path / "b"), b])


def test_what_does_not_belong_together_is_not_merged() -> None:
    first = measure([0, 1])
    for other in (
        measure([2, 3], seed=1),
        measure([2, 3], targets="q_proj"),
        measure([2, 3], signal="spectrum"),
        measure([2, 3], signal=[gr.Spectrum(sketch_dim=9), gr.MeanGradient(7)]),
        measure([2, 3], signal=[gr.Spectrum(sketch_dim=8), gr.MeanGradient(8)]),
    ):
        with pytest.raises(gr.MeasurementError, match="differ in"):
            merge([first, other])
    dense = measure([0, 1], gr.Spectrum("dense"))
    with pytest.raises(gr.MeasurementError, match="dense"):
        merge([dense, dense])
    with pytest.raises(gr.MeasurementError, match="no measurement"):
        merge([])


# --- halves and subsets ----------------------------------------------------------------------


def test_a_subset_is_what_measuring_it_would_have_given(whole: Measurement) -> None:
    chosen = [4, 0, 3]
    found, wanted = whole.need_spectrum().subset(chosen), measure(chosen)
    for target in whole.targets:
        torch.testing.assert_close(found.gram[target.name], wanted.gram(target.name))
        torch.testing.assert_close(found.gram[target.name], gram_matrix(found.rows[target.name]))


def test_halves_share_the_batches_out() -> None:
    spectrum = measure(range(5), "spectrum")
    pairs = spectrum.halves(4)
    assert len(pairs) == 4
    assert all((a.batches, b.batches) == (2, 3) for a, b in pairs)
    name = spectrum.targets[0].name
    diagonal = torch.sort(spectrum.gram(name).diagonal() * 5).values
    for a, b in pairs:
        both = torch.cat([a.gram(name).diagonal() * 2, b.gram(name).diagonal() * 3])
        torch.testing.assert_close(torch.sort(both).values, diagonal)
    first = [a.gram(name) for a, _ in pairs]
    again = [a.gram(name) for a, _ in spectrum.halves(4)]
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert len({tuple(x.reshape(-1).tolist()) for x in first}) > 1


def test_the_mean_gradient_has_one_split(whole: Measurement) -> None:
    ((even, odd),) = whole.halves(8)
    wanted = [measure([0, 2, 4]), measure([1, 3, 5])]
    for half, measured in zip((even, odd), wanted, strict=True):
        assert half.batches == 3
        for target in whole.targets:
            name = target.name
            torch.testing.assert_close(half.gram(name), measured.gram(name))
            torch.testing.assert_close(
                half.need_mean_gradient().values["whole"][name],
                measured.need_mean_gradient().values["whole"][name],
                rtol=1e-3,
                atol=1e-6,
            )
    assert measure([0]).halves(8) == []


# --- summaries -------------------------------------------------------------------------------


def test_the_summary_holds_what_records_and_reports_need(whole: Measurement) -> None:
    summary = whole.summary(energy=0.7)
    json.dumps(summary, allow_nan=False)
    assert summary["batches"] == 6
    assert summary["energy_threshold"] == 0.7
    assert summary["estimator"] == "sketch"
    assert (summary["sketch_dim"], summary["directions"], summary["seed"]) == (8, 7, 0)
    assert summary["model"] == "LlamaForCausalLM"
    assert summary["base_parameters"] == sum(p.numel() for p in LLAMA.model().parameters())
    assert (summary["examples"], summary["tokens"]) == (18, 18 * 7)
    for target in whole.targets:
        row = summary["targets"][target.name]
        values = eigenvalues(whole.gram(target.name))
        assert row["eigenvalues"] == pytest.approx(values.tolist())
        assert row["effective_rank"] == int(effective_rank(values, 0.7))
        assert row["energy"] == pytest.approx(float(whole.gram(target.name).trace()))
        assert 1 <= row["stable_rank"] <= row["entropy_rank"] + 1e-9 <= 6 + 1e-6
        assert len(row["singular_values"]) == 7


# --- files of unknown origin -----------------------------------------------------------------


def parts_of(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    with safe_open(str(path), framework="pt") as file:
        header = json.loads(file.metadata()["gradrank"])
        return {key: file.get_tensor(key) for key in file.keys()}, header  # noqa: SIM118


def first(tensors: dict[str, torch.Tensor], kind: str) -> str:
    return next(key for key in tensors if key.startswith(kind))


def edit_tensor(kind: str, change: Any) -> Any:
    def edit(tensors: dict[str, torch.Tensor], header: Any) -> None:
        key = first(tensors, kind)
        tensors[key] = change(tensors[key].clone())

    return edit


def edit_header(**fields: Any) -> Any:
    return lambda _tensors, header: header.update(fields)


def poison(tensor: torch.Tensor) -> torch.Tensor:
    tensor.reshape(-1)[0] = math.nan
    return tensor


def first_target(header: Any, place: int, value: Any) -> None:
    header["targets"][0][place] = value


FAULTS = {
    "gram is not square": edit_tensor("spectrum/gram", lambda t: t[:5]),
    "gram is smaller than others": edit_tensor("spectrum/gram", lambda t: t[:5, :5].contiguous()),
    "gram is no matrix": edit_tensor("spectrum/gram", lambda t: t.reshape(-1)),
    "gram is NaN": edit_tensor("spectrum/gram", poison),
    "gram is infinite": edit_tensor("spectrum/gram", lambda t: t * math.inf),
    "gram is whole numbers": edit_tensor("spectrum/gram", lambda t: t.long()),
    "gram is complex": edit_tensor("spectrum/gram", lambda t: t.to(torch.complex64)),
    "gram is empty": edit_tensor("spectrum/gram", lambda t: t[:0, :0].contiguous()),
    "rows of another length": edit_tensor("spectrum/rows", lambda t: t[:4].contiguous()),
    "rows are a vector": edit_tensor("spectrum/rows", lambda t: t.reshape(-1)),
    "rows are NaN": edit_tensor("spectrum/rows", poison),
    "singular values are NaN": edit_tensor("mean-gradient/whole", poison),
    "singular values are negative": edit_tensor("mean-gradient/even", lambda t: -t),
    "singular values are a matrix": edit_tensor("mean-gradient/odd", lambda t: t[None]),
    "singular values are too many": edit_tensor("mean-gradient/whole", lambda t: t.repeat(40)),
    "singular values are none": edit_tensor("mean-gradient/whole", lambda t: t[:0]),
    "gram is missing": lambda t, _h: t.pop(first(t, "spectrum/gram")),
    "rows are missing": lambda t, _h: t.pop(first(t, "spectrum/rows")),
    "singular values are missing": lambda t, _h: t.pop(first(t, "mean-gradient/odd")),
    "gram of a stranger": lambda t, _h: t.update({"spectrum/gram/x": torch.zeros(6, 6)}),
    "tensor of a stranger": lambda t, _h: t.update({"x": torch.zeros(6, 6)}),
    "part of a stranger": lambda t, _h: t.update({"mean-gradient/third/x": torch.zeros(6)}),
    "no tensors": lambda t, _h: t.clear(),
    "no targets": edit_header(targets=[]),
    "targets are text": edit_header(targets="abc"),
    "targets are absent": lambda _t, h: h.pop("targets"),
    "a target twice": lambda _t, h: h["targets"].append(h["targets"][0]),
    "a target without shape": edit_header(targets=[["a"]]),
    "a target of negative width": lambda _t, h: first_target(h, 1, -3),
    "a target of no width": lambda _t, h: first_target(h, 2, 0),
    "a target of infinite width": lambda _t, h: first_target(h, 2, 1e400),
    "info is a list": edit_header(info=[1]),
    "info is absent": lambda _t, h: h.pop("info"),
    "size of the base is text": lambda _t, h: h["info"].update(base_parameters="many"),
    "counts lie": edit_header(counts={"whole": 6, "even": 6, "odd": 6}),
    "counts differ from the grams": edit_header(counts={"whole": 4, "even": 2, "odd": 2}),
    "counts are negative": edit_header(counts={"whole": 6, "even": 7, "odd": -1}),
    "counts are absent": edit_header(counts={}),
    "counts are huge": edit_header(counts={"whole": 10**400, "even": 0, "odd": 10**400}),
    "another schema": edit_header(schema="gradrank.plan/1"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_lies_is_refused(tmp_path: Path, whole: Measurement, fault: str) -> None:
    path = tmp_path / "m.safetensors"
    whole.save(path, sketches=True)
    tensors, header = parts_of(path)
    FAULTS[fault](tensors, header)
    save_file(tensors, path, metadata={"gradrank": json.dumps(header)})
    with pytest.raises(gr.MeasurementError, match=r"m.safetensors"):
        Measurement.load(path)


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "null", '"x"', "{", "[" * 100_000, '{"schema": 1}']
)
def test_a_foreign_header_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.zeros(2)}, path, metadata={"gradrank": text})
    with pytest.raises(gr.MeasurementError, match=r"m.safetensors"):
        Measurement.load(path)


def test_other_files_are_refused(tmp_path: Path, whole: Measurement) -> None:
    path = tmp_path / "m.safetensors"
    whole.save(path)
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    broken = {
        "empty": b"",
        "text": b"hello, I am a text file",
        "truncated data": content[:-9],
        "truncated header": content[: length // 2],
        "half": content[: len(content) // 2],
        "header of terabytes": struct.pack("<Q", 1 << 42) + content[8:],
        "zip": b"PK\x03\x04" + content,
    }
    for kind, data in broken.items():
        path.write_bytes(data)
        with pytest.raises(gr.MeasurementError, match="damaged"):
            Measurement.load(path)
        assert kind
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(gr.MeasurementError, match="no measurement"):
        Measurement.load(path)
    with pytest.raises(gr.MeasurementError, match="does not exist"):
        Measurement.load(tmp_path / "missing")
    with pytest.raises(gr.MeasurementError, match="no ordinary file"):
        Measurement.load(tmp_path)


@pytest.mark.parametrize("place", range(0, 400, 23))
def test_a_flipped_byte_is_refused_or_harmless(
    tmp_path: Path, whole: Measurement, place: int
) -> None:
    path = tmp_path / "m.safetensors"
    whole.save(path)
    content = bytearray(path.read_bytes())
    content[place] ^= 0x55
    path.write_bytes(bytes(content))
    try:
        found = Measurement.load(path)
    except gr.MeasurementError:
        return
    assert found.batches == 6
    json.dumps(found.summary(), allow_nan=False)
