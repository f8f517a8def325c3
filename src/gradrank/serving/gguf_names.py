"""How llama.cpp names the linear layers of a model, and in which order it keeps their rows."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradrank.core.errors import OptionError, PlanError
from gradrank.serving.engines.engine import Base

_WEIGHT = ".weight"
HEADS = ("lm_head", "embed_out")


@dataclass(frozen=True, slots=True)
class Family:
    """What conversion does to the linear layers of one kind of model besides renaming them.

    Attributes:
        architecture: llama.cpp's name of the kind.
        rotary: Whether rows of queries and keys are put into the order in which llama.cpp rotates.
        tied: Whether llama.cpp has no output matrix for it beside the embeddings, ever.
        transposed: Whether transformers stores the linear layers as ``[d_in, d_out]``.
    """

    architecture: str
    rotary: bool = False
    tied: bool = False
    transposed: bool = False


# By the model_type of transformers. Others may be simple too; these are proven, see the docs.
FAMILIES: Mapping[str, Family] = {
    "gemma": Family("gemma", tied=True),
    "gemma2": Family("gemma2", tied=True),
    "gemma3_text": Family("gemma3", tied=True),
    "gpt2": Family("gpt2", transposed=True),
    "granite": Family("granite", rotary=True),
    "llama": Family("llama", rotary=True),
    "mistral": Family("llama", rotary=True),
    "olmo2": Family("olmo2"),
    "phi": Family("phi2"),
    "phi3": Family("phi3"),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "smollm3": Family("smollm3", rotary=True),
    "starcoder2": Family("starcoder2"),
}


def package() -> Any:
    """Return the package ``gguf``, which is needed for this target alone.

    Raises:
        OptionError: If it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise OptionError(
            "target llama.cpp needs the package 'gguf', which is not installed. Install "
            "'gradrank[train]'."
        ) from error
    return gguf


def family_of(base: Base) -> Family | None:
    """Return what is known of a base model, or None.

    Args:
        base: The base model.
    """
    return FAMILIES.get(model_type(base))


def model_type(base: Base) -> str:
    """Return the kind of a base model as transformers names it, or "".

    Args:
        base: The base model.
    """
    return str(base.config.get("model_type") or "")


class Names:
    """The tensors of a base model in llama.cpp, by module and back.

    Args:
        family: What is known of the model.
        base: The base model.
    """

    def __init__(self, family: Family, base: Base) -> None:
        gguf = package()
        kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
        if family.architecture not in kinds:
            raise OptionError(
                f"the installed 'gguf' does not know the architecture '{family.architecture}'. "
                "Install a newer one."
            )
        self.family = family
        self._map = gguf.get_tensor_name_map(kinds[family.architecture], _layers(base))
        self._heads = _heads(base) if family.rotary else (1, 1)

    def tensors(self, modules: Iterable[str]) -> dict[str, str]:
        """Return the tensor by module.

        Args:
            modules: Full names of modules.

        Returns:
            Names of weights; modules that llama.cpp does not know are left out.
        """
        found = {m: self._map.get_name(key=m + _WEIGHT, try_suffixes=(_WEIGHT,)) for m in modules}
        return {module: name for module, name in found.items() if name is not None}

    def rows(self, module: str, d_out: int) -> Tensor | None:
        """Return which row of the module stands at each row of the tensor.

        Args:
            module: Full name of the module.
            d_out: Its rows.

        Returns:
            ``[d_out]`` indices, or None where the order is the same.

        Raises:
            PlanError: If the rows are no whole number of heads.
        """
        last = module.rpartition(".")[2]
        if not self.family.rotary or last not in {"q_proj", "k_proj"}:
            return None
        heads = self._heads[last == "k_proj"]
        if d_out % (2 * heads):
            raise PlanError(
                f"'{module}' has {d_out} rows, which are no {heads} heads of an even size; the "
                "model's configuration does not fit its weights."
            )
        return interleaved(d_out, heads)


def interleaved(d_out: int, heads: int) -> Tensor:
    """Return the order of a rotated matrix's rows in llama.cpp.

    Transformers rotates row ``i`` of a head together with row ``i + h/2``, llama.cpp rows ``2i``
    and ``2i + 1``; so the two halves of every head are interleaved.

    Args:
        d_out: Rows of the matrix.
        heads: Heads in it.

    Returns:
        ``[d_out]`` indices of rows in transformers' order.

    Examples:
        >>> interleaved(8, 2).tolist()
        [0, 2, 1, 3, 4, 6, 5, 7]
    """
    return torch.arange(d_out).view(heads, 2, -1).transpose(1, 2).reshape(-1)


def _layers(base: Base) -> int:
    found = base.config.get("num_hidden_layers") or base.config.get("n_layer")
    if not isinstance(found, int) or not 0 < found < 100_000:
        raise PlanError(f"the model's configuration says {str(found)[:20]!r} layers.")
    return found


def _heads(base: Base) -> tuple[int, int]:
    queries = base.config.get("num_attention_heads")
    keys = base.config.get("num_key_value_heads") or queries
    for number in (queries, keys):
        if not isinstance(number, int) or number < 1:
            raise PlanError(f"the model's configuration says {str(number)[:20]!r} heads.")
    return int(queries or 1), int(keys or 1)
