"""The window: gradients seen while training equal those of a measurement, and cost it nothing."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import gradrank as gr
from cases import CASES, batches, randomise_adapter, tiny_llama
from gradrank.ops.sketch import fold, random_signs, seed_of
from gradrank.signals.layers import find_sites
from gradrank.signals.window import DIRECTION_ROWS, DirectionProbe, Window
from oracles.gradients import gram_of

DATA = batches(CASES["llama"], 8)
SKETCH, DENSE = gr.Spectrum("sketch", 16), gr.Spectrum("dense")
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


def adapted(dtype: torch.dtype = torch.float32, **extra: Any) -> nn.Module:
    """A tiny Llama with an adapter that is no longer zero, in training mode."""
    lora = {"lora_dropout": extra.pop("lora_dropout", 0.0)}
    model = tiny_llama(**extra).to(dtype)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, **lora)
    return randomise_adapter(get_peft_model(model, config)).train()


def window_on(
    model: nn.Module, signal: gr.Spectrum = SKETCH, size: int = 4, directions: bool = False
) -> Window:
    return Window(find_sites(model, TARGETS), signal, size, seed=5, directions=directions)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def sgd(model: nn.Module, lr: float = 0.0) -> torch.optim.Optimizer:
    return torch.optim.SGD(trainable(model), lr=lr)


def train(
    model: nn.Module,
    data: Sequence[dict[str, Tensor]],
    watch: Window | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    accumulate: int = 1,
    around: Callable[[], Any] = contextlib.nullcontext,
) -> list[float]:
    """Ordinary training steps; the window, if there is one, is open until they end."""
    optimizer = optimizer or sgd(model)
    losses = []
    for step, start in enumerate(range(0, len(data), accumulate), 1):
        if watch:
            watch.open()
        for micro in data[start : start + accumulate]:
            with around():
                loss = model(**micro).loss
            (loss / accumulate).backward()
            losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
        if watch:
            watch.end_step(step)
    if watch:
        watch.close()
    return losses


def measured(model: nn.Module, data: Any, signal: gr.Spectrum, **options: Any) -> Any:
    count = len(data) // options.get("accumulate", 1)
    return gr.measure(model, data, signal, TARGETS, num_batches=count, seed=5, **options)


def same_grams(found: Any, wanted: Any, tolerance: float) -> None:
    assert [t.name for t in found.targets] == [t.name for t in wanted.targets]
    for target in wanted.targets:
        a, b = found.gram(target.name), wanted.gram(target.name)
        assert float(b.abs().max()) > 0
        assert float((a - b).abs().max() / b.abs().max()) <= tolerance, target.name


# --- what is seen is what a measurement sees ---------------------------------------------------


@pytest.mark.parametrize("signal", [SKETCH, DENSE], ids=["sketch", "dense"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_steps_show_what_a_measurement_of_the_same_batches_shows(
    signal: gr.Spectrum, accumulate: int
) -> None:
    model = adapted()
    watch = window_on(model, signal, size=8)
    train(model, DATA, watch, accumulate=accumulate)
    wanted = measured(model, DATA, signal, accumulate=accumulate)
    same_grams(watch.measurement(), wanted, 0.0 if signal is DENSE else 1e-6)


def checkpointed(reentrant: bool) -> nn.Module:
    model: Any = adapted()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model


@pytest.mark.parametrize("signal", [SKETCH, DENSE], ids=["sketch", "dense"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_shows_the_same_gradients_once(
    signal: gr.Spectrum, reentrant: bool
) -> None:
    model = checkpointed(reentrant)
    watch = window_on(model, signal)
    train(model, DATA[:4], watch)
    same_grams(watch.measurement(), measured(adapted(), DATA[:4], signal), 1e-6)


@pytest.mark.parametrize("signal", [SKETCH, DENSE], ids=["sketch", "dense"])
def test_autocast_shows_what_a_measurement_under_autocast_shows(signal: gr.Spectrum) -> None:
    def around() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16)

    model = adapted()
    watch = window_on(model, signal)
    train(model, DATA[:4], watch, around=around)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        with around():
            return model(**batch).loss

    wanted = measured(model, DATA[:4], signal, loss_function=loss)
    same_grams(watch.measurement(), wanted, 0.0 if signal is DENSE else 1e-6)


def test_a_model_in_bfloat16_is_observed_like_it_is_measured() -> None:
    model = adapted(torch.bfloat16)
    watch = window_on(model, DENSE)
    train(model, DATA[:4], watch)
    same_grams(watch.measurement(), measured(model, DATA[:4], DENSE), 0.0)


def weights_of(model: nn.Module) -> dict[str, Any]:
    return {site.target.name: site.module.weight for site in find_sites(model, TARGETS)}


def test_with_dropout_the_window_sees_the_gradients_of_the_very_same_passes() -> None:
    options: dict[str, Any] = {"lora_dropout": 0.3, "attention_dropout": 0.2}
    model, twin = adapted(**options), adapted(**options)
    watch = window_on(model, DENSE)
    torch.manual_seed(1)
    train(model, DATA[:4], watch)
    # The twin's base weights are trainable, and autograd itself gives their gradients.
    weights = weights_of(twin)
    torch.manual_seed(1)
    gradients: dict[str, list[Tensor]] = {name: [] for name in weights}
    for weight in weights.values():
        weight.requires_grad_(True)
    for batch in DATA[:4]:
        found = torch.autograd.grad(twin(**batch).loss, list(weights.values()))
        for name, gradient in zip(weights, found, strict=True):
            gradients[name].append(gradient.double())
    for name, kept in gradients.items():
        gram, wanted = watch.measurement().gram(name), gram_of(kept)
        assert float((gram - wanted).abs().max() / wanted.abs().max()) < 1e-6, name
    quiet = measured(model, DATA[:4], DENSE)
    name = next(iter(weights))
    assert not torch.allclose(quiet.gram(name), watch.measurement().gram(name), rtol=1e-3)


# --- it costs the training nothing -------------------------------------------------------------


@contextlib.contextmanager
def _nothing() -> Iterator[None]:
    yield


@pytest.mark.parametrize("kind", ["plain", "checkpointed", "reentrant", "autocast", "dropout"])
def test_observing_changes_no_loss_and_no_weight_by_a_single_bit(kind: str) -> None:
    def run(observe: bool) -> tuple[list[float], list[Tensor]]:
        if kind in {"checkpointed", "reentrant"}:
            model = checkpointed(kind == "reentrant")
        else:
            model = adapted(lora_dropout=0.2 if kind == "dropout" else 0.0)
        watch = window_on(model, directions=True) if observe else None
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        torch.manual_seed(3)

        def around() -> Any:
            return torch.autocast("cpu", torch.bfloat16) if kind == "autocast" else _nothing()

        losses = train(model, DATA[:5], watch, optimizer, around=around)
        return losses, [p.detach().clone() for p in trainable(model)]

    (losses, weights), (plain_losses, plain_weights) = run(True), run(False)
    assert losses == plain_losses
    assert len(set(losses)) > 1
    for observed, plain in zip(weights, plain_weights, strict=True):
        assert torch.equal(observed, plain)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules())


def test_hooks_are_there_while_open_and_gone_after_close_and_exceptions() -> None:
    model = adapted()
    watch = window_on(model)
    before = hooks(model)
    for _ in range(2):
        watch.open()
        watch.open()
        assert watch.is_open
        assert hooks(model) == before + len(watch.targets)
        watch.close()
        watch.close()
        assert not watch.is_open
        assert hooks(model) == before
    watch.open()
    with pytest.raises(ValueError, match="input_ids"):
        model(nonsense=1)
    watch.close()
    assert hooks(model) == before


def test_an_evaluation_in_between_leaves_no_trace() -> None:
    model, other = adapted(), adapted()
    watch, plain = window_on(model, DENSE), window_on(other, DENSE)
    watch.open()
    for step, batch in enumerate(DATA[:3], 1):
        model(**batch).loss.backward()
        model.eval()
        with torch.no_grad():
            model(**DATA[5])
        with torch.inference_mode():
            model(**DATA[6])
        model.train()
        watch.end_step(step)
    train(other, DATA[:3], plain)
    same_grams(watch.measurement(), plain.measurement(), 0.0)
    assert watch.measurement().batches == 3


def test_a_forward_pass_without_backward_leaves_no_trace() -> None:
    model = adapted()
    watch = window_on(model, DENSE)
    watch.open()
    model(**DATA[5])
    train(model, DATA[:2], watch)
    same_grams(watch.measurement(), measured(model, DATA[:2], DENSE), 0.0)


# --- the window slides -------------------------------------------------------------------------


def test_the_oldest_mini_batch_makes_room_for_the_newest() -> None:
    model = adapted()
    watch = window_on(model, DENSE, size=3)
    for count in range(1, 7):
        train(model, DATA[count - 1 : count], watch)
        kept = DATA[max(0, count - 3) : count]
        same_grams(watch.measurement(), measured(model, kept, DENSE), 0.0)


def step_with(watch: Window, model: nn.Module, step: int, spoil: bool) -> bool:
    """One mini-batch, its gradients overflowing if asked for; whether it was kept."""
    watch.open()
    (model(**DATA[step]).loss * (float("inf") if spoil else 1.0)).backward()
    kept = watch.end_step(step)
    watch.close()
    return kept


def test_batches_that_are_not_finite_are_left_out_counted_and_still_take_their_place() -> None:
    model = adapted()
    watch = window_on(model, DENSE, size=3, directions=True)
    assert [step_with(watch, model, i, spoil=i == 1) for i in range(3)] == [True, False, True]
    assert watch.dropped == 1
    same_grams(watch.measurement(), measured(model, [DATA[0], DATA[2]], DENSE), 0.0)
    # Another one pushes the first batch out, although nothing took its place.
    assert not step_with(watch, model, 3, spoil=True)
    assert watch.dropped == 2
    same_grams(watch.measurement(), measured(model, [DATA[2]], DENSE), 0.0)
    sketches = watch.directions()
    assert sketches
    assert all(torch.isfinite(part).all() for part in sketches.values())


def test_a_window_without_any_finite_batch_is_an_error() -> None:
    model = adapted()
    watch = window_on(model, size=2)
    train(model, DATA[:2], watch)
    assert not step_with(watch, model, 3, spoil=True)
    assert watch.measurement().batches == 1
    assert not step_with(watch, model, 4, spoil=True)
    with pytest.raises(gr.MeasurementError, match=r"none of the observed .*\(2 left out\)"):
        watch.measurement()
    with pytest.raises(gr.MeasurementError, match="none of the observed"):
        window_on(model).measurement()


def test_a_step_that_shows_no_gradient_is_an_error_each_time() -> None:
    model = adapted()
    watch = window_on(model)
    with pytest.raises(gr.MeasurementError, match="no output gradient arrived at any of the 8"):
        watch.end_step(1)
    watch.open()
    model(**DATA[0]).loss.backward()
    assert watch.end_step(1)
    with torch.no_grad():
        model(**DATA[1])
    with pytest.raises(gr.MeasurementError, match=r"targets in step 2\. Check that the model"):
        watch.end_step(2)


def test_what_arrives_after_closing_does_not_spill_into_the_next_window() -> None:
    model = adapted()
    watch = window_on(model, DENSE, directions=True)
    watch.open()
    late = model(**DATA[5]).loss
    watch.close()
    late.backward()
    train(model, DATA[:2], watch)
    same_grams(watch.measurement(), measured(model, DATA[:2], DENSE), 0.0)
    clean = window_on(model, directions=True)
    train(model, DATA[:2], clean)
    wanted = clean.directions()
    assert wanted
    assert all(torch.equal(part, wanted[name]) for name, part in watch.directions().items())


# --- directions to grow into -------------------------------------------------------------------


def test_directions_are_one_sided_sketches_of_the_summed_gradients() -> None:
    model = adapted()
    dense, watch = window_on(model, DENSE), window_on(model, directions=True)
    train(model, DATA[:3], dense)
    rows = {n: t.double() for n, t in dense.state().items() if n.startswith("rows/")}
    train(model, DATA[:3], watch)
    sketches = watch.directions()
    for target in watch.targets:
        gradient = rows[f"rows/{target.name}"].sum(0).reshape(target.d_out, target.d_in)
        signs = random_signs(target.d_out, seed_of(5, "direction", target.name))
        wanted = fold(gradient.float().T, signs, DIRECTION_ROWS).T
        assert sketches[target.name].shape == wanted.shape
        torch.testing.assert_close(sketches[target.name], wanted, rtol=1e-4, atol=1e-6)
    assert watch.directions() == {}
    assert window_on(model).directions() == {}


def test_directions_point_along_the_mean_gradient() -> None:
    target = gr.Target("a", 40, 60)
    generator = torch.Generator().manual_seed(0)
    x, delta = torch.randn(1, 40, generator=generator), torch.randn(1, 60, generator=generator)
    probe = DirectionProbe([target], DIRECTION_ROWS, seed=1)
    for _ in range(4):
        kept = probe.on_input(target, x)
        probe.on_output_grad(target, kept, delta)
        probe.end_batch(keep=True)
    principal = torch.linalg.svd(probe.sums["a"]).Vh[0]
    assert abs(float(principal @ x[0]) / float(x.norm())) > 0.9999


# --- resume ------------------------------------------------------------------------------------


@pytest.mark.parametrize("signal", [SKETCH, DENSE], ids=["sketch", "dense"])
def test_a_window_restored_half_full_goes_on_as_if_nothing_had_happened(
    signal: gr.Spectrum,
) -> None:
    model = adapted()
    whole = window_on(model, signal, size=3, directions=True)
    first, state = window_on(model, signal, size=3, directions=True), {}
    for step in range(4):
        for watch in (whole, first):
            step_with(watch, model, step, spoil=step == 1)
        state = {key: tensor.clone() for key, tensor in first.state().items()}
        first = window_on(model, signal, size=3, directions=True)
        first.restore(state)
        assert first.state().keys() == state.keys()
        assert all(torch.equal(first.state()[key], state[key]) for key in state)
    assert first.dropped == whole.dropped == 1
    same_grams(first.measurement(), whole.measurement(), 0.0)
    assert whole.measurement().batches == 2
    sums = whole.directions()
    assert all(torch.equal(part, sums[name]) for name, part in first.directions().items())
    assert sums


def test_an_empty_window_is_restored_empty() -> None:
    model = adapted()
    watch = window_on(model)
    watch.restore(window_on(model).state())
    watch.restore({})
    with pytest.raises(gr.MeasurementError, match="none of the observed"):
        watch.measurement()


def saved_state() -> dict[str, Tensor]:
    model = adapted()
    watch = window_on(model, directions=True)
    train(model, DATA[:2], watch)
    return watch.state()


def _other_target(state: dict[str, Tensor]) -> None:
    name = next(key for key in state if key.startswith("rows/"))
    state["rows/other"] = state.pop(name)


def _other_width(state: dict[str, Tensor]) -> None:
    name = next(key for key in state if key.startswith("rows/"))
    state[name] = state[name][:, :-1]


def _too_few_rows(state: dict[str, Tensor]) -> None:
    name = next(key for key in state if key.startswith("rows/"))
    state[name] = state[name][:1]


def _too_many_flags(state: dict[str, Tensor]) -> None:
    state["kept"] = torch.ones(3, dtype=torch.bool)


def _no_flags(state: dict[str, Tensor]) -> None:
    del state["kept"]


def _other_directions(state: dict[str, Tensor]) -> None:
    name = next(key for key in state if key.startswith("directions/"))
    state[name] = state[name][:1]


@pytest.mark.parametrize(
    "damage",
    [_other_target, _other_width, _too_few_rows, _too_many_flags, _no_flags, _other_directions],
)
def test_a_state_that_does_not_fit_is_refused(damage: Callable[[dict[str, Tensor]], None]) -> None:
    state = saved_state()
    watch = window_on(adapted(), directions=True)
    watch.restore(state)
    damage(state)
    with pytest.raises(gr.MeasurementError, match="does not fit this run"):
        watch.restore(state)
