"""Check this machine and its libraries: `electra doctor`, a line each, with what is wrong and what to do.

The exit status is 1 if something is wrong, which no run would survive, and 0 if there are only warnings.
"""

from __future__ import annotations

if __name__ == "__main__":
    from electra_composer.program import begin

    begin()

import argparse
import importlib.metadata
import os
import resource
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from electra_composer.arguments import ArgumentParser
from electra_composer.errors import one_line, report_user_errors
from electra_composer.versions import LIBRARIES, fix, is_tested, is_too_old

OK, WARNING, WRONG = "ok", "warning", "WRONG"
GB = 2**30
FREE_DISK = (1, 25)  # GB below which the disk is wrong, and below which OpenWebText does not fit
SHARED_MEMORY = (32 << 20, 256 << 20)  # bytes, as above: for Streaming's blocks, and for batches of loader processes
FILES, THREADS = (256, 1024), (64, 512)
SECONDS = 3.0  # for the hub to answer
HUB = "https://huggingface.co"


class Finding(NamedTuple):
    """A line of the report: what was looked at, its state, what was found, and what to do about it."""

    subject: str
    state: str
    text: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.state:8} {self.subject:14} {self.text}{self.advice and f'; {self.advice}'}"


def graded(subject: str, value: float, limits: tuple[float, float], text: str, advice: str) -> Finding:
    """Return a finding about a number, which is wrong below the first limit, and a warning below the second."""
    state = WRONG if value < limits[0] else WARNING if value < limits[1] else OK
    return Finding(subject, state, text, "" if state == OK else advice)


def check_versions() -> Iterator[Finding]:
    """Compare Python and the libraries with the versions that were tested."""
    python = ".".join(map(str, sys.version_info[:3]))
    fits = (3, 10) <= sys.version_info[:2] <= (3, 12)
    yield Finding("Python", OK if fits else WRONG, python, "" if fits else "expected 3.10 to 3.12")
    for package, library in LIBRARIES.items():
        try:
            installed = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(library.title, WRONG, "not installed", fix(package))
            continue
        if is_too_old(installed, library):
            advice = f"expected at least {library.first}: {fix(package)}"
            yield Finding(library.title, WRONG, f"{installed} is too old", advice)
        elif is_tested(installed, library):
            yield Finding(library.title, OK, installed)
        else:
            tested = ", ".join(library.tested)
            yield Finding(library.title, WARNING, f"{installed} is untested", f"tested: {tested}; {fix(package)}")


def check_gpus() -> Iterator[Finding]:
    """Multiply two matrices on each GPU; without one, look for its driver, and at the CPU's bfloat16."""
    import torch

    from electra_composer.training.devices import choose_device, cpu_multiplies_bfloat16

    driver = driver_version()
    if choose_device(None, "trainer.device") == "cpu":
        if driver is not None:
            built = f"torch {torch.__version__} sees no GPU, although the driver {driver} is there"
            yield Finding("GPU", WRONG, built, "install a torch built for CUDA, and a driver that is new enough for it")
        else:
            yield Finding("GPU", OK, "none; runs use the CPU")
        fast = cpu_multiplies_bfloat16()
        text = "the CPU has bfloat16 products" if fast else "the CPU emulates bfloat16, which is slow"
        yield Finding("bfloat16", OK if fast else WARNING, text, "" if fast else "set trainer.precision=fp32")
        return
    for index in range(torch.cuda.device_count()):
        subject, name = f"GPU {index}", torch.cuda.get_device_name(index)
        try:
            free, total = torch.cuda.mem_get_info(index)
            ones = torch.ones(64, 64, device=f"cuda:{index}")
            assert (ones @ ones).sum().item() == 64**3
        except (RuntimeError, AssertionError) as error:
            yield Finding(subject, WRONG, f"{name}: {one_line(error, 200) or 'a wrong product'}", "see nvidia-smi")
            continue
        text = f"{name}, {free / GB:.0f} of {total / GB:.0f} GB free, CUDA {torch.version.cuda}, driver {driver}"
        yield graded(subject, free / total, (0, 0.5), text, "another process uses it: see nvidia-smi")
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    advice = "" if native else "set trainer.precision=amp_fp16"
    yield Finding("bfloat16", OK if native else WARNING, "on the GPU" if native else "not on this GPU", advice)


