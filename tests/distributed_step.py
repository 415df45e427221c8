"""Three steps of SGD in Composer's `Trainer`, on one or two ranks, for test_distributed.py.

SGD without clipping shows a wrong factor of the gradient, which Adam hides. Every row has its own noise, so that masks
and samples are the same however the batch is split.

    composer -n 2 tests/distributed_step.py OUT ddp:MICROBATCH fsdp:MICROBATCH fsdp:MICROBATCH:OBJECTIVE …
"""

from __future__ import annotations

import os
import sys

import torch
from composer import Trainer
from composer.core import DataSpec
from composer.utils import dist, get_device
from composer.utils.parallelism import FSDP2Config
from torch.utils.data import DataLoader, Dataset

from electra_composer.config import FSDPConfig, ModelConfig, ObjectiveConfig, TrainerConfig
from electra_composer.model.electra import ElectraForPretraining, SpecialIds
from electra_composer.model.objectives import build_pretraining_model
from electra_composer.model.pretraining import ElectraPretraining
from electra_composer.training.devices import fsdp_gradient_factor

LENGTH, VOCAB, BATCH = 32, 100, 8


class Rows(Dataset):
    """Random rows of very different lengths, for which a mean of means would be wrong."""

    def __init__(self, slots: int):
        self.slots = slots

    def __len__(self) -> int:
        return 3 * BATCH

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        tokens = int(torch.randint(4, LENGTH + 1, (1,), generator=generator))
        sequence_ids = (torch.arange(LENGTH) < tokens).long()
        return {
            "input_ids": torch.randint(5, VOCAB, (LENGTH,), generator=generator) * sequence_ids,
            "token_type_ids": torch.zeros(LENGTH, dtype=torch.long),
            "position_ids": torch.arange(LENGTH),
            "sequence_ids": sequence_ids,
            "noise": torch.rand(LENGTH + 3 * self.slots, generator=generator),
        }


def evaluate(electra: ElectraForPretraining, rows: Rows) -> dict[str, torch.Tensor]:
    electra.eval()
    with torch.no_grad():
        return electra(**{name: value[None] for name, value in rows[0].items()})


def main(out: str, kind: str, microbatch: int, objective: str) -> None:
    torch.set_num_threads(1)
    dist.initialize_dist(get_device("cpu"))
    torch.manual_seed(0)
    sizes = ModelConfig(
        num_layers=2,
        hidden_size=32,
        num_heads=2,
        embedding_size=16,
        generator_size=0.5,
        max_positions=LENGTH,
        dropout=0.0,
        attention_dropout=0.0,
    )
    objective_config = ObjectiveConfig(kind=objective)  # type: ignore[arg-type]
    electra = build_pretraining_model(sizes, objective_config, VOCAB, SpecialIds(0, 1, 2, 3), LENGTH)
    fsdp = kind == "fsdp"
    factor = fsdp_gradient_factor(TrainerConfig(fsdp=FSDPConfig() if fsdp else None))
    model = ElectraPretraining(electra, gradient_factor=factor)
    rows = Rows(electra.slots)
    per_rank = BATCH // dist.get_world_size()
    loader = DataLoader(rows, per_rank, sampler=dist.get_sampler(rows, shuffle=False))
    trainer = Trainer(
        model=model,
        train_dataloader=DataSpec(loader, batch_transforms=model.count_batch),
        max_duration="3ba",
        optimizers=torch.optim.SGD(model.parameters(), lr=0.02),
        device="cpu",
        precision="fp32",
        device_train_microbatch_size=min(microbatch, per_rank),
        parallelism_config={"fsdp": FSDP2Config(state_dict_type="full")} if fsdp else None,
        save_folder=f"{out}/checkpoint",
        save_interval="3ba",
        progress_bar=False,
    )
    trainer.fit()
    loss = {name: float(value) for name, value in trainer.state.total_loss_dict.items()}
    # The embeddings are tied, under FSDP too: a change of the table changes the outputs of both models.
    before = evaluate(electra, rows)
    with torch.no_grad():
        electra.embeddings.word.weight.mul_(1.5)
    after = evaluate(electra, rows)
    sides = [name for name in ("mlm_features", "cloze_loss", "rtd_logits", "lm_features") if name in before]
    assert len(sides) == 2
    for side in sides:
        assert not torch.allclose(before[side], after[side]), side
    if dist.get_global_rank() == 0:
        torch.save(loss, f"{out}/loss.pt")


if __name__ == "__main__":
    for arrangement in sys.argv[2:]:
        kind, microbatch, *objective = arrangement.split(":")
        folder = os.path.join(sys.argv[1], arrangement.replace(":", "-"))
        os.makedirs(folder, exist_ok=True)
        main(folder, kind, int(microbatch), *(objective or ["electra"]))
