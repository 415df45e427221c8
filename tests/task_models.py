"""Small random models of tasks, their tokenizer, and splits from lists of rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import ElectraTokenizerFast

from electra_composer.checkpoints.weights import Pretrained
from electra_composer.finetune_config import TaskConfig, TaskModelConfig
from electra_composer.model.encoder import EncoderConfig
from electra_composer.model.finetuning import ElectraWithHead
from electra_composer.tasks.base import Output, Split, Task
from electra_composer.tasks.encoded import EncodedRows, collate
from electra_composer.tasks.kinds import build_task
from electra_composer.tasks.rows import LeftOut, Row

WORDS = [f"w{number}" for number in range(94)]
POSITIONS = 40


def build_tokenizer(folder: Path) -> ElectraTokenizerFast:
    """Build a tokenizer of whole words w0 … w93."""
    path = folder / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    return ElectraTokenizerFast(vocab_file=str(path))


def build_source(folder: Path) -> Pretrained:
    """Return sizes and a tokenizer, without weights."""
    sizes = EncoderConfig(
        vocab_size=99,
        embedding_size=16,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        intermediate_size=64,
        max_positions=POSITIONS,
        dropout=0.1,
        attention_dropout=0.1,
        initializer_range=0.02,
        layer_norm_eps=1e-12,
    )
    return Pretrained("tiny", sizes, {}, build_tokenizer(folder))


def split_of(rows: Sequence[dict[str, Any]], name: str = "train", **columns: str | list[str]) -> Split:
    """Make a split of rows, whose columns have the names of their roles unless given."""
    found: dict[str, str | list[str] | None] = {"text": "text", "text_pair": None, "label": "label", **columns}
    table = [Row(values, f"{name}.csv:{number}") for number, values in enumerate(rows, start=2)]
    return Split(name, table, found, LeftOut(name))


def task_of(kind: str, head: str = "linear", **keys: Any) -> Task:
    """Build a task by its keys."""
    config = TaskConfig(kind=kind, **keys)  # type: ignore[arg-type]
    return build_task(config, TaskModelConfig(source="tiny", head=head))  # type: ignore[arg-type]


def random_model(task: Task, source: Pretrained, seed: int = 0) -> ElectraWithHead:
    """Build a model in evaluation mode whose parameters are all random, and large enough for distinct outputs."""
    torch.manual_seed(seed)
    model = ElectraWithHead(source.encoder, task.build_head(source.encoder), 0.1, task.per_token)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm_weight = parameter.dim() == 1 and "norm" in name and name.endswith("weight")
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (1.0 if is_norm_weight else 0.0))
    return model.eval()


@torch.no_grad()
def outputs_of(model: ElectraWithHead, task: Task, rows: EncodedRows) -> list[Output]:
    """Run a model on all rows, as one batch."""
    batch = collate([rows[index] for index in range(len(rows))], pad_id=0)
    inputs = [batch[name] for name in ("input_ids", "token_type_ids", "position_ids", "sequence_ids")]
    return task.keep(task.forward(model, inputs, batch), batch)
