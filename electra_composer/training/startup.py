"""Start of a run: process group, seed, and checks before anything is built."""

from __future__ import annotations

from composer.utils import dist, reproducibility

from electra_composer.config import RunConfig, TrainerConfig
from electra_composer.errors import UserError
from electra_composer.training.compilation import check_compile
from electra_composer.training.determinism import use_deterministic_kernels
from electra_composer.training.devices import resolve_device, run_device
from electra_composer.training.process_memory import keep_freed_memory
from electra_composer.training.step_graph import check_cuda_graph
from electra_composer.training.threads import choose_threads


def start(config: RunConfig, ranks_of_machine: int | None = None) -> bool:
    """Initialise the process group and the seeds, choose the number of CPU threads, and check device, precision and
    batch sizes.

    Args:
        ranks_of_machine: processes of the program on this machine, which share its cores; None: those of the launcher.

    Returns:
        Whether the model is to run under bfloat16 autocast on the CPU (see devices.py).

    Raises:
        UserError: a value that is not possible on this machine.
    """
    use_deterministic_kernels(config.trainer)
    device, _, cpu_autocast = resolve_device(config.trainer)
    check_compile(config.trainer)
    check_cuda_graph(config.trainer)
    if device == "cpu":
        keep_freed_memory()
    dist.initialize_dist(run_device(device), timeout=300.0)
    device_batch_size(config.trainer)
    if device == "cpu":
        choose_threads(config.trainer, ranks_of_machine or dist.get_local_world_size())
    reproducibility.seed_all(config.seed)  # the same on every rank, so that weights are initialised equally
    return cpu_autocast


def device_batch_size(trainer: TrainerConfig) -> int:
    """Return the rows per rank of a global batch.

    Raises:
        UserError: a global batch size that is not a multiple of the number of ranks, or an impossible microbatch.
    """
    total, ranks = trainer.global_train_batch_size, dist.get_world_size()
    microbatch = trainer.device_train_microbatch_size
    if total % ranks:
        raise UserError(
            f"trainer.global_train_batch_size is {total}; expected a multiple of {ranks}, the number of ranks"
        )
    rows = total // ranks
    # Workaround (composer 0.32): automatic microbatching fails an assertion under FSDP2; goes when it is supported.
    if microbatch == "auto" and trainer.fsdp is not None:
        raise UserError(
            "trainer.device_train_microbatch_size is auto, which Composer does not support under FSDP2; set a number, "
            "or null for no split"
        )
    if isinstance(microbatch, int) and microbatch > rows:
        raise UserError(
            f"trainer.device_train_microbatch_size is {microbatch}; expected 1 to {rows}, the rows per rank of "
            f"trainer.global_train_batch_size {total} on {ranks} ranks"
        )
    return rows


def microbatch_size(trainer: TrainerConfig) -> int:
    """Return the rows of a microbatch; for `auto`, the largest possible number."""
    microbatch = trainer.device_train_microbatch_size
    return microbatch if isinstance(microbatch, int) else device_batch_size(trainer)
