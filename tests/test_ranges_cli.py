"""Numbers out of range on the command line of pretrain.py and glue.py: one line, status 2, and nothing is written."""

from __future__ import annotations

import runpy
import signal
import sys
from pathlib import Path

import glue_tiny
import programs
import pytest
from tiny import ROOT, files_of

PRETRAIN, GLUE = (str(ROOT / "electra_composer" / f"{name}.py") for name in ("pretrain", "glue"))

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A source to finetune, and the data of SST-2."""
    folder = tmp_path_factory.mktemp("glue")
    return glue_tiny.write_source(folder / "source"), glue_tiny.write_data(folder / "data")


NAMED = [
    *(f"optimizer.lr={value}" for value in ("1e400", "-1", "0", "nan", "abc")),
    *("trainer.max_duration=1e400ba", "trainer.max_duration=1e400ep", "schedule.warmup=1e400ba"),
    *("trainer.eval_interval=1e400ba", "checkpoints.interval=1e400ba", "trainer.log_interval=1e400ba"),
    *("objective.mask_prob=1e400", "objective.mask_prob=nan", "model.initializer_range=1e400"),
    *("model.initializer_range=-1", "seed=-1", "seed=99999999999999999999", "data.num_workers=-1"),
    *("trainer.gradient_clip=-1", "trainer.gradient_clip=0", "trainer.gradient_clip=1e400"),
    *("trainer.gradient_clip=nan", "optimizer.eps=1e400", "model.layer_norm_eps=1e400"),
    *("objective.temperature=1e400", "objective.disc_weight=1e400", "optimizer.weight_decay=1e400"),
    *("checkpoints.keep=-2", "data.download_timeout=nan", "trainer.eval_batches=0", "trainer.eval_batches=-1"),
    *("data.num_workers=100000", "model.num_layers=100000"),
]
NAMED_GLUE = [
    *("optimizer.lr=1e400", "task_settings.sst2.lr=1e400", "task_settings.sst2.warmup=1e400ba"),
    *("model.classifier_dropout=2", "model.dropout=nan", "seeds=[-1]", "max_train_examples=0", "results=/dev/full"),
]


@pytest.mark.parametrize("word", [*NAMED, *(f"glue {word}" for word in NAMED_GLUE)])
def test_a_number_out_of_range_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tiny_yaml: Path,
    source: tuple[str, str],
    tmp_path: Path,
    word: str,
) -> None:
    script, words = PRETRAIN, [str(tiny_yaml), word]
    if word.startswith("glue "):
        word = word.removeprefix("glue ")
        script, words = GLUE, [str(ROOT / "yamls" / "glue.yaml"), *glue_tiny.settings(*source, tmp_path), word]
    before = files_of(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, *words])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(script, run_name="__main__")
    assert exit_.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert word.partition("=")[0] in line
    assert files_of(tmp_path) == before


@pytest.mark.parametrize(
    ("script", "word"),
    [(PRETRAIN, "trainer.gradient_clip=-1"), (PRETRAIN, "data.num_workers=100000"), (GLUE, "seed=-1")],
)
def test_a_program_started_with_a_number_out_of_range(tiny_yaml: Path, tmp_path: Path, script: str, word: str) -> None:
    words = [tiny_yaml, word] if script == PRETRAIN else [ROOT / "yamls" / "glue.yaml", "model.source=x", word]
    done = programs.run([sys.executable, script, *map(str, words)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if " is untested (tested: " not in line]  # versions.py
    assert line.startswith(f"error: the command line: {word.partition('=')[0]} is ")
