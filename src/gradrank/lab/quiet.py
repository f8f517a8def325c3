"""What keeps other libraries from talking into our output."""

import logging
import os
import warnings

_TOLD_APART = ("transformers", "peft", "datasets", "accelerate", "huggingface_hub")
_SETTINGS = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


def quieten_libraries() -> None:
    """Set what transformers and its friends read when they are imported, unless the user has."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    # On some processors it asks for a package that only faster 4-bit inference needs.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def ignore_their_warnings() -> None:
    """Drop the warnings of those libraries, until ``warnings.catch_warnings`` ends."""
    for library in _TOLD_APART:
        warnings.filterwarnings("ignore", module=rf"{library}(\.|$)")
