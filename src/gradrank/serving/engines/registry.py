"""The engines: one file and one line each."""

from gradrank.serving.engines.engine import Engine
from gradrank.serving.engines.llamacpp import LlamaCpp
from gradrank.serving.engines.peft import Peft

ENGINES: dict[str, Engine] = {engine.name: engine for engine in (Peft(), LlamaCpp())}
