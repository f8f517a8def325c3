"""Updates added into the weights."""
import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from peft import PeftModel
from torch import Tensor
from gradrank.core.errors import PlanError
from gradrank.serving.adapter import Adapter
from gradrank.serving.check import logits


def write_merged(model: PeftModel, adapter: Adapter, folder: Path, batch: Mapping[str, Tensor], dtype: str | None) -> Tensor:
    if getattr(model.get_base_model(), "is_quantized", False):
        raise PlanError(
            "the base model is quantised, and merging would round the update away. Export with "
            "target 'peft', or merge into the full-precision base."
        )
    merged: Any = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    merged.save_pretrained(str(folder))
    return logits(merged, batch)
