"""Where the time of one call goes: operations by time, and how many of them there are."""

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def show_operations(name: str, call: Callable[[], Any], rows: int = 18) -> None:
    """Print the operations of a call that took most time by themselves.

    Args:
        name: Heading.
        call: What is profiled; call it once before, so that nothing is done for the first time.
        rows: Lines of the table.
    """
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as seen:
        call()
    averages = seen.key_averages()
    count = sum(event.count for event in averages)
    print(f"== {name}: {count:,} operations")
    print(averages.table(sort_by="self_cpu_time_total", row_limit=rows, max_name_column_width=40))
