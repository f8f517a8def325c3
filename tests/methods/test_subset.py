"""Uniform LoRA on a subset chosen by hand."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gradrank as gr
from cases import CASES
from gradrank.signals.facts import find_targets

BLOCKS = 5


def block(index: int, stack: str = "layers") -> list[gr.Target]:
    shapes = {"self_attn.q_proj": (8, 8), "self_attn.o_proj": (8, 8), "mlp.up_proj": (8, 24)}
    return [gr.Target(f"{stack}.{index}.{name}", *shape) for name, shape in shapes.items()]


TARGETS = [target for index in range(BLOCKS) for target in block(index)]
OTHERS = [gr.Target("layers.0.mixer", 8, 8), gr.Target("layers.0.conv", 8, 8)]


def chosen(targets: Sequence[gr.Target], **options: Any) -> set[str]:
    scores = gr.Subset(**options).assess(targets, None).scores
    assert set(scores.values()) <= {0.0, 1.0}
    return {name for name, score in scores.items() if score}


def ranks(budget: Any, targets: Sequence[gr.Target] = TARGETS, **options: Any) -> dict[str, int]:
    found = gr.allocate(targets, gr.Subset(**options), budget).ranks
    return {name: rank for name, rank in found.items() if rank}


@pytest.mark.parametrize(
    ("case", "choose", "parts"),
    [
        ("llama", "qv", ("q_proj", "v_proj")),
        ("bert", "qv", ("self.query", "self.value")),
        ("vit", "qv", ("q_proj", "v_proj")),
        ("t5", "qv", ("Attention.q", "Attention.v")),
        ("llama", "attention", ("q_proj", "k_proj", "v_proj", "o_proj")),
        ("bert", "attention", ("query", "key", "value", "attention.output.dense")),
        ("gpt2", "attention", ("attn.c_attn", "attn.c_proj")),
        ("t5", "attention", ("Attention.q", "Attention.k", "Attention.v", "Attention.o")),
        ("llama", "mlp", ("gate_proj", "up_proj", "down_proj")),
        ("bert", "mlp", (".0.intermediate.dense", ".1.intermediate.dense", "0.output.dense")),
        ("gpt2", "mlp", ("mlp.c_fc", "mlp.c_proj")),
        ("vit", "mlp", ("fc1", "fc2")),
        ("t5", "mlp", ("wi", "wo")),
    ],
)
def test_kinds_of_modules_are_known_by_name(case: str, choose: str, parts: tuple[str, ...]) -> None:
    targets = find_targets(CASES[case].model())
    found = chosen(targets, choose=choose)
    want = {t.name for t in targets if t.name.endswith(parts)}
    if (case, choose) == ("bert", "mlp"):
        want |= {"bert.encoder.layer.1.output.dense"}
    assert found == want
    assert found


@pytest.mark.parametrize("case", list(CASES))
def test_attention_and_feed_forward_are_all_there_is_and_share_nothing(case: str) -> None:
    targets = find_targets(CASES[case].model())
    attention, mlp = (chosen(targets, choose=kind) for kind in ("attention", "mlp"))
    assert not attention & mlp
    # BERT's pooler and the like stand outside all blocks.
    assert {t.name for t in targets if t.depth is not None} == attention | mlp


def test_the_ends_are_shares_of_the_blocks_rounded_up() -> None:
    def blocks(choose: str, share: float) -> set[int]:
        return {int(name.split(".")[1]) for name in chosen(TARGETS, choose=choose, share=share)}

    assert blocks("last", 0.5) == {2, 3, 4}
    assert blocks("first", 0.5) == {0, 1, 2}
    assert blocks("last", 0.01) == {4}
    assert blocks("first", 0.4) == {0, 1}
    assert blocks("first", 1.0) == set(range(BLOCKS))


def test_every_stack_has_ends_of_its_own() -> None:
    targets = [t for i in range(4) for t in block(i, "encoder.block")]
    targets += [t for i in range(2) for t in block(i, "decoder.block")]
    places = {name.rsplit(".", 2)[0] for name in chosen(targets, choose="last")}
    assert places == {"encoder.block.2", "encoder.block.3", "decoder.block.1"}


def test_chance_is_seeded_and_goes_by_names() -> None:
    first, again, other = (
        chosen(TARGETS, choose="random", seed=seed, share=0.4) for seed in (0, 0, 1)
    )
    assert first == again != other
    assert len(first) == len(other) == 6
    assert chosen(TARGETS[::-1], choose="random", share=0.4) == first


def test_chance_is_another_one_than_that_of_the_method_random() -> None:
    targets = [gr.Target(f"layers.{i}.q", 8, 8) for i in range(20)]
    common = []
    for seed in range(50):
        scores = gr.RandomScores(seed=seed).assess(targets, None).scores
        likely = sorted(scores, key=lambda name: -scores[name])[:10]
        common.append(len(chosen(targets, choose="random", seed=seed) & set(likely)))
    # Ten of twenty twice: 5 in common on average, with a standard deviation of 1.15.
    assert abs(sum(common) / 50 - 5) < 4 * 1.15 / 50**0.5


def test_names_are_whole_ends() -> None:
    found = chosen(TARGETS, choose="names", pattern="q_proj, 3.mlp.up_proj")
    assert found == {f"layers.{i}.self_attn.q_proj" for i in range(5)} | {"layers.3.mlp.up_proj"}
    assert chosen(TARGETS, choose="names", pattern="layers.1.mlp.up_proj") == {
        "layers.1.mlp.up_proj"
    }
    for wrong in ("proj", "layers.1", "re:.*", ".*q_proj"):
        with pytest.raises(gr.OptionError, match=r"'pattern'.*Known: o_proj, q_proj, up_proj"):
            chosen(TARGETS, choose="names", pattern=wrong)
    with pytest.raises(gr.OptionError, match=r"names 'q_prj'.*Did you mean 'q_proj'"):
        chosen(TARGETS, choose="names", pattern="o_proj,q_prj")


@pytest.mark.parametrize("pattern", [None, "", ",", "q_proj,", " , q_proj"])
def test_names_need_a_pattern(pattern: str | None) -> None:
    with pytest.raises(gr.OptionError, match="'pattern' of method 'subset'"):
        gr.Subset(choose="names", pattern=pattern)


def test_a_pattern_without_names_is_refused() -> None:
    with pytest.raises(gr.OptionError, match=r"'pattern'.*left out with choose=qv"):
        gr.Subset(choose="qv", pattern="q_proj")


@pytest.mark.parametrize("choose", ["qv", "attention", "mlp"])
def test_nothing_stands_in_for_an_empty_subset(choose: str) -> None:
    with pytest.raises(gr.OptionError, match=rf"is '{choose}'.*Types of modules here: conv, mixer"):
        gr.allocate(OTHERS, gr.Subset(choose=choose), "uniform:1")


def test_fused_projections_are_neither_query_nor_value() -> None:
    targets = find_targets(CASES["gpt2"].model())
    with pytest.raises(gr.OptionError, match=r"'qv'.*c_attn, c_fc, c_proj"):
        gr.allocate(targets, gr.Subset(choose="qv"), "uniform:1")


@pytest.mark.parametrize("choose", ["first", "last"])
def test_models_without_numbered_blocks_have_no_ends(choose: str) -> None:
    with pytest.raises(gr.OptionError, match="in a numbered block"):
        gr.allocate([gr.Target("up", 8, 8)], gr.Subset(choose=choose), "uniform:1")


def test_the_budget_is_spent_as_uniform_ranks() -> None:
    found = ranks("uniform:1", choose="qv")
    assert sum(rank * 16 for rank in found.values()) == 5 * 64
    assert set(found.values()) == {4}
    assert set(found) == chosen(TARGETS, choose="qv")


def test_a_budget_below_one_rank_each_starts_at_the_end_that_was_chosen() -> None:
    q = "layers.{}.self_attn.q_proj".format
    assert ranks(2 * 16 + 15, choose="qv") == {q(4): 1, q(3): 1}
    assert ranks(2 * 16, choose="names", pattern="q_proj") == {q(4): 1, q(3): 1}
    last, first = (ranks(70, choose=choose) for choose in ("last", "first"))
    assert {name.split(".")[1] for name in last} == {"4"}
    assert {name.split(".")[1] for name in first} == {"0"}
    # What the expensive target cannot have any more still pays for cheaper ones further on.
    assert ranks(33, choose="last") == {"layers.4.mlp.up_proj": 1}
    assert set(ranks(31, choose="last")) == {"layers.4.self_attn.o_proj"}


def test_a_small_budget_follows_chance_too() -> None:
    found = {frozenset(ranks(32, choose="random", share=1.0, seed=seed)) for seed in range(8)}
    assert len(found) > 1


def test_targets_outside_blocks_come_last() -> None:
    targets = [gr.Target("pooler.dense", 8, 8), *(gr.Target(f"h.{i}.dense", 8, 8) for i in (0, 1))]
    one = {"choose": "names", "pattern": "dense"}
    assert ranks(32, targets, **one) == {"h.0.dense": 1, "h.1.dense": 1}


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    budget=st.integers(16, 4000),
    choose=st.sampled_from(["qv", "attention", "mlp", "last", "first", "random"]),
    share=st.floats(0.05, 1.0),
    order=st.permutations(range(len(TARGETS))),
)
def test_budget_and_order(budget: int, choose: str, share: float, order: list[int]) -> None:
    method = gr.Subset(choose=choose, share=share)
    picked = [
        target for target in TARGETS if target.name in chosen(TARGETS, choose=choose, share=share)
    ]
    if budget < min(t.cost for t in picked):
        with pytest.raises(gr.BudgetError, match="floor"):
            gr.allocate(TARGETS, method, budget)
        return
    if budget > sum(t.cost * t.max_rank for t in picked):
        with pytest.raises(gr.BudgetError, match="ceiling"):
            gr.allocate(TARGETS, method, budget)
        return
    plan = gr.allocate(TARGETS, method, budget)
    assert gr.allocate([TARGETS[i] for i in order], method, budget).ranks == plan.ranks
    assert 0 < plan.parameters <= budget
    mine = [plan.ranks[t.name] for t in picked]
    assert sum(plan.ranks.values()) == sum(mine)
    if budget < sum(t.cost for t in picked):
        assert set(mine) == {0, 1}
        assert plan.slack < min(t.cost for t in picked if not plan.ranks[t.name])
    else:
        assert plan.slack < min(
            (t.cost for t in picked if plan.ranks[t.name] < t.max_rank), default=budget + 1
        )
