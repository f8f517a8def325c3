"""Sizes by formula and on shapes, against hand counts, torch's own counter and real tensors."""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from gradrank.core.errors import DataError, MeasurementError, OptionError
from gradrank.core.targets import Target
from gradrank.lab import sizes
from gradrank.lab.compare.dry_models import config_of, empty_model
from gradrank.lab.models import HEADS
from gradrank.lab.shapes import Ledger, fake_batch, make_fake, one_pass, weights_of
from gradrank.lab.sized import Inquiry
from gradrank.lab.sizes import Weight
from gradrank.lab.sizing import recompute, size_up
from gradrank.session import allocate, apply, measure
from gradrank.signals.blocks import checkpointed
from gradrank.signals.facts import find_targets
from gradrank.signals.held import dense_blocks, mean_gradient_bytes
from gradrank.signals.layers import find_sites
from gradrank.signals.mean_gradient import MeanGradientProbe
from gradrank.signals.measure import MeanGradient, Spectrum, probe_for
from gradrank.signals.observe import Observer
from gradrank.signals.scheme import scheme_of
from gradrank.signals.spectrum import SketchProbe
from gradrank.signals.weigh import weigh

SIGNALS = (Spectrum(), MeanGradient())
LLAMA = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}


def built(spec: str, head: str, **more: Any) -> Any:
    config = config_of(spec)[0]
    config.num_labels = 2
    torch.manual_seed(0)
    model = HEADS[head][0].from_config(config, **more)
    model.config.use_cache = False
    return model.eval()


@pytest.fixture
def folder(tmp_path: Path) -> str:
    LlamaConfig(**LLAMA).save_pretrained(tmp_path)
    return str(tmp_path)


