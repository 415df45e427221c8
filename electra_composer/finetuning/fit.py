"""Training and evaluation of one finetuned model, of GLUE or of a task of one's own."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from composer import Evaluator, Trainer
from composer.core import Callback, DataSpec

from electra_composer.finetune_config import FinetuneConfig
from electra_composer.finetuning.loader import Encoded, build_loader
from electra_composer.glue_config import GlueConfig
from electra_composer.model.kernels.fused_layers import resolve_layer_kernels, use_layer_kernels
from electra_composer.tasks.model import FinetunedModel, sum_losses
from electra_composer.training.compilation import explain_compile_errors
from electra_composer.training.determinism import explain_nondeterministic_operators
from electra_composer.training.devices import resolve_device
from electra_composer.training.startup import device_batch_size
from electra_composer.training.trainer import build_trainer

EVAL_LABEL = "eval"  # evaluator label of the dev set; a second dev set appends the suffix of its metrics

Config = TypeVar("Config", GlueConfig, FinetuneConfig)


def own_folder(config: Config, name: str, seed: int, group: str) -> Config:
    """Give a run its own name, seed and folder, `checkpoints.folder/group/name`."""
    return replace(
        config,
        run_name=f"{config.run_name}-{name}",
        seed=seed,
        checkpoints=replace(
            config.checkpoints,
            folder=os.path.join(config.checkpoints.folder, group, name),
            # A run takes minutes: an interrupted run starts from the beginning and overwrites its checkpoints.
            resume=False,
            overwrite=True,
        ),
    )


@contextlib.contextmanager
def fitted(
    config: GlueConfig | FinetuneConfig,
    model: FinetunedModel,
    train: Encoded,
    dev: Mapping[str, Encoded],
    pad_id: int,
    attention_path: str,
    callbacks: list[Callback],
) -> Iterator[tuple[Trainer, Callable[[Encoded], DataSpec]]]:
    """Train a model and evaluate it; then let the block use the trainer.

    Args:
        config: of this run.
        dev: rows to evaluate, by the suffix of their evaluator's label; the first has none.
        callbacks: in addition to those of the configuration.

    Yields:
        The trainer, and the function that builds the loader of rows to evaluate.

    Raises:
        UserError: disk full, `torch.compile` failed, or an operator has no deterministic kernel.
    """
    device = resolve_device(config.trainer)[0]
    model.model.attention_path = attention_path  # type: ignore[assignment]
    kernels = resolve_layer_kernels(config.trainer.layer_kernels, "cuda" if device == "gpu" else "cpu")
    use_layer_kernels(model, kernels)
    load: Any = functools.partial(
        build_loader, pad_id=pad_id, num_workers=config.data.num_workers, pin_memory=device == "gpu"
    )
    load_eval = functools.partial(load, device_batch_size=config.trainer.device_eval_batch_size, shuffle_seed=None)
    assert config.trainer.max_duration is not None
    train_data = load(train, device_batch_size=device_batch_size(config.trainer), shuffle_seed=config.seed)
    if config.loss_reduction == "sum":
        train_data.batch_transforms = sum_losses
    trainer = build_trainer(
        config,
        model,
        train_data,
        load_eval(dev[""]),
        config.trainer.max_duration,
        callbacks=callbacks,
        static_shapes=False,  # a batch is as long as its longest example
    )
    try:
        with explain_compile_errors(), explain_nondeterministic_operators():
            if len(dev) == 1:
                trainer.fit()
            else:
                evaluators = [
                    Evaluator(label=EVAL_LABEL + suffix, dataloader=load_eval(part)) for suffix, part in dev.items()
                ]
                trainer.fit(eval_dataloader=evaluators, eval_interval=config.trainer.eval_interval)
        yield trainer, load_eval
    finally:
        trainer.close()


@contextlib.contextmanager
def collect_garbage() -> Iterator[None]:
    """Free the memory of the trainers of the block at its end."""
    try:
        yield
    finally:
        # Workaround (composer 0.32): trainers are in reference cycles, and their models accumulate on the device until
        # a garbage collection; goes when closing a trainer breaks the cycles.
        gc.collect()
