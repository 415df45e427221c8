"""Check the installed versions of the libraries that electra_composer depends on most closely."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import re
from typing import NamedTuple

from electra_composer.errors import UserError

log = logging.getLogger(__name__)


class Library(NamedTuple):
    """Supported versions of a library."""

    title: str
    tested: tuple[str, ...]  # versions that the tests pass with, the one in constraints.txt included
    first: str  # oldest supported version
    lacks: str | None = None  # API that older versions lack


def fix(package: str) -> str:
    """Return the command that installs the version of a package that is tested most."""
    return f"pip install '{package}=={LIBRARIES[package].tested[0]}'"


# `lacks` was found by unpacking the published wheels and searching for the names.
LIBRARIES = {
    "mosaicml": Library(
        "Composer",
        tested=("0.32.1",),
        first="0.32.0",
        lacks="FSDP2Config.state_dict_type (0.31 has FSDP2 without it, 0.30 has no FSDP2)",
    ),
    "mosaicml-streaming": Library(
        "Streaming", tested=("0.13.0",), first="0.10.0", lacks="streaming.base.storage.download.CloudDownloader"
    ),
    "torch": Library("PyTorch", tested=("2.7.0", "2.15.0"), first="2.7.0"),
    "transformers": Library("Transformers", tested=("4.57.6",), first="4.57.0"),
}


def check_versions() -> None:
    """Refuse unsupported versions; on rank 0, warn about untested ones.

    Reads the metadata of the installed packages and imports none of them. The rank is the launcher's `RANK`.

    Raises:
        UserError: A library is not installed or too old; the message contains the command that installs a tested one.
    """
    for package, library in LIBRARIES.items():
        try:
            installed = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError as error:
            raise UserError(f"{library.title} ({package}) is not installed; {fix(package)}") from error
        tested = ", ".join(library.tested)
        if is_too_old(installed, library):
            reason = f": it lacks {library.lacks}" if library.lacks else ""
            raise UserError(
                f"{library.title} {installed} is too old{reason}; expected at least {library.first} "
                f"(tested: {tested}): {fix(package)}"
            )
        if not is_tested(installed, library) and os.environ.get("RANK", "0") == "0":
            log.warning(
                "%s %s is untested (tested: %s); if a run misbehaves, install a tested version: %s",
                library.title,
                installed,
                tested,
                fix(package),
            )


def is_too_old(installed: str, library: Library) -> bool:
    """Return whether a version is older than the oldest supported one."""
    return _release(installed) < _release(library.first)


def is_tested(installed: str, library: Library) -> bool:
    """Return whether the tests pass with a version."""
    return _release(installed) in map(_release, library.tested)


def _release(version: str) -> tuple[int, ...]:
    """Parse the numbers of a version: (0, 32, 1) for `0.32.1`, `0.32.1+cpu` and `0.32.1.dev0`."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(number) for number in match[0].split(".")) if match else ()
