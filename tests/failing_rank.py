"""`pretrain.py` with a disk that is full for one rank: `callbacks.full_disk.rank`, at `callbacks.full_disk.batch`."""

from __future__ import annotations

import errno
import os

from composer.core import Callback
from composer.utils import dist

from electra_composer.config import PretrainConfig
from electra_composer.config_loading import load_config_from_command_line
from electra_composer.errors import report_user_errors
from electra_composer.pretrain import main
from electra_composer.training.builders import CALLBACKS


class FullDisk(Callback):
    def __init__(self, rank: int, batch: int) -> None:
        self.rank, self.batch = rank, batch

    def batch_end(self, state, logger):
        if (dist.get_global_rank(), state.timestamp.batch.value) == (self.rank, self.batch):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "run/trouble")


CALLBACKS["full_disk"] = FullDisk

if __name__ == "__main__":
    report_user_errors(main)(*load_config_from_command_line(PretrainConfig, "tests/failing_rank.py YAML"))
