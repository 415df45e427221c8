"""The processes of the launcher, each of which does complete finetuning runs."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import torch

from electra_composer.errors import LostRankError, UserError
from electra_composer.finetuning.runs import POLL_SECONDS, now
from electra_composer.training.devices import run_device


class Processes:
    """The processes of the launcher, each of which computes on its own.

    Args:
        rank: rank of this process. Rank 0 prints, writes the tables and prepares the data before the others.
        count: number of processes.
        on_this_machine: those of them on this machine.
        store: TCPStore for synchronisation at the start; None for a single process.
    """

    def __init__(self, rank: int = 0, count: int = 1, store: Any = None, on_this_machine: int = 1):
        self.rank = rank
        self.count = count
        self.on_this_machine = on_this_machine
        self.store = store
        self.since = now()

    @classmethod
    def from_launcher(cls) -> Processes:
        """Read the launcher's environment variables, then set them to a world size of 1 for this process.

        Must be called before Composer reads them. `LOCAL_RANK` is kept: it selects the GPU.
        """
        rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if count == 1:
            return cls()
        # Workaround (torch 2.7): the constructor blocks without running Python's signal handlers, so that only the
        # default action of SIGTERM can end a process that waits for a failed rank 0; goes when it can be interrupted.
        handler = signal.signal(signal.SIGTERM, signal.SIG_DFL)
        store = torch.distributed.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=rank == 0,
            wait_for_workers=False,
        )
        if handler is not None:  # None: not installed from Python
            signal.signal(signal.SIGTERM, handler)
        on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", NODE_RANK="0")
        return cls(rank, count, store, on_this_machine)

    def init_process_group(self, device: str) -> None:
        """Initialize a process group with this process as its only member; without a launcher, Composer does it.

        Args:
            device: `gpu` or `cpu`.

        Raises:
            UserError: there are more processes on this machine than GPUs.
        """
        if self.count == 1:
            return
        local_rank = int(os.environ["LOCAL_RANK"])
        if device == "gpu" and local_rank >= torch.cuda.device_count():
            raise UserError(
                f"the launcher started a process for GPU {local_rank}, but there are {torch.cuda.device_count()} GPUs; "
                "start one process per GPU by composer -n …, or set trainer.device=cpu"
            )
        if not torch.distributed.is_initialized():
            backend, store = run_device(device).dist_backend, torch.distributed.HashStore()
            torch.distributed.init_process_group(backend, store=store, world_size=1, rank=0)

    @contextlib.contextmanager
    def rank_zero_first(self) -> Iterator[None]:
        """Run the block on rank 0 before the other ranks, so that they find its files.

        If rank 0 fails, the others raise LostRankError, and the launcher ends them.
        """
        if self.store is not None and self.rank > 0:
            try:
                # Workaround (torch 2.7): `get` blocks without running Python's signal handlers and times out after five
                # minutes; goes when it can be interrupted.
                while not self.store.check(["since"]):
                    time.sleep(POLL_SECONDS)
                self.since = self.store.get("since").decode()
                self.store.add("told", 1)
            except RuntimeError as error:  # rank 0 is the store's server
                raise LostRankError("rank 0 has ended before it had read the data; its error is the cause") from error
        yield
        if self.store is not None and self.rank == 0:
            self.store.set("since", self.since)
            # This process is the store's server and may exit soon: wait until all ranks have read the key.
            while self.store.add("told", 0) < self.count - 1:
                time.sleep(POLL_SECONDS)

    def print(self, text: str) -> None:
        """Print on rank 0."""
        if self.rank == 0:
            print(text, flush=True)
