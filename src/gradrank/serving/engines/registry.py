"""The engines: one file and one line each."""

from gradrank.serving.engines.engine import Engine
from gradrank.serving.engines.llamacpp import LlamaCpp
from gradrank.serving.engines.peft import Peft
from gradrank.serving.engines.sglang import Sglang
from gradrank.serving.engines.vllm import Vllm

ENGINES: dict[str, Engine] = {
    engine.name: engine for engine in (Peft(), Vllm(), Sglang(), LlamaCpp())
}
