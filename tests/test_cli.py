"""Bad input as a person meets it: the scripts run by their command line.

Each case ends with a non-zero exit and one line on stderr that says what was wrong, what was expected or what to do; no
traceback, and no file that was not there before. All run in this process but the last few, which start a new one.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import ROOT, TINY_YAML, files_of

PRETRAIN, GLUE, EXPORT = (f"electra_composer/{name}.py" for name in ("pretrain", "glue", "export"))
CONVERT = "data_prep/convert_owt.py"

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def refused(monkeypatch, capfd, tmp_path) -> Callable[..., str]:
    """`refused(script, *arguments)` → the one line that it ends with; it must leave `tmp_path` as it was."""

    def run(script: str, *arguments: str) -> str:
        before = files_of(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(ROOT / script), *map(str, arguments)])
        monkeypatch.setattr("electra_composer.program.begin", lambda: None)  # installs handlers in this process
        monkeypatch.setattr(sys, "path", list(sys.path))
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        line = one_line(capfd.readouterr().err)
        assert exit_.value.code == 2
        assert files_of(tmp_path) == before
        return line

    return run


def one_line(stderr: str) -> str:
    (line,) = stderr.splitlines()
    assert line.startswith("error: ")
    return line


def mentions(line: str, *words: str) -> None:
    for word in words:
        assert word in line, f"{word!r} is not in {line!r}"


# --- the converter


@pytest.fixture
def vocab(tmp_path) -> str:
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]) + "\n")
    return str(path)


def convert_arguments(tmp_path, vocab, source) -> list[str]:
    options = ["--tokenizer", vocab, "--out", str(tmp_path / "out"), "--max-seq-length", "32"]
    return ["--source", str(source), *options, "--workers", "1", "--no-progress"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", ("no text in", "empty.txt", "expected at least one document")),
        ("blank.txt", b"\n \n\n\t\n", ("no text in", "blank.txt", "expected at least one document")),
        ("empty.jsonl", b"", ("no text in", "empty.jsonl", "expected at least one document")),
        ("damaged.parquet", b"PAR1 and no more", ("damaged.parquet", "cannot be read")),
        ("empty.parquet", b"", ("empty.parquet", "cannot be read")),
        ("cut.jsonl", b'{"text": "a b"}\n{"text": "a', ("cut.jsonl", "2")),
        ("list.jsonl", b"[1, 2]\n", ("list.jsonl, line 1", "expected an object")),
        ("cut.txt.gz", b"\x1f\x8b\x08\x00", ("cut.txt.gz", "cannot be read")),
        ("notes.doc", b"a b", ("notes.doc", ".parquet")),
    ],
)
def test_sources_that_cannot_be_converted(refused, tmp_path, vocab, name, content, words):
    (tmp_path / name).write_bytes(content)
    mentions(refused(CONVERT, *convert_arguments(tmp_path, vocab, tmp_path / name)), *words)


def test_an_empty_folder_of_sources(refused, tmp_path, vocab):
    (tmp_path / "texts").mkdir()
    mentions(refused(CONVERT, *convert_arguments(tmp_path, vocab, tmp_path / "texts")), "texts", ".parquet")


# --- pretraining


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["data.path={tmp}/nothing"], ("nothing", "data_prep/convert_owt.py")),
        (["data.max_seq_length=16"], ("32", "16", "data.max_seq_length")),
        (["data.tokenizer={vocab}"], ("tokenizer", "7 entries", "SHA-256")),
        (["data.pth=x"], ("data.pth", "did you mean data.path?")),
        (["optimzer.lr=1"], ("optimzer", "did you mean optimizer?")),
        (["optimizer.lr=fast"], ("optimizer.lr", "fast")),
        (["trainer.global_train_batch_size=8.5"], ("trainer.global_train_batch_size", "8.5")),
        (["trainer.precision=fp8"], ("trainer.precision", "fp8", "amp_bf16")),
        (["trainer.global_train_batch_size=0"], ("trainer.global_train_batch_size is 0",)),
        (["trainer.global_train_batch_size=100000"], ("100,000 rows", "smaller batch size")),
        (["trainer.device_train_microbatch_size=9"], ("trainer.device_train_microbatch_size is 9", "1 to 8")),
        (["trainer.precision=amp_fp16", "trainer.device=cpu"], ("amp_fp16", "CPU", "trainer.precision=amp_bf16")),
        (["callbacks.speed_monitor.window_size=0"], ("callbacks.speed_monitor.window_size is 0",)),
        (["callbacks.memory_monitor.log_interval=0ba"], ("callbacks.memory_monitor", "log_interval")),
        (["trainer.log_interval=often"], ("log_interval", "often")),
        (["loggers.metrics_file.format=xls"], ("loggers.metrics_file", "xls", "jsonl or csv")),
        (["model.num_heads=5"], ("model.hidden_size 32", "5 heads")),
        (["checkpoints.load_path={vocab}"], ("vocab.txt", "checkpoint")),
        (["trainer.max_duration"], ("trainer.max_duration", "key=value")),
    ],
)
def test_pretraining_that_cannot_start(refused, tiny_yaml, tmp_path, vocab, arguments, words):
    arguments = [argument.format(tmp=tmp_path, vocab=vocab) for argument in arguments]
    mentions(refused(PRETRAIN, tiny_yaml, *arguments), *words)


def test_a_value_that_is_missing(refused, tiny_yaml, tmp_path):
    path = tmp_path / "missing.yaml"
    path.write_text(tiny_yaml.read_text().replace("optimizer: {lr: 5.0e-3}", "optimizer: {}"))
    mentions(refused(PRETRAIN, path), "missing.yaml", "no value for optimizer.lr", "optimizer.lr=")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there(refused, tiny_yaml):
    mentions(refused(PRETRAIN, tiny_yaml, "trainer.device=gpu"), "trainer.device", "trainer.device=cpu")


@pytest.fixture(scope="session")
def trained(tmp_path_factory, shards) -> Path:
    """The folder of a run of two batches."""
    from electra_composer.config import PretrainConfig
    from electra_composer.config_loading import load_config
    from electra_composer.pretrain import main

    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.yaml").write_text(TINY_YAML.replace("SHARDS", str(shards)).replace("FOLDER", str(folder / "run")))
    overrides = ["trainer.max_duration=2ba", "schedule.warmup=1ba", "checkpoints.milestones=[1.0]"]
    main(load_config(str(folder / "tiny.yaml"), overrides, PretrainConfig))
    return folder / "run"


@pytest.fixture
def run_folder(trained, tmp_path) -> Path:
    """A copy of it, as `tiny_yaml`'s run."""
    shutil.copytree(trained, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


def test_resuming_with_a_model_of_other_sizes(refused, tiny_yaml, run_folder):
    line = refused(PRETRAIN, tiny_yaml, "model.hidden_size=64", "model.num_heads=2")
    mentions(
        line, "milestone-ba2-rank0.pt", "model.hidden_size=32", "model.hidden_size=64", "weights are of that model"
    )


def test_starting_anew_in_the_folder_of_a_run(refused, tiny_yaml, run_folder):
    line = refused(PRETRAIN, tiny_yaml, "checkpoints.resume=false")
    mentions(line, "checkpoints.resume=true", "checkpoints.overwrite=true", "checkpoints.folder")


def test_resuming_from_a_checkpoint_that_was_cut_and_there_is_no_other(refused, tiny_yaml, run_folder):
    checkpoint = run_folder / os.readlink(run_folder / "latest-rank0.pt")
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    mentions(
        refused(PRETRAIN, tiny_yaml),
        "milestone-ba2-rank0.pt",
        "not a complete checkpoint",
        "its end is missing",
        "no complete checkpoint before it",
    )


# --- finetuning


@pytest.fixture
def finetune(refused, run_folder, tmp_path) -> Callable[..., str]:
    """`finetune("key=value", …)` → the line of a finetuning of `run_folder` on SST-2 that is refused."""
    (tmp_path / "glue" / "SST-2").mkdir(parents=True)
    for part in ("train", "dev"):
        (tmp_path / "glue" / "SST-2" / f"{part}.tsv").write_text("sentence\tlabel\nba bo\t0\nbu bi\t1\n")

    def run(*overrides: str) -> str:
        defaults = [
            f"model.source={run_folder}/latest-rank0.pt",
            f"data.path={tmp_path}/glue",
            "data.max_seq_length=16",
            "data.num_workers=0",
            "tasks=[sst2]",
            "seeds=[1]",
            f"checkpoints.folder={tmp_path}/finetuned",
            "trainer.device=cpu",
            "trainer.precision=fp32",
            "trainer.progress_bar=false",
        ]
        return refused(GLUE, ROOT / "yamls/glue.yaml", *defaults, *overrides)

    return run


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("text\tlabel\nba bo\t0\n", ("sentence", "label")),
        ("sentence\nba bo\n", ("label",)),
        ("sentence\tlabel\nba bo\n", ("2",)),  # a line without its second column
        ("sentence\tlabel\nba bo\tmany\n", ("many",)),
        ("sentence\tlabel\n", ("no examples", "expected at least one")),
        ("", ("dev.tsv", "the file is empty")),
    ],
)
def test_tsv_files_with_missing_columns(finetune, tmp_path, text, words):
    (tmp_path / "glue" / "SST-2" / "dev.tsv").write_text(text)
    mentions(finetune(), "SST-2", "dev", *words)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.max_seq_length=64"], ("data.max_seq_length is 64", "40 positions")),
        (["data.path=nowhere"], ("nowhere", "no such folder")),
        (["tasks=[sst3]"], ("sst3", "did you mean sst2?")),
        (["tasks=[sst2, cola]"], ("CoLA/train.tsv",)),
        (["tasks=sst2"], ("tasks is 'sst2'", "list")),
        (["seeds=[one]"], ("seeds", "one")),
        (["model.source=nowhere"], ("nowhere", "checkpoint", "Hugging Face")),
        (["model.hidden_size=64"], ("model.hidden_size",)),
        (["trainer.device_train_microbatch_size=100"], ("trainer.device_train_microbatch_size is 100", "1 to 32")),
        (["trainer.global_train_batch_size=0"], ("trainer.global_train_batch_size is 0",)),
        (["trainer.precision=amp_fp16"], ("amp_fp16", "trainer.precision=amp_bf16")),
        (["optimizer.layerwise_decay=2"], ("optimizer.layerwise_decay",)),
    ],
)
def test_finetuning_that_cannot_start(finetune, overrides, words):
    mentions(finetune(*overrides), *words)


