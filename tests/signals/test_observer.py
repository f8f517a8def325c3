"""The same statistic however the model is wrapped, split, checkpointed or written."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration

import gradrank as gr
from cases import CASES, Case, batches, tiny_llama
from gradrank.signals.layers import find_sites
from gradrank.signals.loss import count_items
from gradrank.signals.measure import run
from gradrank.signals.measurement import Measurement
from gradrank.signals.observe import Observer
from gradrank.signals.spectrum import SketchProbe
from oracles.gradients import gram_of, weight_gradients

LLAMA = CASES["llama"]
DENSE = gr.Spectrum("dense")


def measure(model: nn.Module, data: list[Any], **options: Any) -> Measurement:
    options.setdefault("num_batches", len(data))
    return gr.measure(model, data, options.pop("signal", DENSE), **options)


def assert_same(found: Measurement, wanted: Measurement, tolerance: float = 1e-5) -> None:
    assert found.targets == wanted.targets
    for target in wanted.targets:
        a, b = found.gram(target.name), wanted.gram(target.name)
        largest = float(b.abs().max())
        assert largest > 0, f"{target.name} is not exercised"
        assert float((a - b).abs().max()) < tolerance * largest, target.name


def differ(found: Measurement, wanted: Measurement) -> bool:
    name = wanted.targets[0].name
    return not torch.allclose(found.gram(name), wanted.gram(name), rtol=1e-3)


# --- wrappings ------------------------------------------------------------------------------


def test_frozen_partly_frozen_and_trainable_models_measure_alike(case: Case) -> None:
    data = batches(case, 3)
    wanted = measure(case.model(), data)
    frozen = case.model().requires_grad_(False)
    partly = case.model()
    for index, parameter in enumerate(partly.parameters()):
        parameter.requires_grad_(index % 3 == 0)
    assert_same(measure(frozen, data), wanted, 1e-7)
    assert_same(measure(partly, data), wanted, 1e-7)


def test_training_mode_with_dropout_measures_as_evaluation_mode(case: Case) -> None:
    data = batches(case, 2)
    wanted = measure(case.model().eval(), data)
    assert_same(measure(case.model().train(), data), wanted, 1e-7)


def test_a_fresh_peft_model_has_the_names_and_gradients_of_its_base(case: Case) -> None:
    data = batches(case, 3)
    wanted = measure(case.model(), data)
    names = [target.name for target in wanted.targets]
    conv = case.name == "gpt2"
    config = LoraConfig(r=2, target_modules=names[1:], lora_dropout=0.5, fan_in_fan_out=conv)
    wrapped = get_peft_model(case.model(), config)
    assert_same(measure(wrapped, data), wanted, 1e-6)


def test_a_task_head_that_peft_saves_is_no_target() -> None:
    model = get_peft_model(
        CASES["bert"].model(),
        LoraConfig(task_type="SEQ_CLS", target_modules=["query"], modules_to_save=["classifier"]),
    )
    plain = [site.target for site in find_sites(CASES["bert"].model())]
    assert [site.target for site in find_sites(model)] == plain
    assert_same(
        measure(model, batches(CASES["bert"], 2)),
        measure(CASES["bert"].model(), batches(CASES["bert"], 2)),
    )


# --- batches ---------------------------------------------------------------------------------


def test_micro_batches_add_up_to_the_batch() -> None:
    generator = torch.Generator().manual_seed(3)
    whole, parts = [], []
    for _ in range(3):
        ids = torch.randint(3, 97, (4, 9), generator=generator)
        labels = ids.clone()
        # Unequal numbers of tokens: the first part predicts 7 + 8, the second 3 + 1.
        for row, kept in enumerate((8, 9, 4, 2)):
            labels[row, kept:] = -100
        whole.append({"input_ids": ids, "labels": labels})
        parts += [
            {"input_ids": ids[:2], "labels": labels[:2]},
            {"input_ids": ids[2:], "labels": labels[2:]},
        ]
    model = LLAMA.model()
    wanted = measure(model, whole)
    found = measure(model, parts, num_batches=3, accumulate=2)
    assert_same(found, wanted)
    assert found.batches == 3
    assert found.info["examples"] == wanted.info["examples"] == 12


def test_micro_batches_of_a_classifier_are_weighted_by_examples() -> None:
    case = CASES["bert"]
    whole = batches(case, 2)
    parts = []
    for batch in whole:
        parts += [{k: v[:1] for k, v in batch.items()}, {k: v[1:] for k, v in batch.items()}]
    model = case.model()
    found = measure(model, parts, num_batches=2, accumulate=2)
    assert_same(found, measure(model, whole))
    assert [count_items(model, part) for part in parts] == [1, 2, 1, 2]


def test_the_order_of_batches_permutes_the_gram() -> None:
    model, data = LLAMA.model(), batches(LLAMA, 4)
    order = [2, 0, 3, 1]
    wanted = measure(model, data, signal="spectrum")
    found = measure(model, [data[i] for i in order], signal="spectrum")
    for target in wanted.targets:
        expected = wanted.gram(target.name)[order][:, order]
        torch.testing.assert_close(found.gram(target.name), expected)


def test_a_measurement_is_deterministic_and_its_seed_matters() -> None:
    model, data = LLAMA.model(), batches(LLAMA, 3)
    first, again, other = (measure(model, data, signal="spectrum", seed=s) for s in (0, 0, 1))
    small = [measure(model, data, signal=gr.Spectrum(sketch_dim=4), seed=s) for s in (0, 1)]
    for target in first.targets:
        assert torch.equal(first.gram(target.name), again.gram(target.name))
    # A target of at most 1,024 weights is stored exactly; a sketch of 4 depends on its signs.
    exact = "model.layers.0.self_attn.q_proj"
    torch.testing.assert_close(other.gram(exact), first.gram(exact))
    assert differ(small[1], small[0])


# --- checkpointing and dtypes ----------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_gradient_checkpointing_changes_nothing(
    case: Case, reentrant: bool, training: bool
) -> None:
    data = batches(case, 2)
    wanted = measure(case.model(), data)
    model = case.model().train(training)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(measure(model, data), wanted, 1e-6)


def test_gradient_checkpointing_is_really_on_while_measuring() -> None:
    model = LLAMA.model().train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    calls = []
    layer = model.model.layers[0].self_attn
    layer.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    measure(model, batches(LLAMA, 1))
    assert len(calls) == 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_with_a_dropout_of_their_own_stay_quiet_under_checkpointing(
    reentrant: bool,
) -> None:
    def bart(dropout: float) -> nn.Module:
        torch.manual_seed(0)
        model = BartForConditionalGeneration(
            BartConfig(
                vocab_size=97,
                d_model=16,
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=24,
                decoder_ffn_dim=24,
                max_position_embeddings=32,
                dropout=dropout,
                attention_dropout=dropout,
                activation_dropout=dropout,
                encoder_layerdrop=dropout,
                decoder_layerdrop=dropout,
                init_std=0.3,
            )
        )
        return model.double()

    data = batches(CASES["t5"], 2)
    wanted = measure(bart(0.0), data)
    model = bart(0.5).train()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(measure(model, data), wanted, 1e-6)
    assert model.model.decoder.layers[0].dropout == 0.5
    assert model.model.encoder.layerdrop == 0.5


def test_bfloat16_is_close_to_float32(case: Case) -> None:
    data = batches(case, 2)
    wanted = measure(case.model(), data)
    low = [
        {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch.items()}
        for batch in data
    ]
    found = measure(case.model().bfloat16(), low)
    traces = [
        (float(found.gram(t.name).trace()), float(wanted.gram(t.name).trace()))
        for t in wanted.targets
    ]
    close = [abs(a / b - 1) < 0.1 for a, b in traces]
    # Gradients through the softmax of an untrained attention are tiny, mostly rounding.
    assert sum(close) >= 0.6 * len(close)
    assert all(a >= 0 for a, _ in traces)


def test_autocast_by_the_loss_function_is_close_to_float32() -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(**batch).loss

    model, data = LLAMA.model(), batches(LLAMA, 2)
    wanted = measure(model, data)
    found = measure(model, data, loss_function=loss)
    name = "model.layers.1.mlp.down_proj"
    torch.testing.assert_close(found.gram(name), wanted.gram(name), rtol=0.1, atol=1e-6)


# --- modules of other people -----------------------------------------------------------------


def square_loss(model: nn.Module, batch: Any) -> Tensor:
    return model(batch["x"]).square().mean()


def net_batches(count: int, *shape: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(*shape, generator=generator)} for _ in range(count)]


class Twice(nn.Module):
    """One module called twice in a forward pass, on different inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(torch.tanh(self.a(x))))


