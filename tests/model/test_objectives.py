"""Each objective beside a twin of its formula, and what must not depend on how a batch is computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from electra_inputs import gradients
from launcher import launch
from objective_cases import CASES, Twin, word_counts
from tiny import ROOT
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from electra_composer.config import ObjectiveConfig, OptimizerConfig
from electra_composer.model.masker import SpecialIds
from electra_composer.model.pretraining import ElectraPretraining
from electra_composer.training.builders import build_optimizer
from electra_composer.training.parallelism import use_flat_parameters

Batch = dict[str, Tensor]
Make = Callable[..., Any]

# Full, two special tokens, short, packed, short, two segments, nothing, one of two segments.
ROWS = [[(12, 20)], [(2, 0)], [(6, 0)], [(8, 4), (20, 0)], [(3, 0)], [(7, 5)], [], [(10, 10), (10, 0)]]


@pytest.fixture
def make(make_model: Make, make_batch: Make, tiny_model_config: Make) -> Make:
    """`make("case")` returns a model of :data:`CASES` and a counted batch with noise."""

    def of(name: str, **sizes: Any) -> tuple[ElectraPretraining, Batch]:
        objective, model = CASES[name]
        built = make_model(tiny_model_config(**{"num_layers": 1, **model, **sizes}), ObjectiveConfig(**objective))
        if built.objective.generator == "unigram":
            built.distribution.set_counts(word_counts(built.vocab_size))
        batch = make_batch(ROWS, vocab_size=12)  # few words: samples hit originals
        with torch.no_grad():
            for head, more in ((built.mlm_head, 8.0), (built.lm_head, 3.0)):
                if head is not None:
                    head.bias[5:12] += more
        batch["noise"] = built.draw_noise(batch["input_ids"], torch.Generator().manual_seed(3))
        pretraining = ElectraPretraining(built).train()
        return pretraining, pretraining.count_batch(batch)

    return of


def backward(model: ElectraPretraining, batch: Batch) -> tuple[dict[str, Any], dict[str, Tensor], Batch]:
    model.zero_grad()
    outputs = model(batch)
    losses = model.loss(outputs, batch)
    losses["total"].backward()
    return outputs, losses, gradients(model.model)


def assert_same(found: Batch, expected: Batch, tolerance: float = 2e-5) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        largest = max(1.0, tensor.abs().max().item())
        assert (found[name] - tensor).abs().max() <= tolerance * largest, name


@pytest.mark.parametrize("name", CASES)
def test_samples_losses_gradients_statistics_and_metrics_are_those_of_the_formula(make: Make, name: str) -> None:
    model, batch = make(name)
    outputs, losses, found = backward(model, batch)
    twin = Twin(model.model, batch, outputs["corrupted_ids"])
    if model.model.objective.kind != "mlm":
        assert torch.equal(outputs["corrupted_ids"][twin.used], twin.samples)
        unmasked = torch.ones_like(batch["input_ids"], dtype=torch.bool)
        unmasked[twin.used] = False
        assert torch.equal(outputs["corrupted_ids"][unmasked], batch["input_ids"][unmasked])
        hits = (outputs["corrupted_ids"] == batch["input_ids"])[twin.used].sum()
        assert hits < len(twin.samples)
        # Random weights, and so the samples, differ between versions of torch: few cases have hits with all of them.
        assert hits > 0 or name not in {"electra", "unigram", "electra_15"}
    expected = twin.means()
    assert {key: value.item() for key, value in losses.items()} == pytest.approx(
        {key: value.item() for key, value in expected.items()}, rel=1e-5
    )
    stats = {key: value.item() for key, value in outputs["stats"].items()}
    assert stats == pytest.approx(twin.stats, rel=1e-5)
    assert {*model.model.stats} == {*stats}
    expected["total"].backward()
    assert_same(found, gradients(twin.model))
    for key, parameter in model.model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, key  # or DDP would wait for it

    metrics = model.get_metrics(is_train=False)
    for metric in metrics.values():
        model.update_metric(batch, outputs, metric)
    found_metrics = {key: metric.compute().item() for key, metric in metrics.items()}
    of_twin = metrics_of(twin, {key: value.item() for key, value in expected.items()})
    # The thresholds are 0.025 apart: some of the pairs of a small batch are ties.
    assert found_metrics.pop("rtd_auc", None) == pytest.approx(of_twin.pop("rtd_auc", None), abs=0.03)
    assert found_metrics == pytest.approx(of_twin, rel=1e-5)


def metrics_of(twin: Twin, losses: dict[str, float]) -> dict[str, float]:
    stats = twin.stats
    metrics = {"total_loss": losses.pop("total"), **{f"{name}_loss": value for name, value in losses.items()}}
    for name, over in (("mlm", "masked"), ("cloze", "candidates"), ("lm", "predicted")):
        if name in losses:
            metrics[f"{name}_accuracy"] = stats[f"{name}_correct"] / stats[over]
    if "sampled_correct" in stats:
        metrics["sampled_accuracy"] = stats["sampled_correct"] / stats["masked"]
    if "copied" in stats:
        metrics["copied_share"] = stats["copied"] / stats["predicted"]
    if "rtd" in losses:
        guess, truth = twin.rtd_logits > 0, twin.labels
        metrics["rtd_accuracy"] = (guess == truth).double().mean().item()
        metrics["rtd_precision"] = truth[guess].double().mean().item() if guess.any() else 0.0
        metrics["rtd_recall"] = guess[truth].double().mean().item()
        metrics["replaced_share"] = truth.double().mean().item()
        logits = twin.rtd_logits
        if twin.objective.mask_draw == "with_replacement" and twin.objective.kind == "electra_15":
            places = torch.stack(twin.used)  # a token counts once
            distinct = [places.T.tolist().index(place) for place in places.unique(dim=1).T.tolist()]
            logits, truth = logits[distinct], truth[distinct]
        metrics["rtd_auc"] = binary_auroc(logits.sigmoid(), truth.long()).item()
    return metrics


@pytest.mark.parametrize("name", CASES)
def test_microbatches_give_the_gradient_of_the_batch(make: Make, name: str) -> None:
    """Of three, three and two rows, with the weights that Composer gives them, and flat parameters."""
    model, batch = make(name)
    _, losses, expected = backward(model, batch)
    model.zero_grad()
    config = OptimizerConfig(lr=1e-3)
    use_flat_parameters(model, build_optimizer(config, model), "fp32")
    sums = dict.fromkeys(losses, 0.0)
    for start in (0, 3, 6):
        part = {key: tensor[start : start + 3] for key, tensor in batch.items()}
        weight = len(part["input_ids"]) / len(batch["input_ids"])
        of_part = model.loss(model(part), part)
        (of_part["total"] * weight).backward()
        sums = {key: sums[key] + of_part[key].item() * weight for key in sums}
    assert sums == pytest.approx({key: value.item() for key, value in losses.items()}, rel=1e-5)
    assert_same(gradients(model.model), expected)


@pytest.mark.distributed
def test_two_processes_give_the_gradient_of_one(make: Make, tiny_model_config: Make, tmp_path: Path) -> None:
    """Four rows each, and six against two, under DDP over gloo, each in two microbatches."""
    shares = (4, 6)  # of the eight rows, how many the first process has
    names = ("electra", "frozen", "unigram", "mlm", "all_tokens_mlm, towers", "electra_15, repeats", "electric")
    inputs, expected = [], []
    for name in names:
        model, batch = make(name)
        expected.append(backward(model, batch)[2])
        config = tiny_model_config(**{"num_layers": 1, **CASES[name][1]})
        arguments = (config, ObjectiveConfig(**CASES[name][0]), 99, SpecialIds(pad=0, cls=2, sep=3, mask=4), 32)
        rows = {key: tensor for key, tensor in batch.items() if key != "loss_scale"}
        weights = model.model.state_dict()
        inputs.append({"arguments": arguments, "weights": weights, "batch": rows, "shares": shares})
    torch.save(inputs, tmp_path / "inputs.pt")
    launch(2, str(ROOT / "tests" / "gradient_of_ranks.py"), str(tmp_path))
    for number, found in enumerate(expected):
        trained = {name: gradient for name, gradient in found.items() if gradient.any()}
        for first_rows in shares:
            for rank in range(2):
                of_rank = torch.load(tmp_path / f"{number}_{first_rows}_{rank}.pt")
                assert_same({name: of_rank[name] for name in trained}, trained)


@pytest.mark.parametrize("keys", [{"gen_weight": 0.0}, {"disc_weight": 0.0}])
def test_a_weight_of_zero_leaves_gradients_of_zero(make_model: Make, make_batch: Make, keys: dict[str, float]) -> None:
    """And not none: DDP waits for the gradient of every trainable parameter."""
    model = ElectraPretraining(make_model(objective=ObjectiveConfig(**keys)))
    batch = model.count_batch(make_batch(ROWS))
    model.loss(model(batch), batch)["total"].backward()
    of_generator = {p for module in model.model.modules_of_generator for p in module.parameters()}
    for name, parameter in model.model.named_parameters():
        assert parameter.grad is not None, name
        if not name.startswith("embeddings"):
            assert parameter.grad.any() != ((parameter in of_generator) == ("gen_weight" in keys)), name


@pytest.mark.parametrize(
    "name", ["frozen", "unigram", "mlm", "replace_mlm", "all_tokens_mlm", "electra_15", "electric"]
)
def test_one_compiled_graph_gives_the_same(make: Make, name: str) -> None:
    """Traced without a break; of those that differ most, autograd's graph too, which takes twice as long."""
    torch.compiler.reset()
    backend = "aot_eager" if name in ("all_tokens_mlm", "electric") else "eager"
    model, batch = make(name)
    _, losses, expected = backward(model, batch)
    model.forward = torch.compile(model.forward, backend=backend, fullgraph=True, dynamic=False)  # type: ignore[method-assign]
    _, found, compiled = backward(model, batch)
    torch.testing.assert_close(found, losses, rtol=1e-5, atol=1e-5)
    assert_same(compiled, expected)