def real_batch(model: Any, batch: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.arange(batch * length).reshape(batch, length) % 64 + 4
    return {"input_ids": ids, "labels": ids.clone()}


# hand-computed cases


def test_quantised_weights_by_hand() -> None:
    weights = [Weight(10, 1000, True), Weight(7, 70, False)]
    assert sizes.weight_bytes(weights, 2) == 2000 + 140
    assert sizes.weight_bytes(weights, 2, 8) == 1000 + 40 + 140
    assert sizes.weight_bytes(weights, 2, 4) == 500 + 4 * 16 + 140  # ceil(1000 / 64) = 16
    assert sizes.workspace_bytes(weights, 2, 4) == 2000
    assert sizes.workspace_bytes(weights, 2, None) == 0
    with pytest.raises(OptionError, match="4 or 8"):
        sizes.weight_bytes(weights, 2, 3)


def test_projections_by_hand() -> None:
    """One target, 6 rows, d_in = 10 above and d_out = 4 below the sketch sizes."""
    target = Target("a", 10, 4)
    one = ((Spectrum(sketch_dim=5),), {"a": 6}, [(6, 10)])
    assert sizes.projection_flops([target], *one) == (2 * 6 * 5 * 4, 2 * 6 * 10)
    # k = 3, c = min(7, 4): d_out is no longer than c and is not folded
    mean = ((MeanGradient(directions=3),), {"a": 6}, [(6, 10)])
    assert sizes.projection_flops([target], *mean) == (2 * 6 * (4 * 3 + 4 * 10), 2 * 6 * 10)
    dense = ((Spectrum("dense"),), {"a": 6}, [(6, 10)])
    assert sizes.projection_flops([target], *dense) == (2 * 6 * 40, 0)
    # a target that no gradient reaches costs its share of the forward pass only
    assert sizes.projection_flops([target], one[0], {}, one[2]) == (0, 120)


def test_statistics_by_hand() -> None:
    targets = [Target("a", 10, 4), Target("b", 300, 200)]
    # k = 131: 10 x 4, and min(131 x 131, 1024)
    host = sizes.spectrum_host_bytes(targets, Spectrum(), 3)
    assert host == 4 * 3 * (40 + 1024) + 2 * 8 * 9
    # k = 2, c = 5 (prime at least 5), at most d_out
    assert mean_gradient_bytes(targets, MeanGradient(2)) == 4 * (4 * 2 + 4 * 10 + 200 * 2 + 5 * 300)


def test_dense_gradients_need_a_pass_per_block() -> None:
    targets = [Target(name, 10, 10) for name in "abc"]
    signal = Spectrum("dense", max_bytes=4 * 200 * 5)  # 200 weights beside 4 batches
    assert [len(block) for block in dense_blocks(targets, signal, 4)] == [2, 1]
    assert len(scheme_of(targets, (signal,), 4).passes) == 2
    assert len(scheme_of(targets, (signal, MeanGradient()), 4).passes) == 3
    assert len(scheme_of(targets, SIGNALS, 4).passes) == 1
    assert sizes.spectrum_host_bytes(targets, signal, 4) == 4 * 4 * (200 + 100) + 3 * 8 * 16


# against real tensors


def test_ledger_counts_living_tensors() -> None:
    with Ledger() as ledger:
        a = torch.zeros(1000)
        view = a[:10]
        b = a + 1
        assert ledger.now == 8000
        a += 1
        del a
        assert ledger.now == 8000  # the view keeps it
        del view, b
        assert ledger.now == 0
    assert ledger.peak == 8000


@pytest.mark.parametrize("signal", [Spectrum(), MeanGradient(), Spectrum("dense")])
def test_shapes_and_values_allocate_alike(signal: Any) -> None:
    """One pass of the real model, its tensors counted, against the same on shapes."""
    model = built("tiny-llama", "lm").requires_grad_(False)
    targets = find_targets(model)
    names = [target.name for target in targets]
    mode = FakeTensorMode()
    fake = make_fake(empty_model("tiny-llama", "lm", 2).requires_grad_(False), mode, torch.float32)
    fake.eval()
    fake.config.use_cache = False
    with mode:
        probe = probe_for(signal, targets, 0)
    found = one_pass(fake, mode, lambda: fake_batch(fake, "lm", 3, 20), [probe], names)
    batch = real_batch(model, 3, 20)
    with Observer(find_sites(model), [probe_for(signal, targets, 0)]), Ledger() as ledger:
        model(**batch).loss.backward()
    assert found.peak == pytest.approx(ledger.peak, rel=0.02)
    assert found.forward + found.backward == ledger.flops
    assert found.rows == dict.fromkeys(names, 60)
    # q, k, v share an input, gate and up another
    assert len(found.inputs) == 8


def test_weights_and_adapter_are_those_of_real_tensors() -> None:
    model = built("tiny-gpt2", "lm")
    held = sum(p.numel() * p.itemsize for p in model.parameters())
    found = size_up(Inquiry("tiny-gpt2", method="uniform", batch_size=1, length=8))
    assert found.training.weights == held
    assert found.measuring is None
    plan = allocate(find_targets(model), "uniform", "uniform:8")
    own = [p for p in apply(plan, model).parameters() if p.requires_grad]
    assert found.training.adapter == sum(p.numel() * p.itemsize for p in own)
    optimizer = torch.optim.AdamW(own)
    for parameter in own:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = [s[key] for s in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert found.training.moments == sum(t.numel() * t.itemsize for t in moments)
    assert found.training.gradients == sum(p.numel() * p.itemsize for p in own)


def test_statistics_and_file_are_those_of_a_real_measurement(tmp_path: Path) -> None:
    model = built("tiny-llama", "lm")
    found = size_up(Inquiry("tiny-llama", signals=SIGNALS, batches=5, batch_size=2, length=12))
    got = measure(model, [real_batch(model, 2, 12)] * 5, SIGNALS, num_batches=5)
    assert got.spectrum is not None
    assert got.mean_gradient is not None
    part = found.measuring
    assert part is not None
    kept = [*got.spectrum.gram.values(), *got.spectrum.rows.values()]
    assert part.host == sum(t.numel() * t.itemsize for t in kept)
    pairs = [p for half in got.mean_gradient.sketches.values() for p in half.values()]
    assert part.statistics == sum(t.numel() * t.itemsize for pair in pairs for t in pair)
    path = tmp_path / "measurement.safetensors"
    got.save(path)
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert part.stored == path.stat().st_size - header


def test_sketches_are_the_same_before_and_after_shapes() -> None:
    """Nothing fake is left where a real measurement would find it, nor the other way round."""
    model = built("tiny-llama", "lm")
    batches = [real_batch(model, 2, 12)] * 3
    before = measure(model, batches, "spectrum", num_batches=3)
    size_up(Inquiry("tiny-llama", signals=SIGNALS, batches=3, batch_size=2, length=12))
    after = measure(model, batches, "spectrum", num_batches=3)
    for name, gram in before.need_spectrum().gram.items():
        assert torch.equal(gram, after.need_spectrum().gram[name])
    probe = SketchProbe(find_targets(model), 128, 0)
    assert type(next(iter(probe._out_signs.values()))) is torch.Tensor


# against torch's own counter, and the closed form


@pytest.mark.parametrize("spec", ["tiny-llama", "tiny-gpt2"])
def test_flops_are_those_that_torch_counts(spec: str) -> None:
    model = built(spec, "lm", attn_implementation="eager").requires_grad_(False)
    start: Any = model.get_input_embeddings()
    start.register_forward_hook(lambda _m, _a, output: output.requires_grad_())
    batch = real_batch(model, 2, 16)
    with FlopCounterMode(display=False) as counter, Ledger() as ledger:
        model(**batch).loss.backward()
    assert ledger.flops == counter.get_total_flops() > 0


def test_flops_of_a_llama_in_closed_form(folder: str) -> None:
    batch, length, width, layers = 2, 16, LLAMA["hidden_size"], 2
    asked = Inquiry(folder, signals=SIGNALS, batches=1, batch_size=batch, length=length)
    found = size_up(asked)
    part = found.measuring
    assert part is not None
    rows = batch * length
    linear = [(t.d_in, t.d_out) for t in found.outline.targets] + [(width, LLAMA["vocab_size"])]
    forward, backward = sizes.attention_flops(batch, 4, length, width // 4)
    # angles of the rotary positions: one small product, [batch, 4, 1] x [1, length]
    angles = part.forward - sizes.linear_flops(linear, rows) - layers * forward
    assert 0 <= angles <= 2 * batch * length * 4
    # the graph starts at the outputs of the first block's q, k and v
    skipped = [(width, width)] * 3
    assert part.backward == (
        sizes.linear_flops(linear, rows) - sizes.linear_flops(skipped, rows) + layers * backward
    )


def test_work_and_memory_grow_as_they_should() -> None:
    one, two = (
        size_up(Inquiry("tiny-llama", signals=SIGNALS, batches=4, batch_size=n, length=32))
        for n in (2, 4)
    )
    assert one.measuring is not None
    assert two.measuring is not None
    assert two.tokens == 2 * one.tokens
    assert two.measuring.projections == 2 * one.measuring.projections
    assert two.measuring.activations > 1.5 * one.measuring.activations
    assert two.measuring.host == one.measuring.host
    assert one.checkpointed is not None
    assert one.checkpointed.activations < one.training.activations
    assert one.checkpointed.flops > one.training.flops
    twice = size_up(Inquiry("tiny-llama", batches=4, batch_size=2, length=32, accumulate=2))
    assert twice.training.flops == 2 * one.training.flops
    assert twice.training.device == one.training.device


def test_half_precision_and_packing() -> None:
    full = size_up(Inquiry("tiny-llama", batch_size=2, length=16))
    half = size_up(Inquiry("tiny-llama", batch_size=2, length=16, dtype="bfloat16", gpu=True))
    four = size_up(
        Inquiry("tiny-llama", batch_size=2, length=16, dtype="bfloat16", bits=4, gpu=True)
    )
    assert half.training.weights * 2 == full.training.weights
    assert four.training.weights == half.packed < half.training.weights
    assert four.training.workspace == 2 * 64 * 32
    # the adapter stays in float32
    assert half.training.adapter == full.training.adapter == full.parameters.budget * 4


@pytest.mark.parametrize(("spec", "head"), [("tiny-bert", "classification"), ("tiny-vit", "image")])
def test_classifiers_train_their_head_too(spec: str, head: str) -> None:
    found = size_up(Inquiry(spec, signals=SIGNALS, batch_size=2, length=None))
    assert found.parameters.head > 0
    assert found.training.adapter == 4 * (found.parameters.budget + found.parameters.head)
    assert found.length == (0 if head == "image" else 128)
    assert found.measuring is not None
    assert found.to_dict()["measuring"]["device"] == found.measuring.device


def test_dense_gradients_are_counted_block_by_block() -> None:
    signal = Spectrum("dense", max_bytes=40_000)
    found = size_up(Inquiry("tiny-llama", signals=(signal,), batches=3, batch_size=2, length=8))
    assert found.measuring is not None
    assert found.measuring.passes == len(dense_blocks(found.outline.targets, signal, 3)) > 1


def test_checkpointed_and_capped_measuring() -> None:
    asked = Inquiry("tiny-llama", signals=SIGNALS, batches=4, batch_size=4, length=64)
    free = size_up(asked)
    plain, less = free.measuring, free.measuring_checkpointed
    assert plain is not None
    assert less is not None
    assert less.activations < plain.activations
    assert less.backward > plain.backward
    assert (plain.checkpointed, less.checkpointed) == (False, True)
    limit = (less.activations + less.statistics) * 3 // 4
    capped = size_up(replace(asked, max_memory=limit))
    assert capped.measuring is not None
    assert capped.measuring.checkpointed
    assert capped.measuring.passes > 1
    # kept by an estimate, which is told from what the whole pass then holds
    assert capped.measuring.activations + capped.measuring.statistics <= 1.15 * limit
    assert capped.measuring_checkpointed is None
    assert capped.to_dict()["max_memory"] == limit
    with pytest.raises(MeasurementError, match="micro-batches"):
        size_up(replace(asked, max_memory=10_000))


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("vocabulary", [96, 2048])
def test_what_is_weighed_is_what_a_pass_holds(checkpoint: bool, vocabulary: int) -> None:
    """The estimate without a backward pass, against every living tensor of one with it."""
    config = LlamaConfig(
        **LLAMA | {"vocab_size": vocabulary, "num_hidden_layers": 4, "use_cache": False}
    )
    model = HEADS["lm"][0].from_config(config).eval().requires_grad_(False)
    targets, batch = find_targets(model), real_batch(model, 4, 64)
    probes = [probe_for(signal, targets, 0) for signal in SIGNALS]
    sites, names = find_sites(model), [target.name for target in targets]
    memory = weigh(model, sites, probes, lambda: model(**batch).loss, batch)
    for probe in probes:
        if isinstance(probe, MeanGradientProbe):
            probe.reserve()
    around = checkpointed(model) if checkpoint else contextlib.nullcontext()
    with around, Observer(sites, probes), Ledger() as ledger:
        model(**batch).loss.backward()
    assert memory.activations(names, checkpoint) == pytest.approx(ledger.peak, rel=0.15)


def test_what_cannot_be_sized_up_is_refused() -> None:
    with pytest.raises(DataError, match="not known here"):
        size_up(Inquiry("no-such-model"))
    with pytest.raises(OptionError, match="positions for 128"):
        size_up(Inquiry("tiny-llama", length=129))
    with pytest.raises(OptionError, match="no 'lm' head"):
        size_up(Inquiry("tiny-vit", head="lm"))


def test_weights_that_quantisation_packs() -> None:
    model = empty_model("tiny-llama", "lm", 2)
    weights = weights_of(model)
    packed = sum(w.numel for w in weights if w.linear)
    assert packed == sum(t.d_in * t.d_out for t in find_targets(model))
    assert sum(w.numel for w in weights) == sum(p.numel() for p in model.parameters())


def test_recompute_switches_checkpointing_on() -> None:
    model = built("tiny-llama", "lm")
    recompute(model)
    assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
