"""Baselines on PEFT that look at data or move ranks: EVA, LoRA-GA and AdaLoRA."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import EvaConfig, initialize_lora_eva_weights
from torch import Tensor, nn

from baseline_cases import SCALE, STEPS, setting_of
from cases import CASES, batches
from gradrank.adapters.apply import count_trainable
from gradrank.core.errors import BudgetError, MeasurementError, OptionError
from gradrank.core.targets import Target
from gradrank.lab.adalora_run import AdaLoraCallback
from gradrank.lab.baselines.arm import Batch, Setting
from gradrank.lab.baselines.eva import _Passes, within_budget
from gradrank.lab.baselines.eva_inputs import InputRows, explained, joined
from gradrank.lab.baselines.lora_ga import first_factors
from gradrank.lab.baselines.registry import create_baseline
from gradrank.lab.baselines.shared_peft import lora_layers
from gradrank.signals.facts import find_targets
from oracles.baselines import (
    best_directions,
    gradient_start,
    gradient_start_by_inputs,
    principal_inputs,
    uncentred_inputs,
)

EXACT = {"tau": 0.995, "passes": 100}


def inputs_of(setting: Setting, name: str, data: list[Batch]) -> Tensor:
    """All inputs of a target, one row per token; batches here have no padding."""
    rows: list[Tensor] = []
    module = setting.model.get_submodule(name)
    handle = module.register_forward_pre_hook(
        lambda _module, args: rows.append(args[0].reshape(-1, args[0].shape[-1]))
    )
    with torch.no_grad():
        for batch in data:
            setting.model.eval()(**batch)
    handle.remove()
    return torch.cat(rows)


@pytest.mark.parametrize("case", ["llama", "bert", "gpt2", "vit"])
def test_evas_directions_are_principal_directions_of_the_inputs(case):
    setting = setting_of(case)
    data = list(setting.batches(16))
    seen = {t.name: inputs_of(setting, t.name, data) for t in setting.targets}
    built = create_baseline("eva", EXACT).build(setting)
    wrong = []
    for name, layer in lora_layers(built.model).items():
        A = layer.lora_A["default"].weight.detach().double()
        assert bool((layer.lora_B["default"].weight == 0).all())
        exact, shares = principal_inputs(seen[name], len(A))
        # PEFT's PCA is incremental and approximate, and random weights have flat spectra: the
        # directions explain nearly as much as the exact ones, and other directions do not.
        centred = seen[name].double() - seen[name].double().mean(0)
        caught = (centred @ A.T).square().sum() / centred.square().sum()
        assert float(caught) > 0.85 * float(shares.sum())
        other = torch.linalg.qr(torch.randn(A.shape[1], len(A)).double())[0].T
        missed = (centred @ other.T).square().sum() / centred.square().sum()
        assert float(missed) < 0.8 * float(shares.sum())
        assert torch.allclose(A @ A.T, torch.eye(len(A), dtype=torch.float64), atol=1e-4)
        wrong.append(float((A[0] @ uncentred_inputs(seen[name], 1)[0][0]).abs()))
        assert float((A[0] @ exact[0]).abs()) > 0.6
    assert min(wrong) < 0.9


def test_ranks_follow_explained_variance_and_are_no_longer_uniform():
    setting = setting_of("llama", 3.0)
    data = list(setting.batches(16))
    seen = {t.name: inputs_of(setting, t.name, data) for t in setting.targets}
    built = create_baseline("eva", EXACT).build(setting)
    shares = {n: principal_inputs(rows, 6)[1].tolist() for n, rows in seen.items()}
    costs = {t.name: t.cost for t in setting.targets}
    ideal = best_directions(costs, shares, setting.budget)
    found = {t.name: built.ranks.get(t.name, 0) for t in setting.targets}
    assert sum(abs(found[n] - ideal[n]) for n in ideal) <= 0.15 * sum(ideal.values())
    assert len(set(found.values())) > 1
    assert max(found.values()) <= 6  # rho = 2


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 5)), min_size=1, max_size=6),
    st.integers(0, 80),
    st.integers(0, 10**6),
)
def test_directions_are_taken_as_the_oracle_takes_them(shapes, budget, seed):
    generator = torch.Generator().manual_seed(seed)
    targets = [Target(f"t{i}", d, d) for i, (d, _) in enumerate(shapes)]
    shares = {
        f"t{i}": sorted(torch.rand(count, generator=generator).tolist(), reverse=True)
        for i, (_, count) in enumerate(shapes)
    }
    ranks = within_budget(targets, shares, budget)
    assert ranks == best_directions({t.name: t.cost for t in targets}, shares, budget)
    left = budget - sum(ranks[t.name] * t.cost for t in targets)
    further = [t.cost for t in targets if ranks[t.name] < len(shares[t.name])]
    assert left >= 0
    assert not further or left < min(further)


def test_an_oracle_that_ignores_costs_would_be_noticed():
    targets = [Target("wide", 10, 10), Target("slim", 1, 1)]
    shares = {"wide": [0.9, 0.8], "slim": [0.7]}
    assert within_budget(targets, shares, 22) == {"wide": 1, "slim": 1}
    assert best_directions({"wide": 1, "slim": 1}, shares, 22) == {"wide": 2, "slim": 1}


def test_without_trimming_eva_is_what_peft_makes():
    """Square targets: ranks and parameters are one, so PEFT's own way needs no trimming."""
    base = CASES["llama"].model()
    names = r"re:.*(q_proj|o_proj)"
    setting = setting_of("llama", 2.0, targets=tuple(find_targets(base, names)))
    twin = setting_of("llama", 2.0)
    config = LoraConfig(
        r=2,
        lora_alpha=2 * SCALE,  # pyright: ignore[reportArgumentType]
        target_modules=[target.name for target in setting.targets],
        init_lora_weights="eva",
        eva_config=EvaConfig(),
    )
    twin_model = get_peft_model(twin.model, config, low_cpu_mem_usage=True)  # pyright: ignore
    found = InputRows(twin_model.get_base_model(), setting.targets, list(setting.batches(16)))
    loader = found.grouped(8)
    initialize_lora_eva_weights(twin_model, loader, show_progress_bar=False)
    built = create_baseline("eva").build(setting)
    ours, theirs = lora_layers(built.model), lora_layers(twin_model)
    assert built.ranks == {name: layer.r["default"] for name, layer in theirs.items()}
    for name, layer in ours.items():
        A, other = layer.lora_A["default"].weight, theirs[name].lora_A["default"].weight
        assert torch.allclose(A, other, atol=1e-6)
        assert layer.scaling == pytest.approx(theirs[name].scaling)


