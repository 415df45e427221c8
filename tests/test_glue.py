"""Finetuning end to end on tiny data, the classifier, and the results file."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import ElectraConfig, ElectraForPreTraining, ElectraTokenizerFast

from electra_composer import glue
from electra_composer.builders import build_optimizer
from electra_composer.checkpoint import load_source
from electra_composer.config import GlueConfig, GlueModelConfig, load_config
from electra_composer.errors import UserError
from electra_composer.glue_data import Example, collate, encode
from electra_composer.glue_model import build_classifier
from electra_composer.glue_results import add_run, load_results, new_results, save_results, table
from electra_composer.glue_tasks import TASKS

ROOT = Path(__file__).resolve().parents[1]
WORDS = ["good", "bad", "film", "the", "a", "dull", "fine", "plot", "is", "was", "very", "and"]
ENTRIES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Hugging Face folder with a tiny discriminator."""
    folder = tmp_path_factory.mktemp("source")
    (folder / "vocab.txt").write_text("\n".join(ENTRIES) + "\n")
    ElectraTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = ElectraConfig(
        vocab_size=len(ENTRIES),
        embedding_size=8,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        initializer_range=0.2,  # so that so small a model can learn at all
    )
    ElectraForPreTraining(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """SST-2 whose label is whether `good` occurs, and STS-B whose score is how many words two sentences share."""
    folder = tmp_path_factory.mktemp("glue")
    rng = random.Random(0)
    sizes = {"train": 64, "dev": 23}
    for part, size in sizes.items():
        (folder / "SST-2").mkdir(exist_ok=True)
        (folder / "STS-B").mkdir(exist_ok=True)
        lines = ["sentence\tlabel"]
        for index in range(size):
            words = [rng.choice(WORDS[1:]) for _ in range(rng.randint(2, 9))]
            lines.append(" ".join(["good", *words] if index % 2 else words) + f" \t{index % 2}")
        (folder / "SST-2" / f"{part}.tsv").write_text("\n".join(lines) + "\n")
        lines = ["sentence1\tsentence2\tscore"]
        for _ in range(size):
            first, second = ([rng.choice(WORDS) for _ in range(5)] for _ in range(2))
            lines.append(f"{' '.join(first)}\t{' '.join(second)}\t{len(set(first) & set(second)):.3f}")
        (folder / "STS-B" / f"{part}.tsv").write_text("\n".join(lines) + "\n")
    return str(folder)


@pytest.fixture
def make_config(source: str, data: str, tmp_path: Path) -> Callable[..., GlueConfig]:
    def make(*overrides: str) -> GlueConfig:
        return load_config(
            str(ROOT / "yamls" / "glue.yaml"), [*settings(source, data, tmp_path), *overrides], GlueConfig
        )

    return make


def settings(source: str, data: str, folder: Path) -> list[str]:
    return [
        f"model.source={source}",
        f"data.path={data}",
        "data.max_seq_length=24",
        "data.num_workers=0",
        "tasks=[sst2]",
        "seeds=[1]",
        f"checkpoints.folder={folder}/run",
        f"results={folder}/run/results.json",
        "trainer.device=cpu",
        "trainer.precision=fp32",
        "trainer.global_train_batch_size=8",
        "trainer.progress_bar=false",
        "trainer.max_duration=2ep",
        "optimizer.lr=2e-3",
    ]


def test_two_tasks_and_seeds_from_files_to_table(
    make_config: Callable[..., GlueConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config("tasks=[SST-2, stsb]", "seeds=[1, 2]", "trainer.max_duration=1ep")
    results = glue.main(config)
    assert results == json.loads((tmp_path / "run" / "results.json").read_text())
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
    if stsb["mean"] is not None:
        assert results["average"] == pytest.approx((sst2["mean"] + stsb["mean"]) / 2)
    out = capsys.readouterr().out
    assert "run 4 of 4: STS-B, seed 2" in out
    assert table(results) in out
    assert table(results) in (tmp_path / "run" / "results.md").read_text()


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


def test_autocast_on_the_cpu_runs(make_config: Callable[..., GlueConfig]) -> None:
    assert 0 <= glue.main(make_config("trainer.precision=amp_bf16"))["tasks"]["sst2"]["mean"] <= 100


def test_a_later_start_does_what_is_missing(
    make_config: Callable[..., GlueConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = glue.main(make_config())
    trained = []
    finetune = glue.finetune

    def counted(config: Any, source: Any, task: Any, seed: int, *rest: Any) -> dict[str, Any]:
        trained.append((task.name, seed))
        if seed == 3:
            raise RuntimeError("killed")
        return finetune(config, source, task, seed, *rest)

    monkeypatch.setattr(glue, "finetune", counted)
    with pytest.raises(RuntimeError, match="killed"):
        glue.main(make_config("seeds=[1, 2, 3]"))
    assert trained == [("sst2", 2), ("sst2", 3)]
    after = glue.main(make_config("seeds=[1, 2]"))
    assert trained == [("sst2", 2), ("sst2", 3)]  # nothing more: the run before the failure was kept
    assert after["tasks"]["sst2"]["runs"][0] == before["tasks"]["sst2"]["runs"][0]
    assert [run["seed"] for run in after["tasks"]["sst2"]["runs"]] == [1, 2]


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
        (["trainer.fsdp={}"], "finetuning runs on DDP"),
        (["trainer.precision=amp_fp16"], "trainer.precision"),
        (["trainer.eval_interval=0ba"], "nothing would be scored"),
        (["trainer.eval_batches=2"], "scores are of the whole dev set"),
    ],
)
def test_bad_input_is_one_line(make_config: Callable[..., GlueConfig], overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        glue.main(make_config(*overrides))


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


def fake_results(config: GlueConfig, weights: str | None = "aa") -> dict[str, Any]:
    source = {"name": "a model", "random_init": False, "weights_sha256": weights, "vocabulary_sha256": "bb"}
    return new_results(config, source)


def test_results_of_other_settings_are_refused(make_config: Callable[..., GlueConfig]) -> None:
    config = make_config()
    results = fake_results(config)
    add_run(results, TASKS["sst2"], {"seed": 1, "metrics": {"accuracy": 50.0}})
    save_results(results, config.results)
    same = make_config("tasks=[sst2, stsb]", "seeds=[5]", "run_name=other", "trainer.log_interval=1ba")
    assert load_results(same, results["source"])["tasks"] == results["tasks"]
    with pytest.raises(UserError, match=r"optimizer.lr = 0.002, now it is 0.001; .*checkpoints.overwrite=true"):
        load_results(make_config("optimizer.lr=1e-3"), results["source"])
    with pytest.raises(UserError, match=r"weights_sha256 of model.source = aa, now it is cc"):
        load_results(config, fake_results(config, "cc")["source"])
    with pytest.raises(UserError, match=r"checkpoints\.resume is false"):
        load_results(make_config("checkpoints.resume=false"), results["source"])
    assert load_results(make_config("checkpoints.overwrite=true"), results["source"])["tasks"] == {}
    Path(config.results).write_text('{"tasks": 3}')
    with pytest.raises(UserError, match="is not a results file"):
        load_results(config, results["source"])


def test_table_and_summaries(make_config: Callable[..., GlueConfig]) -> None:
    results = fake_results(make_config())
    for seed, score in ((3, 90.0), (1, 80.0), (2, 82.0)):
        add_run(results, TASKS["sst2"], {"seed": seed, "metrics": {"accuracy": score}})
    add_run(results, TASKS["synthetic-words"], {"seed": 1, "metrics": {"accuracy": 99.0, "matthews": 98.0}})
    assert results["average"] == pytest.approx(84.0)  # what is synthetic stays out
    assert "Average" not in table(results)
    add_run(results, TASKS["cola"], {"seed": 1, "metrics": {"matthews": 40.0, "accuracy": 70.0}})
    assert results["average"] == pytest.approx((84.0 + 40.0) / 2)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table(results).split("\n")]
    std = f"{statistics.stdev([90, 80, 82]):.1f}"
    assert lines[3] == ["SST-2", "accuracy", f"84.0 ± {std}", "82.0", "90.0", "80.0 (1), 82.0 (2), 90.0 (3)"]
    assert [line[0] for line in lines[2:]] == ["CoLA", "SST-2", "synthetic-words", "Average"]
    assert lines[2][2] == lines[2][3] == "40.0"


def test_an_undefined_score_is_null_and_no_number(make_config: Callable[..., GlueConfig], tmp_path: Path) -> None:
    results = fake_results(make_config())
    add_run(results, TASKS["stsb"], {"seed": 1, "metrics": {"spearman": 80.0, "pearson": 81.0}})
    add_run(results, TASKS["stsb"], {"seed": 2, "metrics": {"spearman": math.nan, "pearson": math.nan}})
    path = tmp_path / "results.json"
    save_results(results, str(path))
    found = json.loads(path.read_text())["tasks"]["stsb"]
    assert found["runs"][1]["score"] is None
    assert found["mean"] is None
    assert "nan (2)" in table(results)


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_score_as_one(
    make_config: Callable[..., GlueConfig], source: str, data: str, tmp_path: Path
) -> None:
    """Same batches, every one of the 23 dev examples once: the same Pearson correlation as on one process."""
    extra = [
        "tasks=[stsb]",
        "trainer.max_duration=1ep",
        "trainer.device_eval_batch_size=4",
        "model.dropout=0.0",
        "model.classifier_dropout=0.0",
        "trainer.gradient_clip=null",
    ]
    alone = glue.main(make_config(*extra))["tasks"]["stsb"]["runs"][0]
    command = [
        str(Path(sys.executable).with_name("composer")),
        "-n",
        "2",
        str(ROOT / "electra_composer" / "glue.py"),
        str(ROOT / "yamls" / "glue.yaml"),
        *settings(source, data, tmp_path / "two"),
        *extra,
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("run 1 of 1") == 1
    both = json.loads((tmp_path / "two" / "run" / "results.json").read_text())["tasks"]["stsb"]["runs"][0]
    assert both["steps"] == alone["steps"]
    assert both["metrics"]["pearson"] == pytest.approx(alone["metrics"]["pearson"], abs=0.05)
    assert both["metrics"]["spearman"] == pytest.approx(alone["metrics"]["spearman"], abs=0.5)
