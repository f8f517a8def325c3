"""The parameter table of PiLoRA: counts against hand counts, intervals against real partitions."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
from benchmarks.pilora_parameters import parameters as counting
from benchmarks.pilora_parameters.findings import study
from benchmarks.pilora_parameters.shapes import Shape, build_shapes

from gradrank.core.partition import NeuronPartition
from gradrank.core.targets import Target

ROOT = Path(__file__).resolve().parents[2]
NAMED = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


@pytest.fixture(scope="module")
def shapes() -> dict[str, Shape]:
    return build_shapes()


@pytest.fixture(scope="module")
def found() -> dict:
    return json.loads(json.dumps(study()))


def test_models_have_as_many_parameters_as_by_hand(shapes) -> None:
    # Embedding in and out, blocks (projections, two norms), last norm.
    llama2 = 2 * 32000 * 4096 + 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 4096
    attention = 2 * 4096**2 + 2 * 4096 * 1024
    llama3 = 2 * 128256 * 4096 + 32 * (attention + 3 * 4096 * 14336 + 2 * 4096) + 4096
    assert shapes["LLaMA2-7B"].bases["whole model"] == llama2
    assert shapes["LLaMA3-8B"].bases["whole model"] == llama3
    # Words, positions, one type, norm; blocks with biases and two norms of two vectors.
    block = 4 * (1024**2 + 1024) + 2 * 4 * 1024**2 + 5 * 1024 + 2 * 2 * 1024
    embeddings = (50265 + 514 + 1 + 2) * 1024
    roberta = shapes["RoBERTa-large"]
    assert roberta.bases["encoder"] == embeddings + 24 * block
    assert roberta.bases["encoder without embeddings"] == 24 * block
    assert roberta.head == 1024**2 + 1024 + 2 * 1024 + 2
    assert roberta.bases["encoder and two-class head"] == embeddings + 24 * block + roberta.head
    assert roberta.bases["encoder and pooler"] == embeddings + 24 * block + 1024**2 + 1024
    block = 4 * (768**2 + 768) + 2 * 4 * 768**2 + 5 * 768 + 2 * 2 * 768
    embeddings = 768 + 3 * 32 * 32 * 768 + 50 * 768
    clip = shapes["CLIP ViT-B/32"]
    assert clip.bases["vision tower"] == embeddings + 12 * block + 2 * 2 * 768
    assert clip.bases["vision tower and projection"] == clip.bases["vision tower"] + 768 * 512
    assert clip.bases["vision tower without embeddings"] == 12 * block + 2 * 2 * 768


def test_lora_counts_are_those_by_hand(shapes) -> None:
    llama2, llama3 = shapes["LLaMA2-7B"], shapes["LLaMA3-8B"]
    by_hand = 32 * 32 * (3 * (4096 + 4096) + 2 * (4096 + 11008))
    assert counting.lora_parameters(llama2.of_types(NAMED), 32) == by_hand == 56_098_816
    by_hand = 32 * 32 * (8192 + 2 * (4096 + 1024) + 2 * (4096 + 14336))
    assert counting.lora_parameters(llama3.of_types(NAMED), 32) == by_hand == 56_623_104
    six = 24 * 8 * (4 * 2048 + 2 * 5120)
    assert counting.lora_parameters(shapes["RoBERTa-large"].targets, 8) == six == 3_538_944
    six = 12 * 8 * (4 * 1536 + 2 * 3840)
    assert counting.lora_parameters(shapes["CLIP ViT-B/32"].targets, 8) == six == 1_327_104


def test_only_layers_of_blocks_are_targets(shapes) -> None:
    types = {name: len(shape.types) for name, shape in shapes.items()}
    assert types == {"LLaMA2-7B": 7, "LLaMA3-8B": 7, "RoBERTa-large": 6, "CLIP ViT-B/32": 6}
    assert {t.depth for t in shapes["RoBERTa-large"].targets} == set(range(24))
    assert len(list(shapes["RoBERTa-large"].choices())) == 2**6 - 1
    # Three layers of RoBERTa are called 'dense'; their place in the block tells them apart.
    dense = [kind for kind in shapes["RoBERTa-large"].types if kind.endswith("dense")]
    assert len(dense) == 3


def test_the_formula_is_that_of_real_partitions() -> None:
    targets = [Target("a.0.x", 7, 12), Target("a.0.y", 5, 4)]
    for rows in ((3, 1), (6, 2), (1, 3)):
        exact = sum(
            NeuronPartition.of([i < k for i in range(t.d_out)], 4, 2).parameters(t.d_in)
            for t, k in zip(targets, rows, strict=True)
        )
        share = sum(rows) / 16
        assert counting.pilora_parameters(targets, 4, 2, share) == pytest.approx(exact)
        assert counting.share_of(targets, 4, 2, exact) == pytest.approx(share)


@pytest.mark.parametrize(
    ("value", "printed", "is_given"),
    [(0.7002, 0.70, True), (0.7051, 0.70, False), (0.695, 0.70, True), (0.6949, 0.70, False)],
)
def test_a_figure_stands_for_what_rounds_to_it(value, printed, is_given) -> None:
    assert counting.gives(value, printed) is is_given


def test_an_implied_share_gives_the_figure_back(shapes) -> None:
    shape = shapes["LLaMA2-7B"]
    for inside in (False, True):
        choice = counting.Choice(NAMED, "whole model", inside)
        shares = counting.implied_share(shape, choice, (32, 2), 0.63)
        back = [
            counting.percent(
                round(counting.pilora_parameters(shape.of_types(NAMED), 32, 2, share)),
                shape.bases["whole model"],
                inside,
            )
            for share in shares
        ]
        assert back == pytest.approx([0.625, 0.63, 0.635], abs=1e-6)


def test_tables_1_and_4_follow_from_one_reading(found) -> None:
    assert all(row["inside"] and row["basis"] == "whole model" for row in found["joint"])
    row = next(row for row in found["joint"] if tuple(row["types"]) == NAMED)
    assert all(row["holds"].values())
    assert row["lora"] == pytest.approx([0.82564, 0.70018], abs=1e-5)
    least, _, most = row["shares"][0]
    assert least < 0.415 < most < 0.5
    # Without the adapter in the denominator LLaMA3-8B would be printed 0.71.
    outside = next(r for r in found["models"]["LLaMA3-8B"]["named"] if not r["inside"])
    assert outside["lora"] == pytest.approx(0.70512, abs=1e-5)
    assert not outside["fits"]


def test_clip_follows_with_the_adapter_in_the_denominator_only(found) -> None:
    clip = found["models"]["CLIP ViT-B/32"]
    assert [(row["basis"], row["inside"]) for row in clip["fitting"]] == [
        ("vision tower", True),
        ("vision tower and projection", True),
    ]
    assert clip["fitting"][0]["share"][1] == pytest.approx(0.416, abs=5e-4)


def test_roberta_cannot_have_four_per_cent_at_rank_8(found) -> None:
    roberta = found["models"]["RoBERTa-large"]
    assert roberta["fitting"] == []
    assert roberta["largest"] < 1.52
    by_ranks = {(row["rank"], row["supplementary_rank"]): row for row in roberta["other_ranks"]}
    whole = [c for c in by_ranks[32, 4]["fitting"] if len(c["types"]) == 6]
    assert [(c["basis"], c["inside"], c["head"]) for c in whole] == [("encoder", False, False)]
    # Only the ratio r' / r matters where inputs and outputs sum to the same number.
    for way, shares in by_ranks[8, 1]["by_ratio"].items():
        assert shares == pytest.approx(by_ranks[32, 4]["by_ratio"][way])
    # By hand: (10 + 7 s) / 16 = 3.26 / 4.00.
    central = by_ranks[8, 1]["by_ratio"]["outside"][1]
    assert central == pytest.approx((16 * 3.26 / 4.00 - 10) / 7)
    assert by_ranks[32, 1]["share"][1] > 0.5


def test_results_and_page_in_the_repository_are_those_of_the_code(found) -> None:
    kept = (ROOT / "results/studies/pilora-parameters.json").read_text(encoding="utf-8")
    assert json.loads(kept) == found
    page = (ROOT / "docs/studies/pilora-parameters.md").read_text(encoding="utf-8")
    for name, table in _script().tables(found).items():
        assert f"<!-- {name} -->\n{table}\n<!-- /{name} -->" in page


def _script() -> ModuleType:
    path = ROOT / "benchmarks/study_pilora_parameters.py"
    spec = importlib.util.spec_from_file_location("study_pilora_parameters", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