def test_rho_of_one_is_uniform():
    built = create_baseline("eva", {"rho": 1.0}).build(setting_of("llama", 2.0))
    assert set(built.ranks.values()) == {2}


def test_explained_variance_is_exact():
    setting = setting_of("llama")
    data = list(setting.batches(4))
    rows = InputRows(setting.model, setting.targets, data)
    name = setting.targets[0].name
    directions, shares = principal_inputs(inputs_of(setting, name, data), 5)
    found = explained(setting.model, {name: directions, "lm_head": directions[:0]}, rows, data)
    assert found[name] == pytest.approx(shares.tolist(), abs=1e-6)
    assert found["lm_head"] == []
    _, broken = uncentred_inputs(inputs_of(setting, name, data), 5)
    assert found[name] != pytest.approx(broken.tolist(), abs=1e-3)


def test_padding_and_unlabelled_tokens_do_not_count():
    setting = setting_of("llama")
    batch = next(iter(setting.batches(1)))
    mask, labels = batch["attention_mask"].clone(), batch["labels"].clone()
    mask[:, 5:], labels[:, :3] = 0, -100
    one = {**batch, "attention_mask": mask, "labels": labels}
    rows = InputRows(setting.model, setting.targets, [one])
    expected = torch.zeros(3, 7, dtype=torch.bool)
    expected[:, 3:5] = True
    kept = rows.mask_of(one)
    assert kept is not None
    assert torch.equal(kept, expected)
    states = torch.randn(3, 7, 4)
    assert torch.equal(rows.rows_of((states,), kept), states[:, 3:5].reshape(6, 4))
    assert rows.rows_of(torch.randn(3, 4), kept).shape == (3, 4)  # a pooler's input
    # Six rows have labels, nine more are real: more is asked for than the labelled ones are.
    assert len(rows.grouped(6)) == 1
    assert rows.notes == ()
    assert len(rows.grouped(12)) == 1
    assert "Too few tokens have labels" in rows.notes[0]
    with pytest.raises(MeasurementError, match="needs 16 rows of input at once"):
        rows.grouped(16)


