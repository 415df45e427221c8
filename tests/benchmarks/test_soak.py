"""Soak benchmark: a short one passes, and it detects differences and growth."""

from __future__ import annotations

import json

import programs
import pytest
import soak
from recorded_run import read_record

ARGUMENTS = ["--batches=200", "--kills=3", "--minutes=2", "--documents=200", "--workers=1", "--interval=20"]


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """Soak with three kills: exit status, printed line, and folder of the runs."""
    folder = tmp_path_factory.mktemp("soak")
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("subprocess.Popen", programs.Program)
        patch.setattr("builtins.print", lambda *texts, **_: lines.append(texts[0]))
        status = soak.main([*ARGUMENTS, f"--folder={folder}"])
    return status, json.loads(lines[-1]), folder


@pytest.mark.slow
def test_a_short_soak(short):
    status, line, _ = short
    assert (line["failed"], line["passed"], status) == ([], True, 0)
    assert line["kills_by_signal"] == {"SIGKILL": 1, "SIGTERM": 1, "SIGINT": 1}
    assert line["resumes"] >= 2
    assert (line["batches"], line["samples"]) == (200, 200 * 16)
    assert line["epochs"] > 1
    assert all(line[name] == 0 for name in soak.MUST_BE_ZERO)
    assert line["metric_rows"] == 30  # 0, 7, … 196, and the last


@pytest.mark.slow
def test_differences_are_found(short, tmp_path):
    """One row of a batch replaced by another, one loss changed, one row of metrics missing."""
    *_, folder = short
    undisturbed, killed = (FakeRun(folder / name) for name in ("whole", "killed"))
    assert not any(soak.compare(undisturbed, killed)[name] for name in soak.MUST_BE_ZERO)
    record = read_record(folder / "killed" / "record")
    record[7]["rows"][0] = record[7]["rows"][1]
    record[9]["loss/train/total"] += 0.5
    killed.folder = tmp_path
    killed.rows = killed.rows[:-1]
    (tmp_path / "record").mkdir()
    (tmp_path / "record" / "rank0.jsonl").write_text("\n".join(map(json.dumps, record.values())))
    found = soak.compare(undisturbed, killed)
    assert (found["samples_seen_twice"], found["samples_missed"], found["batches_with_other_samples"]) == (1, 1, 1)
    assert found["largest_loss_difference"] == 0.5
    assert found["metric_rows_that_differ"] == 1
    (tmp_path / "record" / "rank0.jsonl").write_text("\n".join(map(json.dumps, list(record.values())[:-1])))
    assert soak.compare(undisturbed, killed)["largest_loss_difference"] == float("inf")


class FakeRun:
    """The parts of a finished `Run` that `compare` uses."""

    def __init__(self, folder):
        options = soak.argparse.Namespace(processes=1, overrides=[])
        run = soak.Run(options, folder.parent, folder.name, 200)
        self.folder, self.rows, self.weights = folder, run.metrics(), run.weights

    def metrics(self):
        return self.rows


def watched(memory, files, seconds=600):
    return [(float(second), memory(second), files(second)) for second in range(seconds)]


@pytest.mark.parametrize(
    ("memory", "files", "grows"),
    [
        (lambda second: 10**9, lambda second: 30, False),
        (lambda second: 10**7 * min(second, 60), lambda second: min(second, 30), False),  # the start
        (lambda second: 10**9 + 10**6 * second, lambda second: 30, True),
        (lambda second: 10**9, lambda second: 30 + second // 30, True),
    ],
)
def test_growth_is_found(memory, files, grows):
    assert soak.grows(watched(memory, files)) == grows
    assert soak.first_and_last(watched(memory, files, seconds=20)) is None


@pytest.mark.parametrize("argument", ["--kills=0", "--minutes=0", "--processes=0"])
def test_nothing_is_refused(argument):
    with pytest.raises(soak.UserError, match="expected values above 0"):
        soak.main([argument])