def test_finetuning_a_checkpoint_whose_sizes_are_not_its_weights(finetune, run_folder):
    """Say, weights and configuration of two runs put together by hand."""
    path = run_folder / "latest-rank0.pt"
    content = torch.load(path, weights_only=False)
    content["state"]["callbacks"]["RunRecord"]["config"]["model"]["hidden_size"] = 64
    torch.save(content, run_folder / "mixed.pt")
    mentions(finetune(f"model.source={run_folder}/mixed.pt"), "mixed.pt", "[32", "[64")


def test_finetuning_a_hugging_face_folder_whose_sizes_are_not_its_weights(finetune, run_folder, tmp_path):
    from electra_composer.checkpoints.weights import read_checkpoint
    from electra_composer.export import export

    export(read_checkpoint(str(run_folder)), str(tmp_path / "exported"), False)
    config = tmp_path / "exported" / "discriminator" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "hidden_size": 64, "intermediate_size": 256}))
    line = finetune(f"model.source={tmp_path}/exported/discriminator")
    mentions(line, "exported/discriminator", "64")


# --- export


def test_exports_that_cannot_be(refused, run_folder, tmp_path):
    mentions(refused(EXPORT, tmp_path / "nothing.pt", tmp_path / "out"), "nothing.pt")
    (tmp_path / "there").mkdir()
    mentions(refused(EXPORT, run_folder, tmp_path / "there"), "there", "--overwrite")


# --- in a process of its own


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "words"),
    [(PRETRAIN, ("data_prep/convert_owt.py",)), (CONVERT, ("nothing.txt", "no such file"))],
)
def test_one_line_is_all_that_a_process_says(tiny_yaml, tmp_path, script, words):
    """Nothing that is imported on the way writes to stderr."""
    arguments = [tiny_yaml, f"data.path={tmp_path}/nothing"]
    if script == CONVERT:
        arguments = ["--source", tmp_path / "nothing.txt", "--out", tmp_path / "out"]
    before = files_of(tmp_path)
    done = subprocess.run(
        [sys.executable, ROOT / script, *arguments], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if " is untested (tested: " not in line]  # versions.py
    mentions(one_line("\n".join(lines)), *words)
    assert files_of(tmp_path) == before
