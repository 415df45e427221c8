"""Pretraining end to end on tiny shards: the files of a run, resuming, and refused input."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import programs
import pytest
import torch
from comparison import Kill, weights
from tiny import ROOT

from electra_composer.checkpoints.weights import load_source, read_checkpoint
from electra_composer.config import PretrainConfig
from electra_composer.config_loading import load_config
from electra_composer.errors import UserError
from electra_composer.export import export
from electra_composer.model.finetuning import ElectraForClassification
from electra_composer.pretrain import main
from electra_composer.training import devices
from electra_composer.training import trainer as trainer_module


@pytest.fixture
def make_config(tiny_yaml):
    """`make_config("key=value", …)` returns the configuration of a run in `tmp_path / "run"`."""

    def make(*overrides: str) -> PretrainConfig:
        return load_config(str(tiny_yaml), list(overrides), PretrainConfig)

    return make


def metrics(folder: Path, having: str = "loss/train/mlm") -> list[dict]:
    """Return the rows of the metrics file that have a metric. Row n has the loss of the batch after n batches."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if having in row]


def test_a_run_leaves_what_the_configuration_says(make_config, tmp_path):
    main(make_config())
    run = tmp_path / "run"
    milestones = {path.name for path in run.glob("milestone-*")}
    assert milestones == {f"milestone-ba{batch}-rank0.pt" for batch in (1, 2, 4, 8, 16)}
    assert len(list(run.glob("batch-*"))) == 1  # keep: 1
    assert "max_seq_length: 32" in (run / "config.yaml").read_text()
    assert (run / "tokenizer" / "vocab.txt").is_file()
    last = metrics(run, having="metrics/eval/rtd_auc")[-1]
    assert last["step"] == 16
    for name in ("mlm_loss", "mlm_accuracy", "sampled_accuracy", "rtd_loss", "rtd_accuracy", "replaced_share"):
        assert math.isfinite(last[f"metrics/train/{name}"]), name
        assert math.isfinite(last[f"metrics/eval/{name}"]), name
    for name in ("metrics/eval/rtd_auc", "throughput/tokens_per_sec", "time/remaining_estimate", "lr-AdamW/group0"):
        assert metrics(run, having=name), name
    first, *_, last = metrics(run)
    assert (first["step"], last["step"]) == (0, 15)
    assert last["loss/train/mlm"] < first["loss/train/mlm"]
    assert last["loss/train/total"] == pytest.approx(last["loss/train/mlm"] + 50 * last["loss/train/rtd"], rel=1e-5)


@pytest.mark.parametrize(
    ("workers", "draw"), [("auto", "exact"), ("0", "exact"), ("1", "exact"), ("auto", "bernoulli")]
)
def test_the_loss_of_every_batch_is_that_of_its_own_tokens(make_config, tmp_path, workers, draw):
    """The loss uses counts made on the host before the batch is split; the metrics count on the device, afterwards.

    A batch that is read before it is complete, memory that is written too early, a factor of another batch, or a batch
    counted twice would make them differ. Over two epochs, with microbatches and rows of very different fill.
    """
    overrides = ("trainer.device_train_microbatch_size=3", "trainer.max_duration=2ep", "trainer.eval_interval=2ep")
    overrides += (f"objective.mask_draw={draw}",)
    main(make_config(f"data.num_workers={workers}", "checkpoints.milestones=[1.0]", *overrides))
    losses = metrics(tmp_path / "run", having="loss/train/total")
    counted = metrics(tmp_path / "run", having="metrics/train/rtd_loss")
    assert len(losses) == len(counted) > 16
    for loss, of_tokens in zip(losses, counted, strict=True):
        assert loss["loss/train/mlm"] == pytest.approx(of_tokens["metrics/train/mlm_loss"], rel=1e-5)
        assert loss["loss/train/rtd"] == pytest.approx(of_tokens["metrics/train/rtd_loss"], rel=1e-5)
        expected = of_tokens["metrics/train/mlm_loss"] + 50 * of_tokens["metrics/train/rtd_loss"]
        assert loss["loss/train/total"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("how", ["objective.mask_draw=exact", "objective.mask_draw=bernoulli", "model.sharing=gdes"])
def test_a_killed_run_continues_as_if_nothing_had_happened(make_config, tmp_path, monkeypatch, how):
    uninterrupted = weights(main(make_config(f"checkpoints.folder={tmp_path / 'uninterrupted'}", how)))
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "build_callbacks", lambda config: [Kill(after=10)])
        with pytest.raises(KeyboardInterrupt):
            main(make_config(how))
    continued = main(make_config(how))
    assert continued.state.timestamp.batch.value == 16
    for name, tensor in weights(continued).items():
        assert torch.equal(tensor, uninterrupted[name]), name
    steps = [row["step"] for row in metrics(tmp_path / "run")]
    assert steps == list(range(16))


