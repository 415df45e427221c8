"""Compilers that Triton and `torch.compile` need on this machine, and the cache of what they generate."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from typing import Any


def missing_for_triton() -> str | None:
    """Return what the machine lacks for Triton's kernels, and how to get it; None if nothing.

    Triton compiles kernels by itself, but for every kernel a launcher in C, which includes Python's headers.
    """
    if importlib.util.find_spec("triton") is None:
        return "the package triton (pip install triton)"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "a C compiler (apt-get install gcc, or set CC)"
    return _missing_headers()


def missing_for_cpp() -> str | None:
    """Return what the machine lacks for the C++ that `torch.compile` generates for a CPU; None if nothing."""
    # Workaround (torch 2.7): only private modules tell before compilation whether there is a C++ compiler; goes when
    # torch.compiler does.
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return "a C++ compiler (apt-get install g++, or set CXX)"
    return _missing_headers()


def _missing_headers() -> str | None:
    # Debian's Python names a scheme for its own installations, whose headers are those of the system.
    scheme = sysconfig.get_default_scheme()
    include = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"]
    if os.path.isfile(os.path.join(include, "Python.h")):
        return None
    return f"Python's headers ({include}/Python.h; apt-get install python3-dev)"


def keep_compiled_code() -> None:
    """Let `torch.compile` cache what it generates in the user's cache folder, so that the next start has it.

    torch's default is a folder in /tmp, which a container or a restart loses. TORCHINDUCTOR_CACHE_DIR takes precedence.
    Call before the first compilation.
    """
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        return
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = os.path.join(caches, "electra_composer", "inductor")
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError:  # no home that can be written to: torch's default
        return
    if os.access(folder, os.W_OK):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder


def describe_operators_briefly() -> None:
    """Let inductor describe an operator that it calls as it is by its name alone. Call before the first compilation."""
    # Workaround (torch 2.7): for a line of a log that nobody reads, inductor describes the arguments of an operator
    # without a lowering, with all that they were computed from. Behind twelve layers of such operators that takes more
    # than ten minutes. The class is private; goes when torch 2.7 is no longer supported (later versions describe them
    # only if the line is read).
    from torch._inductor.exc import OperatorIssue

    OperatorIssue.operator_str = staticmethod(_name_of)  # type: ignore[method-assign]


def _name_of(target: Any, args: Any, kwargs: Any) -> str:
    return f"  target: {target}"
