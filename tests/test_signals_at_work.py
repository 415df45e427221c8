"""SIGINT and SIGTERM while programs work: one line that says what is kept, nothing unfinished left."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import programs
import psutil
import pytest
from glue_tiny import settings, write_data, write_source
from signalled import PACKAGE, catches_sigterm, has_exited, start, stop, wait_until
from tiny import ROOT

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
SIGINT, SIGTERM = signal.SIGINT, signal.SIGTERM


@pytest.fixture
def text(tmp_path) -> Path:
    rng = random.Random(0)
    path = tmp_path / "text.txt"
    words = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in "lmnr"]
    path.write_text("\n\n".join(" ".join(rng.choices(words, k=200)) for _ in range(4000)))
    return path


def convert_command(text: Path, folder: Path) -> list[Any]:
    options = ["--tokenizer", "train", "--vocab-size", "200", "--out", folder / "out", "--no-progress"]
    return [ROOT / "data_prep/convert_owt.py", "--source", text, "--workers", "2", *options]


@pytest.mark.parametrize(
    ("moment", "number", "group"),
    [("out.partial/plan.json", SIGINT, True), ("out.partial/unfinished", SIGTERM, False)],
)
def test_a_conversion_at_work(text, tmp_path, moment, number, group):
    process = start(convert_command(text, tmp_path), tmp_path, programs.Program)
    wait_until(process, lambda pid: (tmp_path / moment).exists())
    status, lines = stop(process, number, group)
    assert status == 128 + number
    assert lines == [f"stopped by {number.name}: nothing was kept"]
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_a_run_between_its_data_and_its_first_batch(tiny_yaml, tmp_path):
    command = [PACKAGE / "pretrain.py", tiny_yaml, "trainer.max_duration=100000ba"]
    process = start(command, tmp_path, programs.Program)
    wait_until(process, lambda pid: (tmp_path / "run/.lock").exists())
    files = " ".join(file.path for file in psutil.Process(process.pid).open_files())
    datasets = re.findall(r"_(\d{6,})\.owner", files)
    assert datasets
    status, lines = stop(process, SIGTERM, group=False)
    assert status == 143
    assert lines == ["stopped by SIGTERM"]
    assert not [number for number in datasets if os.path.exists(f"/dev/shm/{number}_locals")]
    assert not list((tmp_path / "run").glob("*.pt"))


def test_finetuning_before_its_first_batch(tmp_path):
    source, data = write_source(tmp_path / "source"), write_data(tmp_path / "data")
    command = [PACKAGE / "glue.py", ROOT / "yamls/glue.yaml", *settings(source, data, tmp_path)]
    process = start(command, tmp_path, programs.Program)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("attention")
    assert stop(process, SIGINT, group=True) == (130, ["stopped by SIGINT"])


@pytest.mark.parametrize("number", [SIGINT, SIGTERM])
def test_quickstart_ends_the_step_that_it_waits_for(tmp_path, number):
    """The step, a child of the tests' program server, prints the line."""
    for name in ("electra_composer", "data_prep", "yamls"):
        (tmp_path / name).symlink_to(ROOT / name)
    command = ["-m", "electra_composer.quickstart", "--smoke"]
    process = start(command, tmp_path, programs.Program, **{programs.WARM_CHILDREN: "1"})
    wait_until(process, lambda pid: (tmp_path / "runs/quickstart/shards.partial/plan.json").exists())
    status, lines = stop(process, number, group=False)
    assert status == 128 + number
    assert [line for line in lines if "B/s]" not in line] == ["stopped by SIGTERM: nothing was kept"]


# --- at twenty moments


def program_runs(tmp_path: Path, text: Path, run: Path, shards: Path) -> dict[str, list[Any]]:
    glue = settings(write_source(tmp_path / "source"), write_data(tmp_path / "data"), tmp_path)
    return {
        "glue": [PACKAGE / "glue.py", ROOT / "yamls/glue.yaml", *glue],
        "convert": convert_command(text, tmp_path),
        "export": [PACKAGE / "export.py", run, tmp_path / "export"],
        "preview": ["-m", "electra_composer.preview", shards, "--checkpoint", run],
        "pretrain": [PACKAGE / "pretrain.py", tmp_path / "tiny.yaml"],
    }


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ["pretrain", "glue", "convert", "export", "preview"])
def test_twenty_moments(tmp_path, tiny_yaml, text, shards, name):
    """Spread over the time of a whole run, both signals in turn, to the program and to its group.

    While a run trains there are two lines, and a run that has trained its last batch is complete (interrupts.py).
    """
    first = start([PACKAGE / "pretrain.py", tiny_yaml, "checkpoints.folder=first"], tmp_path)
    first.communicate()
    assert first.returncode == 0
    command = program_runs(tmp_path, text, tmp_path / "first", shards)[name]

    def clean() -> None:
        for folder in ("out", "export", "run"):
            shutil.rmtree(tmp_path / folder, ignore_errors=True)

    clean()
    begun = time.monotonic()
    start(command, tmp_path).communicate()
    total = time.monotonic() - begun
    moment = 0
    while moment < 20:
        clean()
        number, group = (SIGINT, SIGTERM)[moment % 2], moment % 4 > 1
        begun, process = time.monotonic(), start(command, tmp_path)
        wait_until(process, catches_sigterm)
        time.sleep(max(0, begun + total * moment / 20 - time.monotonic()))
        if has_exited(process):  # faster than those before, which shared the machine with others
            process.communicate()
            assert process.returncode == 0
            total *= moment / 20
            continue
        moment += 1
        status, lines = stop(process, number, group)
        lines = [line for line in lines if not line.startswith("the ")]  # advice on tiny models
        if lines and "stopping after this batch" in lines[0]:
            del lines[0]
            if status == 0:  # in the last batch
                continue
        assert status == 128 + number, (moment, lines)
        assert [line.partition(":")[0].partition(" after")[0] for line in lines] == [f"stopped by {number.name}"]