def test_checkpoint_export_and_finetuning_hold_the_same_weights(make_config, tmp_path):
    from transformers import AutoTokenizer, ElectraForMaskedLM, ElectraForPreTraining

    trainer = main(make_config())
    checkpoint = read_checkpoint(str(tmp_path / "run"))
    export(checkpoint, str(tmp_path / "export"))
    discriminator, loading = ElectraForPreTraining.from_pretrained(
        tmp_path / "export" / "discriminator", output_loading_info=True
    )
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    generator = ElectraForMaskedLM.from_pretrained(tmp_path / "export" / "generator")
    word = trainer.state.model.model.embeddings.word.weight[: checkpoint.discriminator.vocab_size]
    assert torch.equal(discriminator.electra.embeddings.word_embeddings.weight, word)
    # Tied after export: the generator's input and output table are one parameter, equal to the discriminator's table.
    assert generator.generator_lm_head.weight is generator.electra.embeddings.word_embeddings.weight
    assert torch.equal(generator.generator_lm_head.weight, word)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export" / "discriminator")
    assert tokenizer.get_vocab() == checkpoint.tokenizer.get_vocab()
    for source in (tmp_path / "run", tmp_path / "export" / "discriminator"):
        pretrained = load_source(str(source))
        classifier = ElectraForClassification(pretrained.encoder, 2)
        missing, unexpected = classifier.load_state_dict(pretrained.weights, strict=False)
        assert set(missing) == {"head.weight", "head.bias"}
        assert not unexpected
        assert torch.equal(classifier.embeddings.word.weight[: len(word)], word)
    with pytest.raises(UserError, match="exists already"):
        export(checkpoint, str(tmp_path / "export"))


def test_evaluation_interval_changes_nothing_in_training(make_config, tmp_path):
    often = weights(main(make_config("trainer.eval_interval=3ba", f"checkpoints.folder={tmp_path / 'often'}")))
    once = weights(main(make_config(f"checkpoints.folder={tmp_path / 'once'}")))
    assert all(torch.equal(often[name], once[name]) for name in once)


