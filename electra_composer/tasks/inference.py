"""Run finetuned models on examples."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from electra_composer.errors import UserError
from electra_composer.tasks.base import Output, Split, Task
from electra_composer.tasks.encoded import PAD_MULTIPLE, EncodedRows, collate
from electra_composer.tasks.model import MODEL_INPUTS
from electra_composer.tasks.saved import SavedModel


@torch.inference_mode()
def run_model(
    model: nn.Module, task: Task, rows: EncodedRows, pad_id: int, batch_size: int, device: torch.device
) -> list[Output]:
    """Run a model on all rows, the longest first, in bf16 on a GPU that has it.

    Args:
        model: in evaluation mode, on `device`.

    Returns:
        Outputs of :meth:`Task.keep`, in the order of the rows.
    """
    outputs: dict[int, Output] = {}
    order = np.argsort(-rows.lengths, kind="stable")
    with _autocast(device):
        for start in range(0, len(rows), batch_size):
            multiple = PAD_MULTIPLE if device.type == "cuda" else 1
            batch = collate([rows[index] for index in order[start : start + batch_size]], pad_id, multiple)
            batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
            found = task.forward(model, [batch[name] for name in MODEL_INPUTS], batch)
            outputs.update(zip(batch["indices"].tolist(), task.keep(found, batch), strict=True))
    return [outputs[index] for index in range(len(rows))]


def _autocast(device: torch.device) -> Any:
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.autocast("cuda", torch.bfloat16)
    return contextlib.nullcontext()


def predict(
    models: Sequence[SavedModel], split: Split, batch_size: int, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Yield the predictions for all rows of a split, which is in memory.

    Args:
        models: on `device`; of several, the outputs are averaged (see :func:`check_ensemble`).
        split: `input` or `test`, so that no row is left out.

    Raises:
        UserError: a row cannot be read.
    """
    first = models[0]
    examples = first.task.tokenize(split, first.tokenizer)
    rows = first.task.encode(examples, first.tokenizer, first.max_seq_length)
    pad_id = first.tokenizer.pad_token_id
    outputs = [run_model(each.model, each.task, rows, pad_id, batch_size, device) for each in models]
    if len(models) == 1:
        return first.task.predictions(rows, outputs[0])
    return first.task.predictions(rows, [np.mean(parts, axis=0) for parts in zip(*outputs, strict=True)])


def check_ensemble(models: Sequence[SavedModel]) -> None:
    """Check that the outputs of models can be averaged.

    Raises:
        UserError: they differ in tokenizer or labels, or the task has no mean of outputs.
    """
    first = models[0]
    if len(models) > 1 and not first.task.averages:
        head = first.task.model_config.head
        raise UserError(f"{first.folder}: outputs of model.head={head} cannot be averaged; select best or a seed")
    for other in models[1:]:
        states = [each.task.state() for each in (first, other)]
        labels = [(state.get("labels"), state.get("names")) for state in states]
        if labels[0] != labels[1] or first.tokenizer.get_vocab() != other.tokenizer.get_vocab():
            raise UserError(
                f"{other.folder}: other labels or another vocabulary than {first.folder}; an ensemble needs the same"
            )
