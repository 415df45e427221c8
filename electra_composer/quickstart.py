"""`make quickstart`: convert, pretrain, finetune and export on installed text, in minutes on two CPU cores.

Every step is a command, printed before it runs. The last output is a table of finetuning scores from pretrained and
from random weights.
"""

from __future__ import annotations

if __name__ == "__main__":
    from electra_composer.program import begin

    begin()

import argparse
import sys

from electra_composer.arguments import ArgumentParser, parse_early
from electra_composer.errors import report_user_errors


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(prog="python -m electra_composer.quickstart", description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="only test every step, in a minute")
    return parser.parse_args(arguments)


if __name__ == "__main__":  # before the imports that take seconds
    parse_early(parse)

import json
import math
import os
import shlex
import shutil
import statistics
import subprocess
import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoTokenizer, ElectraForMaskedLM, ElectraForPreTraining

from electra_composer.batches.baselines import loss_without_context
from electra_composer.batches.shards import read_meta
from electra_composer.checkpoints.weights import read_checkpoint
from electra_composer.config import ObjectiveConfig, ShardsConfig, TrainerConfig
from electra_composer.model.kernels.attention import pattern_of
from electra_composer.next_steps import describe_end, in_repository, preview
from electra_composer.shipped import is_installed
from electra_composer.signals import STOPPED, Stopped, leave_line_to_child, unwind
from electra_composer.training.devices import cpu_multiplies_bfloat16, resolve_device

FOLDER = "runs/quickstart"
SHARDS, GLUE_DATA = f"{FOLDER}/shards", f"{FOLDER}/synthetic_glue"
PRETRAIN, EXPORT = f"{FOLDER}/pretrain", f"{FOLDER}/export"
REPORT = f"{PRETRAIN}/report.html"
STARTS = ("pretrained", "random")

REAL_RUN = "\n  ".join(
    ["The real run, ELECTRA-Small of the paper on OpenWebText (times and disk: README.md):"]
    + (
        ["electra convert", "electra pretrain small", "electra glue glue"]
        if is_installed()
        else [
            "python data_prep/convert_owt.py",
            "composer electra_composer/pretrain.py yamls/small.yaml",
            "composer electra_composer/glue.py yamls/glue.yaml",
        ]
    )
)


@dataclass(frozen=True)
class Size:
    """Options of each step that set the amount of work."""

    convert: tuple[str, ...] = ("--vocab-size", "4096", "--val-fraction", "0.02", "--overflow", "carry")
    pretrain: tuple[str, ...] = ()
    synthetic: tuple[str, ...] = ()
    finetune: tuple[str, ...] = ()


SMOKE = Size(
    convert=("--vocab-size", "1000", "--val-fraction", "0.2", "--max-documents", "200"),
    pretrain=("trainer.max_duration=40ba", "trainer.eval_interval=40ba", "trainer.eval_batches=2"),
    synthetic=("--train", "64", "--dev", "32", "--max-documents", "1000"),
    finetune=("trainer.max_duration=1ep", "seeds=[1]"),
)
"""Takes a minute; tests every step, but is too short to show a gain from pretraining."""


def commands(size: Size) -> list[tuple[str, list[str]]]:
    """Return the steps in order: title and command line."""
    pretrain = precision_and_duration()
    python = sys.executable
    convert = [
        python,
        in_repository("data_prep/convert_owt.py"),
        "--source",
        "docstrings",
        "--tokenizer",
        "train",
        "--out",
        SHARDS,
    ]
    convert += ["--max-seq-length", "32", "--lines", "sentence", *size.convert]
    train = [
        python,
        in_repository("electra_composer/pretrain.py"),
        in_repository("yamls/quickstart.yaml"),
        *pretrain,
        *size.pretrain,
    ]
    synthetic = [python, "-m", "electra_composer.finetuning.synthetic", "--source", "docstrings", "--out", GLUE_DATA]
    synthetic += size.synthetic
    glue = [python, in_repository("electra_composer/glue.py"), in_repository("yamls/quickstart_glue.yaml")]
    finetune = [*glue, *size.finetune]
    baseline = [f"checkpoints.folder={FOLDER}/glue-random", "model.random_init=true"]
    export = [python, in_repository("electra_composer/export.py"), PRETRAIN, EXPORT]
    return [
        ("docstrings of the installed Python packages → a WordPiece vocabulary and MDS shards", convert),
        ("pretraining of a tiny ELECTRA on them", train),
        ("a synthetic GLUE-style task from the same text: original or corrupted sentence?", synthetic),
        ("finetuning from the pretrained weights", [*finetune, f"checkpoints.folder={FOLDER}/glue-pretrained"]),
        ("the same finetuning from random weights", [*finetune, *baseline]),
        ("export to folders that transformers loads", export),
        ("a report of all this", [python, "-m", "electra_composer.report", PRETRAIN]),
    ]


def precision_and_duration() -> list[str]:
    """Return the overrides of pretraining that depend on the device that its runs will use."""
    if resolve_device(TrainerConfig(precision="fp32"))[0] == "gpu":
        return ["trainer.precision=amp_bf16"] if torch.cuda.is_bf16_supported(including_emulation=False) else []
    # bfloat16 makes a CPU 1.5 times as fast; a CPU without its instructions gets two thirds of the steps.
    return ["trainer.precision=amp_bf16"] if cpu_multiplies_bfloat16() else ["trainer.max_duration=4000ba"]


