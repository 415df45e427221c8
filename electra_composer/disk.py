"""Recognize errors of a full or read-only disk, whichever library raises them."""

from __future__ import annotations

import errno
import os
import re

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def system_error(error: BaseException | None) -> int | None:
    """Return the `errno` of an exception; None if the operating system did not raise it."""
    if isinstance(error, OSError):
        return error.errno
    # Workaround (tokenizers 0.22): tokenizers and safetensors raise the system's errors as an Exception of their own,
    # with the number in the text only; goes when they raise OSError.
    found = re.search(r"\(os error (\d+)\)|Os \{ code: (\d+)", str(error))
    return int(found[1] or found[2]) if found else None


def disk_error(error: BaseException | None) -> str | None:
    """Describe an error of a full, limited or read-only disk; None for any other."""
    code = system_error(error)
    return os.strerror(code) if code in NO_ROOM else None
