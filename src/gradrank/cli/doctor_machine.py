"""The machine and its settings, as far as they can be seen without loading PyTorch."""

import os
import platform
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from gradrank.cli.doctor_findings import NO, NOTE, OK, Finding, homely
from gradrank.core.switches import switched_on

SECTION, SETTINGS = "machine", "settings"
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
_LITTLE_MEMORY, _LITTLE_DISK = 4 * 2**30, 2 * 2**30


def usable_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0)) or 1
    return os.cpu_count() or 1


def processor_finding() -> Finding:
    """Look at the processor."""
    cores, usable = os.cpu_count() or 1, usable_cores()
    limited = f", {usable} of them for this process" if usable < cores else ""
    system = f"{platform.system()} {platform.machine()}"
    return Finding(SECTION, "processor", OK, f"{cores} cores{limited} ({system})")


def memory_finding() -> Finding:
    """Look at the memory, that of a container if one limits it."""
    total, free = _memory()
    if total is None:
        return Finding(SECTION, "memory", NOTE, "this system does not tell")
    told = f"{total / 2**30:.1f} GiB"
    if free is not None:
        told += f", {free / 2**30:.1f} GiB available now"
    if (free if free is not None else total) < _LITTLE_MEMORY:
        fix = "close other programs; 'gradrank plan --dry-run' tells what a model needs"
        return Finding(SECTION, "memory", NOTE, told, fix)
    return Finding(SECTION, "memory", OK, told)


def _memory() -> tuple[int | None, int | None]:
    """Return the bytes of memory, and those still available."""
    total = free = None
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    status = Path("/proc/meminfo")
    if status.is_file():
        lines = dict(line.split(":", 1) for line in status.read_text(encoding="ascii").splitlines())
        free = int(lines.get("MemAvailable", "0").split()[0]) * 1024 or None
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text(encoding="ascii").strip() if limit.is_file() else "max"
    if text.isdigit() and total is not None and int(text) < total:
        total = int(text)
        free = None if free is None else min(free, total)
    return total, free


def disk_findings() -> list[Finding]:
    """Look at the room where results and temporary files go."""
    places = {"here": Path.cwd(), "temporary files": Path(tempfile.gettempdir())}
    found = []
    for name, folder in places.items():
        free = shutil.disk_usage(folder).free
        told = f"{free / 2**30:.1f} GiB free in {homely(folder)}"
        if not os.access(folder, os.W_OK):
            fix = "choose an --out elsewhere" if name == "here" else "set TMPDIR to another folder"
            found.append(Finding(SECTION, f"disk, {name}", NOTE, f"{told}, not writable", fix))
        elif free < _LITTLE_DISK:
            fix = "free some space; checkpoints of large adapters take much"
            found.append(Finding(SECTION, f"disk, {name}", NOTE, told, fix))
        else:
            found.append(Finding(SECTION, f"disk, {name}", OK, told))
    return found


def thread_finding(environment: Mapping[str, str], cores: int) -> Finding:
    """Look at what limits the threads of PyTorch.

    Args:
        environment: Environment variables.
        cores: Cores that this process may use.

    Returns:
        The finding.
    """
    given = {name: environment[name] for name in THREADS if environment.get(name)}
    told = ", ".join(f"{name}={value}" for name, value in given.items())
    for name, value in given.items():
        if not value.isdigit() or not int(value):
            fix = f"set {name} to a number from 1 to {cores}, or unset it"
            return Finding(SETTINGS, "threads", NO, f"{told}: {value!r} is no count", fix)
        if int(value) > cores:
            fix = f"set {name}={cores}: more threads than cores slow training down"
            return Finding(SETTINGS, "threads", NOTE, f"{told} on {cores} cores", fix)
    if given.get("OMP_NUM_THREADS") == "1" and cores > 1:
        fix = f"unset OMP_NUM_THREADS to let one run use all {cores} cores"
        return Finding(SETTINGS, "threads", NOTE, told, fix)
    return Finding(SETTINGS, "threads", OK, told or f"not limited: up to {cores} a process")


def network_finding(environment: Mapping[str, str]) -> Finding:
    """Look at whether the model hub may be asked.

    Args:
        environment: Environment variables.

    Returns:
        The finding.
    """
    on = [name for name in OFFLINE if switched_on(name, environment)]
    if on:
        told = f"{', '.join(on)} set: hub names are looked up in the local cache only"
        return Finding(SETTINGS, "network", NOTE, told, f"unset {' '.join(on)} to ask the hub")
    told = "hub names are looked up on the network; folders and names in 'gradrank demo' need none"
    return Finding(SETTINGS, "network", OK, told)


def cache_findings() -> list[Finding]:
    """Look at the cache of models and data: where, how large, writable, whole."""
    from gradrank.lab.cache import cache_root, problem

    root = cache_root()
    parent = next(folder for folder in (root, *root.parents) if folder.exists())
    if not os.access(parent, os.W_OK):
        fix = "set GRADRANK_CACHE to a folder that can be written"
        return [Finding(SETTINGS, "cache", NO, f"{homely(root)} cannot be written", fix)]
    size = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    told = f"{homely(root)}, {size / 1e6:,.0f} MB"
    found = [Finding(SETTINGS, "cache", OK, told)]
    for entry in sorted(root.glob("assets/[!.]*/")):
        wrong = problem(entry)
        if wrong is not None:
            fix = "nothing: it is built again when it is used, which needs the network"
            found.append(Finding(SETTINGS, f"cache, {entry.name}", NOTE, f"damaged: {wrong}", fix))
        else:
            found.append(Finding(SETTINGS, f"cache, {entry.name}", OK, "whole"))
    return found