def test_batches_of_different_lengths_are_joined_by_padding():
    short = {"input_ids": torch.ones(2, 3, dtype=torch.long), "labels": torch.ones(2, 3).long()}
    long = {"input_ids": torch.ones(1, 5, dtype=torch.long), "labels": torch.ones(1, 5).long()}
    with pytest.raises(MeasurementError, match=r"\(3 and 5 in 'input_ids'\).*attention mask"):
        joined([short, long])
    parts = [{**part, "attention_mask": torch.ones_like(part["labels"])} for part in (short, long)]
    whole = joined(parts)
    assert whole["attention_mask"].sum(1).tolist() == [3, 3, 5]
    assert whole["labels"][0].tolist() == [1, 1, 1, -100, -100]


def test_no_data_and_too_narrow_inputs_are_told():
    with pytest.raises(MeasurementError, match="no calibration batch"):
        create_baseline("eva").build(setting_of("llama", batches=lambda _count: iter(())))
    with pytest.raises(BudgetError, match="needs 34 input features for rank 17"):
        create_baseline("eva").build(setting_of("llama", 17.0))


@pytest.mark.parametrize("case", ["llama", "bert"])
def test_directions_that_do_not_come_to_rest_are_taken_with_a_note(case):
    setting = setting_of(case)
    data = list(setting.batches(16))
    seen = {t.name: inputs_of(setting, t.name, data) for t in setting.targets}
    built = create_baseline("eva", {"tau": 0.9999999, "passes": 2}).build(setting)
    assert [note for note in built.notes if "Not all directions stood still" in note] == [
        built.notes[-1]
    ]
    spent = count_trainable(built.model)["adapter"]
    assert setting.budget - max(t.cost for t in setting.targets) < spent <= setting.budget
    for name, layer in lora_layers(built.model).items():
        A = layer.lora_A["default"].weight.detach().double()
        assert torch.allclose(A @ A.T, torch.eye(len(A), dtype=torch.float64), atol=1e-4)
        centred = seen[name].double() - seen[name].double().mean(0)
        caught = (centred @ A.T).square().sum() / centred.square().sum()
        assert float(caught) > 0.8 * sum(principal_inputs(seen[name], len(A))[1].tolist())
    assert not any(module._forward_hooks for module in built.model.modules())


def test_directions_at_rest_have_no_such_note():
    notes = create_baseline("eva", EXACT).build(setting_of("llama")).notes
    assert not any("stood still" in note for note in notes)


def test_directions_that_are_no_numbers_end_the_search():
    class Blind:
        def forward(self, _model: Any, _batch: Batch) -> None:
            return None

    passes = _Passes(Blind(), 3, 0.9)  # pyright: ignore[reportArgumentType]
    for _ in range(4):
        passes(None, {})
    assert not passes.stopped
    for _ in range(64):
        passes(None, {})
    with pytest.raises(MeasurementError, match="not finite"):
        passes(None, {})
    assert passes.stopped


def test_a_target_without_input_is_named():
    setting = setting_of("llama")
    setting.model.idle = nn.Linear(32, 32)
    idle = (*setting.targets, Target("idle", 32, 32))
    with pytest.raises(MeasurementError, match="'idle' and 0 other"):
        InputRows(setting.model, idle, list(setting.batches(1)))


