"""Time and cost of a full pretraining run on one GPU, computed from measured step times; the table of docs/speed.md.

    python benchmarks/cost.py                           print the table
    python benchmarks/cost.py --price 'H200=3.20'       with other prices per card-hour
    python benchmarks/cost.py --write                   write it into docs/speed.md; --check: exit with 1 if it differs
    python benchmarks/cost.py --add results.jsonl --commit 61ce48b   first add the steps that gpu.sh has measured

No run of full length has been made: every row is computed. `measured_steps.json` holds the steps that were measured,
bare and in the `Trainer`, and the newest one of a model counts. On the card it was measured on, a run takes its steps
times the time of one in the `Trainer`. On another card, the bare step is scaled by what limits the model (see
:data:`LIMIT`), and the rest, the host's work, is left as it is. A model without a measured step gets the time of its
FLOPs at an assumed MFU (--mfu). Evaluations, checkpoints and interruptions are not counted.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from report import read, table
from workload import YAMLS, make_tokenizer

from electra_composer.checkpoints.weights import special_ids
from electra_composer.config import PretrainConfig
from electra_composer.config_loading import load_config
from electra_composer.errors import UserError, report_user_errors
from electra_composer.model.electra import ElectraForPretraining
from electra_composer.model.pretraining import ElectraPretraining
from electra_composer.training.gpus import GPUS, find_gpu

MEASURED = Path(__file__).with_name("measured_steps.json")
PAGE = YAMLS.parent / "docs" / "speed.md"
BEGIN, END = "<!-- cost.py: begin -->\n", "<!-- cost.py: end -->\n"
MODELS = ("small", "base")
VOCABULARY = 30522
LIMIT = {"small": "bandwidth", "base": "half"}
"""What limits a bare step: Small's moves for 3.6 ms and multiplies for 2.2 ms on an H100; Base's is mostly products."""
PRICES = {"A100": 1.80, "H100 PCIe": 2.40, "H100 SXM": 3.00, "H200": 3.80, "B200": 6.00}
"""Assumed prices in dollars per card-hour, of the order of rented cards in 2026; not quotes."""
MFU = 0.4
"""Assumed for a model without a measured step: the goal for Base at 512, not measured."""


class Recipe(NamedTuple):
    """The run of a YAML: steps, rows and tokens per row of a step, and FLOPs of a step of full rows."""

    steps: int
    rows: int
    length: int
    flops: int


class Estimate(NamedTuple):
    """Milliseconds of a step in a run on a GPU, and how they were found."""

    step_ms: float
    how: str


def main(arguments: list[str] | None = None) -> int:
    """Print, write or check the table; return the exit status."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    if options.add:
        add(options.add, options.commit)
    text = render(json.loads(MEASURED.read_text()), options.prices, options.mfu)
    if not (options.write or options.check):
        print(text)
        return 0
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    if BEGIN not in page or END not in rest:
        raise UserError(f"{PAGE}: expected the lines {BEGIN.strip()} and {END.strip()}")
    new = f"{before}{BEGIN}\n{text}\n\n{END}{after}"
    if options.write:
        PAGE.write_text(new, encoding="utf-8")
    elif new != page:
        print(f"error: {PAGE.name} is out of date; run python benchmarks/cost.py --write", file=sys.stderr)
        return 1
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the options; `prices` is complete.

    Raises:
        UserError: a price or an MFU out of range, or options that exclude each other.
    """
    parser = argparse.ArgumentParser(prog="benchmarks/cost.py", description=__doc__.split("\n")[0])
    parser.add_argument("--price", action="append", default=[], metavar="GPU=DOLLARS", help=f"per card-hour; {PRICES}")
    parser.add_argument("--mfu", type=float, default=MFU, help="of models without a measured step (%(default)s)")
    parser.add_argument("--write", action="store_true", help="write the table into docs/speed.md")
    parser.add_argument("--check", action="store_true", help="exit with 1 if the table in docs/speed.md differs")
    parser.add_argument("--add", metavar="FILE", help="results.jsonl of gpu.sh, whose steps are added first")
    parser.add_argument("--commit", help="of the code that was measured; for --add")
    options = parser.parse_args(arguments)
    options.prices = dict(PRICES)
    for text in options.price:
        name, _, price = text.partition("=")
        try:
            options.prices[name] = float(price)
        except ValueError:
            options.prices[name] = -1.0
        if name not in PRICES or not options.prices[name] > 0:
            raise UserError(f"--price {text}: expected one of {', '.join(PRICES)}, =, and dollars above 0")
    if not 0 < options.mfu <= 1:
        raise UserError(f"--mfu is {options.mfu}; expected a fraction in (0, 1]")
    if (options.price or options.mfu != MFU) and (options.write or options.check):
        raise UserError(
            "--write and --check: the table of docs/speed.md has the default prices and MFU; leave them out"
        )
    if bool(options.add) != bool(options.commit):
        raise UserError("--add and --commit: expected both or neither")
    return options


def recipe(model: str) -> Recipe:
    """Read the run of a YAML. The FLOPs are those of rows that one example of two segments fills."""
    config = load_config(str(YAMLS / f"{model}.yaml"), [], PretrainConfig)
    duration, rows, length = (
        config.trainer.max_duration,
        config.trainer.global_train_batch_size,
        config.data.max_seq_length,
    )
    assert duration is not None
    assert duration.endswith("ba")
    special = special_ids(make_tokenizer(VOCABULARY))
    with torch.device("meta"):
        electra = ElectraForPretraining(config.model, config.objective, VOCABULARY, special, length)
    input_ids = torch.full((rows, length), VOCABULARY - 1)
    input_ids[:, [0, length // 2, -1]] = torch.tensor([special.cls, special.sep, special.sep])
    batch = {
        "input_ids": input_ids,
        "sequence_ids": torch.ones_like(input_ids),
        "position_ids": torch.arange(length).expand(rows, length),
    }
    return Recipe(int(duration[:-2]), rows, length, ElectraPretraining(electra).flops_per_batch(batch))


def estimate(model: str, run: Recipe, gpu: str, measured: list[dict[str, Any]], mfu: float) -> Estimate:
    """Estimate a step of a run on a GPU; see the top of this file."""
    steps = [step for step in measured if (step["model"], step["length"]) == (model, run.length)]
    if not steps:
        return Estimate(1000 * run.flops / (mfu * GPUS[gpu].half), f"MFU {mfu:.0%} assumed")
    # ISO dates sort as text, and the last of a day counts; a step on the card itself comes first.
    newest = max(enumerate(steps), key=lambda item: (item[1]["gpu"] == gpu, item[1]["date"], item[0]))[1]
    parts = run.rows / newest["rows"]
    host = newest["trainer_ms"] - newest["bare_ms"]
    origin = f"{newest['date']}, {newest['commit']}"
    if parts != 1:
        origin += f", {parts:g} × {newest['rows']} rows"
    if newest["gpu"] == gpu:
        return Estimate(parts * newest["bare_ms"] + host, f"measured ({origin})")
    limit = LIMIT[model]
    ratio = getattr(GPUS[newest["gpu"]], limit) / getattr(GPUS[gpu], limit)
    by = "memory bandwidth" if limit == "bandwidth" else "bf16 peak"
    return Estimate(parts * ratio * newest["bare_ms"] + host, f"scaled from {newest['gpu']} by {by}")


def render(measured: list[dict[str, Any]], prices: dict[str, float], mfu: float) -> str:
    """Render the table of all models and GPUs."""
    header = ["model", "steps × rows × tokens", "GPU", "a step", "from", "full run", "$ per card-hour", "cost"]
    rows = []
    for model in MODELS:
        run = recipe(model)
        for gpu in GPUS:
            step_ms, how = estimate(model, run, gpu, measured, mfu)
            hours = run.steps * step_ms / 3.6e6
            work = f"{run.steps:,} × {run.rows} × {run.length}"
            cells = [f"ELECTRA-{model.capitalize()}", work, gpu, f"{step_ms:.1f} ms", how]
            rows.append([*cells, f"{hours:.1f} h", f"{prices[gpu]:.2f}", f"${hours * prices[gpu]:,.0f}"])
    return table(header, rows)


def add(path: str, commit: str) -> None:
    """Append the steps of a results file that were measured on a known GPU, bare and in the `Trainer`.

    Raises:
        UserError: there is none.
    """
    found = []
    for line in read(path):
        if line["benchmark"] != "pretrain_step" or not {"ours", "trainer"} <= set(line["step_ms"]):
            continue
        gpu, options = find_gpu(line["machine"]["gpu"] or ""), line["options"]
        if gpu is None or options["size"] not in MODELS:
            continue
        found.append(
            {
                "model": options["size"],
                "rows": options["batch"],
                "length": line["length"],
                "precision": options["precision"],
                "gpu": gpu,
                "bare_ms": line["step_ms"]["ours"]["median"],
                "trainer_ms": line["step_ms"]["trainer"]["median"],
                "settings": " ".join([f"trainer.compile={options['compile']}", *options["overrides"]]),
                "date": line["machine"]["date"],
                "commit": commit,
                "torch": line["machine"]["versions"]["torch"],
            }
        )
    if not found:
        raise UserError(
            f"{path}: no step of {' or '.join(MODELS)}, bare and in the Trainer, on one of {', '.join(GPUS)}"
        )
    measured = json.loads(MEASURED.read_text()) + found
    MEASURED.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(report_user_errors(main)())
