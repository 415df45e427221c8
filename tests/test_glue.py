"""Finetuning end to end on tiny data, and the classifier."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from composer.utils import reproducibility
from glue_tiny import settings, write_data, write_source
from tiny import ROOT
from transformers import ElectraForPreTraining, ElectraModel

from electra_composer import glue
from electra_composer.checkpoints.weights import load_source
from electra_composer.config import GlueConfig, GlueModelConfig
from electra_composer.config_loading import load_config
from electra_composer.errors import UserError
from electra_composer.finetune.data import encode, encode_split
from electra_composer.finetune.files import Example
from electra_composer.finetune.loader import build_loader, collate
from electra_composer.finetune.model import build_classifier
from electra_composer.finetune.one_run import config_of_task
from electra_composer.finetune.tasks import TASKS, Task
from electra_composer.training import devices
from electra_composer.training.builders import build_optimizer


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_data(tmp_path_factory.mktemp("glue"))


@pytest.fixture
def make_config(source: str, data: str, tmp_path: Path) -> Callable[..., GlueConfig]:
    def make(*overrides: str) -> GlueConfig:
        return load_config(
            str(ROOT / "yamls" / "glue.yaml"), [*settings(source, data, tmp_path), *overrides], GlueConfig
        )

    return make


def test_two_tasks_and_seeds_from_files_to_table(
    make_config: Callable[..., GlueConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config("tasks=[SST-2, stsb]", "seeds=[1, 2]", "trainer.max_duration=1ep")
    results = glue.main(config)
    assert results == json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["failures"] == []
    assert list(results["tasks"]) == ["sst2", "stsb"]
    sst2, stsb = results["tasks"]["sst2"], results["tasks"]["stsb"]
    assert [run["seed"] for run in sst2["runs"]] == [1, 2]
    scores = [run["score"] for run in sst2["runs"]]
    assert all(run["score"] == run["metrics"]["accuracy"] for run in sst2["runs"])
    # Accuracy × 100 over 23 examples, each counted once.
    assert all(score * 23 / 100 == pytest.approx(round(score * 23 / 100), abs=1e-3) for score in scores)
    assert sst2["mean"] == pytest.approx(sum(scores) / 2)
    assert sst2["std"] == pytest.approx(abs(scores[0] - scores[1]) / math.sqrt(2))
    assert [run["steps"] for run in sst2["runs"]] == [8, 8]
    assert [(run["train_examples"], run["steps"]) for run in stsb["runs"]] == [(128, 16), (128, 16)]  # swapped too
    assert set(stsb["runs"][0]["metrics"]) == {"spearman", "pearson"}
    out = capsys.readouterr().out
    assert "0 of 4 runs done" in out
    assert "STS-B, seed 2: 128 training, 23 dev examples" in out
    assert out.index("STS-B, seed 1") < out.index("SST-2, seed 1")  # longest first
    assert re.search(r"stsb-seed1: .* in \d+ s; 1 of 4 runs done, about \d+ s left", out)
    assert "4 of 4 runs done\n" in out
    assert (tmp_path / "run" / "results.md").read_text() in out


def test_finetuning_learns_what_can_be_learnt(make_config: Callable[..., GlueConfig]) -> None:
    config = make_config(
        "trainer.max_duration=20ep", "optimizer.lr=5e-3", "optimizer.layerwise_decay=null", "model.dropout=0.0"
    )
    assert glue.main(config)["tasks"]["sst2"]["mean"] > 85


def test_same_seed_same_score_and_epochs_of_the_task(make_config: Callable[..., GlueConfig], tmp_path: Path) -> None:
    first = glue.main(make_config("trainer.max_duration=null"))["tasks"]["sst2"]["runs"][0]
    again = make_config("trainer.max_duration=null", f"results={tmp_path}/again.json")
    second = glue.main(again)["tasks"]["sst2"]["runs"][0]
    assert first["metrics"] == second["metrics"]
    assert first["steps"] == 3 * 8  # three epochs of 64 examples in batches of 8


def test_autocast_on_the_cpu_runs(make_config: Callable[..., GlueConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "cpu_multiplies_bfloat16", lambda: True)  # slowly, where it does not
    assert 0 <= glue.main(make_config("trainer.precision=amp_bf16"))["tasks"]["sst2"]["mean"] <= 100


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the runs that are begun, in their order; seed 3 fails, seed 4 is interrupted."""
    names: list[str] = []
    finetune = glue.finetune

    def counted(config: Any, source: Any, run: Any, *rest: Any) -> dict[str, Any]:
        names.append(run.name)
        if run.seed == 3:
            raise RuntimeError("CUDA out of memory")
        if run.seed == 4:
            raise KeyboardInterrupt
        return finetune(config, source, run, *rest)

    monkeypatch.setattr(glue, "finetune", counted)
    return names


