"""Memory and time of a conversion as the corpus grows: the same files again and again, under other names.

    python benchmarks/convert_scale.py --source '../shared/data/corpus/*.jsonl.gz' --tokenizer vocab.txt --times 1 4 16

Prints one JSON line: for each size tokens, seconds, tokens per second, and the peak of the memory of all its processes
together (PSS, so that what they share counts once).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from machine import describe

from electra_composer.corpus.sources import find_files
from electra_composer.errors import report_user_errors

SCRIPT = Path(__file__).parents[1] / "data_prep/convert_owt.py"


def tree_of(root: int) -> list[int]:
    """A process and all below it (Linux)."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(path.parent.name))
    found = [root]
    for process in found:
        found += children.get(process, [])
    return found


def memory_of(processes: list[int]) -> int:
    """Bytes that processes hold together; what several share counts once."""
    total = 0
    for process in processes:
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


class PeakMemory:
    """Looks at a process tree until it is gone."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.bytes = 0
        self._process = process
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while self._process.poll() is None:
            self.bytes = max(self.bytes, memory_of(tree_of(self._process.pid)))
            time.sleep(0.2)


@report_user_errors
def main(arguments: list[str] | None = None) -> None:
    """Convert the corpus so many times over, and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="files, or a glob of them")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--times", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--folder", help="for the shards, which are removed again (default: the system's)")
    parser.add_argument("more", nargs="*", help="after --: further options of the converter, such as --deduplicate")
    options = parser.parse_args(arguments)
    sizes = []
    for times in options.times:
        with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
            corpus = Path(scratch) / "corpus"
            corpus.mkdir()
            for number in range(times):
                for path in find_files(options.source):
                    (corpus / f"{number:03}-{os.path.basename(path)}").symlink_to(os.path.abspath(path))
            command = [sys.executable, str(SCRIPT), "--source", str(corpus), "--tokenizer", options.tokenizer]
            command += ["--lines", "sentence", "--overflow", "carry", "--workers", str(options.workers)]
            command += ["--out", f"{scratch}/out", "--json", f"{scratch}/summary.json", *options.more]
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, text=True)
            peak = PeakMemory(process)
            if process.wait():
                sys.exit(f"the conversion of {times} times the corpus failed")
            summary = json.loads(Path(f"{scratch}/summary.json").read_text())
            tokens = sum(split["tokens"] for split in summary["splits"].values())
            sizes.append(
                {
                    "times": times,
                    "text_megabytes": round(summary["text_bytes"] / 1e6, 1),
                    "tokens": tokens,
                    "seconds": round(summary["seconds"], 1),
                    "tokens_per_second": round(summary["tokens_per_second"]),
                    "peak_memory_megabytes": round(peak.bytes / 1e6),
                    "parts": len(os.listdir(f"{scratch}/out/train")) - 1,
                    "fill": round(summary["fill"], 4),
                }
            )
            shutil.rmtree(f"{scratch}/out")
    print(
        json.dumps(
            {
                "benchmark": "convert_scale",
                "workers": options.workers,
                "options": options.more,
                "sizes": sizes,
                "machine": describe(),
            }
        ),
        flush=True,
    )


if __name__ == "__main__":
    main()
