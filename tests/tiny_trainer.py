"""A linear model of two inputs, and Composer's Trainer for it."""

from __future__ import annotations

from typing import Any

import torch
from composer import ComposerModel, Trainer
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric


class Tiny(ComposerModel):
    """Returns the losses `total` and `mlm` (half of it), and the metric `mean_output`."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(2, 1)

    def forward(self, batch):
        return self.head(batch[0])

    def loss(self, outputs, batch):
        loss = outputs.square().mean()
        return {"total": loss, "mlm": loss / 2}

    def eval_forward(self, batch, outputs=None):
        return self.forward(batch)

    def get_metrics(self, is_train):
        return {} if is_train else {"mean_output": MeanMetric()}

    def update_metric(self, batch, outputs, metric):
        metric.update(outputs)


def make_trainer(
    max_duration: str, model: ComposerModel | None = None, trainer_class: type[Trainer] = Trainer, **arguments: Any
) -> Trainer:
    """Build a trainer on the CPU over 5 batches of 4 rows per epoch; `arguments` are Composer's."""
    torch.manual_seed(0)
    model = model or Tiny()
    data = DataLoader(TensorDataset(torch.randn(20, 2)), batch_size=4)
    defaults: dict[str, Any] = {
        "optimizers": torch.optim.AdamW(model.parameters(), lr=1e-3),
        "train_dataloader": data,
        "eval_dataloader": data,
        "eval_interval": "4ba",
        "progress_bar": False,
        "device": "cpu",
        "precision": "fp32",
    }
    return trainer_class(model=model, max_duration=max_duration, **{**defaults, **arguments})
