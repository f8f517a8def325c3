"""The example on pictures."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from examples.example_cases import ranks_on_disk, run, tiny, write_pictures


@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")
def test_a_vision_transformer_on_a_folder_of_pictures(tmp_path: Path) -> None:
    base, pictures = tiny(tmp_path / "vit", "vit"), write_pictures(tmp_path / "pictures")
    run("images", "--model", base, "--data", pictures, "--steps", 2, "--out", tmp_path / "out")
    ranks = ranks_on_disk(tmp_path / "out")
    assert len(ranks) == 12
    weights = load_file(tmp_path / "out/adapter_model.safetensors")
    assert weights["base_model.model.classifier.weight"].shape == (3, 32)
    assert all(weights[key].abs().max() > 0 for key in weights if key.endswith("lora_B.weight"))
