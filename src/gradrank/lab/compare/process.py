"""Where a worker process begins: libraries are told to be quiet before they are imported."""

import importlib
from typing import Any

from gradrank.lab.quiet import quieten_libraries


def main(*arguments: Any) -> None:
    """Work until told to stop.

    Args:
        *arguments: Those of :func:`gradrank.lab.compare.worker.main`.
    """
    quieten_libraries()
    importlib.import_module("gradrank.lab.compare.worker").main(*arguments)
