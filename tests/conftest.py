"""What every test starts from: no hub, one thread, seeded randomness, the tiny architectures."""

import gc
import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import pytest
import torch
from hypothesis import settings

from cases import CASES, Case
from quick import compile_templates_once

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A job that a shell starts in the background ignores Ctrl-C; tests of it need the usual state.
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("gradrank", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("gradrank")
torch.set_num_threads(1)
compile_templates_once()


def pytest_collection_finish() -> None:
    """Leave what the imports made out of later collections: every Trainer ends with a full one."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed torch before every test, so that none depends on its neighbours."""
    torch.manual_seed(20240)
    return 20240


@pytest.fixture(params=list(CASES.values()), ids=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    """One tiny architecture after the other."""
    return request.param
