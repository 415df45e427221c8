"""Main memory of this process: its peak, and what its allocator does with freed memory."""

from __future__ import annotations

import ctypes
import platform
import resource
import sys
from pathlib import Path

# From glibc's malloc.h: mallopt(parameter, value).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory for the next step instead of returning it to the system.

    A step on a CPU allocates and frees gigabytes. Page faults of memory from the system take a quarter of a small
    model's step. The process then keeps its peak memory. CUDA has its own allocator.

    Returns:
        False if there is no glibc or it refused.
    """
    return set_malloc({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 2**26})


def set_malloc(settings: dict[int, int]) -> bool:
    """Call glibc's `mallopt` for each setting. Return False if there is no glibc or it refused one."""
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return [mallopt(parameter, value) for parameter, value in settings.items()] == [1] * len(settings)


def peak_resident_bytes() -> int:
    """Return the peak main memory of this process.

    Read from `/proc`, since Linux keeps `ru_maxrss` over `exec`, so that a child of a large process (a launcher, a test
    runner) reports its parent's peak.
    """
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # macOS counts bytes, others kibibytes
