"""The script for a GPU machine: its parts and their order, failures, limits, and a rehearsal on the CPU."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pretrain_step
import pytest
import report
import user_runs
import workload
from tiny import BENCHMARKS

PARTS = ["tests", "small", "captured", "base", "convert", "same-seed", "pretrain", "glue"]


def fake_python(folder: Path, body: str) -> dict[str, str]:
    """Return an environment in which the script's interpreter runs `body` for everything but the report."""
    fake = folder / "python"
    fake.write_text(f'#!/bin/bash\ncase "$1" in *report.py) exec {sys.executable} "$@";; esac\n{body}\n')
    fake.chmod(0o755)
    return {**os.environ, "PYTHON": str(fake), "DATA": str(folder)}


def script(*arguments: object, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [str(BENCHMARKS / "gpu.sh"), *map(str, arguments)]
    return subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.long
def test_rehearsal_on_the_cpu(tmp_path: Path) -> None:
    """Every program of the script in tiny, except pytest; the report includes all results."""
    parts = ("small", "convert", "same-seed", "pretrain", "glue", "masked-lm")
    done = script("--smoke", tmp_path / "out", *parts, environment={**os.environ, "PYTHON": sys.executable})
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    kinds = ["pretrain_step", "profile", "profile", "conversion", "same_seed", "real_run", "glue_scores"]
    kinds.append("masked_lm")
    assert [line["benchmark"] for line in lines] == kinds
    assert set(lines[0]["step_ms"]) == {"reference", "ours", "trainer"}
    assert [line["variant"] for line in lines[1:3]] == ["ours", "trainer"]
    assert all(len(line["kernels"]) == 10 and line["kernels_per_step"] > 100 for line in lines[1:3])
    assert (lines[4]["batches"], lines[4]["differing"], lines[4]["first_difference"]) == (4, 0, None)
    assert lines[5]["batches"] == lines[5]["of_batches"] > 0
    assert lines[5]["tokens_per_second"] > 0
    assert 0 <= lines[6]["tasks"]["synthetic-words"]["accuracy"] <= 100
    printed = (tmp_path / "out" / "report.md").read_text()
    assert all(f"### {report.SECTIONS[kind][0]}" in printed for kind in kinds)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"results.jsonl", "report.md", "gpu.log", "metrics.jsonl", "glue.md"}


def test_commands_of_a_gpu_machine_can_be_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The options and overrides of every part, with sizes of a GPU, and the order of the parts."""
    body = f'printf "%q " "$@" >> {tmp_path}/commands; echo >> {tmp_path}/commands'
    assert script(tmp_path / "out", environment=fake_python(tmp_path, body)).returncode == 0
    commands = [shlex.split(line) for line in (tmp_path / "commands").read_text().splitlines()]
    programs = [Path(words[1] if words[0] == "-m" else words[0]).name for words in commands if words[0] != "-c"]
    assert programs == ["pytest", *["pretrain_step.py"] * 3, *["user_runs.py"] * 4]
    for words in commands:
        if words[0].endswith("pretrain_step.py"):
            workload.read_config(pretrain_step.parse(words[1:]), tmp_path)
        elif words[0].endswith("user_runs.py"):
            options = user_runs.parse(words[1:])
            assert (str(options.data), options.smoke) == (str(tmp_path), False)
    assert user_runs.parse(commands[-2][1:]).seconds == 180
    tests = next(words for words in commands if "pytest" in words)
    assert {"tests/training/test_monitors.py", "-m", "cuda"} <= set(tests)
    log = (tmp_path / "out" / "gpu.log").read_text()
    assert [line.split()[1] for line in log.splitlines() if line.startswith("==") and "at most" in line] == PARTS


def test_failed_parts_are_recorded_and_the_others_run(tmp_path: Path) -> None:
    environment = fake_python(tmp_path, "echo '2 failed, 5 passed in 1.23s'; exit 3")
    done = script("--smoke", tmp_path / "out", "tests", "small", "glue", environment=environment)
    assert done.returncode == 1
    printed = (tmp_path / "out" / "report.md").read_text()
    assert all(f"| {part} | 3 |" in printed for part in ("tests", "small", "glue"))
    assert "2 failed, 5 passed in 1.23s" in printed


def test_a_script_that_is_ended_leaves_what_was_measured(tmp_path: Path) -> None:
    line = json.dumps({"benchmark": "tests", "summary": "done so far"})
    environment = fake_python(tmp_path, f"echo '{line}'; touch {tmp_path}/begun; sleep 60")
    command = [str(BENCHMARKS / "gpu.sh"), "--smoke", str(tmp_path / "out"), "small"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while not (tmp_path / "begun").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    assert "done so far" in (tmp_path / "out" / "report.md").read_text()


def test_report_of_runs_that_differ_and_of_one_that_was_cut_short() -> None:
    first = {"batch": 385, "rows": 7, "total": "0x1p+5", "mlm": "0x1p+3"}
    pair = {"first_run": first, "second_run": {**first, "total": "0x1.8p+5"}}
    lines = [
        {"benchmark": "same_seed", "batches": 400, "differing": 16, "first_difference": pair},
        {"benchmark": "real_run", "data": "data", "batches": 0, "of_batches": 9000, "wall_seconds": 3.0}
        | dict.fromkeys([*user_runs.LAST, *user_runs.MEDIAN, "first_mlm_loss"]),
        {"benchmark": "conversion", "data": "data", "wall_seconds": 25.0},
        {"benchmark": "glue_scores", "tasks": {"cola": {"matthews": None}}, "max_train_examples": 8000}
        | {"wall_seconds": 9.0},
    ]
    printed = report.report(lines)
    assert "400 batches of two runs with one seed: 16 differ, first batch 385 in total." in printed
    assert "| data | 0 of 9,000 | 3.0 | – | – | – | – → – | – | – | –, – | – |" in printed
    assert "| data | – | – | – | 25.0 |" in printed
    assert "| cola | matthews – | 8,000 | 9.0 |" in printed


@pytest.mark.parametrize("arguments", [[], ["--other"], ["--smoke"], ["out", "unknown"]])
def test_wrong_arguments(tmp_path: Path, arguments: list[str]) -> None:
    done = subprocess.run([BENCHMARKS / "gpu.sh", *arguments], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert "usage: " in done.stderr or "no part unknown" in done.stderr
    assert not (tmp_path / "out").exists()
