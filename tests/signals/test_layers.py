"""Which modules are targets, by what names, and which are refused."""

import re

import pytest
import torch
from torch import Tensor, nn

import gradrank as gr
from cases import CASES, tiny_llama, tiny_mixtral
from gradrank.core.targets import Target
from gradrank.signals.layers import ambiguous_suffixes, find_sites, unwrapped


def names(model: nn.Module, targets: str | list[str] = "all-linear") -> list[str]:
    return [site.target.name for site in find_sites(model, targets)]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = nn.Linear(4, 4), nn.Linear(4, 4)


class Clash(nn.Module):
    """``enc.q`` is a dotted suffix of ``vision.enc.q``."""

    def __init__(self) -> None:
        super().__init__()
        self.enc = Attention()
        self.vision = nn.ModuleDict({"enc": Attention()})


def test_heads_are_left_out_of_all_linear() -> None:
    for case in CASES.values():
        found = names(case.model())
        assert found
        assert not [name for name in found if "lm_head" in name or "classifier" in name]
    assert names(CASES["bert"].model(), "classifier") == ["classifier"]


def test_an_output_embedding_is_left_out_whatever_its_name() -> None:
    model = tiny_llama()
    model.out = model.lm_head
    del model.lm_head
    model.get_output_embeddings = lambda: model.out
    assert "out" not in names(model)


def test_patterns_select_by_name_suffix_list_and_expression() -> None:
    model = tiny_llama(2)
    q = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    v = [f"model.layers.{i}.self_attn.v_proj" for i in range(2)]
    assert names(model, "q_proj") == q
    assert names(model, "self_attn.q_proj") == q
    assert names(model, q[1]) == [q[1]]
    assert names(model, ["v_proj", "q_proj"]) == [q[0], v[0], q[1], v[1]]
    assert names(model, "v_proj, q_proj") == [q[0], v[0], q[1], v[1]]
    assert names(model, r"re:model\.layers\.1\.self_attn\.(q|v)_proj") == [q[1], v[1]]
    assert names(model, [r"re:.*\.0\..*q_proj", "v_proj"]) == [q[0], v[0], v[1]]


def test_an_expression_may_hold_a_comma() -> None:
    model = tiny_llama(12)
    assert len(names(model, r"re:model\.layers\.\d{1,2}\.self_attn\.q_proj")) == 12
    assert len(names(model, r"re:model\.layers\.\d{2,2}\.self_attn\.q_proj")) == 2


def test_a_suffix_stops_at_a_dot() -> None:
    model = tiny_llama(12)
    assert names(model, "1.self_attn.q_proj") == ["model.layers.1.self_attn.q_proj"]
    with pytest.raises(gr.TargetError, match="'proj' matches no module"):
        names(model, "proj")


def test_unmatched_patterns_suggest_the_nearest_name() -> None:
    with pytest.raises(gr.TargetError, match=r"'q_prj' matches no.*Did you mean 'q_proj'"):
        names(tiny_llama(), ["v_proj", "q_prj"])
    with pytest.raises(gr.TargetError, match="'all-linea'"):
        names(tiny_llama(), "all-linea")
    with pytest.raises(gr.TargetError, match="no target pattern"):
        names(tiny_llama(), [])
    with pytest.raises(gr.TargetError, match="no target pattern"):
        names(tiny_llama(), " , ")


def test_a_broken_expression_is_refused_with_its_fault() -> None:
    with pytest.raises(gr.TargetError, match=re.escape("'re:(q_proj' is not a valid")):
        names(tiny_llama(), "re:(q_proj")


def test_a_module_that_is_no_linear_layer_is_no_target() -> None:
    with pytest.raises(gr.TargetError, match="'norm' matches no"):
        names(tiny_llama(), "norm")


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(gr.TargetError, match="matches nothing in Embedding"):
        names(nn.Embedding(3, 3))


def test_expert_parameters_are_refused_by_name_and_attention_is_not() -> None:
    model = tiny_mixtral()
    with pytest.raises(gr.TargetError, match=r"model\.layers\.0\.mlp\.experts.*expert weights"):
        names(model)
    with pytest.raises(gr.TargetError, match="expert weights"):
        names(model, ["q_proj", "experts"])
    found = names(model, ["q_proj", "k_proj", "v_proj", "o_proj"])
    assert [name.rpartition(".")[2] for name in found] == ["q_proj", "k_proj", "v_proj", "o_proj"]


def test_fused_attention_is_refused_with_its_parts() -> None:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "mlp": nn.Linear(8, 8)})
    with pytest.raises(gr.TargetError, match=r"'attn'.*nn\.MultiheadAttention"):
        names(model)
    with pytest.raises(gr.TargetError, match="MultiheadAttention"):
        names(model, "attn")
    with pytest.raises(gr.TargetError, match="MultiheadAttention"):
        names(model, "out_proj")
    assert names(model, "mlp") == ["mlp"]


def test_clashing_suffixes_are_noticed() -> None:
    model = Clash()
    assert names(model) == ["enc.q", "enc.v", "vision.enc.q", "vision.enc.v"]
    assert names(model, "enc.q") == ["enc.q", "vision.enc.q"]
    assert names(model, "re:enc.q") == ["enc.q"]
    assert ambiguous_suffixes(model, [Target("enc.q", 4, 4)])
    assert not ambiguous_suffixes(model, [Target("vision.enc.q", 4, 4)])
    llama = tiny_llama(12)
    assert not ambiguous_suffixes(llama, [site.target for site in find_sites(llama)])


def test_shared_modules_count_once_and_a_part_called_module_keeps_its_name() -> None:
    inner = nn.Linear(3, 3)
    model = nn.ModuleDict({"module": nn.ModuleDict({"a": inner}), "b": inner})
    assert names(model) == ["module.a"]


def test_wrappers_do_not_change_names() -> None:
    class Compiled(nn.Module):
        """What torch.compile returns, without its import."""

        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self._orig_mod = model

    model = tiny_llama()
    wanted = names(model)
    assert names(nn.DataParallel(model)) == wanted
    assert names(Compiled(model)) == wanted
    assert names(Compiled(nn.DataParallel(model))) == wanted
    assert unwrapped(Compiled(nn.DataParallel(model))) is model


class PackedLinear(nn.Module):
    """Stands for any quantised linear: integer weights, no weight gradient."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.scale = float(weight.abs().max() / 127)
        self.register_buffer("qweight", (weight / self.scale).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.qweight.to(x.dtype) * self.scale).T


def test_any_quantised_linear_is_measured_like_its_unpacked_twin() -> None:
    from oracles.gradients import gram_of, weight_gradients

    torch.manual_seed(1)
    packed = nn.Sequential(
        PackedLinear(torch.randn(5, 4)), nn.Tanh(), PackedLinear(torch.randn(3, 5))
    )
    twin = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False))
    for index in (0, 2):
        twin[index].weight.data = packed[index].qweight.float() * packed[index].scale
    data = [{"x": torch.randn(6, 4)} for _ in range(3)]

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(batch["x"]).square().mean()

    found = gr.measure(packed, data, num_batches=3, loss_function=loss)
    assert [(t.name, t.d_in, t.d_out, t.kind) for t in found.targets] == [
        ("0", 4, 5, "quantized-linear"),
        ("2", 5, 3, "quantized-linear"),
    ]
    oracle = weight_gradients(twin, data, ["0", "2"], loss)
    for name in ("0", "2"):
        torch.testing.assert_close(found.gram(name), gram_of(oracle[name]), rtol=1e-5, atol=1e-9)
