"""Joint loss of a batch split into microbatches and over ranks, compilation and sharding."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Trainer
from composer.core import DataSpec, Evaluator
from flash_stand_in import flash_forward
from launcher import launch
from tiny import ROOT
from torch.utils.data import DataLoader

from electra_composer.config import ObjectiveConfig
from electra_composer.model import electra, electric, generators, masker, token_prediction
from electra_composer.model.electra import ElectraForPretraining, SpecialIds
from electra_composer.model.encoder import Layer
from electra_composer.model.kernels import attention
from electra_composer.model.kernels.attention import ExampleBound
from electra_composer.model.pretraining import ElectraPretraining

Batch = dict[str, torch.Tensor]
Make = Callable[..., Any]
LENGTH = 32

# 32, 2, 6, 32, 3, 12, 30 and 20 tokens, masked 5 to none: a mean of the microbatches' means would be far off.
VERY_UNEVEN = [[(12, 20)], [(2, 0)], [(6, 0)], [(8, 4), (20, 0)], [(3, 0)], [(7, 5)], [(10, 10), (10, 0)], [(20, 0)]]


def noisy(model: ElectraForPretraining, batch: Batch, seed: int = 3) -> Batch:
    return {**batch, "noise": model.draw_noise(batch["input_ids"], torch.Generator().manual_seed(seed))}


def split(batch: Batch, parts: int) -> list[Batch]:
    rows = len(batch["input_ids"]) // parts
    return [{name: t[i * rows : (i + 1) * rows] for name, t in batch.items()} for i in range(parts)]


def gradients(model: torch.nn.Module) -> Batch:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: Batch, expected: Batch) -> None:
    """Compare to 1e-5 of the largest entry, absolutely if that is below 1."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() <= 1e-5 * max(1.0, tensor.abs().max().item()), name


def reference(model: ElectraForPretraining, batch: Batch) -> tuple[Batch, dict[str, float]]:
    """Compute gradients and losses of the complete batch from the definition: two means over the batch."""
    model.zero_grad()
    outputs = model(**batch)
    mlm = outputs["mlm_loss"] / outputs["masked_weights"].sum()
    rtd = outputs["rtd_loss"] / (batch["sequence_ids"] > 0).sum()
    total = 1.0 * mlm + 50.0 * rtd
    total.backward()
    found = gradients(model)
    model.zero_grad()
    return found, {"total": total.item(), "mlm": mlm.item(), "rtd": rtd.item()}


@pytest.mark.parametrize(
    ("draw", "parts"),
    [*(("exact", parts) for parts in (1, 2, 4, 8)), ("with_replacement", 4), ("bernoulli", 1), ("bernoulli", 4)],
)
def test_microbatches_give_the_gradient_of_the_whole_batch(
    make_model: Make, make_batch: Make, draw: Any, parts: int
) -> None:
    """Composer weighs a microbatch's loss by its rows over the batch's rows."""
    model = ElectraPretraining(make_model(objective=ObjectiveConfig(mask_draw=draw)))
    batch = noisy(model.model, make_batch(VERY_UNEVEN))
    counted = model.count_batch(batch)
    expected, losses = reference(model.model, {name: counted[name] for name in counted if name != "loss_scale"})
    sums = dict.fromkeys(losses, 0.0)
    for micro in split(counted, parts):
        loss = model.loss(model(micro), micro)
        weight = len(micro["input_ids"]) / len(batch["input_ids"])
        (loss["total"] * weight).backward()
        for name in sums:
            sums[name] += loss[name].item() * weight
    assert sums == pytest.approx(losses, rel=1e-5)
    assert_same(gradients(model.model), expected)


def test_weights_of_the_losses_come_from_the_objective(make_model: Make, make_batch: Make) -> None:
    model = ElectraPretraining(make_model(objective=ObjectiveConfig(gen_weight=2.0, disc_weight=7.0)))
    batch = model.count_batch(noisy(model.model, make_batch(VERY_UNEVEN)))
    loss = model.loss(model(batch), batch)
    assert loss["total"].item() == pytest.approx(2.0 * loss["mlm"].item() + 7.0 * loss["rtd"].item(), rel=1e-6)


