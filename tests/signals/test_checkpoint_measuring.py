"""Measuring with checkpointing: the same numbers, nothing left behind, inputs dropped."""

import weakref
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import gradrank as gr
from cases import CASES, Case, batches, tiny_llama
from gradrank.signals.blocks import checkpointed, repeated_blocks
from gradrank.signals.layers import find_sites
from gradrank.signals.measurement import Measurement
from gradrank.signals.observe import Observer
from gradrank.signals.spectrum import SketchProbe
from gradrank.signals.untouched import untouched

LLAMA = CASES["llama"]
SIGNALS = [gr.Spectrum(sketch_dim=16), gr.MeanGradient(4, rows=True)]


def measure(model: nn.Module, data: list[Any], **options: Any) -> Measurement:
    options.setdefault("num_batches", len(data) // 2)
    return gr.measure(model, data, options.pop("signal", SIGNALS), accumulate=2, **options)


def assert_equal(found: Measurement, wanted: Measurement) -> None:
    """To the last bit: the same operations on the same numbers."""
    assert found.targets == wanted.targets
    for target in wanted.targets:
        assert float(wanted.gram(target.name).abs().max()) > 0
        assert torch.equal(found.gram(target.name), wanted.gram(target.name))
        for part in ("whole", "even", "odd"):
            mine, other = found.need_mean_gradient(), wanted.need_mean_gradient()
            assert torch.equal(mine.values[part][target.name], other.values[part][target.name])
            assert torch.equal(mine.rows[part][target.name], other.rows[part][target.name])


def test_checkpointing_changes_no_bit(case: Case) -> None:
    data, model = batches(case, 4), case.model()
    wanted = measure(model, data)
    found = measure(model, data, checkpoint=True)
    assert_equal(found, wanted)
    assert (wanted.info["checkpointed"], found.info["checkpointed"]) == (False, True)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_model_that_checkpoints_by_itself_is_left_to_it(reentrant: bool) -> None:
    data, model = batches(LLAMA, 4), LLAMA.model()
    wanted = measure(model, data)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    calls: list[bool] = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(True))
    for checkpoint in (None, True):
        calls.clear()
        found = measure(model, data, checkpoint=checkpoint)
        assert_equal(found, wanted)
        assert found.info["checkpointed"]
        assert len(calls) == 2 * len(data)


def test_wrapped_and_tied_models_with_dropout() -> None:
    def tied() -> nn.Module:
        return tiny_llama(tie_word_embeddings=True)

    data = batches(LLAMA, 4)
    wanted = measure(tied(), data)
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], lora_dropout=0.5)
    model = get_peft_model(tied(), config).train()
    assert_equal(measure(model, data, checkpoint=True), wanted)
    assert all(module.training for module in model.modules())


def test_blocks_are_really_computed_again() -> None:
    model, calls = LLAMA.model(), []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(True))
    measure(model, batches(LLAMA, 2), checkpoint=True)
    assert len(calls) == 4


class Chain(nn.Module):
    """A model of nobody's library."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 6)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)) for _ in range(blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return x


def chain_loss(model: nn.Module, batch: Any) -> Tensor:
    return model(batch["x"]).square().mean()


def test_a_chain_of_equal_modules_has_blocks_too() -> None:
    data = [{"x": torch.randn(4, 6, generator=torch.Generator().manual_seed(i))} for i in range(4)]
    model = Chain()
    assert repeated_blocks(model) == list(model.blocks)
    wanted = measure(model, data, loss_function=chain_loss)
    assert_equal(measure(model, data, loss_function=chain_loss, checkpoint=True), wanted)
    with pytest.raises(gr.MeasurementError, match="no repeated blocks"):
        measure(Chain(1).blocks[0], data, loss_function=chain_loss, checkpoint=True)


class StopError(Exception):
    pass


def test_forwards_are_as_they_were_after_a_failure() -> None:
    def stop(*_: Any) -> Any:
        raise StopError

    model = LLAMA.model()
    kept = model.model.layers[1].forward
    model.model.layers[1].forward = kept  # as libraries that hook forward leave it
    with pytest.raises(StopError):
        measure(model, batches(LLAMA, 2), checkpoint=True, progress=stop)
    assert vars(model.model.layers[1])["forward"] == kept
    assert "forward" not in vars(model.model.layers[0])


class Remembering(SketchProbe):
    """Keeps copies of inputs, and knows which of them are still alive."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.refs: list[weakref.ref[Any]] = []

    @property
    def alive(self) -> int:
        return sum(ref() is not None for ref in self.refs)

    def on_input(self, target: gr.Target, x: Tensor) -> Tensor:
        kept = x.clone()
        self.refs.append(weakref.ref(kept.untyped_storage()))
        return kept

    def on_output_grad(self, target: gr.Target, kept: Tensor, delta: Tensor) -> None:
        self.most = max(getattr(self, "most", 0), self.alive)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_kept_inputs_follow_the_policy_of_checkpointing(checkpoint: bool) -> None:
    model, (batch,) = tiny_llama(4), batches(LLAMA, 1)
    sites = find_sites(model)
    probe = Remembering([site.target for site in sites], 8, 0)
    with untouched(model, 0), Observer(sites, [probe]):
        if checkpoint:
            with checkpointed(model):
                loss = model(**batch).loss
                # only the last input, which the next target might share
                assert probe.alive == 1
                loss.backward()
        else:
            loss = model(**batch).loss
            assert probe.alive == 16
            loss.backward()
    # four distinct inputs to a block
    assert probe.most == 16 if not checkpoint else 4 <= probe.most <= 5
    del loss
    assert probe.alive == 0


def test_an_input_that_changes_after_it_was_read_is_refused() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            y = self.b(x)
            return y + x.mul_(2)

    with pytest.raises(gr.MeasurementError, match="'b' was changed in place"):
        gr.measure(Net(), [{"x": torch.ones(2, 6)}] * 2, "spectrum", loss_function=chain_loss)