def driver_version() -> str | None:
    """Return the version of NVIDIA's driver; None if there is none."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n")[0].strip() or None


def check_compilers() -> Iterator[Finding]:
    """Look for what Triton and `torch.compile` need."""
    from electra_composer.compilers import missing_for_cpp, missing_for_triton
    from electra_composer.training.devices import choose_device

    on_gpu = choose_device(None, "trainer.device") == "gpu"
    for subject, missing, is_used in (
        ("Triton", missing_for_triton(), on_gpu),
        ("torch.compile", missing_for_cpp(), False),
    ):
        if missing is None:
            yield Finding(subject, OK, "has a compiler and Python's headers")
        else:
            use = "kernels and torch.compile on the GPU need it" if is_used else "only compilation needs it"
            yield Finding(subject, WRONG if is_used else WARNING, f"lacks {missing}", use)


def check_room() -> Iterator[Finding]:
    """Look at shared memory, and at the disk of the current folder."""
    shared = Path("/dev/shm")
    if shared.is_dir():
        usage = shutil.disk_usage(shared)
        text = f"{usage.free / GB:.1f} of {usage.total / GB:.1f} GB free"
        yield graded(str(shared), usage.free, SHARED_MEMORY, text, "give a container more (docker run --shm-size=8g)")
    usage = shutil.disk_usage(".")
    text = f"{usage.free / GB:.0f} of {usage.total / GB:.0f} GB free in the current folder"
    yield graded("disk", usage.free / GB, FREE_DISK, text, "OpenWebText takes 20 GB, a run a few hundred MB")


def check_limits() -> Iterator[Finding]:
    """Look at the limits of open files and of threads of this user, and at the cores that are free."""
    infinite = resource.RLIM_INFINITY
    for subject, limit, least, option in (
        ("open files", resource.RLIMIT_NOFILE, FILES, "-n 65536"),
        ("threads", resource.RLIMIT_NPROC, THREADS, "-u 65536"),
    ):
        soft = resource.getrlimit(limit)[0]
        value = float("inf") if soft == infinite else soft
        text = "no limit" if soft == infinite else f"at most {soft:,}"
        yield graded(subject, value, least, text, f"raise the limit: ulimit {option}")
    from electra_composer.training.cores import allowed_cpus, cgroup_cores, measure_usage, used_by_others

    before = measure_usage()
    time.sleep(0.3)
    cores = min(len(allowed_cpus()), cgroup_cores())
    free = max(0.0, cores - used_by_others(before, measure_usage()))
    text = f"{free:.1f} of {cores:g} are free"
    yield graded("cores", free / cores, (0, 0.5), text, "other processes slow a run on this machine down")


def check_hub() -> Iterator[Finding]:
    """Ask the Hugging Face hub, or `HF_ENDPOINT`, for an answer."""
    hub = os.environ.get("HF_ENDPOINT", HUB)
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        yield Finding("hub", WARNING, "HF_HUB_OFFLINE is set", "nothing is downloaded; unset it if that is not wanted")
        return
    try:
        urllib.request.urlopen(urllib.request.Request(hub, method="HEAD"), timeout=SECONDS).close()
    except (OSError, ValueError) as error:  # HTTPError and URLError are OSErrors
        if not isinstance(error, urllib.error.HTTPError):
            reason = one_line(getattr(error, "reason", error), 100)
            advice = "needed for its data, models and tokenizers alone; set HTTPS_PROXY or HF_ENDPOINT"
            yield Finding("hub", WARNING, f"{hub} does not answer: {reason}", advice)
            return
    yield Finding("hub", OK, f"{hub} answers")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    check_versions,
    check_gpus,
    check_compilers,
    check_room,
    check_limits,
    check_hub,
)


def findings() -> Iterator[Finding]:
    """Run all checks; one that fails by itself, such as by an import, is a finding too."""
    for check in CHECKS:
        try:
            yield from check()
        except Exception as error:  # a broken library may raise anything
            subject = check.__name__.removeprefix("check_")
            yield Finding(
                subject,
                WRONG,
                f"{type(error).__name__}: {one_line(error, 200)}",
                "reinstall electra_composer and its dependencies",
            )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    return ArgumentParser(prog="electra doctor", description=__doc__).parse_args(arguments)


@report_user_errors
def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parse(argv)
    states = []
    for finding in findings():
        states.append(finding.state)
        print(finding, flush=True)
    wrong, warnings = states.count(WRONG), states.count(WARNING)
    print(f"\n{wrong} wrong, {warnings} to know of" if wrong or warnings else "\neverything is as it should be")
    sys.exit(int(wrong > 0))


if __name__ == "__main__":
    main(sys.argv[1:])
