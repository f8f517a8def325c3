"""A cap on memory: what is decided, that it changes no number, and what is refused."""

from typing import Any

import pytest
import torch

import gradrank as gr
from cases import CASES, batches
from gradrank.core.bytesize import parse_bytes
from gradrank.signals import scheme as schemes
from gradrank.signals.held import statistics_bytes
from gradrank.signals.scheme import Cap, Pass, Scheme, agreed, scheme_of
from gradrank.signals.weigh import KeptInput, PassMemory

LLAMA = CASES["llama"]
SIGNALS = {
    "sketch": [gr.Spectrum(sketch_dim=16), gr.MeanGradient(4)],
    "dense": [gr.Spectrum("dense"), gr.MeanGradient(4)],
}
TARGETS = [gr.Target(name, 10, 10) for name in "abcd"]
MEAN = (gr.MeanGradient(2),)
# Two blocks of 100 bytes with entries of 10; each target's input takes 20.
MEMORY = PassMemory(
    front=5,
    tail=40,
    blocks=(100, 100),
    entries=(10, 10),
    kept=tuple(KeptInput(20, i // 2, frozenset(name)) for i, name in enumerate("abcd")),
    widest_tail=30,
    widest_block=8,
    working=6,
)


def cap(limit: int, on_host: bool = False, can_checkpoint: bool = True) -> Cap:
    return Cap(limit, MEMORY, on_host, can_checkpoint)


def test_activations_by_hand() -> None:
    # two blocks with two inputs each; at the loss its tail and two like its widest
    assert MEMORY.activations("abcd", False) == 5 + 2 * 140 + 40 + 60
    # entries, and one block at work with its three temporaries; that is more than the tail
    assert MEMORY.activations("abcd", True) == 5 + 20 + 140 + 24 + 6
    assert MEMORY.activations("a", True) == 5 + 20 + 120 + 24 + 6
    outside = PassMemory(1, 2, (), (), (KeptInput(4, -1, frozenset("a")),), 8, 0, 0)
    assert outside.activations("a", False) == 1 + 4 + 2 + 16
    assert outside.activations("b", False) == 1 + 2 + 16


def test_a_cap_is_met_by_as_little_as_it_takes() -> None:
    # k = 2, c = 5: 4 (20 + 50) bytes, for even and odd batches; 385, 195 and 5 % more of each
    one = statistics_bytes(TARGETS[:1], MEAN, 4, False)
    assert one == 2 * 4 * 70
    four = 4 * one
    plain = scheme_of(TARGETS, MEAN, 4, None, cap(404 + four))
    assert plain == Scheme((Pass(tuple(TARGETS), MEAN),), False, 404 + four)
    again = scheme_of(TARGETS, MEAN, 4, None, cap(403 + four))
    assert again == Scheme((Pass(tuple(TARGETS), MEAN),), True, 204 + four)
    streamed = scheme_of(TARGETS, MEAN, 4, None, cap(203 + four))
    assert [[t.name for t in p.targets] for p in streamed.passes] == [["a", "b", "c"], ["d"]]
    assert streamed.checkpoint
    assert streamed.predicted == 204 + 3 * one
    refused = scheme_of(TARGETS, MEAN, 4, False, cap(403 + four))
    assert (refused.checkpoint, len(refused.passes)) == (False, 2)
    flat = scheme_of(TARGETS, MEAN, 4, None, cap(403 + four, can_checkpoint=False))
    assert (flat.checkpoint, len(flat.passes)) == (False, 2)


def test_what_does_not_fit_is_refused_with_numbers() -> None:
    with pytest.raises(gr.MeasurementError, match=r"'a' alone takes about 743 B .*micro-batches"):
        scheme_of(TARGETS, MEAN, 4, None, cap(742))
    with pytest.raises(gr.MeasurementError, match="allow checkpointing"):
        scheme_of(TARGETS, MEAN, 4, False, cap(700))


def test_dense_gradients_keep_to_both_limits() -> None:
    signal = gr.Spectrum("dense", max_bytes=4 * 200 * 5)  # two targets beside four batches
    assert len(scheme_of(TARGETS, (signal,), 4).passes) == 2
    # on a host the gradients of all batches count: 4 x 5 x 100 bytes, and an eigenproblem
    found = scheme_of(TARGETS, (signal,), 4, None, cap(195 + 2128, on_host=True))
    assert [len(p.targets) for p in found.passes] == [1, 1, 1, 1]


def test_processes_agree_on_the_smaller_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, c, d = TARGETS
    mine = Scheme((Pass((a, b, c), MEAN), Pass((d,), MEAN)), False)
    other = [1.0, 1.0, 0.0, 1.0, 0.0]  # checkpointed, cut before c

    def add(tensors: list[torch.Tensor]) -> None:
        tensors[0] += torch.tensor(other)

    assert agreed(mine) is mine
    monkeypatch.setattr(schemes, "is_distributed", lambda: True)
    monkeypatch.setattr(schemes, "sum_over_processes", add)
    found = agreed(mine)
    assert found.checkpoint
    assert found.passes == (Pass((a, b), MEAN), Pass((c,), MEAN), Pass((d,), MEAN))


@pytest.mark.parametrize("kind", sorted(SIGNALS))
@pytest.mark.parametrize("checkpoint", [None, False])
def test_a_cap_changes_no_number(kind: str, checkpoint: bool | None) -> None:
    model, data = LLAMA.model(), batches(LLAMA, 4)
    told: list[tuple[int, int]] = []

    def measure(**options: Any) -> Any:
        return gr.measure(model, data, SIGNALS[kind], num_batches=2, accumulate=2, **options)

    wanted = measure()
    roomy = measure(max_memory="1GiB", checkpoint=checkpoint)
    assert roomy.info["passes"] == wanted.info["passes"]
    assert not roomy.info["checkpointed"]
    limit = roomy.info["predicted_memory"] * 7 // 10
    found = measure(max_memory=limit, checkpoint=checkpoint, progress=lambda *now: told.append(now))
    passes = found.info["passes"]
    assert passes > wanted.info["passes"]
    assert found.info["checkpointed"] is (checkpoint is None)
    assert found.info["predicted_memory"] <= limit == found.info["max_memory"]
    assert told == [(i + 1, 2 * passes) for i in range(2 * passes)]
    for key in ("examples", "tokens", "unreached"):
        assert found.info[key] == wanted.info[key]
    values, others = (m.need_mean_gradient().values["whole"] for m in (found, wanted))
    assert list(values) == [target.name for target in wanted.targets]
    for target in wanted.targets:
        assert torch.equal(found.gram(target.name), wanted.gram(target.name))
        assert torch.equal(values[target.name], others[target.name])


def test_a_plan_under_a_cap_is_the_same_plan() -> None:
    model, data = LLAMA.model(), batches(LLAMA, 2)
    wanted = gr.plan(model, data, "waterfill", "uniform:2", num_batches=2)
    found = gr.plan(model, data, "waterfill", "uniform:2", num_batches=2, max_memory="200KiB")
    assert found.provenance["passes"] > 1
    assert found.ranks == wanted.ranks


def test_weighing_leaves_nothing_and_sees_through_own_checkpointing() -> None:
    model, data = LLAMA.model(), batches(LLAMA, 2)
    state = torch.get_rng_state()
    plain = gr.measure(model, data, num_batches=2, max_memory="1GiB", checkpoint=True)
    model.activation_checkpointing_enable({"use_reentrant": False})
    own = gr.measure(model, data, num_batches=2, max_memory="1GiB")
    assert own.info["checkpointed"]
    assert own.info["predicted_memory"] == pytest.approx(plain.info["predicted_memory"], rel=0.02)
    assert model.model.layers[0].gradient_checkpointing
    assert torch.equal(torch.get_rng_state(), state)
    # the one hook is the model's own: it lets the embedding's output ask for a gradient
    hooks = [hook for m in model.modules() for hook in (*m._forward_hooks, *m._forward_pre_hooks)]
    assert len(hooks) == 1


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 << 30), ("8g", 8 << 30), ("1.5 MB", 3 << 19), ("512", 512), (7, 7)],
)
def test_sizes_are_read(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "8 apples", "-1GiB", "0", "GiB", "1e9", "inf", 0, -3])
def test_sizes_that_are_none_are_refused(text: str | int) -> None:
    with pytest.raises(gr.OptionError, match="not understood"):
        parse_bytes(text)