def test_a_later_start_does_what_is_missing(make_config: Callable[..., GlueConfig], trained: list[str]) -> None:
    before = glue.main(make_config())
    with pytest.raises(KeyboardInterrupt):
        glue.main(make_config("seeds=[1, 2, 4]"))
    assert trained == ["sst2-seed1", "sst2-seed2", "sst2-seed4"]
    after = glue.main(make_config("seeds=[1, 2]"))
    assert trained == ["sst2-seed1", "sst2-seed2", "sst2-seed4"]  # nothing more: the runs before it were kept
    assert after["tasks"]["sst2"]["runs"][0] == before["tasks"]["sst2"]["runs"][0]
    assert [run["seed"] for run in after["tasks"]["sst2"]["runs"]] == [1, 2]


def test_a_failed_run_is_reported_and_the_others_go_on(
    make_config: Callable[..., GlueConfig], trained: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for start in (1, 2):
        with pytest.raises(SystemExit) as exit_:
            glue.main(make_config("seeds=[3, 5]"))
        assert exit_.value.code == 1
        assert trained.count("sst2-seed3") == start  # tried once a start
    assert trained.count("sst2-seed5") == 1
    assert "1 runs failed; the same command tries them again:\n  sst2-seed3: RuntimeError: CUDA out of memory" in (
        capsys.readouterr().err
    )
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [run["seed"] for run in results["tasks"]["sst2"]["runs"]] == [5]
    assert [failure["seed"] for failure in results["failures"]] == [3]


def test_another_setting_is_another_group_and_never_mixed(
    make_config: Callable[..., GlueConfig], trained: list[str], tmp_path: Path
) -> None:
    glue.main(make_config())
    after = glue.main(make_config("optimizer.lr=1e-3"))
    assert trained == ["sst2-seed1"] * 2
    assert after["tasks"]["sst2"]["n"] == 1
    (other,) = after["other_groups"]
    assert other["differs"] == {"optimizer.lr": [2e-3, 1e-3]}
    with pytest.raises(UserError, match=r"checkpoints\.resume is false"):
        glue.main(make_config("checkpoints.resume=false"))
    glue.main(make_config("checkpoints.overwrite=true"))
    assert trained == ["sst2-seed1"] * 3


def test_scores_of_every_epoch_are_kept(make_config: Callable[..., GlueConfig]) -> None:
    run = glue.main(make_config())["tasks"]["sst2"]["runs"][0]
    assert [(epoch["epoch"], epoch["step"]) for epoch in run["epochs"]] == [(1, 8), (2, 16)]
    assert run["epochs"][-1]["metrics"] == run["metrics"]
    assert run["collapsed"] in (False, True)


def test_a_model_that_gives_one_answer_has_collapsed(make_config: Callable[..., GlueConfig], source: str) -> None:
    """After steps of a rate far too high, unclipped, the input no longer matters."""
    learnt = glue.main(make_config("trainer.max_duration=20ep", "optimizer.lr=5e-3", "model.dropout=0.0"))
    assert learnt["tasks"]["sst2"]["collapsed"] == 0
    dead = glue.main(make_config("optimizer.lr=3.0", "optimizer.layerwise_decay=null", "trainer.gradient_clip=null"))
    assert dead["tasks"]["sst2"]["collapsed"] == 1
    assert dead["tasks"]["sst2"]["runs"][0]["collapsed"] is True


@pytest.mark.parametrize(
    ("name", "predictions", "constant"),
    [
        ("sst2", [[1, 1], [1]], True),
        ("sst2", [[1, 1], [0]], False),
        ("stsb", [[0.5, 0.5004], [0.5001]], True),  # of 0…1
        ("stsb", [[0.5, 0.5004], [0.52]], False),
    ],
)
def test_one_answer_to_all_is_a_collapse(
    source: str, name: str, predictions: list[list[float]], constant: bool
) -> None:
    model = build_classifier(load_source(source), TASKS[name], GlueModelConfig(source=source))
    metric = model.get_metrics(is_train=False)["collapsed"]
    for batch in predictions:
        metric.update(torch.tensor(batch), torch.zeros(len(batch)))
    assert bool(metric.compute()) is constant


def test_settings_of_one_task(make_config: Callable[..., GlueConfig]) -> None:
    config = make_config(
        "tasks=[sst2, stsb]",
        "trainer.max_duration=1ep",
        "task_settings.STS-B.epochs=2",
        "task_settings.STS-B.batch_size=16",
        "double_unordered=false",
    )
    results = glue.main(config)
    assert [(run["train_examples"], run["steps"]) for run in results["tasks"]["stsb"]["runs"]] == [(64, 8)]
    assert [(run["train_examples"], run["steps"]) for run in results["tasks"]["sst2"]["runs"]] == [(64, 8)]
    mine = config_of_task(
        make_config("task_settings={sst2: {lr: 1e-5, layerwise_decay: 1.0, warmup: 3ba}}"), TASKS["sst2"]
    )
    assert (mine.optimizer.lr, mine.optimizer.layerwise_decay, mine.schedule.warmup) == (1e-5, 1.0, "3ba")
    others = config_of_task(make_config("task_settings={sst2: {lr: 1e-5}}"), TASKS["stsb"])
    assert others.optimizer.lr == 2e-3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tasks=[sst-3]"], r"no task called 'sst-3'; did you mean sst2\?"),
        (["tasks=[]"], "tasks is empty"),
        (["seeds=[1, 1]"], "seeds is .*different"),
        (["max_train_examples=0"], "max_train_examples is 0"),
        (["data.path=/nowhere"], "/nowhere: no such folder"),
        (["tasks=[sst2, cola]"], "CoLA/train.tsv: no such file"),
        (["data.max_seq_length=64"], "max_seq_length is 64, but .* has 32 positions"),
        (["checkpoints.load_path=x.pt"], "what is finetuned is model.source"),
        (["trainer.fsdp={}"], "a finetuning run has one device"),
        (["trainer.precision=amp_fp16"], "trainer.precision"),
        (["trainer.eval_interval=0ba"], "nothing would be scored"),
        (["trainer.eval_batches=2"], "scores are of the whole dev set"),
        (["task_settings={sst3: {lr: 1.0}}"], r"task_settings.sst3: no such task; did you mean sst2\?"),
        (["task_settings={sst2: {lr: -1.0}}"], r"task_settings.sst2.lr is -1.0; expected a number above 0"),
        (["task_settings={sst2: {warmup: soon}}"], r"task_settings.sst2: .*warmup"),
        (["intermediate=true"], "add mnli to tasks"),
        (["tasks=[ax]"], "ax is predicted by the runs of mnli; add mnli"),
        (
            ["predict.enabled=true", "predict.select=worst"],
            r"predict.select is 'worst'; expected best, ensemble, .*\[1\]",
        ),
        (["predict.enabled=true"], "SST-2/test.tsv: no such file"),
    ],
)
def test_bad_input_is_one_line(
    make_config: Callable[..., GlueConfig], tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        glue.main(make_config(*overrides))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task_settings={sst2: {epoch: 3}}", r"task_settings.sst2.epoch; did you mean task_settings.sst2.epochs\?"),
        ("task_settings={sst2: {epochs: many}}", r"task_settings.sst2.epochs: .*many"),
        ("task_settings.sst2=3", "task_settings"),
        ("predict.selcet=best", r"did you mean predict.select\?"),
    ],
)
def test_settings_are_checked_strictly(make_config: Callable[..., GlueConfig], override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_config(override)


def test_the_classifier_is_transformers_body_and_one_linear_layer(source: str) -> None:
    task, pretrained = TASKS["stsb"], load_source(source)
    classifier = build_classifier(pretrained, task, GlueModelConfig(source=source)).eval()
    # Head: Xavier-uniform weight, zero bias (G, R).
    head = classifier.model.head
    assert head.weight.abs().max() <= math.sqrt(6 / (16 + 1))
    assert not head.bias.any()
    encoded = encode(task, [Example(("good film", "the plot is dull"), 1.0)], pretrained.tokenizer, 24)
    batch = collate([encoded[0]], pad_id=0)
    body = ElectraForPreTraining.from_pretrained(source).electra.eval()
    hidden = body(
        batch["input_ids"], attention_mask=batch["sequence_ids"], token_type_ids=batch["token_type_ids"]
    ).last_hidden_state
    expected = F.linear(hidden[:, 0], head.weight, head.bias)
    outputs = classifier(batch)
    torch.testing.assert_close(outputs, expected, atol=1e-5, rtol=1e-5)
    assert classifier.loss(outputs, batch).item() == pytest.approx((expected.item() - 0.2) ** 2, rel=1e-4)


def test_random_init_keeps_the_sizes_and_draws_new_weights(source: str) -> None:
    pretrained = load_source(source)
    config = GlueModelConfig(source=source, random_init=True, dropout=0.3)
    torch.manual_seed(1)
    first = build_classifier(pretrained, TASKS["sst2"], config)
    torch.manual_seed(2)
    second = build_classifier(pretrained, TASKS["sst2"], config)
    word = "embeddings.word.weight"
    states = [model.model.state_dict() for model in (first, second)]
    assert {name: tensor.shape for name, tensor in states[0].items() if not name.startswith("head.")} == {
        name: tensor.shape for name, tensor in pretrained.weights.items()
    }
    assert not torch.equal(states[0][word], pretrained.weights[word])
    assert not torch.equal(states[0][word], states[1][word])
    assert first.model.embeddings.dropout.p == first.model.encoder.layers[0].attention.dropout == 0.3


def test_weights_load_strictly(source: str) -> None:
    pretrained = load_source(source)
    name = "encoder.layers.1.up.weight"
    config = GlueModelConfig(source=source)
    fewer = dataclasses.replace(pretrained, weights={k: v for k, v in pretrained.weights.items() if k != name})
    more = dataclasses.replace(pretrained, weights={**pretrained.weights, "encoder.extra": torch.zeros(1)})
    other = dataclasses.replace(pretrained, weights={**pretrained.weights, name: torch.zeros(3, 3)})
    for wrong, message in ((fewer, name), (more, "encoder.extra"), (other, name)):
        with pytest.raises(UserError, match=message):
            build_classifier(wrong, TASKS["sst2"], config)


def test_learning_rates_of_the_recipe(make_config: Callable[..., GlueConfig], source: str) -> None:
    config = make_config("optimizer.lr=3e-4")
    classifier = build_classifier(load_source(source), TASKS["sst2"], config.model)
    optimizer = build_optimizer(config.optimizer, classifier)
    names = {parameter: name for name, parameter in classifier.named_parameters()}
    rates = {names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert all(group["weight_decay"] == 0 for group in optimizer.param_groups)
    assert rates["model.head.weight"] == pytest.approx(3e-4)
    assert rates["model.encoder.layers.1.up.weight"] == pytest.approx(3e-4 * 0.8**2)
    assert rates["model.encoder.layers.0.attention.qkv.weight"] == pytest.approx(3e-4 * 0.8**3)
    assert rates["model.encoder.project.weight"] == pytest.approx(3e-4 * 0.8**4)
    assert rates["model.embeddings.word.weight"] == pytest.approx(3e-4 * 0.8**4)
    assert config.optimizer.bias_correction is False
    assert config.trainer.gradient_clip == 1.0


def plain_losses(config: GlueConfig, task: Task, encoded: Any, steps: int) -> list[float]:
    """The recipe in plain PyTorch over transformers' body: AdamW without bias correction, layer by layer, clipped."""
    source = load_source(config.model.source)
    reproducibility.seed_all(1)
    head = build_classifier(source, task, config.model).model.head
    body = ElectraModel.from_pretrained(config.model.source, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    weight, bias = head.weight.detach().clone().requires_grad_(), head.bias.detach().clone().requires_grad_()
    layers = body.config.num_hidden_layers
    rates = {weight: 2e-3, bias: 2e-3}
    for name, parameter in body.named_parameters():
        layer = re.search(r"encoder\.layer\.(\d+)", name)
        depth = int(layer[1]) + 1 if layer else 0
        rates[parameter] = 2e-3 * 0.8 ** (layers + 2 - depth)
    moments = {parameter: (torch.zeros_like(parameter), torch.zeros_like(parameter)) for parameter in rates}
    spec = build_loader(encoded, source.tokenizer.pad_token_id, 8, 0, shuffle_seed=1)
    losses: list[float] = []
    for epoch in range(2):
        spec.dataloader.sampler.set_epoch(epoch)
        for batch in spec.dataloader:
            step, warmup = len(losses), 0.1 * steps
            hidden = body(
                batch["input_ids"], attention_mask=batch["sequence_ids"], token_type_ids=batch["token_type_ids"]
            ).last_hidden_state
            outputs = hidden[:, 0] @ weight.T + bias
            if task.is_regression:
                loss = ((outputs[:, 0] - batch["labels"]) ** 2).mean()
            else:
                loss = F.cross_entropy(outputs, batch["labels"])
            losses.append(loss.item())
            gradients = dict(zip(rates, torch.autograd.grad(loss, list(rates), allow_unused=True), strict=True))
            gradients = {parameter: gradient for parameter, gradient in gradients.items() if gradient is not None}
            norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
            scale = (1 - step / steps) * min(1.0, step / warmup)
            with torch.no_grad():
                for parameter, gradient in gradients.items():
                    gradient = gradient * min(1.0, 1.0 / (norm.item() + 1e-6))
                    first, second = moments[parameter]
                    first.mul_(0.9).add_(gradient, alpha=0.1)
                    second.mul_(0.999).add_(gradient**2, alpha=0.001)
                    parameter -= scale * rates[parameter] * first / (second.sqrt() + 1e-6)
    return losses


@pytest.mark.parametrize(("name", "steps"), [("sst2", 16), ("stsb", 32)])
def test_finetuning_equals_a_plain_loop_with_transformers_modules(
    make_config: Callable[..., GlueConfig], tmp_path: Path, name: str, steps: int
) -> None:
    """Batch by batch, over shuffled epochs, schedule, layerwise rates and clipping included."""
    config = make_config(
        f"tasks=[{name}]",
        "model.dropout=0.0",
        "model.classifier_dropout=0.0",
        "loggers.metrics_file.interval=1ba",
    )
    run = glue.main(config)["tasks"][name]["runs"][0]
    assert run["steps"] == steps
    (file,) = (tmp_path / "run").glob(f"*/{name}-seed1/metrics.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    ours = [row["loss/train/total"] for row in rows if "loss/train/total" in row]  # the last row is an evaluation
    tokenizer = load_source(config.model.source).tokenizer
    encoded = encode_split(TASKS[name], "train", config.data.path, tokenizer, 24)
    expected = plain_losses(config, TASKS[name], encoded, steps)
    assert ours == pytest.approx(expected, abs=1e-4)
    assert max(expected) - min(expected) > 0.01  # it has moved
