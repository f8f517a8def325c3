"""llama.cpp itself, in this process: what it computes from our files is what was trained."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gradrank as gr
from cases import hand_plan, randomise_adapter
from gguf_cases import DECODERS, VOCABULARY, Decoder, Engine, log_probabilities, write_base
from gradrank.serving import gguf_names
from gradrank.serving.engines.engine import Base
from gradrank.serving.engines.llamacpp import FILE, LlamaCpp
from gradrank.serving.gguf_file import placed, write_gguf
from gradrank.serving.gguf_names import FAMILIES
from gradrank.serving.installing import taken
from gradrank.signals.facts import find_targets

xllamacpp = pytest.importorskip("xllamacpp")

IDS = torch.randint(3, VOCABULARY, (8,), generator=torch.Generator().manual_seed(1)).tolist()
# Of log-probabilities, while an adapter changes some of them by several units.
SUMS, TABLE = 1e-4, 2e-2


class Proof:
    """A tiny trained model beside the engine's base model."""

    def __init__(self, name: str, folder: Path, head: bool = False) -> None:
        self.decoder: Decoder = DECODERS[name]
        self.folder = folder
        model: Any = self.decoder.model()
        write_base(model, self.decoder, folder / "base.gguf")
        self.plain = log_probabilities(model, IDS)
        names = [target.name for target in find_targets(model, "all-linear")]
        plan = hand_plan(model, targets=["lm_head", *names] if head else names)
        self.model: Any = randomise_adapter(gr.apply(plan, model), 0.15)
        self.trained = log_probabilities(self.model, IDS)

    def run(self, adapter: Path | None = None) -> Tensor:
        return Engine(xllamacpp, self.folder / "base.gguf", adapter).log_probabilities(IDS)

    @property
    def base(self) -> Base:
        inner = self.model.get_base_model()
        names = (name.replace(".base_layer", "") for name, _ in inner.named_modules())
        return Base(inner.config.to_dict(), tuple(name for name in names if ".lora_" not in name))

    @property
    def noise(self) -> float:
        return TABLE if self.decoder.coarse else SUMS


def unmoved(d_out: int, heads: int) -> Tensor:
    return torch.arange(d_out)


def distance(one: Tensor, other: Tensor) -> float:
    assert torch.isfinite(one).all(), "the engine left out a token"
    return float((one - other).abs().max())


@pytest.mark.parametrize("name", DECODERS)
def test_the_engine_computes_what_was_trained(name: str, tmp_path: Path) -> None:
    proof = Proof(name, tmp_path)
    assert distance(proof.run(), proof.plain) < proof.noise
    gr.export(proof.model, tmp_path / "out", "llama.cpp")
    assert distance(proof.run(tmp_path / "out" / FILE), proof.trained) < proof.noise
    assert distance(proof.trained, proof.plain) > 100 * proof.noise


def test_the_engine_reads_an_output_matrix_of_its_own(tmp_path: Path) -> None:
    proof = Proof("llama", tmp_path, head=True)
    # PEFT saves a copy of the frozen matrix beside the factors.
    adapter = replace(taken(proof.model), other={}, features=())
    assert "lm_head" in adapter.updates
    LlamaCpp().write(adapter, tmp_path, proof.base)
    assert distance(proof.run(tmp_path / FILE), proof.trained) < SUMS


@pytest.mark.parametrize(("dtype", "limit"), [("float16", 0.1), ("bfloat16", 0.6)])
def test_the_engine_reads_half_precision(dtype: str, limit: float, tmp_path: Path) -> None:
    proof = Proof("llama", tmp_path)
    gr.export(proof.model, tmp_path / "out", "llama.cpp", dtype=dtype)
    found = distance(proof.run(tmp_path / "out" / FILE), proof.trained)
    assert SUMS < found < limit
    assert distance(proof.trained, proof.plain) > 10 * limit


def test_the_engine_catches_a_wrong_order_of_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proof = Proof("llama", tmp_path)
    monkeypatch.setattr(gguf_names, "interleaved", unmoved)
    # Reading back undoes the same mistake: only the engine itself can tell.
    gr.export(proof.model, tmp_path / "out", "llama.cpp")
    assert distance(proof.run(tmp_path / "out" / FILE), proof.trained) > 1000 * SUMS


def test_the_engine_catches_several_alphas(tmp_path: Path) -> None:
    proof = Proof("llama", tmp_path)
    adapter = taken(proof.model)
    alphas = {update.scaling * update.rank for update in adapter.updates.values()}
    assert len(alphas) > 1
    # What a converter does that takes one alpha and folds nothing.
    write_gguf(
        placed(adapter, FAMILIES["llama"], proof.base), max(alphas), "llama", tmp_path / FILE
    )
    assert distance(proof.run(tmp_path / FILE), proof.trained) > 1000 * SUMS
    assert LlamaCpp().read(tmp_path, proof.base).ranks == adapter.ranks