def run(title: str, command: list[str]) -> None:
    """Print a command and run it; exit if it fails."""
    shown = shlex.join(os.path.basename(part) if index == 0 else part for index, part in enumerate(command))
    print(f"\n━━ {title}\n$ {shown}", flush=True)
    process = subprocess.Popen(command)
    try:
        code = process.wait()
    except Stopped:  # a signal to this process only; Ctrl-C has reached the step, which then ignores SIGTERM
        process.terminate()
        if process.wait() in STOPPED:
            leave_line_to_child()
        raise
    if code:
        print(f"\nquickstart: the command above failed with exit status {code}", file=sys.stderr)
        sys.exit(code)


def check_export() -> str:
    """Load the export through transformers and compare its logits with our model's on one sentence.

    Returns:
        The result in one line.

    Raises:
        RuntimeError: the logits differ.
    """
    tokenizer = AutoTokenizer.from_pretrained(f"{EXPORT}/discriminator")
    discriminator = ElectraForPreTraining.from_pretrained(f"{EXPORT}/discriminator").eval()
    generator = ElectraForMaskedLM.from_pretrained(f"{EXPORT}/generator").eval()
    ours = read_checkpoint(PRETRAIN).build_model()
    encoded = tokenizer("Return the number of elements in the array.", return_tensors="pt")
    ids = encoded["input_ids"]
    with torch.no_grad():
        positions, types = torch.arange(ids.shape[1])[None], encoded["token_type_ids"]
        pattern = pattern_of(torch.ones_like(ids))
        rtd = ours.discriminate(ids, types, positions, pattern)
        mlm = ours.mlm_logits(ours.generate(ids, positions, types, positions, pattern))
        difference = max(
            (rtd - discriminator(**encoded).logits).abs().max().item(),
            (mlm - generator(**encoded).logits).abs().max().item(),
        )
    if not difference < 1e-4:
        raise RuntimeError(f"the exported models' logits differ from ours by {difference}")
    return f"reloaded through transformers: logits of both models within {difference:.0e} of ours"


def metrics_of(folder: str) -> list[dict[str, Any]]:
    """Read the rows of a run's metrics file."""
    with open(os.path.join(folder, "metrics.jsonl"), encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def pretraining_summary(rows: list[dict[str, Any]], without_context: float | None) -> str:
    """Format losses, AUC and speed of the pretraining run, one per line.

    Args:
        rows: rows of the metrics file.
        without_context: MLM loss of predicting by word frequencies; None if unknown.
    """
    mlm = [row["metrics/train/mlm_loss"] for row in rows if "metrics/train/mlm_loss" in row]
    rtd = [row["metrics/train/rtd_loss"] for row in rows if "metrics/train/rtd_loss" in row]
    auc = [row["metrics/eval/rtd_auc"] for row in rows if "metrics/eval/rtd_auc" in row]
    speed = [row["throughput/tokens_per_sec"] for row in rows if "throughput/tokens_per_sec" in row]
    beside = f" (without context: {without_context:.2f})" if without_context is not None else ""
    lines = [
        f"generator, MLM loss          {mlm[0]:.2f} → {mlm[-1]:.2f}{beside}",
        f"discriminator, RTD loss      {rtd[0]:.3f} → {rtd[-1]:.3f}",
        f"discriminator, RTD AUC       {auc[-1]:.3f} on held-out documents (chance 0.500)",
        f"tokens seen                  {rows[-1]['time/token']:,}",
        f"speed                        {statistics.median(speed):,.0f} tokens/s without padding",
    ]
    return "\n".join(f"  {line}" for line in lines)


def table(results: dict[str, dict[str, Any]]) -> str:
    """Format accuracy from pretrained and random weights: mean and spread over the seeds, and the difference."""
    lines = [f"  {'finetuned from':<22}{'accuracy':>9}{'± std':>8}   seeds"]
    means = {}
    for start, label in zip(STARTS, ("pretrained weights", "random weights"), strict=True):
        (task,) = results[start]["tasks"].values()
        scores = [run["metrics"]["accuracy"] for run in task["runs"]]
        means[start] = statistics.mean(scores)
        spread = statistics.stdev(scores) if len(scores) > 1 else math.nan
        each = " ".join(f"{score:.1f}" for score in scores)
        lines.append(f"  {label:<22}{means[start]:>9.1f}{spread:>8.1f}   {each}")
    lines.append(f"  {'gain from pretraining':<22}{means['pretrained'] - means['random']:>+9.1f}   points")
    return "\n".join(lines)


@report_user_errors
def main() -> None:
    """Run the steps and print the results."""
    options = parse(None)
    started = time.monotonic()
    unwind()
    if os.path.isdir(FOLDER):
        print(f"replacing {FOLDER} of an earlier quickstart")
        shutil.rmtree(FOLDER)
    for title, command in commands(SMOKE if options.smoke else Size()):
        run(title, command)
    exported = check_export()
    results = {}
    for start in STARTS:
        with open(f"{FOLDER}/glue-{start}/results.json", encoding="utf-8") as file:
            results[start] = json.load(file)
    without_context = loss_without_context(
        ShardsConfig(SHARDS, max_seq_length=32), read_meta(SHARDS), ObjectiveConfig()
    )
    print(f"\n━━ pretraining\n{pretraining_summary(metrics_of(PRETRAIN), without_context)}")
    print(f"\n━━ a synthetic task: original or corrupted sentence (chance 50)\n{table(results)}")
    print(f"\n━━ export\n  {EXPORT}: {exported}")
    print(f"\n{(time.monotonic() - started) / 60:.1f} minutes in total\n")
    see = {"see the models' predictions": preview(SHARDS, "--checkpoint", PRETRAIN)}
    print(f"{describe_end({'all files': FOLDER, 'report': REPORT}, see)}\n\n{REAL_RUN}")


if __name__ == "__main__":
    main()
