"""Where a worker process begins: libraries are told to be quiet before they are imported."""

import importlib
from multiprocessing.connection import Connection
from pathlib import Path

from gradrank.lab.quiet import quieten_libraries


def main(pipe: Connection, folder: Path, threads: int, data_dir: str | None) -> None:
    """Work until told to stop.

    Args:
        pipe: Runs come in as plain data; what happens goes out.
        folder: The grid's folder, with its recipe.
        threads: Threads of PyTorch.
        data_dir: Folder with public data.
    """
    quieten_libraries()
    importlib.import_module("gradrank.lab.compare.worker").main(pipe, folder, threads, data_dir)
