"""First steps of a program, which it takes before it imports libraries."""

from __future__ import annotations

import os
import sys

from electra_composer import signals


def begin() -> None:
    """Handle signals, find no module in the program's own folder, and print no advice of libraries."""
    signals.install()
    leave_own_folder()
    import logging  # registers an exit handler, which must run before that of signals.py

    # Workaround (matplotlib 3.11): torchmetrics imports it, and its first import on a machine warns that it builds a
    # cache of fonts; goes when it builds the cache for the first text.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)


def leave_own_folder() -> None:
    """Remove the folder of the program from `sys.path`, where Python puts it first.

    Its files would shadow packages of the same names, such as `config`, `model` or `storage`, for every library.
    """
    own = getattr(sys.modules["__main__"], "__file__", None)
    if own is not None and sys.path and os.path.realpath(sys.path[0]) == os.path.dirname(os.path.realpath(own)):
        del sys.path[0]
