"""The GLUE classifier and its training recipe against transformers and plain PyTorch."""

from __future__ import annotations

import dataclasses
import functools
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
from finetuning_runs import glue_config
from glue_tiny import settings, write_data, write_source
from transformers import ElectraForPreTraining, ElectraModel

from electra_composer import glue
from electra_composer.checkpoints.weights import load_source
from electra_composer.errors import UserError
from electra_composer.finetuning.data import encode, encode_split
from electra_composer.finetuning.files import Example
from electra_composer.finetuning.loader import build_loader
from electra_composer.finetuning.model import build_classifier
from electra_composer.finetuning.tasks import TASKS, Task
from electra_composer.glue_config import GlueConfig, GlueModelConfig
from electra_composer.tasks.encoded import collate
from electra_composer.training.builders import build_optimizer


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_source(tmp_path_factory.mktemp("source"))


@pytest.fixture
def make_config(source: str, tmp_path: Path) -> Callable[..., GlueConfig]:
    return functools.partial(glue_config, *settings(source, write_data(tmp_path / "glue"), tmp_path))


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
    """Train transformers' body in plain PyTorch: AdamW without bias correction, layerwise rates, clipping."""
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
    """The losses of every batch over shuffled epochs, with schedule, layerwise rates and clipping."""
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
    assert max(expected) - min(expected) > 0.01  # the losses change
