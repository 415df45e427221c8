"""Which versions of Composer and Streaming are known to work, and which are known not to."""

from __future__ import annotations

import importlib.metadata
import logging
import re
from typing import NamedTuple

from electra_composer.errors import UserError

log = logging.getLogger(__name__)

FIX = "pip install -c constraints.txt -e ."


class Library(NamedTuple):
    """What is known of a library's versions."""

    title: str
    tested: str  # as in constraints.txt
    first: str  # the first that has what is used of it
    lacks: str  # what those before it lack


# Found by unpacking the published wheels and looking for the names.
LIBRARIES = {
    "mosaicml": Library(
        "Composer",
        tested="0.32.1",
        first="0.32.0",
        lacks="FSDP2Config.state_dict_type (0.31 has FSDP2 without it, 0.30 has no FSDP2)",
    ),
    "mosaicml-streaming": Library(
        "Streaming", tested="0.13.0", first="0.10.0", lacks="streaming.base.storage.download.CloudDownloader"
    ),
}


def check_versions() -> None:
    """Refuse a Composer or Streaming that is known not to work; warn of one that was not tested.

    Reads the installed packages' metadata only, and imports nothing.

    Raises:
        UserError: not installed, or older than what is used of it; with the command that mends it.
    """
    for package, library in LIBRARIES.items():
        try:
            installed = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError as error:
            raise UserError(f"{library.title} ({package}) is not installed; {FIX}") from error
        if _release(installed) < _release(library.first):
            raise UserError(
                f"{library.title} {installed} is known not to work: it lacks {library.lacks}; "
                f"tested with {library.tested}: {FIX}"
            )
        if _release(installed) != _release(library.tested):
            log.warning(
                "%s %s is untested; if anything is odd, use %s: %s", library.title, installed, library.tested, FIX
            )


def _release(version: str) -> tuple[int, ...]:
    """The numbers of a version: 0.32.1 for `0.32.1`, `0.32.1+cpu` and `0.32.1.dev0`."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(number) for number in match[0].split(".")) if match else ()
