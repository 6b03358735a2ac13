"""Memory in large pages, where the system leaves that to each program."""

import os
import platform
import sys
from pathlib import Path

TUNABLE = "glibc.malloc.hugetlb"
SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def use_large_pages(switch: Path = SWITCH) -> None:
    """Starts this process anew, under the same number, so that what it allocates is in large pages.

    XLA on a CPU gives large buffers back after each call and asks for them again, and Linux then
    hands out and clears each page of 4 KiB: up to a third of a training step. Pages of 2 MiB are
    500 times fewer. `GLIBC_TUNABLES`, which alone asks for them, is read when a process starts.

    Nothing happens where the system does so for all programs or for none, where the C library is
    another, or where the variable says something about it: `GLIBC_TUNABLES=glibc.malloc.hugetlb=0`
    keeps small pages. See glibc's manual, "Memory Allocation Tunables"; benchmarks/large_pages.py
    measures the difference.
    """
    said = os.environ.get("GLIBC_TUNABLES", "")
    if TUNABLE in said or platform.libc_ver()[0] != "glibc":
        return
    try:
        if "[madvise]" not in switch.read_text():
            return
    except OSError:
        return
    ours = f"{TUNABLE}=1"
    environment = {**os.environ, "GLIBC_TUNABLES": f"{said}:{ours}" if said else ours}
    try:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
    except OSError:
        return  # Small pages do as well.