def mean_gradients(setting: Setting, count: int) -> dict[str, Tensor]:
    setting.model.requires_grad_(True).train()
    for batch in setting.batches(count):
        (setting.model(**batch).loss / count).backward()
    found = {}
    for target in setting.targets:
        gradient: Any = setting.model.get_submodule(target.name).weight.grad
        found[target.name] = gradient.T if target.kind == "conv1d" else gradient
    return found


@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_lora_ga_starts_from_the_mean_gradient_of_the_loss(case):
    dropout_free = setting_of(case)
    if case == "gpt2":
        for module in dropout_free.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    twin = setting_of(case)
    twin.model.load_state_dict(dropout_free.model.state_dict())
    for module in twin.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    gradients = mean_gradients(twin, 4)
    built = create_baseline("lora-ga", {"batches": 4}).build(dropout_free)
    rectangular = 0
    for name, layer in lora_layers(built.model).items():
        B, A = (f["default"].weight.detach().double() for f in (layer.lora_B, layer.lora_A))
        # Directions are found up to rotations among near-equal singular values.
        sizes = [float(factor.norm()) for factor in gradient_start(gradients[name], 2, 16)]
        assert [float(A.norm()), float(B.norm())] == pytest.approx(sizes, rel=1e-4)
        _, _, right = torch.linalg.svd(gradients[name].double(), full_matrices=False)
        caught = (right[:2] @ A.T).norm() / A.norm()
        assert float(caught) > 0.95
        if A.shape[1] != B.shape[0]:
            rectangular += 1
            broken = gradient_start_by_inputs(gradients[name], 2, 16)
            assert float(A.norm()) != pytest.approx(float(broken[0].norm()), rel=0.05)
    assert rectangular
    assert not any(hasattr(m, "_peft_loraga_grad") for m in built.model.modules())


def test_first_factors_are_the_oracles():
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(24, 12, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(12, 12, generator=generator))[0]
    gradient = left @ torch.diag(0.5 ** torch.arange(12.0)) @ right.T
    A, B = first_factors(gradient, 3, 16)
    found = (A.double().abs(), B.double().abs())
    for factor, exact, broken in zip(
        found,
        gradient_start(gradient, 3, 16),
        gradient_start_by_inputs(gradient, 3, 16),
        strict=True,
    ):
        assert torch.allclose(factor, exact.abs(), atol=1e-4)
        assert not torch.allclose(factor, broken.abs(), atol=1e-2)


def test_pefts_start_of_lora_ga_is_another_one():
    sizes = {}
    for factors in ("authors", "peft"):
        built = create_baseline("lora-ga", {"factors": factors}).build(setting_of("llama"))
        layer = next(iter(lora_layers(built.model).values()))
        A, B = (f["default"].weight.detach() for f in (layer.lora_A, layer.lora_B))
        sizes[factors] = (float(A.norm()), float(B.norm()))
    assert sizes["peft"][0] == pytest.approx(2**0.5, rel=1e-4)  # orthonormal rows
    assert sizes["authors"][0] == pytest.approx(2**0.5 * 32**0.25 / 4, rel=1e-4)
    assert sizes["authors"][0] == pytest.approx(sizes["authors"][1], rel=1e-4)
    assert sizes["peft"][1] != pytest.approx(sizes["authors"][1], rel=0.1)


def test_lora_ga_refuses_ranks_that_a_gradient_has_no_directions_for():
    # k_proj is 16 x 32: at most 8.
    with pytest.raises(BudgetError, match=r"takes 2 r directions, 18 on '.*k_proj'"):
        create_baseline("lora-ga").build(setting_of("llama", 9.0))


def test_lora_ga_refuses_targets_without_gradients():
    idle = Target("idle", 32, 32)
    setting = setting_of("llama", targets=(*setting_of("llama").targets, idle))
    setting.model.idle = nn.Linear(32, 32)
    with pytest.raises(MeasurementError, match="'idle' has no gradient in 8 batches"):
        create_baseline("lora-ga").build(setting)


