"""Equal ranks where an engine keeps several modules in one buffer."""

from collections.abc import Mapping

import torch

from gradrank.core.errors import OptionError, nearest
from gradrank.serving.adapter import Adapter, Update

PADDINGS = ("none", "groups", "all")
# Modules that servers fuse into one matrix, by the last part of their names.
GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def padded(adapter: Adapter, padding: str, shapes: Mapping[str, tuple[int, int]]) -> Adapter:
    """Return the same adapter with components of zeros where ranks have to be equal.

    Args:
        adapter: The adapter.
        padding: ``none``; ``groups``: equal ranks within every fused group that is touched, absent
            members included; ``all``: one rank for everything.
        shapes: ``(d_out, d_in)`` of the base model's linear modules, for members that the adapter
            does not touch.

    Returns:
        The adapter.

    Raises:
        OptionError: If the padding is unknown.
    """
    if padding not in PADDINGS:
        raise OptionError(f"padding '{padding}' is unknown. {nearest(padding, PADDINGS)}")
    if padding == "none":
        return adapter
    whole = completed(adapter, shapes)
    ranks = whole.ranks
    if padding == "all":
        ranks = dict.fromkeys(ranks, adapter.max_rank)
    else:
        for members in fused(whole):
            ranks |= dict.fromkeys(members, max(ranks[name] for name in members))
    return whole.with_updates(u.padded(ranks[u.name]) for u in whole.updates.values())


def completed(adapter: Adapter, shapes: Mapping[str, tuple[int, int]]) -> Adapter:
    """Return the adapter with an update of rank 0 for every absent member of a touched group.

    Args:
        adapter: The adapter.
        shapes: ``(d_out, d_in)`` by module name.
    """
    found = dict(adapter.updates)
    for update in adapter.updates.values():
        stem, _, last = update.name.rpartition(".")
        for other in next((group for group in GROUPS if last in group), ()):
            name = f"{stem}.{other}"
            if name not in found and name in shapes:
                d_out, d_in = shapes[name]
                a = torch.zeros(0, d_in, dtype=update.a.dtype)
                b = torch.zeros(d_out, 0, dtype=update.b.dtype)
                found[name] = Update(name, a, b, update.scaling)
    return adapter.with_updates(found.values())


def fused(adapter: Adapter) -> list[tuple[str, ...]]:
    """Return the fused groups of which at least one member is in an adapter, present ones only.

    Args:
        adapter: The adapter.
    """
    groups: dict[tuple[str, int], list[str]] = {}
    for name in adapter.updates:
        stem, _, last = name.rpartition(".")
        for index, group in enumerate(GROUPS):
            if last in group:
                groups.setdefault((stem, index), []).append(name)
    return [tuple(members) for members in groups.values()]
