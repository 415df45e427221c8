"""The loss of a batch as a mean or a sum over its examples (`loss_reduction`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from composer.core import Callback, State
from composer.loggers import Logger
from finetuning_runs import SOURCE, glue_config
from glue_tiny import settings, write_data, write_source
from tiny import ROOT

from electra_composer.checkpoints.weights import load_source
from electra_composer.config_loading import load_config
from electra_composer.errors import UserError
from electra_composer.finetune_config import FinetuneConfig
from electra_composer.finetuning import one_run
from electra_composer.finetuning.data import encode_split
from electra_composer.finetuning.fit import fitted
from electra_composer.finetuning.results import group_of
from electra_composer.finetuning.settings import check_config
from electra_composer.finetuning.task_start import TaskJob, check_settings
from electra_composer.finetuning.tasks import TASKS
from electra_composer.glue_config import GlueConfig
from electra_composer.tasks.model import sum_losses
from electra_composer.training.startup import start

PARTS = ((slice(0, 4), 4), (slice(4, 6), 2))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("tiny")
    return write_source(folder / "source"), write_data(folder / "data")


@pytest.fixture
def make_config(tiny: tuple[str, str], tmp_path: Path) -> Callable[..., GlueConfig]:
    def make(*overrides: str) -> GlueConfig:
        overrides = (*settings(*tiny, tmp_path), *overrides)
        return load_config(str(ROOT / "yamls" / "glue.yaml"), list(overrides), GlueConfig)

    return make


class Gradients(Callback):
    """Keeps the gradients of the first batch and its loss."""

    def after_train_batch(self, state: State, logger: Logger) -> None:
        parameters = dict(state.model.named_parameters())
        self.kept = {name: value.grad.clone() for name, value in parameters.items() if value.grad is not None}


@pytest.mark.parametrize("task", ["sst2", "stsb"])
def test_a_summed_loss_is_the_sum_over_the_batch_however_it_is_split(
    make_config: Callable[..., GlueConfig], tiny: tuple[str, str], task: str
) -> None:
    """12 examples, also in microbatches of 5, 5 and 2."""
    source, given = load_source(tiny[0]), TASKS[task]
    rows = {name: encode_split(given, name, tiny[1], source.tokenizer, 24) for name in ("train", "dev")}
    found = {}
    for key in (("mean", "null"), ("sum", "null"), ("sum", "5")):
        overrides = (f"loss_reduction={key[0]}", f"trainer.device_train_microbatch_size={key[1]}")
        config = make_config(
            *overrides, "trainer.max_duration=1ba", "trainer.global_train_batch_size=12", "trainer.gradient_clip=null",
            "model.dropout=0.0", "model.classifier_dropout=0.0", "optimizer.lr=1e-12", "schedule.warmup=0ba",
        )  # fmt: skip
        start(config)
        torch.manual_seed(0)
        model, gradients = one_run.build_model(source, given, config), Gradients()
        with fitted(config, model, rows["train"], {"": rows["dev"]}, 0, "sdpa", [gradients]) as (trainer, _):
            loss = trainer.state.total_loss_dict["loss/train/total"]
        found[key] = loss, torch.cat([value.flatten() for _, value in sorted(gradients.kept.items())])
    mean, total, split = found.values()
    assert total[0] == pytest.approx(12 * mean[0], rel=1e-5)
    assert split[0] == pytest.approx(total[0], rel=1e-5)
    assert mean[1].norm() > 1e-3
    torch.testing.assert_close(total[1], 12 * mean[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(split[1], total[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_loss_is_torchs(tiny: tuple[str, str], make_config: Callable[..., GlueConfig], reduction: str) -> None:
    model = one_run.build_model(load_source(tiny[0]), TASKS["sst2"], make_config())
    outputs, labels = torch.randn(6, 2, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 1, 0, 1, 0])
    batch = {"labels": labels, "indices": torch.arange(6)}
    batch = sum_losses(batch) if reduction == "sum" else batch
    parts = [model.loss(outputs[part], {**batch, "labels": labels[part]}) * n / 6 for part, n in PARTS]
    expected = torch.nn.functional.cross_entropy(outputs, labels, reduction=reduction)
    assert sum(parts).item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_summed_loss_is_refused_where_the_loss_is_no_mean_over_examples(
    make_config: Callable[..., GlueConfig],
) -> None:
    check_config(make_config("tasks=[sst2]", "wnli=coreference", "loss_reduction=sum"))
    with pytest.raises(UserError, match=r"loss_reduction is sum, but the ranking loss of wnli=coreference is a mean"):
        check_config(make_config("tasks=[wnli]", "wnli=coreference", "loss_reduction=sum"))
    tagging = ["data.train=x.conll", "loss_reduction=sum"]
    job = TaskJob(load_config(str(ROOT / "yamls" / "tagging.yaml"), tagging, FinetuneConfig), check_only=True)
    with pytest.raises(UserError, match="loss_reduction is sum, but the loss of tagging is a mean over tokens"):
        check_settings(job)


def test_results_without_the_key_are_of_the_group_of_the_mean() -> None:
    """Settings of results of earlier versions, in tests/data, have no such key."""
    assert "loss_reduction" not in group_of(glue_config(), SOURCE)[1]
    assert group_of(glue_config("loss_reduction=mean"), SOURCE) == group_of(glue_config(), SOURCE)
    assert group_of(glue_config("loss_reduction=sum"), SOURCE)[1]["loss_reduction"] == "sum"
