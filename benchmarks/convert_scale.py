"""Memory and time of a conversion as the corpus grows, by repeating the same files under other names.

    python benchmarks/convert_scale.py --source '../shared/data/corpus/*.jsonl.gz' --tokenizer vocab.txt --times 1 4 16

Prints one JSON line: for each size tokens, seconds, tokens per second, and the peak memory of all processes together
(PSS, which counts shared memory once).
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
from contextlib import suppress
from pathlib import Path

import psutil
from machine import print_result

from electra_composer.corpus.files import find_files
from electra_composer.errors import report_user_errors

SCRIPT = Path(__file__).parents[1] / "data_prep/convert_owt.py"


class PeakMemory:
    """Peak PSS of a process and its descendants, sampled in a thread until the process ends."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.bytes = 0
        self._process = process
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while self._process.poll() is None:
            used = 0
            with suppress(psutil.Error):
                root = psutil.Process(self._process.pid)
                for process in [root, *root.children(recursive=True)]:
                    with suppress(psutil.Error):
                        used += process.memory_full_info().pss
            self.bytes = max(self.bytes, used)
            time.sleep(0.2)


@report_user_errors
def main(arguments: list[str] | None = None) -> None:
    """Convert the corpus at each size and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="files or a glob")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--times", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--folder", help="scratch folder for the shards (default: the system's temporary folder)")
    parser.add_argument("more", nargs="*", help="after --: more options of the converter, such as --deduplicate")
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
                sys.exit(f"the conversion of {times} copies of the corpus failed")
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
    print_result("convert_scale", workers=options.workers, options=options.more, sizes=sizes)


if __name__ == "__main__":
    main()
