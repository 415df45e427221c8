"""Kills a conversion at random moments until it is done, and compares its bytes with an undisturbed one's.

    python benchmarks/convert_kills.py --source '../shared/data/corpus/*.jsonl.gz' --tokenizer vocab.txt --kills 10

For each number of processes the same conversion is begun, killed after a random time by SIGKILL, SIGTERM or SIGINT, and
begun again, `--kills` times, then left to finish. Prints one JSON line; exits with 1 if any byte differs, if a killed
conversion left something that looks whole, or if processes outlive it.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import describe

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
SCRIPT = Path(__file__).parents[1] / "data_prep/convert_owt.py"


def command(options: argparse.Namespace, workers: int, out: Path) -> list[str]:
    return [
        *(sys.executable, str(SCRIPT), "--source", options.source, "--tokenizer", options.tokenizer),
        *("--out", str(out), "--workers", str(workers), "--lines", "sentence", "--overflow", "carry", "--no-progress"),
    ]


def differences(a: Path, b: Path) -> list[str]:
    """Names of files that are not in both folders with the same bytes."""
    files = [{str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} for folder in (a, b)]
    _, different, failed = filecmp.cmpfiles(a, b, sorted(files[0] & files[1]), shallow=False)
    return [*sorted(files[0] ^ files[1]), *different, *failed]


def survivors(out: Path) -> int:
    """Processes that still name the folder in their command line, after a moment to end."""
    for _ in range(50):
        found = 0
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                found += str(out) in path.read_text()
            except OSError:
                continue
        if not found:
            return 0
        time.sleep(0.1)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the trial, print one JSON line, and return 1 where something was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--kills", type=int, default=10, help="for each number of processes")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    rng = random.Random(options.seed)
    runs = []
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / "whole"
        start = time.monotonic()
        subprocess.run([sys.executable, str(SCRIPT), "--help"], check=True, stdout=subprocess.DEVNULL)
        start_up = time.monotonic() - start
        subprocess.run(command(options, options.workers[0], whole), check=True, stdout=subprocess.DEVNULL)
        seconds = time.monotonic() - start - 2 * start_up
        for workers in options.workers:
            out = Path(scratch) / f"out-{workers}"
            kills: dict[str, int] = {}
            parts: list[int] = []
            early = lost = 0
            while sum(kills.values()) < options.kills:
                process = subprocess.Popen(
                    command(options, workers, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
                )
                try:  # the start of Python, and so much of the whole that most kills find it at work
                    process.wait(timeout=rng.uniform(0, start_up + seconds / 4))
                    early += 1  # done before the kill: begin anew
                    shutil.rmtree(out, ignore_errors=True)
                    continue
                except subprocess.TimeoutExpired:
                    number = rng.choice(SIGNALS)
                    process.send_signal(number)
                    process.wait()
                lost += survivors(out)
                if out.exists():  # it had just got its name: compare it, and begin anew
                    lost += bool(differences(whole, out))
                    early += 1
                    shutil.rmtree(out)
                    continue
                kills[number.name] = kills.get(number.name, 0) + 1
                parts.append(len(list(Path(f"{out}.partial").glob("records/*.json"))))
            process = subprocess.run(command(options, workers, out), stdout=subprocess.DEVNULL)
            different = differences(whole, out) if process.returncode == 0 else ["it does not go on"]
            runs.append(
                {
                    "workers": workers,
                    "kills": kills,
                    "parts_whole_at_each_kill": parts,
                    "finished_before_a_kill": early,
                    "left_looking_whole_or_running": lost,
                    "files_that_differ": len(different),
                }
            )
    print(
        json.dumps(
            {
                "benchmark": "convert_kills",
                "seconds_undisturbed": round(seconds, 1),
                "runs": runs,
                "machine": describe(),
            }
        ),
        flush=True,
    )
    return int(any(run["files_that_differ"] or run["left_looking_whole_or_running"] for run in runs))


if __name__ == "__main__":
    sys.exit(main())