class InPlace(nn.Module):
    """In-place operations directly on the outputs of targets, first, middle and last."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8, bias=bias), nn.Linear(8, 8, bias=bias)
        self.c = nn.Linear(8, 5, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.a(x))
        x = torch.relu_(self.b(x))
        return self.c(x).mul_(2)


class Keyword(nn.Module):
    """A target that is called with a keyword argument."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(input=torch.tanh(self.a(input=x)))


class Branch(nn.Module):
    """A target that is never used, and one whose input is changed in place between two uses."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.unused = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        shifted = x.clone()
        first = self.b(shifted.clone())
        shifted.add_(1)
        return y + first + self.b(shifted)


@pytest.mark.parametrize("shape", [(5, 6), (2, 5, 6), (2, 3, 5, 6)])
@pytest.mark.parametrize(
    "make",
    [Twice, lambda: InPlace(True), lambda: InPlace(False), Keyword, Branch],
    ids=["twice", "in-place", "in-place without bias", "keyword", "branch"],
)
@pytest.mark.parametrize("estimator", ["dense", "sketch"])
def test_unusual_modules_give_exact_gradients(
    make: Callable[[], nn.Module], shape: tuple[int, ...], estimator: str
) -> None:
    model, data = make(), net_batches(3, *shape)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    # Widths below the sketch size: the sketch is exact too.
    found = measure(model, data, signal=gr.Spectrum(estimator), loss_function=square_loss)
    oracle = weight_gradients(model, data, names, square_loss)
    for name in names:
        torch.testing.assert_close(found.gram(name), gram_of(oracle[name]), rtol=1e-5, atol=1e-9)
    assert found.info["unreached"] == (["unused"] if hasattr(model, "unused") else [])


@pytest.mark.parametrize("shape", [(5, 6), (2, 5, 6)])
def test_dense_blocks_survive_a_target_that_no_gradient_reaches(shape: tuple[int, ...]) -> None:
    model, data = Branch(), net_batches(2, *shape)
    at_once = measure(model, data, loss_function=square_loss)
    blocks = measure(
        model, data, signal=gr.Spectrum("dense", max_bytes=1), loss_function=square_loss
    )
    for target in at_once.targets:
        torch.testing.assert_close(blocks.gram(target.name), at_once.gram(target.name))
    assert blocks.info["unreached"] == ["unused"]


class CountingProbe(SketchProbe):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.calls: list[str] = []

    def on_input(self, target: gr.Target, x: Tensor) -> Tensor:
        self.calls.append(target.name.rpartition(".")[2])
        return super().on_input(target, x)


def test_targets_that_read_one_input_share_its_projection() -> None:
    model, (batch,) = LLAMA.model().requires_grad_(False), batches(LLAMA, 1)
    sites = find_sites(model)
    probe = CountingProbe([site.target for site in sites], 64, 0)
    with Observer(sites, [probe]):
        model(**batch).loss.backward()
    assert probe.calls == ["q_proj", "o_proj", "gate_proj", "down_proj"] * 2


def test_an_input_changed_in_place_is_projected_again() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(300, 5), nn.Linear(300, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x.mul_(2))

    model = Net().requires_grad_(False)
    sites = find_sites(model)
    # Wider than the sketch, so that a projection is a copy and not the input itself.
    probe = CountingProbe([site.target for site in sites], 8, 0)
    with Observer(sites, [probe]):
        model(torch.randn(4, 300)).sum().backward()
    assert probe.calls == ["a", "b"]


def test_several_probes_see_the_same_pass() -> None:
    model, data = LLAMA.model(), batches(LLAMA, 4)
    both = gr.measure(model, data, ["spectrum", "mean-gradient"], num_batches=4)
    one = gr.measure(model, data, "spectrum", num_batches=4)
    other = gr.measure(model, data, "mean-gradient", num_batches=4)
    assert_same(both, one, 1e-12)
    for target in both.targets:
        for part in ("whole", "even", "odd"):
            torch.testing.assert_close(
                both.need_mean_gradient().values[part][target.name],
                other.need_mean_gradient().values[part][target.name],
            )


def test_the_mean_gradient_has_the_singular_values_of_the_mean() -> None:
    model, data = LLAMA.model(), batches(LLAMA, 4)
    found = gr.measure(model, data, gr.MeanGradient(64), num_batches=4).need_mean_gradient()
    names = list(found.values["whole"])
    oracle = weight_gradients(model, data, names)
    parts = {"whole": [0, 1, 2, 3], "even": [0, 2], "odd": [1, 3]}
    for name in names:
        for part, chosen in parts.items():
            mean = torch.stack([oracle[name][i] for i in chosen]).mean(0)
            wanted = torch.linalg.svdvals(mean)
            values = found.values[part][name]
            assert values.dtype == torch.float64
            torch.testing.assert_close(
                values, wanted[: values.numel()], rtol=1e-3, atol=1e-5 * float(wanted[0])
            )
    assert found.counts == {"whole": 4, "even": 2, "odd": 2}


def test_an_observer_alone_leaves_outputs_as_they_are() -> None:
    model, (batch,) = LLAMA.model().eval(), batches(LLAMA, 1)
    with torch.no_grad():
        wanted = model(**batch).logits
    sites = find_sites(model)
    with Observer(sites, [SketchProbe([site.target for site in sites], 8, 0)]):
        assert torch.equal(model(**batch).logits, wanted)
        with torch.no_grad():
            assert torch.equal(model(**batch).logits, wanted)


def test_twelve_layers_keep_their_order_and_names() -> None:
    model = tiny_llama(12)
    found = measure(model, batches(LLAMA, 2), targets="q_proj", signal="spectrum")
    assert [t.name for t in found.targets] == [
        f"model.layers.{i}.self_attn.q_proj" for i in range(12)
    ]
    assert [t.depth for t in found.targets] == list(range(12))
    only = measure(model, batches(LLAMA, 2), targets="layers.1.self_attn.q_proj")
    assert [t.name for t in only.targets] == ["model.layers.1.self_attn.q_proj"]


def test_run_needs_at_least_one_batch() -> None:
    model = LLAMA.model()
    with pytest.raises(gr.MeasurementError, match="no batch"):
        run(model, find_sites(model), [], [gr.Spectrum()], 0)
