"""What programs print: each prints the commands that come next, which run as they stand; stderr has its own lines."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys

import programs
import pytest
import yaml
from glue_tiny import write_data
from tiny import ROOT

from electra_composer.config import PretrainConfig
from electra_composer.config_loading import load_config
from electra_composer.glue_config import GlueConfig
from electra_composer.next_steps import describe_end, export, finetune, override, pretrain, preview

# Sizes for a machine without a GPU, in addition to the printed commands.
SMALL = shlex.split(
    "model.num_layers=1 model.hidden_size=32 model.num_heads=2 model.embedding_size=16 model.generator_size=0.5 "
    "trainer.max_duration=4ba trainer.global_train_batch_size=8 trainer.eval_interval=4ba schedule.warmup=1ba "
    "trainer.device_eval_batch_size=8 trainer.precision=fp32 trainer.log_interval=2ba trainer.device=cpu "
    "checkpoints.milestones=[1.0] checkpoints.interval=null"
)
SMALL_GLUE = shlex.split(
    "tasks=[sst2] seeds=[1] trainer.max_duration=1ep trainer.precision=fp32 trainer.device=cpu "
    "trainer.global_train_batch_size=8 data.cache=null"
)

# Lines that a program writes to stderr itself in a run without faults: progress bars, and advice on tiny models.
OWN = (
    r"",
    r"(reading text for the vocabulary|converting): .*B/s\]",
    r" *\d+\.\d% \d+/\d+(ba|ep)?.*",
    r"step \d+: .*",
    r"the (MLM loss on held-out text is|discriminator's) .*",
    r"warning: \d+% of the tokens were dropped.*",
)


def foreign(stderr: str) -> list[str]:
    """Lines of stderr that no program of ours has written."""
    lines = re.split(r"[\r\n]", stderr)
    return [line for line in lines if not any(re.fullmatch(own, line.rstrip()) for own in OWN)]


def commands_of(stdout: str) -> list[list[str]]:
    """The commands that a program printed at its end: indented, each after a line with a colon."""
    return [shlex.split(match) for match in re.findall(r"^[^\n]*:\n  (\S.*)$", stdout, re.M)]


def command(printed: list[list[str]], word: str) -> list[str]:
    (found,) = (each for each in printed if any(part.endswith(word) for part in each))
    return found


@pytest.mark.parametrize(
    "cold",
    [
        pytest.param(False, marks=pytest.mark.slow),
        pytest.param(True, marks=[pytest.mark.long, pytest.mark.timeout(600)]),  # noise of imports too
    ],
)
def test_each_program_prints_the_next_commands_and_nothing_foreign(tmp_path, cold):
    """From text to scores by copying what was printed, in a folder with a space in its name."""
    folder = tmp_path / "my files"
    folder.mkdir()
    words = [f"{a}{b}" for a in "bdfgk" for b in "aeiou"]
    text = "\n\n".join(" ".join(words[(i * j) % 25] for j in range(30)) for i in range(100))
    (folder / "text.txt").write_text(text)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(line: list[str], *more: str, advice: tuple[str, ...] = ()) -> list[list[str]]:
        interpreters = {"python": sys.executable, "composer": os.path.join(os.path.dirname(sys.executable), "composer")}
        start = subprocess.run if cold else programs.run
        words = [interpreters[line[0]], *line[1:], *more]
        done = start(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        assert set(foreign(done.stderr)) <= set(advice)
        assert "\n\n\n" not in done.stdout
        return commands_of(done.stdout)

    convert = f"python {ROOT}/data_prep/convert_owt.py --source text.txt --tokenizer train --vocab-size 100 --workers 1"
    printed = run(shlex.split(convert), "--out", "my shards", "--max-seq-length", "40", "--val-fraction", "0.2")
    run(command(printed, "preview"))
    printed = run(command(printed, "pretrain.py"), *SMALL, "model.max_positions=100")
    assert os.path.isdir(folder / command(printed, "tensorboard")[2])
    run(command(printed, "preview"))
    exported = run(command(printed, "export.py"))
    run(command(exported, "-c"), advice=("Device set to use cpu",))  # of transformers alone
    load_config(command(exported, "glue.py")[2], command(exported, "glue.py")[3:], GlueConfig)
    printed = run(command(printed, "glue.py"), *SMALL_GLUE, f"data.path={write_data(folder / 'glue')}")
    assert "data.max_seq_length=100" in command(exported, "glue.py")
    run(command(printed, "glue_report.py"))
    assert command(printed, "export.py")[2:] == ["runs/electra-small-my shards", "exports/electra-small-my shards"]


def test_a_sharded_run_prints_nothing_foreign(tiny_yaml):
    """Nor when it resumes with the other format of checkpoints."""
    command = [sys.executable, ROOT / "electra_composer/pretrain.py", tiny_yaml, "trainer.device=cpu"]
    for kind, duration in (("sharded", 2), ("full", 4)):
        overrides = [f"trainer.fsdp={{state_dict_type: {kind}}}", f"trainer.max_duration={duration}ba"]
        words = [*command, *overrides, "checkpoints.interval=2ba", "checkpoints.milestones=[]"]
        done = programs.run(words, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
        assert foreign(done.stderr) == []
        assert (tiny_yaml.parent / f"run/batch-{duration}").is_dir() == (kind == "sharded")


VALUES = ["data/owt", "/a", "a b", "1e-3", "null", "nan", "yes", "[x", "a: b", "~", "'", "007", ".5", "ü", "{a}", "#a"]


@pytest.mark.parametrize("value", VALUES)
def test_an_override_is_read_back(value):
    settings = [override("run_name", value), "data.path=x", "checkpoints.folder=y"]
    settings = shlex.split(shlex.join(settings))
    assert load_config(str(ROOT / "yamls/small.yaml"), settings, PretrainConfig).run_name == value


def test_what_the_yaml_says_is_not_repeated(monkeypatch):
    monkeypatch.chdir(ROOT)
    small = yaml.safe_load((ROOT / "yamls/small.yaml").read_text())
    glue = yaml.safe_load((ROOT / "yamls/glue.yaml").read_text())
    assert shlex.join(pretrain(small["data"]["path"], small["data"]["max_seq_length"], False)) == (
        "composer electra_composer/pretrain.py yamls/small.yaml"
    )
    assert shlex.join(finetune(glue["model"]["source"], small["run_name"], small["model"]["max_positions"])) == (
        "composer electra_composer/glue.py yamls/glue.yaml"
    )
    assert pretrain("s3://bucket/a", 512, True)[3:] == [
        *("data.remote=s3://bucket/a", "data.path=data/a", "run_name=electra-small-a", "data.max_seq_length=512")
    ]
    assert pretrain("data/long", 1024, False)[-1] == "model.max_positions=1024"


def test_a_command_whose_files_are_not_there_is_left_out(tmp_path):
    found = describe_end(
        {"here": "a", "not": None},
        {"gone": ["python", str(tmp_path / "gone.py")], "none": None, "preview": preview("x y")},
    )
    assert found == "here  a\npreview:\n  python -m electra_composer.preview 'x y'"


def test_without_the_repository_programs_are_called_by_name(monkeypatch, tmp_path):
    monkeypatch.setattr("electra_composer.shipped.REPOSITORY", tmp_path)  # as in an installed wheel
    assert shlex.join(pretrain("data/owt", 128, False)) == "electra pretrain small"
    assert shlex.join(finetune("runs/a", "a", 512)[:4]) == "electra glue glue model.source=runs/a"
    assert export("a", "b") == ["electra", "export", "a", "exports/b"]
    assert describe_end({}, {"export": export("a", "b")}) == "export:\n  electra export a exports/b"
