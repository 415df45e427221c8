"""Start scripts with Composer's launcher."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import programs

COMPOSER = Path(sys.executable).with_name("composer")


def launch(processes: int, *arguments: str) -> str:
    """Run a script with Composer's launcher (directly for one process) and return its output; it must succeed."""
    command = [str(COMPOSER), "-n", str(processes)] if processes > 1 else [sys.executable]
    done = programs.run(
        [*command, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr
