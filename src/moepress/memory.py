"""Memory of a device, and what of it is free."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import torch


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still allocate on a card, or else of the machine's memory."""
    if device.type != "cuda":
        return free_host_memory()
    free, total = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    allowed = torch.cuda.get_per_process_memory_fraction(index) * total
    return min(free + held, int(allowed) - torch.cuda.memory_allocated(device))


def free_host_memory() -> int:
    """Bytes of memory that this process can still take, also inside a control group."""
    return min(int(psutil.virtual_memory().available), *(room for _, room in _groups()), 2**62)


def host_memory() -> int:
    """Bytes of memory that the machine has, or that the control group of this process may take."""
    return min(int(psutil.virtual_memory().total), *(most for most, _ in _groups()), 2**62)


def _groups() -> Iterator[tuple[int, int]]:
    """The limits of this process's control groups (versions 1 and 2), and what they leave."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds not in ("", "memory"):
            continue
        root = Path("/sys/fs/cgroup") / kinds
        limit, usage, cache = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            if kinds
            else ("memory.max", "memory.current", "inactive_file")
        )
        folder = root / path.strip("/")
        for group in (folder, *folder.parents):
            if root not in (group, *group.parents):
                break
            try:
                most = int((group / limit).read_text(encoding="utf-8"))
                used = int((group / usage).read_text(encoding="utf-8"))
                stat = dict(
                    s.split()
                    for s in (group / "memory.stat").read_text(encoding="utf-8").splitlines()
                )
            except (OSError, ValueError):  # no such file, or "max"
                continue
            yield most, max(most - used + int(stat.get(cache, 0)), 0)
