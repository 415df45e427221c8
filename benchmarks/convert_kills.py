"""Kill a conversion at random moments, resume it, and compare its files with those of an undisturbed conversion.

    python benchmarks/convert_kills.py --source '../shared/data/corpus/*.jsonl.gz' --tokenizer vocab.txt --kills 10

For each number of processes, the conversion is started and killed after a random time by SIGKILL, SIGTERM or SIGINT,
`--kills` times, then left to finish. Prints one JSON line. The exit status is 1 if any byte differs, if a killed
conversion left output that looks complete, or if processes outlive it.
"""

from __future__ import annotations

import argparse
import filecmp
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
from machine import print_result

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
SCRIPT = Path(__file__).parents[1] / "data_prep/convert_owt.py"


def command(options: argparse.Namespace, workers: int, out: Path) -> list[str]:
    return [
        *(sys.executable, str(SCRIPT), "--source", options.source, "--tokenizer", options.tokenizer),
        *("--out", str(out), "--workers", str(workers), "--lines", "sentence", "--overflow", "carry", "--no-progress"),
    ]


def differences(a: Path, b: Path) -> list[str]:
    """Return the names of files that are not bitwise identical in both folders."""
    files = [{str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} for folder in (a, b)]
    _, different, failed = filecmp.cmpfiles(a, b, sorted(files[0] & files[1]), shallow=False)
    return [*sorted(files[0] ^ files[1]), *different, *failed]


def survivors(out: Path) -> int:
    """Count processes with the folder in their command line that have not ended after five seconds."""
    for _ in range(50):
        commands = (process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"]))
        found = sum(str(out) in "\0".join(words) for words in commands)
        if not found:
            return 0
        time.sleep(0.1)
    return found


class Trial:
    """A conversion that is killed repeatedly, then left to finish.

    Args:
        options: of the command line.
        workers: number of processes.
        out: folder of the shards.
        undisturbed: folder of the same conversion without kills.
        longest: seconds after which the conversion is killed at the latest.
        rng: draws the moments and signals.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        workers: int,
        out: Path,
        undisturbed: Path,
        longest: float,
        rng: random.Random,
    ) -> None:
        self.command, self.workers, self.out = command(options, workers, out), workers, out
        self.undisturbed, self.longest, self.rng = undisturbed, longest, rng
        self.kills: Counter[str] = Counter()
        self.parts: list[int] = []
        self.early = self.lost = 0

    def kill_once(self) -> None:
        """Start or resume the conversion and kill it; start over if it finished first."""
        process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=self.rng.uniform(0, self.longest))
        except subprocess.TimeoutExpired:
            number = self.rng.choice(SIGNALS)
            process.send_signal(number)
            process.wait()
            self.lost += survivors(self.out)
            if not self.out.exists():
                self.kills[number.name] += 1
                self.parts.append(len(list(Path(f"{self.out}.partial").glob("records/*.json"))))
                return
            self.lost += bool(differences(self.undisturbed, self.out))  # it was renamed just before the signal
        self.early += 1
        shutil.rmtree(self.out, ignore_errors=True)

    def finish(self) -> dict[str, Any]:
        """Resume the conversion to its end and compare the folders."""
        done = subprocess.run(self.command, stdout=subprocess.DEVNULL)
        different = differences(self.undisturbed, self.out) if done.returncode == 0 else ["cannot be resumed"]
        return {
            "workers": self.workers,
            "kills": self.kills,
            "parts_whole_at_each_kill": self.parts,
            "finished_before_a_kill": self.early,
            "left_looking_whole_or_running": self.lost,
            "files_that_differ": len(different),
        }


def main(arguments: list[str] | None = None) -> int:
    """Run the trials and print one JSON line.

    Returns:
        1 if a kill lost or changed anything, otherwise 0.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--kills", type=int, default=10, help="for each number of processes (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    rng = random.Random(options.seed)
    runs = []
    with tempfile.TemporaryDirectory() as scratch:
        undisturbed = Path(scratch) / "whole"
        start = time.monotonic()
        subprocess.run([sys.executable, str(SCRIPT), "--help"], check=True, stdout=subprocess.DEVNULL)
        start_up = time.monotonic() - start
        subprocess.run(command(options, options.workers[0], undisturbed), check=True, stdout=subprocess.DEVNULL)
        seconds = time.monotonic() - start - 2 * start_up
        longest = start_up + seconds / 4  # a quarter of the work, so that most kills hit a working conversion
        for workers in options.workers:
            trial = Trial(options, workers, Path(scratch) / f"out-{workers}", undisturbed, longest, rng)
            while trial.kills.total() < options.kills:
                trial.kill_once()
            runs.append(trial.finish())
    print_result("convert_kills", seconds_undisturbed=round(seconds, 1), runs=runs)
    return int(any(run["files_that_differ"] or run["left_looking_whole_or_running"] for run in runs))


if __name__ == "__main__":
    sys.exit(main())
