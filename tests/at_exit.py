"""Run a program as on a GPU machine, with batches in pinned memory, and print what its exit waits for.

    python tests/at_exit.py PROGRAM [ARGUMENT …]

The last line is a JSON object: `in vain`, names of processes that were waited for until a timeout; `threads`, names of
threads that Python joined; `children`, number of processes that Python joined.
"""

from __future__ import annotations

import atexit
import json
import multiprocessing
import runpy
import sys
import threading
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from electra_composer import program, signals

found: dict[str, list[object]] = {"in vain": [], "threads": []}


def report() -> None:
    print(json.dumps({**found, "children": len(multiprocessing.active_children())}))


signals.install()  # ends the process without running what is registered before it
atexit.register(report)  # what is registered first runs last
program.begin = lambda: None


def is_for_pinned_memory() -> bool:
    return str(sys._getframe(1).f_globals["__name__"]).startswith(("torch.utils.data", "electra_composer.batches"))


join = BaseProcess.join


def watched_join(process, timeout=None):
    join(process, timeout)
    if process.is_alive():
        found["in vain"].append(process.name)


BaseProcess.join = watched_join
torch.accelerator.is_available = is_for_pinned_memory
torch.cuda.current_device = torch.accelerator.current_device_index = lambda: 0
torch.cuda.set_device = torch.accelerator.set_device_index = lambda device: None
torch.Tensor.pin_memory = lambda tensor, device=None: tensor
create = DataLoader.__init__


def create_pinning(loader, *args, **options):
    create(loader, *args, **{**options, "pin_memory": True})


DataLoader.__init__ = create_pinning

if __name__ == "__main__":
    program, *arguments = sys.argv[1:]
    sys.argv, sys.path[0] = [program, *arguments], str(Path(program).parent)
    try:
        runpy.run_path(program, run_name="__main__")
    finally:
        main = threading.main_thread()
        found["threads"] = [each.name for each in threading.enumerate() if each is not main and not each.daemon]