@pytest.mark.parametrize(
    "override",
    [
        "objective.sampling=gumbel",
        "objective.mask_draw=with_replacement",
        "objective.mask_style=bert",
        "objective.disallow_correct=true",
        "objective.temperature=2.0",
        "objective.mlm_label_smoothing=0.1",
        "objective.rtd_label_smoothing=0.1",
        "model.sharing=untied",
        "model.sharing=gdes",
        "optimizer.bias_correction=true",
        "schedule.name=linear",
        "schedule.name=one_cycle",
        "schedule.name=one_cycle_fastai",
        "schedule.name=constant",
        "trainer.precision=amp_bf16",
        "objective.masked_lm=chunked",
        "trainer.attention=sdpa",
        "trainer.device_train_microbatch_size=2",
        "trainer.gradient_clip=null",
    ],
)
def test_every_switch_trains(make_config, tmp_path, monkeypatch, override):
    monkeypatch.setattr(devices, "cpu_multiplies_bfloat16", lambda: True)  # slow where it does not
    trainer = main(make_config(override, "trainer.max_duration=6ba", "checkpoints.milestones=[1.0]"))
    rows = metrics(tmp_path / "run")
    assert trainer.state.timestamp.batch.value == 6
    assert rows[-1]["loss/train/mlm"] < rows[0]["loss/train/mlm"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.path=/nowhere"], "convert_owt.py"),
        (["data.max_seq_length=64", "model.max_positions=64"], "32.*64"),
        (["trainer.max_duration=null"], "trainer.max_duration"),
        (["trainer.max_duration=16xy"], "trainer.max_duration"),
        (["trainer.global_train_batch_size=0"], "global_train_batch_size"),
        (["trainer.global_train_batch_size=100000"], "rows"),
        (["trainer.device_train_microbatch_size=9"], "1 to 8"),
        (["trainer.device_train_microbatch_size=auto"], "auto"),
        (["trainer.device_train_microbatch_size=many"], "many"),
        (["trainer.device_eval_batch_size=0"], "device_eval_batch_size"),
        (["trainer.eval_interval=often"], "trainer.eval_interval"),
        (["trainer.precision=amp_fp16"], "amp_bf16"),
        (["trainer.attention=varlen"], "trainer.attention=auto"),
        (["trainer.compile=fast"], "reduce-overhead"),
        (["objective.masked_lm=triton"], "objective.masked_lm=chunked"),
        (["trainer.device=gpu"], "CUDA|gpu"),
        (["model.num_heads=3"], "multiple"),
        (["model.max_positions=16"], "max_positions"),
        (["objective.mask_prob=0.0"], "mask_prob"),
        (["optimizer.lr=-1"], "optimizer.lr"),
        (["schedule.warmup=100ba"], "warmup"),
        (["callbacks.speed_monitr={}"], "callbacks.speed_monitor"),
        (["loggers.metrics_file.pth=x"], "loggers.metrics_file.path"),
        (["checkpoints.interval=often"], "checkpoints.interval"),
        (["checkpoints.milestones=[2.0]"], "checkpoints.milestones"),
        (["checkpoints.load_path=/nowhere.pt"], "/nowhere.pt"),
        (["checkpoints.load_path=/"], "neither the folder of a run"),
    ],
)
def test_bad_input_is_one_clear_line(make_config, overrides, message):
    if "gpu" in overrides[0] and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(UserError, match=message):
        main(make_config(*overrides))


def test_shards_of_another_tokenizer_are_refused(make_config, tmp_path):
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]) + "\n")
    with pytest.raises(UserError, match=r"tokenizer.*7 entries"):
        main(make_config(f"data.tokenizer={vocab}"))


def test_a_run_starts_from_the_weights_of_another(make_config, tmp_path):
    first = main(make_config("trainer.max_duration=4ba", "checkpoints.milestones=[1.0]"))
    again = main(
        make_config(
            "trainer.max_duration=2ba",
            "optimizer.lr=1e-30",  # so that the weights do not change
            f"checkpoints.load_path={tmp_path / 'run'}",
            "checkpoints.load_weights_only=true",
            f"checkpoints.folder={tmp_path / 'next'}",
        )
    )
    assert again.state.timestamp.batch.value == 2
    for name, tensor in first.state.model.state_dict().items():
        torch.testing.assert_close(again.state.model.state_dict()[name], tensor, rtol=0, atol=1e-6)


def test_a_checkpoint_of_other_sizes_is_refused(make_config, tmp_path):
    main(make_config("trainer.max_duration=1ba", "schedule.warmup=1ba", "checkpoints.milestones=[1.0]"))
    with pytest.raises(
        UserError, match=r"was written with model\.hidden_size=\d+, but this start has model\.hidden_size=64"
    ):
        main(make_config("model.hidden_size=64"))
    other = f"checkpoints.folder={tmp_path / 'other'}"
    load = f"checkpoints.load_path={tmp_path / 'run' / 'latest-rank0.pt'}"
    with pytest.raises(
        UserError, match=r"latest-rank0\.pt was written with model\.num_layers=1, .*; set model\.num_layers=1$"
    ):
        main(make_config("model.num_layers=2", other, load))
    with pytest.raises(UserError, match="sizes under model"):
        main(make_config("model.num_layers=2", other, load, "checkpoints.load_weights_only=true"))
    with pytest.raises(UserError, match="holds the checkpoints of a run"):
        main(make_config("checkpoints.resume=false"))


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("pretrain", ["nothing.yaml"], "no such file"),
        ("glue", ["YAML", "optimizer.lrr=1"], "did you mean optimizer.lr?"),
    ],
)
def test_the_command_line_says_in_one_line_what_is_wrong_with_it(script, arguments, message):
    path = ROOT / "electra_composer" / f"{script}.py"
    yaml = path.parent.parent / "yamls" / "glue.yaml"
    arguments = [str(yaml) if argument == "YAML" else argument for argument in arguments]
    done = programs.run([sys.executable, str(path), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert message in line
