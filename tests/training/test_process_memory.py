"""Peak memory and glibc's allocator, each in a subprocess that starts with little memory and imports no library."""

from __future__ import annotations

import subprocess
import sys

import pytest

needs_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's report of memory in /proc")


def printed(code: str) -> list[float]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [float(word) for word in done.stdout.split()]


@needs_linux
def test_peak_memory_grows_by_what_is_allocated_and_stays() -> None:
    """A block of 200 MB that is written to. The larger peak of this process, the parent, must not be reported."""
    parents = bytearray(1_000_000_000)
    parents[::4096] = b"x" * len(parents[::4096])
    during, after = printed("""
from electra_composer.training.process_memory import peak_resident_bytes
before = peak_resident_bytes()
block = bytearray(b"x") * 200_000_000
print(peak_resident_bytes() - before)
del block
print(peak_resident_bytes() - before)
""")
    del parents
    assert during == pytest.approx(200e6, abs=60e6)
    assert after == pytest.approx(during, abs=8e6)  # the kernel counts pages in batches per processor


@needs_linux
def test_freed_memory_is_kept() -> None:
    """256 MiB that were freed stay resident until `malloc_trim`."""
    kept = printed("""
import ctypes
from electra_composer.training.process_memory import keep_freed_memory
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
if keep_freed_memory():
    before = resident()
    block = bytearray(b"x") * 2**28
    del block
    print(resident() - before)
    ctypes.CDLL(None).malloc_trim(0)
    print(resident() - before)
""")
    if not kept:
        pytest.skip("no glibc")
    assert kept[0] > 200
    assert kept[1] < 100
