"""Targets: what a rank costs, and what their names say."""

import pytest

from gradrank.core.targets import Target


@pytest.mark.parametrize(
    ("name", "module_type", "depth", "stack"),
    [
        ("model.layers.11.self_attn.q_proj", "q_proj", 11, "model.layers"),
        ("encoder.block.0.layer.1.DenseReluDense.wi", "wi", 0, "encoder.block"),
        ("pooler.dense", "dense", None, ""),
        ("head", "head", None, ""),
        ("0", "0", 0, ""),
    ],
)
def test_names_tell_type_depth_and_stack(
    name: str, module_type: str, depth: int | None, stack: str
) -> None:
    target = Target(name, 3, 5)
    assert (target.module_type, target.depth, target.stack) == (module_type, depth, stack)


def test_a_rank_costs_a_row_and_a_column() -> None:
    target = Target("a", 3, 5)
    assert target.cost == 8
    assert target.max_rank == 3