@pytest.mark.parametrize("case", ["llama", "bert", "gpt2"])
def test_adalora_ends_with_the_mean_rank_that_the_budget_buys(case):
    setting = setting_of(case, 2.6)
    built = create_baseline("peft-adalora", {"interval": 2}).build(setting)
    assert set(built.ranks.values()) == {3}
    callback = built.capacity
    assert isinstance(callback, AdaLoraCallback)
    config = built.model.peft_config["default"]
    assert (config.target_r, config.init_r, config.total_step) == (2, 3, STEPS)
    assert (config.tinit, config.tfinal, config.deltaT) == (2, 10, 2)
    whole = sum(target.cost for target in setting.targets)
    assert count_trainable(built.model)["adapter"] == 3 * (whole + len(setting.targets))
    callback.on_train_begin(None, State(), None, model=built.model)
    optimizer = torch.optim.AdamW([p for p in built.model.parameters() if p.requires_grad], lr=1e-2)
    built.model.train()
    for batch in batches(CASES[case], STEPS, seed=4):
        built.model(**batch).loss.backward()
        optimizer.step()
        callback.on_optimizer_step(None, State(), None, optimizer=optimizer)
        optimizer.zero_grad()
    final = callback.finish()
    assert sum(final.ranks.values()) == 2 * len(setting.targets)
    square = [t for t in setting.targets if t.cost == 64]
    spent = {t.name: final.parameters[t.name] for t in square}
    assert spent == {t.name: 64 * final.ranks[t.name] for t in square}


class State:
    global_step, max_steps = 0, STEPS


def test_strict_adalora_cannot_exceed_the_budget():
    setting = setting_of("llama", 4.0)
    loose = create_baseline("peft-adalora").build(setting)
    assert "if the costliest targets keep all" in loose.notes[0]
    strict = create_baseline("peft-adalora", {"strict": True}).build(setting_of("llama", 4.0))
    r, s = (b.model.peft_config["default"] for b in (loose, strict))
    assert s.target_r < r.target_r == 4
    costs = sorted((t.cost for t in setting.targets), reverse=True)
    left, worst = s.target_r * len(costs), 0
    for cost in costs:
        worst += min(s.init_r, left) * cost
        left -= min(s.init_r, left)
    assert worst <= setting.budget
    with pytest.raises(BudgetError, match="kept wherever the ranks go"):
        create_baseline("peft-adalora", {"strict": True}).build(setting_of("llama", 1.0))


def test_adalora_refuses_quantized_targets_and_runs_without_steps():
    quantized = Target("model.layers.0.self_attn.q_proj", 32, 32, "quantized-linear")
    with pytest.raises(OptionError, match="cannot take targets of kind quantized-linear"):
        create_baseline("peft-adalora").build(setting_of("llama", targets=(quantized,)))
    with pytest.raises(OptionError, match="leave none of 0 steps"):
        create_baseline("peft-adalora").build(setting_of("llama", steps=0))


def test_lora_ga_starts_from_gradients_behind_the_warmed_head():
    inside: list[bool] = []

    def factors(setting: Setting) -> Tensor:
        model = create_baseline("lora-ga").build(setting).model
        assert torch.equal(model.base_model.model.classifier.original_module.weight, cold)
        layers = lora_layers(model).values()
        return torch.cat([layer.lora_A["default"].weight.flatten() for layer in layers])

    @contextlib.contextmanager
    def warmed() -> Iterator[None]:
        head: Any = plain.model.get_submodule("classifier")
        with torch.no_grad():
            head.weight.copy_(cold.flip(0) * 3)
        inside.append(True)
        yield
        with torch.no_grad():
            head.weight.copy_(cold)

    plain = setting_of("vit")
    cold = plain.model.get_submodule("classifier").weight.detach().clone()
    other = factors(setting_of("vit", warmed=warmed, model=plain.model))
    assert inside == [True]
    assert not torch.allclose(other, factors(setting_of("vit")), atol=1e-3)
