"""DyLoRA: ranks drawn per step, what a step trains, and what is left in the end."""

from collections import Counter
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict

import gradrank as gr
from cases import CASES, batches
from gradrank.adapters.apply import count_trainable
from gradrank.adapters.view import lora_sites
from gradrank.lab.baselines.dylora import DyLora, rank_of
from gradrank.lab.baselines.registry import create_baseline
from lab.baselines_ours_cases import (
    RANK,
    SCALING,
    STEPS,
    State,
    logits,
    same_weights,
    setting,
    tell,
    train,
)
from oracles.baselines_ours import nested_but_thawed, nested_update, nested_with_one_scale


def made(case: str = "llama", seed: int = 0, frozen: bool = True, **more: Any) -> Any:
    torch.manual_seed(seed)
    return DyLora(frozen=frozen).build(setting(case, seed=seed, **more))


def test_every_rank_is_drawn_equally_often() -> None:
    built = made()
    name = next(iter(built.ranks))
    count = Counter(built.capacity.drawn(step)[name] for step in range(3000))
    assert set(count) == {1, 2, 3}
    # Four standard errors of a share of one third.
    assert all(abs(n - 1000) < 4 * (3000 * 2 / 9) ** 0.5 for n in count.values())


def test_draws_depend_on_seed_and_step_alone() -> None:
    one, again, other = made(seed=0), made(seed=0), made(seed=1)
    torch.rand(7)
    draws = [[b.capacity.drawn(step) for step in range(20)] for b in (one, again, other)]
    assert draws[0] == draws[1] != draws[2]
    assert all(len(set(ranks.values())) == 1 for ranks in draws[0])


def test_targets_of_several_ranks_share_the_draw() -> None:
    assert [rank_of(0.5, rank) for rank in (1, 2, 3, 4)] == [1, 2, 2, 3]
    assert rank_of(1 - 1e-17, 5) == 5


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_step_is_that_of_nested_slices(frozen: bool, rank: int) -> None:
    built = made(frozen=frozen)
    _fill(built)
    site = next(iter(lora_sites(built.model, "default").values()))
    built.capacity.cut(dict.fromkeys(built.ranks, rank))
    A = site.raw("A").detach().clone().requires_grad_()
    B = site.raw("B").detach().clone().requires_grad_()
    x = torch.randn(4, A.shape[1])
    weight = site.layer.get_base_layer().weight
    found = site.layer(x)
    found.square().sum().backward()
    wrong = 0
    for twin in (nested_update, nested_with_one_scale, nested_but_thawed):
        A.grad = B.grad = None
        want = x @ weight.T + x @ twin(A, B, rank, SCALING * RANK, frozen).T
        want.square().sum().backward()
        alike = torch.allclose(found, want, atol=1e-5) and all(
            torch.allclose(mine.grad, theirs.grad, atol=1e-4, rtol=1e-4)
            for mine, theirs in ((site.raw("A"), A), (site.raw("B"), B))
        )
        assert alike or twin is not nested_update
        wrong += not alike
    # With one component nothing else could be trained; with all the scale is the whole one.
    assert wrong == 2 - (rank == 1) - (rank == RANK)
    left_out = [k for k in range(RANK) if k >= rank or (frozen and k != rank - 1)]
    assert not site.raw("A").grad[left_out].any()
    assert not site.raw("B").grad[:, left_out].any()


def _fill(built: Any) -> None:
    generator = torch.Generator().manual_seed(2)
    for site in lora_sites(built.model, "default").values():
        for raw in (site.raw("A"), site.raw("B")):
            raw.data = 0.3 * torch.randn(raw.shape, generator=generator)


def test_between_steps_the_whole_adapter_counts() -> None:
    built, state = made(), State()
    _fill(built)
    before = logits(built.model)
    cut = set()
    for _ in range(8):
        tell(built.capacity, "on_step_begin", state)
        cut |= {site.rank for site in lora_sites(built.model, "default").values()}
        if min(built.capacity.drawn(state.global_step).values()) < RANK:
            assert not torch.equal(logits(built.model), before)
        state.global_step += 1
        tell(built.capacity, "on_step_end", state)
        assert torch.equal(logits(built.model), before)
        shapes = {tuple(v.shape) for v in get_peft_model_state_dict(built.model).values()}
        assert all(RANK in shape for shape in shapes)
    assert cut == {1, 2, 3}


@pytest.mark.parametrize("case", list(CASES))
def test_it_ends_as_a_plain_adapter_of_full_rank(case: str) -> None:
    built = made(case)
    assert count_trainable(built.model) == {"adapter": setting(case).budget, "other": 0}
    train(built, case)
    before = logits(built.model, case)
    built.finish(built.model)
    built.finish(built.model)
    for site in lora_sites(built.model, "default").values():
        assert site.form == "plain"
        assert site.rank == RANK
        assert site.scaling == pytest.approx(SCALING)
    assert torch.equal(logits(built.model, case), before)
    built.model(**batches(CASES[case], 1)[0]).loss.backward()
    gradient = next(p.grad for n, p in built.model.named_parameters() if ".lora_B" in n)
    assert gradient is not None
    assert (gradient != 0).any(0).all(), "a hook is left"


def test_an_interrupted_step_is_closed() -> None:
    built = made()
    _fill(built)
    before = logits(built.model)
    built.capacity.cut(dict.fromkeys(built.ranks, 1))
    built.capacity.close()
    assert torch.equal(logits(built.model), before)


def test_runs_are_paired_and_seeds_differ() -> None:
    runs = [made(seed=seed) for seed in (0, 0, 1)]
    losses = [train(run) for run in runs]
    assert losses[0] == losses[1] != losses[2]
    assert same_weights(runs[0].model, runs[1].model)


def test_training_all_components_is_another_method() -> None:
    torch.manual_seed(0)
    frozen, thawed = made(frozen=True), made(frozen=False)
    assert train(frozen) != train(thawed)


def test_it_learns() -> None:
    losses = train(made(), steps=2 * STEPS, repeat=True)
    assert sum(losses[-6:]) < sum(losses[:6])


def test_options_are_read_from_text() -> None:
    assert create_baseline("dylora", {"frozen": "no"}) == DyLora(frozen=False)
    with pytest.raises(gr.OptionError, match="no option 'rank'"):
        create_baseline("dylora", {"rank": 3})
