"""score.py: lines of text in, pseudo-log-likelihoods in their order out; what is refused."""

from __future__ import annotations

import csv
import io
import json
import shlex
from types import SimpleNamespace

import pytest
import torch
from shared_fixtures import LENGTH
from transformers import AutoTokenizer, ElectraForPreTraining

from electra_composer import score
from electra_composer.checkpoints.weights import read_checkpoint
from electra_composer.config import PretrainConfig
from electra_composer.config_loading import load_config
from electra_composer.model.weight_maps import discriminator_to_transformers, transformers_config
from electra_composer.pretrain import describe_run
from electra_composer.pretrain import main as pretrain

LINES = ["ba da fi", "", "ko lu [MASK] ba", "so", "ba da fi", "mi na pe re ti bu gu xx", " \t", "ra"]


@pytest.fixture(scope="module")
def runs(write_tiny_yaml, tmp_path_factory):
    """Folders of tiny runs, by kind."""
    folder = tmp_path_factory.mktemp("runs")
    tiny = str(write_tiny_yaml(folder))
    few = ["trainer.max_duration=2ba", "schedule.warmup=1ba", "trainer.eval_interval=2ba", "checkpoints.milestones=[]"]
    for kind in ("electric", "mlm", "electra"):
        pretrain(
            load_config(tiny, [*few, f"objective.kind={kind}", f"checkpoints.folder={folder / kind}"], PretrainConfig)
        )
    return {kind: str(folder / kind) for kind in ("electric", "mlm", "electra")}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("".join(f"{line}\n" for line in LINES))
    return path


@pytest.fixture
def call(capsys):
    """`call(*arguments)`: the records of stdout."""

    def run_program(*arguments):
        capsys.readouterr()
        score.main([*map(str, arguments), "--device", "cpu"])
        return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]

    return run_program


@pytest.fixture
def refused(capsys):
    """`refused(*arguments)`: the error of a call, one line."""

    def run_program(*arguments):
        with pytest.raises(SystemExit) as caught:
            score.main([*map(str, arguments), "--device", "cpu"])
        assert caught.value.code == 2
        return next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))

    return run_program


@torch.no_grad()
def test_scores_of_a_run_are_those_of_its_exported_discriminator(runs, file, call):
    """The same network in transformers, with the run's tokenizer, one line at a time; several blocks and batches."""
    checkpoint = read_checkpoint(runs["electric"])
    config, tokenizer = checkpoint.discriminator, checkpoint.tokenizer
    theirs = ElectraForPreTraining(transformers_config(config, tokenizer.pad_token_id)).eval()
    theirs.load_state_dict(discriminator_to_transformers(checkpoint.state, config))
    found = call(runs["electric"], file, "--batch-size", 3, "--tokens")
    assert [record["text"] for record in found] == LINES
    for line, record in zip(LINES, found, strict=True):
        ids = tokenizer(line, return_tensors="pt", split_special_tokens=True)["input_ids"]
        scores = -theirs(ids).logits[0, 1:-1]
        assert record["tokens"] == len(scores)
        assert record["score"] == pytest.approx(float(scores.sum()), rel=1e-4, abs=1e-5)
        assert [token for token, _ in record["token_scores"]] == tokenizer.convert_ids_to_tokens(ids[0, 1:-1].tolist())
        assert [each for _, each in record["token_scores"]] == pytest.approx(scores.tolist(), rel=1e-4, abs=1e-5)
        if len(scores):
            assert record["score_per_token"] == pytest.approx(record["score"] / record["tokens"])


@pytest.mark.parametrize("kind", ["electric", "mlm"])
def test_a_line_has_its_score_whatever_stands_beside_it(runs, file, call, monkeypatch, kind):
    """In other batches, in the reverse order, alone, and from stdin."""
    monkeypatch.setattr(score, "BLOCK", 3)
    found = call(runs[kind], file)
    assert (found[1]["score"], found[1]["tokens"], found[1]["score_per_token"]) == (0.0, 0, None)
    assert found[6] == {"text": " \t", "score": 0.0, "tokens": 0, "score_per_token": None}
    assert found[0]["score"] == pytest.approx(found[4]["score"], abs=1e-4)
    file.write_text("\r\n".join(reversed(LINES)))
    monkeypatch.setattr(score, "BLOCK", 4096)
    back = call(runs[kind], file, "--batch-size", 2)
    assert [record["text"] for record in back] == LINES[::-1]
    scores = [record["score"] for record in found]
    assert [record["score"] for record in reversed(back)] == pytest.approx(scores, rel=1e-4, abs=1e-4)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(f"{LINES[5]}\n".encode())))
    (alone,) = call(runs[kind])
    assert alone["score"] == pytest.approx(scores[5], rel=1e-4, abs=1e-4)
    assert len({round(each, 3) for each in scores}) > 4