def test_count_batch_changes_nothing_else(make_model: Make, make_batch: Make) -> None:
    """And counts by hand: masked 5, 0, 1, 5 (slots allow no more than int(0.155 × 32) = 4), …"""
    model = ElectraPretraining(make_model())
    batch = make_batch(VERY_UNEVEN)
    before = {name: tensor.clone() for name, tensor in batch.items()}
    counted = model.count_batch(batch)
    assert counted.keys() == {*before, "loss_scale"}
    assert all(torch.equal(counted[name], before[name]) for name in before)
    masked = 4 + 0 + 1 + 4 + 1 + 2 + 4 + 3
    tokens = 32 + 2 + 6 + 32 + 3 + 12 + 30 + 20
    assert counted["loss_scale"].shape == (8, 2)
    torch.testing.assert_close(counted["loss_scale"], torch.tensor([8 / masked, 8 / tokens]).expand(8, 2))


def test_varlen_attention_with_a_bound_that_a_batch_exceeds(
    make_model: Make, make_batch: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound is chosen where the batch is counted, before the forward; the losses are those of `sdpa`."""
    model = ElectraPretraining(make_model())
    batch = noisy(model.model, make_batch(VERY_UNEVEN))
    _, expected = reference(model.model, batch)
    monkeypatch.setattr(attention, "_flash_forward", flash_forward)
    model.model.attention_path = "varlen"
    model.example_bound = ExampleBound(rows=8, length=LENGTH, examples_per_row=1.0)
    for exceeded in (False, True):
        if exceeded:
            model.example_bound.expected = 3
        counted = model.count_batch(batch)
        bound = model.example_bound.possible if exceeded else model.example_bound.expected
        assert counted["example_slots"].shape == (8, bound, 0)
        loss = model.loss(model(counted), counted)
        assert {name: value.item() for name, value in loss.items()} == pytest.approx(expected, rel=1e-5)
    with pytest.raises(RuntimeError, match="more than the 3 examples of its bound"):
        model.model(**batch, most_examples=3)


def test_a_batch_that_was_not_counted_is_refused(make_model: Make, make_batch: Make) -> None:
    model = ElectraPretraining(make_model())
    batch = make_batch(VERY_UNEVEN)
    with pytest.raises(KeyError, match="count_batch"):
        model.loss(model(batch), batch)


def test_a_batch_without_words_has_finite_losses(make_model: Make, make_batch: Make) -> None:
    model = ElectraPretraining(make_model())
    batch = model.count_batch(make_batch([[(2, 0)], [(2, 0)]]))
    loss = model.loss(model(batch), batch)
    assert loss["mlm"] == 0
    assert torch.isfinite(loss["total"])


def test_cpu_autocast_computes_in_bfloat16_and_keeps_losses_in_fp32(make_model: Make, make_batch: Make) -> None:
    plain, cast = ElectraPretraining(make_model()), ElectraPretraining(make_model(), cpu_autocast=True)
    batch = plain.count_batch(noisy(plain.model, make_batch(VERY_UNEVEN)))
    seen = []
    cast.model.discriminator.layers[0].up.register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
    expected, outputs = plain(batch), cast(batch)
    assert seen == [torch.bfloat16]
    for name in ("mlm_loss", "rtd_loss", "rtd_logits"):
        assert outputs[name].dtype == torch.float32, name
    assert outputs["mlm_loss"].item() == pytest.approx(expected["mlm_loss"].item(), rel=0.05)


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __init__(self, batch: Batch):
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch["input_ids"])

    def __getitem__(self, index: int) -> Batch:
        return {name: tensor[index] for name, tensor in self.batch.items()}


def one_step(model: ElectraPretraining, batch: Batch, microbatch: int | None) -> Trainer:
    rows = len(batch["input_ids"])
    trainer = Trainer(
        model=model,
        train_dataloader=DataSpec(DataLoader(Rows(batch), batch_size=rows), batch_transforms=model.count_batch),
        optimizers=torch.optim.SGD(model.parameters(), lr=1.0),
        max_duration="1ba",
        device="cpu",
        precision="fp32",
        device_train_microbatch_size=microbatch or rows,
        progress_bar=False,
        log_to_console=False,
    )
    trainer.fit()
    return trainer


@pytest.mark.parametrize("microbatch", [8, 4, 2, 1])
def test_a_step_of_composers_trainer_is_the_same_however_the_batch_is_split(
    make_model: Make, make_batch: Make, microbatch: int
) -> None:
    """SGD at learning rate 1: what the weights move by is the gradient."""
    model = ElectraPretraining(make_model())
    batch = noisy(model.model, make_batch(VERY_UNEVEN))
    expected, _ = reference(model.model, batch)
    before = {name: parameter.detach().clone() for name, parameter in model.model.named_parameters()}
    trainer = one_step(model, batch, microbatch)
    moved = {name: before[name] - parameter.detach() for name, parameter in model.model.named_parameters()}
    for name, tensor in expected.items():
        # A difference of weights carries their own rounding: 6e-8 of a weight that may have moved by tens.
        assert (moved[name] - tensor).abs().max() <= 2e-5 * max(1.0, tensor.abs().max().item()), name
    trainer.close()


def test_composers_evaluation_is_repeatable(make_model: Make, make_batch: Make) -> None:
    model = ElectraPretraining(make_model())
    batch = make_batch(VERY_UNEVEN)
    trainer = Trainer(model=model, device="cpu", precision="fp32", progress_bar=False)
    found = []
    for _ in range(2):
        loader = DataSpec(DataLoader(Rows(batch), batch_size=4))
        trainer.eval(Evaluator(label="eval", dataloader=loader))
        found.append({name: metric.compute().item() for name, metric in trainer.state.eval_metrics["eval"].items()})
    trainer.close()
    assert found[0] == found[1]
    assert {"mlm_loss", "rtd_loss", "total_loss", "rtd_auc", "rtd_precision", "rtd_recall"} <= found[0].keys()
    sums = [model.eval_forward(part)["stats"] for part in split(batch, 2)]
    for name in ("masked", "tokens"):
        assert sum(part[name] for part in sums) > 0
    mlm = sum(part["mlm_loss_sum"] for part in sums) / sum(part["masked"] for part in sums)
    rtd = sum(part["rtd_loss_sum"] for part in sums) / sum(part["tokens"] for part in sums)
    assert found[0]["mlm_loss"] == pytest.approx(mlm.item(), rel=1e-5)
    assert found[0]["rtd_loss"] == pytest.approx(rtd.item(), rel=1e-5)
    # A mean over batches of 50 × rtd + mlm, which the two means over all tokens need not give exactly.
    assert found[0]["total_loss"] == pytest.approx(mlm.item() + 50 * rtd.item(), rel=0.05)


@pytest.mark.distributed
def test_two_processes_give_the_gradient_of_one(
    make_model: Make, make_batch: Make, tiny_model_config: Make, tmp_path: Path
) -> None:
    """Four rows each, and six against two, under DDP over gloo."""
    model = make_model()
    batch = noisy(model, make_batch(VERY_UNEVEN))
    expected, _ = reference(model, batch)
    sizes = (tiny_model_config(), 99, SpecialIds(pad=0, cls=2, sep=3, mask=4), LENGTH)
    shares = (4, 6)  # of the eight rows, how many the first process has
    inputs = {"sizes": sizes, "weights": model.state_dict(), "batch": batch, "shares": shares}
    torch.save(inputs, tmp_path / "inputs.pt")
    launch(2, str(ROOT / "tests" / "gradient_of_ranks.py"), str(tmp_path))
    for first_rows in shares:
        for rank in range(2):
            assert_same(torch.load(tmp_path / f"{first_rows}_{rank}.pt"), expected)


@pytest.mark.parametrize("cpu_autocast", [False, True])
def test_the_composer_forward_compiles_without_a_graph_break(
    make_model: Make, make_batch: Make, cpu_autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Composer compiles the forward of the `ComposerModel`, its batch a dictionary."""
    torch.compiler.reset()
    # Compiled attention in bf16 is torch's, which rounds differently from _WrittenAttention.
    monkeypatch.setattr("electra_composer.model.kernels.attention._is_short_bf16", lambda qkv: False)
    model = ElectraPretraining(make_model(), cpu_autocast=cpu_autocast)
    batch = model.count_batch(noisy(model.model, make_batch(VERY_UNEVEN)))
    found = torch.compile(model.forward, fullgraph=True, backend="eager")(batch)
    expected = model(batch)
    assert torch.equal(found["corrupted_ids"], expected["corrupted_ids"])
    torch.testing.assert_close(found["rtd_loss"], expected["rtd_loss"], rtol=1e-5, atol=1e-5)


def test_the_only_child_wraps_layers_and_nothing_else(make_model: Make) -> None:
    model = ElectraPretraining(make_model())
    assert [name for name, _ in model.named_children()] == ["model"]
    wrapped = {type(module) for module in model.modules() if model.model.fsdp_wrap_fn(module)}
    assert wrapped == {Layer}


def test_every_field_of_the_objective_is_read(make_model: Make) -> None:
    """No option of the objective is without effect."""
    modules = (electra, electric, generators, masker, token_prediction)
    source = "".join(inspect.getsource(module) for module in modules)
    for field in dataclasses.fields(ObjectiveConfig):
        assert f"objective.{field.name}" in source, field.name
