"""Pretraining-step benchmark: comparable variants, correct counts, and report."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import BENCHMARKS

sys.path.insert(0, str(BENCHMARKS))  # as when they run as scripts

import agreement
import pretrain_step
import reference
import report
import workload

SIZES = ["--device=cpu", "--size=tiny", "--batch=2", "--vocab=199", "--segment=2", "--warmup=1", "--repeats=1"]
TINY = [*SIZES, "--skip-memory"]


@pytest.fixture
def packed(make_batch: Callable[..., Any]) -> dict[str, torch.Tensor]:
    """Three rows of 32 tokens: two examples and padding, one full example, three examples."""
    return make_batch([[(6, 5), (9, 0)], [(16, 16)], [(5, 0), (7, 4), (8, 8)]])


def test_unpacking_gives_each_example_a_row_of_its_own(packed: dict[str, torch.Tensor]) -> None:
    unpacked = reference.unpack(packed, pad_id=0)
    assert unpacked["attention_mask"].sum(1).tolist() == [11, 9, 32, 5, 11, 16]
    assert unpacked["input_ids"].shape == (6, 32)
    first, third = unpacked["input_ids"][1], unpacked["token_type_ids"][4]
    assert first[:9].tolist() == packed["input_ids"][0, 11:20].tolist()
    assert not first[9:].any()
    assert third.tolist() == [0] * 7 + [1] * 4 + [0] * 21


def test_reference_ties_what_the_recipe_ties(make_model: Callable[..., Any]) -> None:
    ours = make_model()
    theirs = reference.ReferenceElectra(ours)
    count = sum(parameter.numel() for parameter in theirs.parameters())
    padding = ours.embeddings.word.weight[99:].numel() + ours.mlm_head.bias[99:].numel()
    assert count == sum(parameter.numel() for parameter in ours.parameters()) - padding
    table = theirs.discriminator.electra.embeddings.word_embeddings.weight
    assert theirs.generator.generator_lm_head.weight is table


def test_reference_masks_15_percent_and_keeps_15_percent_of_these(make_model: Callable[..., Any]) -> None:
    theirs = reference.ReferenceElectra(make_model())
    input_ids = torch.randint(5, 99, (400, 500))
    input_ids[:, 0] = 2
    attention_mask = torch.ones_like(input_ids)
    attention_mask[:, 450:] = 0
    masked_ids, labels = theirs.mask(input_ids, attention_mask)
    is_masked = labels != reference.IGNORED
    assert not is_masked[:, 0].any()
    assert not is_masked[:, 450:].any()
    assert is_masked[:, 1:450].float().mean().item() == pytest.approx(0.15, abs=0.003)
    assert (masked_ids[is_masked] == 4).float().mean().item() == pytest.approx(0.85, abs=0.01)
    assert torch.equal(masked_ids[~is_masked], input_ids[~is_masked])
    assert torch.equal(labels[is_masked], input_ids[is_masked])


def test_reference_samples_the_softmax(make_model: Callable[..., Any]) -> None:
    theirs = reference.ReferenceElectra(make_model())
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.1])
    drawn = theirs.sample(probabilities.log().expand(40_000, 4))
    np.testing.assert_allclose(np.bincount(drawn.numpy()) / 40_000, probabilities.numpy(), atol=0.01)


def test_reference_flops_by_hand(make_model: Callable[..., Any]) -> None:
    """Two layers; generator width 16, discriminator 32, embeddings 16, vocabulary 99; 3 rows of 32 tokens."""
    theirs = reference.ReferenceElectra(make_model())
    tokens = 3 * 32
    generator = 2 * (4 * 16 * 16 + 2 * 16 * 64)  # no projection: embeddings are as wide
    discriminator = 2 * (4 * 32 * 32 + 2 * 32 * 128) + 16 * 32
    heads = (16 * 16 + 16 * 99) + (32 * 32 + 32)
    # Scores and values: two products of 32 × 32 × width multiply-adds per layer and row; two operations each.
    attention = 2 * 3 * (2 * 2 * 32 * 32 * 16) + 2 * 3 * (2 * 2 * 32 * 32 * 32)
    expected = 3 * (2 * tokens * (generator + discriminator + heads) + attention)
    assert reference.flops(theirs, rows=3, length=32) == expected


def test_reference_refuses_an_objective_it_does_not_compute(
    make_model: Callable[..., Any], tiny_objective_config: Callable[..., Any]
) -> None:
    with pytest.raises(ValueError, match="temperature 1"):
        reference.ReferenceElectra(make_model(objective=tiny_objective_config(temperature=2.0)))


@pytest.mark.parametrize("perturbed", ["generator.generator_lm_head.bias", "discriminator.electra.encoder.layer.0"])
def test_same_losses_on_shards_and_packed_rows_and_a_perturbed_weight_is_found(
    tmp_path: Path, shards: Path, packed: dict[str, torch.Tensor], perturbed: str
) -> None:
    options = pretrain_step.parse([*TINY, "--what", "a,b", "--data", str(shards)])
    setup = pretrain_step.set_up(options, tmp_path)
    ours = setup.ours()
    agreement.magnify(ours.model)
    theirs = reference.ReferenceElectra(ours.model)
    for batch in (setup.workload.batches(setup.config, 1)[0], packed):
        agreed = agreement.compare_losses(setup, ours, theirs, batch)
        agreed.check()
        assert agreed.relative_difference < 1e-5
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.startswith(perturbed):
                parameter += torch.randn_like(parameter)
    with pytest.raises(SystemExit, match=r"do not agree.*ours.*reference"):
        agreement.compare_losses(setup, ours, theirs, packed).check()


def test_program_ends_with_an_error_where_losses_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    right = reference.generator_to_transformers

    def wrong(*arguments: Any) -> dict[str, torch.Tensor]:
        return {name: tensor * 1.5 for name, tensor in right(*arguments).items()}

    monkeypatch.setattr(reference, "generator_to_transformers", wrong)
    with pytest.raises(SystemExit, match="do not agree") as ended:
        pretrain_step.main([*TINY, "--what", "a"])
    assert ended.value.code != 0


def test_agreement_does_not_take_nan_for_equal() -> None:
    nan = float("nan")
    for ours, theirs in ((nan, 1.0), (1.0, nan)):
        with pytest.raises(SystemExit):
            agreement.Agreement({"mlm": ours, "rtd": 1.0}, {"mlm": theirs, "rtd": 1.0}, 0.1).check()


def test_memory_of_one_variant(capsys: pytest.CaptureFixture[str]) -> None:
    pretrain_step.main([*TINY, "--batch", "8", "--vocab", "5000", "--memory-only", "b"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["bytes"]
    assert found is None or found >= 0


def test_summary_by_hand() -> None:
    seconds = {"a": [0.4, 0.5, 0.3], "b": [0.2, 0.2, 0.1], "c": [0.21], "d": [0.20]}
    batches = [{"sequence_ids": torch.tensor([[1, 1, 2, 0]])}]
    result = pretrain_step.summary(seconds, batches, {"a": 10.0, "b": 4.0}, {"a": 100, "b": 60})
    assert result["speedup"] == 2.0
    assert result["tokens_per_second"]["ours"] == 15
    assert result["step_ms"]["reference"] == {"median": 400.0, "min": 300.0, "steps": 3}
    assert result["trainer_overhead_percent"] == 5.0
    assert result["callbacks_cost_percent"] == 5.0
    assert result["memory_ratio"] == 0.6
    alone = pretrain_step.summary({"b": [0.1]}, batches, {"a": 10.0, "b": 4.0}, {})
    assert alone["speedup"] is alone["trainer_overhead_percent"] is alone["memory_ratio"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--what", "a,x"], "--what a,x: expected some of a,b,c,d"),
        (["--batch", "0"], "--batch is 0; expected at least 1"),
        (["--what", "a", "--profile"], "--profile profiles variants b and c"),
    ],
)
def test_bad_options(arguments: list[str], message: str) -> None:
    with pytest.raises(pretrain_step.UserError, match=message):
        pretrain_step.parse(arguments)


def test_shards_that_are_too_few_or_of_another_length(tmp_path: Path, shards: Path) -> None:
    options = pretrain_step.parse([*TINY, "--data", str(shards)])
    with pytest.raises(pretrain_step.UserError, match="expected at least"):
        workload.make_workload(options, tmp_path / "a", 32, rows=10**9)
    with pytest.raises(pretrain_step.UserError, match="rows of 32 tokens; expected 64"):
        workload.make_workload(options, tmp_path / "b", 64, rows=2)


MACHINE = {
    "date": "2026-01-02",
    "cpu": "Some CPU",
    "cores": 2,
    "gpu": None,
    "system": "Linux x86_64",
    "versions": {"torch": "2.7.0", "cuda": None},
}
STEP: dict[str, Any] = {
    "benchmark": "pretrain_step",
    "options": {
        **{"size": "small", "batch": 32, "data": "synthetic", "precision": "fp32", "compile": "false"},
        "overrides": ["trainer.attention=sdpa"],
    },
    "length": 128,
    "step_ms": {"reference": {"median": 2000.0, "min": 1}, "ours": {"median": 800.0, "min": 1}},
    "tokens_per_second": {"ours": 5120},
    "speedup": 2.5,
    "trainer_overhead_percent": None,
    "callbacks_cost_percent": None,
    "memory_ratio": 0.55,
    "mfu": None,
    "machine": MACHINE,
}


def test_report_of_two_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.jsonl"
    failure = {"benchmark": "failure", "part": "tests", "status": 124, "seconds": 30}
    path.write_text(f"{json.dumps(STEP)}\n\n{json.dumps(failure)}\n")
    report.main([str(path)])
    printed = capsys.readouterr().out
    assert printed.startswith("Some CPU, 2 cores, no GPU; Linux x86_64; torch 2.7.0; 2026-01-02.\n")
    measured = "2000.00 | 800.00 | – | – | 5,120 | 2.50 × | – | – | 0.55 × | –"
    settings = "compile=false trainer.attention=sdpa"
    assert f"| small | 32 × 128 | synthetic | fp32 | {settings} | {measured} |" in printed
    assert "| tests | 124 | 30 |" in printed


@pytest.mark.parametrize("text", ["no json", '{"benchmark": "other"}', "[1]"])
def test_report_refuses_other_lines(tmp_path: Path, text: str) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(text)
    with pytest.raises(report.UserError, match=r"results\.jsonl"):
        report.main([str(path)])