def test_output_files(runs, file, call, tmp_path):
    assert call(runs["mlm"], file, "--output", tmp_path / "scores.jsonl") == []
    lines = (tmp_path / "scores.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == LINES
    call(runs["mlm"], file, "--output", tmp_path / "scores.tsv", "--tokens")
    with open(tmp_path / "scores.tsv", newline="") as found:
        rows = list(csv.DictReader(found, delimiter="\t"))
    assert [float(row["score"]) for row in rows] == [json.loads(line)["score"] for line in lines]
    assert [len(json.loads(row["token_scores"])) for row in rows] == [json.loads(line)["tokens"] for line in lines]


def test_a_long_line_is_refused_or_truncated(runs, call, refused, tmp_path):
    """The maximum is that of the run's rows, not of the positions of its embeddings, of which there are more."""
    most, out = LENGTH - 2, tmp_path / "out.jsonl"
    words = [("ba", "da", "fi")[number % 3] for number in range(most + 1)]
    tokenizer = AutoTokenizer.from_pretrained(read_tokenizer(runs["mlm"], tmp_path))
    assert len(tokenizer.tokenize(" ".join(words))) == most + 1
    path = tmp_path / "long.txt"
    path.write_text(f"so\n{' '.join(words[:-1])}\n{' '.join(words)}\n")
    message = refused(runs["mlm"], path, "--output", out)
    assert f"{path}:3: has {most + 1} tokens; expected at most {most}" in message
    assert not out.exists()
    _, whole, cut = call(runs["mlm"], path, "--truncate", "--tokens")
    assert whole["tokens"] == cut["tokens"] == len(cut["token_scores"]) == most
    assert cut["score"] == pytest.approx(whole["score"], rel=1e-4)
    assert cut["text"] == " ".join(words)


@pytest.mark.parametrize("kind", ["electric", "mlm", "electra"])
def test_a_run_ends_with_the_command_if_it_can_score(runs, tiny_yaml, kind):
    config = load_config(str(tiny_yaml), [f"objective.kind={kind}", f"checkpoints.folder={runs[kind]}"], PretrainConfig)
    commands = [shlex.split(line) for line in describe_run(config).splitlines() if "score.py" in line]
    assert len(commands) == (kind != "electra")
    for command in commands:
        options = score.parse(command[2:])
        assert (options.checkpoint, options.file, options.output) == (runs[kind], "sentences.txt", "scores.jsonl")


def read_tokenizer(run, folder):
    read_checkpoint(run).tokenizer.save_pretrained(folder / "tokenizer")
    return folder / "tokenizer"


def test_bad_input(runs, refused, tmp_path, monkeypatch):
    message = refused(runs["electra"], tmp_path / "no.txt")
    assert "a run with objective.kind=electra" in message
    assert "expected one with objective.kind=electric or objective.kind=mlm" in message
    assert "no.txt: cannot be read" in refused(runs["mlm"], tmp_path / "no.txt")
    assert "no such file or folder; expected a checkpoint" in refused(tmp_path / "no.pt", tmp_path / "no.txt")
    path = tmp_path / "bad.txt"
    path.write_bytes(b"ba da\n\xff\n")
    assert f"{path}:2: not UTF-8" in refused(runs["mlm"], path, "--output", tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
    path.write_text("a text\n")
    assert f"{path}: a text file; expected a checkpoint" in refused(path, path)
    path.write_text("")
    assert f"{path}: no rows; expected at least one" in refused(runs["mlm"], path, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"")))
    assert "stdin: no rows; expected one text per line" in refused(runs["mlm"])
    assert "--batch-size" in refused(runs["mlm"], path, "--batch-size", "0")
