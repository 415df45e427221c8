"""First steps of a program, which it takes before it imports libraries."""

from __future__ import annotations

import os
import sys

from electra_composer import signals


def begin() -> None:
    """Handle signals, and find no module in the program's own folder."""
    signals.install()
    leave_own_folder()


def leave_own_folder() -> None:
    """Remove the folder of the program from `sys.path`, where Python puts it first.

    Its files would shadow packages of the same names, such as `config`, `model` or `storage`, for every library.
    """
    own = getattr(sys.modules["__main__"], "__file__", None)
    if own is not None and sys.path and os.path.realpath(sys.path[0]) == os.path.dirname(os.path.realpath(own)):
        del sys.path[0]
