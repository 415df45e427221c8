"""Speed of the quickstart's pretraining beside busy processes, with and without the choice of threads; one JSON line.

    python benchmarks/neighbours.py [--pairs 8] [--repeats 2] [--steps 24] [--seconds 20] [key=value …]

The model, batch size and callbacks of `yamls/quickstart.yaml` train in Composer's `Trainer`. Blocks of steps alternate:
`adapted` chooses the number of threads as the programs do, at the start of each block and during it; `fixed` has
torch's own, as with `OMP_NUM_THREADS`. Beside busy processes a block has a third of the steps. Last, a neighbour starts
and ends while the adapted trainer runs. Exits with 1 if a goal is missed: beside one busy process at least 3 batches/s,
and on an idle machine at most 3% slower than `fixed`. `key=value` overrides the YAML.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from machine import describe, require_positive
from tqdm import tqdm
from variants import Setup, TrainerSteps
from workload import YAMLS, make_workload

from electra_composer.config import PretrainConfig
from electra_composer.config_loading import load_config
from electra_composer.errors import UserError, report_user_errors
from electra_composer.training import threads
from electra_composer.training.cores import measure_usage, used_by_others
from electra_composer.training.devices import cpu_multiplies_bfloat16
from electra_composer.training.startup import start

BUSY = (0, 1, 2)


@dataclass(frozen=True)
class Block:
    """A block of steps: batches/s, the last number of threads, and the cores that other processes used."""

    rate: float
    threads: int
    others: float


Pairs = dict[int, list[dict[str, Block]]]
"""Number of busy processes → pairs of an adapted and a fixed block."""

GOAL_BESIDE_ONE = 3.0
GOAL_IDLE_LOSS = 0.03
QUIET = 0.1  # cores in use by others, up to which a machine counts as idle
MIN_QUIET_PAIRS = 4
WARMUP = 4


def main(arguments: list[str] | None = None) -> None:
    """Measure, print one JSON line, and exit with 1 if a goal is missed."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        config, trainers = set_up(options, Path(folder))
        pairs = alternate(config, trainers, options)
        adaption = adapt(trainers["adapted"], options.seconds)
    result = summarize(pairs)
    result = {"benchmark": "neighbours", **result, "missed": missed(result), "adaption": adaption}
    result |= {"options": vars(options), "machine": describe()}
    print(json.dumps(result), flush=True)
    sys.exit(1 if result["missed"] else 0)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the options.

    Raises:
        UserError: an option is out of range, or the environment fixes the number of threads.
    """
    parser = argparse.ArgumentParser(prog="benchmarks/neighbours.py", description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=8, help="blocks of each kind without neighbours (%(default)s)")
    parser.add_argument("--repeats", type=int, default=2, help="blocks of each kind with neighbours (%(default)s)")
    parser.add_argument("--steps", type=int, default=24, help="timed steps of a block without neighbours (%(default)s)")
    parser.add_argument("--seconds", type=int, default=20, help="of each phase of the adaption (%(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args(arguments)
    require_positive(options, "pairs", "repeats", "steps", "seconds")
    if threads.is_fixed_by_user():
        raise UserError(f"{' or '.join(threads.FIXED_BY)} is set, which switches off what is measured; unset it")
    return options


def set_up(options: argparse.Namespace, folder: Path) -> tuple[PretrainConfig, dict[str, TrainerSteps]]:
    """Build the trainer that adapts its threads and the one that does not, over the same synthetic rows."""
    overrides = [
        f"data.path={folder / 'shards'}",
        "data.shuffle=false",
        f"trainer.precision={'amp_bf16' if cpu_multiplies_bfloat16() else 'fp32'}",  # as quickstart.py does
        "trainer.device=cpu",
        "trainer.max_duration=1000000ba",
        "trainer.progress_bar=false",
        f"checkpoints.folder={folder / 'run'}",
        "checkpoints.milestones=[]",
        "checkpoints.resume=false",
        *options.overrides,
    ]
    config = load_config(str(YAMLS / "quickstart.yaml"), overrides, PretrainConfig)
    rows = (WARMUP + options.steps) * config.trainer.global_train_batch_size
    data = argparse.Namespace(data=None, vocab=4096, batch=config.trainer.device_eval_batch_size, seed=config.seed)
    workload = make_workload(data, folder / "shards", config.data.max_seq_length, rows)
    setup = Setup(config, workload, torch.device("cpu"), start(config), "sdpa")
    with mock.patch.dict(os.environ, {threads.FIXED_BY[0]: str(threads.default_threads())}):
        fixed = TrainerSteps(setup, with_callbacks=True)
    return config, {"adapted": TrainerSteps(setup, with_callbacks=True), "fixed": fixed}


@contextlib.contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Run processes that each keep a core busy."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        time.sleep(0.2 * bool(count))  # their start
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def alternate(config: PretrainConfig, trainers: dict[str, TrainerSteps], options: argparse.Namespace) -> Pairs:
    """Time pairs of blocks beside no, one and two busy processes.

    Without neighbours up to twice as many pairs as asked for, until so many are quiet (:func:`is_quiet`).
    """
    for trainer in trainers.values():
        trainer.block(WARMUP)  # includes the start of libraries
    pairs: Pairs = {busy: [] for busy in BUSY}
    rounds = [1, 2] * options.repeats + [0] * (2 * options.pairs)
    for turn, busy in enumerate(tqdm(rounds, desc="pairs of blocks", file=sys.stderr)):
        if busy == 0 and sum(map(is_quiet, pairs[0])) == options.pairs:
            continue
        kinds = ("adapted", "fixed") if turn % 2 else ("fixed", "adapted")  # both see a slow drift alike
        with neighbours(busy):
            pairs[busy].append({kind: run_block(config, trainers[kind], kind, busy, options.steps) for kind in kinds})
    return pairs


def run_block(config: PretrainConfig, trainer: TrainerSteps, kind: str, busy: int, steps: int) -> Block:
    """Train a block of steps, with a new choice of threads if adapted; beside busy processes a third of the steps."""
    torch.set_num_threads(threads.default_threads())
    if kind == "adapted":
        threads.choose_threads(config.trainer, ranks=1)
        trainer.trainer.threads = threads.watch_threads(config.trainer, "cpu")
    steps = steps if busy == 0 else max(2, steps // 3)
    before = measure_usage()
    seconds = trainer.block(WARMUP + steps)[WARMUP - 1 :]
    others = used_by_others(before, measure_usage())
    return Block(len(seconds) / sum(seconds), torch.get_num_threads(), others)


def is_quiet(pair: dict[str, Block]) -> bool:
    """Return whether the machine was idle but for the benchmark."""
    return max(block.others for block in pair.values()) <= QUIET


def adapt(trainer: TrainerSteps, seconds: float) -> dict[str, Any]:
    """Train alone, beside a busy process that starts in mid-run, and after its end.

    Returns:
        Phase → batches/s in the last third of the phase, batches/s of the complete phase, and the number of threads
        every two seconds.
    """
    phases: dict[str, Any] = {}
    torch.set_num_threads(threads.default_threads())
    trainer.trainer.threads = threads.ThreadWatch()
    for phase, busy in (("alone", 0), ("beside_one", 1), ("alone_again", 0)):
        with neighbours(busy):
            steps: list[tuple[float, float]] = []  # seconds since the start of the phase, duration
            counts: dict[int, int] = {}
            begin = time.monotonic()
            while (now := time.monotonic() - begin) < seconds:
                steps += [(now, step) for step in trainer.block(WARMUP)]
                counts[int(now // 2)] = torch.get_num_threads()
        last = [step for since, step in steps if since >= seconds * 2 / 3] or [steps[-1][1]]  # steps may be slow
        phases[phase] = {
            "settled": round(len(last) / sum(last), 2),
            "complete": round(len(steps) / sum(step for _, step in steps), 2),
            "threads": list(counts.values()),
        }
    return phases


def summarize(pairs: Pairs) -> dict[str, Any]:
    """Return the medians of the blocks.

    Returns:
        `idle` (quiet pairs only), `beside_one`, `beside_two`: of each kind batches/s, None without a pair, and the
        numbers of threads; `idle_loss`: fraction by which `adapted` is slower than `fixed` in the median pair;
        `quiet_pairs` and the `others_cores` of all pairs without neighbours.
    """
    quiet = list(filter(is_quiet, pairs[0]))
    result: dict[str, Any] = {}
    for name, chosen in (("idle", quiet), ("beside_one", pairs[1]), ("beside_two", pairs[2])):
        result[name] = {
            kind: {
                "batches_per_second": _median([pair[kind].rate for pair in chosen], 2),
                "threads": sorted({pair[kind].threads for pair in chosen}),
            }
            for kind in ("adapted", "fixed")
        }
    result["idle_loss"] = _median([1 - pair["adapted"].rate / pair["fixed"].rate for pair in quiet], 4)
    result["quiet_pairs"] = len(quiet)
    result["others_cores"] = [round(max(block.others for block in pair.values()), 2) for pair in pairs[0]]
    return result


def _median(values: list[float], digits: int) -> float | None:
    return round(statistics.median(values), digits) if values else None


def missed(result: dict[str, Any]) -> list[str]:
    """Return the goals that a result misses, in words."""
    missed = []
    if result["beside_one"]["adapted"]["batches_per_second"] < GOAL_BESIDE_ONE:
        missed.append(f"at least {GOAL_BESIDE_ONE} batches/s beside one busy process")
    if result["quiet_pairs"] < MIN_QUIET_PAIRS:
        missed.append(f"at least {MIN_QUIET_PAIRS} quiet pairs of blocks (others use at most {QUIET} cores)")
    elif result["idle_loss"] > GOAL_IDLE_LOSS:
        missed.append(f"at most {GOAL_IDLE_LOSS:.0%} slower when idle")
    return missed


if __name__ == "__main__":
    report_user_errors(main)()
