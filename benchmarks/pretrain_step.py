"""Pretraining step of ours compared with the reference, bare and in Composer's `Trainer`; prints one JSON line.

    python benchmarks/pretrain_step.py [--size small] [--precision fp32] [--what a,b,c,d] [--profile] [key=value …]

All variants run in one process with the same weights, examples and precision. They alternate in blocks of steps, so
that a change in machine speed affects all of them. First, the losses of reference and ours must agree. `key=value` are
overrides of the YAML of the size, as for `pretrain.py`.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import reference
import torch
from agreement import compare_losses, magnify
from machine import PeakMemory, describe, median_ms, require_positive
from profiling import profile
from sizes import SIZES
from tqdm import tqdm
from variants import NAMES, BareSteps, Setup, TrainerSteps, use_allocator_of
from workload import make_workload, read_config

from electra_composer.errors import UserError, report_user_errors
from electra_composer.model.sizes import discriminator_config, generator_config
from electra_composer.training.attention_path import choose_attention
from electra_composer.training.devices import resolve_device
from electra_composer.training.gpus import peak_flops
from electra_composer.training.startup import start

MEMORY_OF = "abc"  # d differs from c only in callbacks, which hold no memory
MEMORY_STEPS = 3  # the first allocates the optimizer's state
HOW_FLOPS = (
    "ours: model FLOPs, what the step needs without padding and with the vocabulary at masked positions only "
    "(ElectraPretraining.flops_per_batch), from which every MFU here is taken; reference: what it computes, padding "
    "and the vocabulary at all positions included (benchmarks/reference.py)"
)
HOW_MEMORY = (
    "each variant in a process of its own: weights, gradients, optimizer state and activations of three steps; growth "
    "of resident memory on the CPU (the reference with glibc's default settings, as for its times), of torch's "
    "allocations on CUDA, after a warm-up of libraries"
)


def main(arguments: list[str] | None = None) -> None:
    """Measure and print one JSON line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    with tempfile.TemporaryDirectory() as folder:
        if options.memory_only is not None:
            print(json.dumps({"bytes": memory_of(options, Path(folder))}))
            return
        memory = {} if options.skip_memory else memory_in_processes(options, arguments)
        measure(options, Path(folder), memory)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the options and fill in the defaults for this machine.

    Raises:
        UserError: an option is out of range.
    """
    parser = argparse.ArgumentParser(prog="benchmarks/pretrain_step.py", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "gpu"), help="default: gpu if available")
    parser.add_argument(
        "--precision", choices=("fp32", "amp_bf16", "amp_fp16"), help="default: amp_bf16 on gpu, fp32 on cpu"
    )
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--batch", type=int, help="rows; default: 128 on gpu, 32 on cpu")
    parser.add_argument("--length", type=int, help="tokens per row; default: as in the YAML")
    parser.add_argument("--vocab", type=int, default=30522, help="vocabulary size of synthetic rows (%(default)s)")
    parser.add_argument("--data", help="folder of shards to use instead of synthetic rows; unpacked for the reference")
    parser.add_argument(
        "--compile", default="false", help="ours: false, true, or a mode of torch.compile (trainer.compile)"
    )
    parser.add_argument("--what", default="a,b,c,d", help="; ".join(f"{key}: {name}" for key, name in NAMES.items()))
    parser.add_argument("--repeats", type=int, default=5, help="rounds of one block per variant (%(default)s)")
    parser.add_argument("--segment", type=int, help="timed steps per block; default: 40 on gpu, 4 on cpu")
    parser.add_argument("--warmup", type=int, help="untimed steps before them; default: 12 on gpu, 2 on cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no round later than this (%(default)s)")
    parser.add_argument(
        "--profile", action="store_true", help="also profile b and c; prints a line of kernels for each"
    )
    parser.add_argument("--skip-memory", action="store_true", help="do not measure memory")
    parser.add_argument("--memory-only", choices=tuple(MEMORY_OF), help="measure only the memory of one variant")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args(arguments)
    options.what = options.what.split(",")
    if not set(options.what) <= set(NAMES) or not options.what:
        raise UserError(f"--what {','.join(options.what)}: expected some of {','.join(NAMES)}")
    options.device = options.device or ("gpu" if torch.cuda.is_available() else "cpu")
    on_gpu = options.device == "gpu"
    options.precision = options.precision or ("amp_bf16" if on_gpu else "fp32")
    for name, default in (("batch", (32, 128)), ("segment", (4, 40)), ("warmup", (2, 12))):
        if getattr(options, name) is None:
            setattr(options, name, default[on_gpu])
    require_positive(options, "batch", "repeats", "segment", "warmup")
    if options.profile and not {"b", "c"} & set(options.what):
        raise UserError("--profile profiles variants b and c; add one of them to --what")
    return options


def set_up(options: argparse.Namespace, folder: Path) -> Setup:
    """Set up shards, device, precision and attention path as `pretrain.py` does.

    On the CPU, `start` changes the allocator's settings (devices.py). The reference does not get them: for times, see
    `use_allocator_of`; for memory, it runs in its own process, which does not call `start`.
    """
    config = read_config(options, folder)
    resolve_device(config.trainer)  # raises before the shards are written
    length, trainer = config.data.max_seq_length, config.trainer
    workload = make_workload(options, folder / "shards", length, (options.warmup + options.segment) * options.batch)
    cpu_autocast = resolve_device(trainer)[2] if options.memory_only == "a" else start(config)
    encoders = [sizes(config.model, len(workload.tokenizer)) for sizes in (generator_config, discriminator_config)]
    path, reason = choose_attention(trainer, encoders, options.batch, length)
    print(f"attention: {path} ({reason})", file=sys.stderr)
    device = torch.device("cuda" if options.device == "gpu" else "cpu")
    return Setup(config, workload, device, cpu_autocast, path)


def measure(options: argparse.Namespace, folder: Path, memory: dict[str, int | None]) -> None:
    """Check agreement, time all variants, and print the summary; then the profiles, if asked for."""
    begin = time.monotonic()
    setup = set_up(options, folder)
    batches = setup.workload.batches(setup.config, options.warmup + options.segment)
    agreed, flops = agree(setup, batches)
    variants = {what: setup.build(what, batches) for what in options.what}
    seconds: dict[str, list[float]] = {what: [] for what in variants}
    rounds = [(turn, what) for turn in range(options.repeats + 1) for what in variants]
    for turn, what in tqdm(rounds, desc="blocks", file=sys.stderr):
        if turn > 1 and what == options.what[0] and time.monotonic() - begin > options.seconds:
            break  # every variant has at least one block
        if options.device == "cpu":
            use_allocator_of(what)
        taken = variants[what].block(options.warmup + options.segment)[options.warmup - 1 :]
        if turn:  # the first block of each includes compilation and the start of libraries and workers
            seconds[what] += taken
    result = {
        "benchmark": "pretrain_step",
        "options": {**vars(options), "data": "synthetic" if options.data is None else os.path.basename(options.data)},
        "length": setup.config.data.max_seq_length,
        "attention": setup.attention,
        "loader_workers": setup.config.data.num_workers,
        "agreement": agreed,
        **summary(seconds, batches, flops, memory),
        **mfu(seconds, flops, options),
        "flops_counted": HOW_FLOPS,
        "memory_counted": HOW_MEMORY,
        "reference_optimizer": reference.OPTIMIZER,
        "machine": describe(),
    }
    for name in ("memory_only", "profile", "seconds"):
        del result["options"][name]
    print(json.dumps(result), flush=True)
    for what in sorted({"b", "c"} & set(variants)) if options.profile else ():
        variant = variants[what]
        assert isinstance(variant, BareSteps | TrainerSteps)
        about = {"benchmark": "profile", "variant": NAMES[what], "options": result["options"]}
        print(
            json.dumps({**about, "length": result["length"], **profile(variant), "machine": result["machine"]}),
            flush=True,
        )
    for variant in variants.values():
        if isinstance(variant, TrainerSteps):
            variant.trainer.close()


def agree(setup: Setup, batches: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, float]]:
    """Check that the losses of both agree on the first batch, and count FLOPs per step, averaged over the batches.

    The forward is eager. TF32, which Composer enables, is disabled here, so that fp32 is full fp32.
    """
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    ours = setup.ours()
    magnify(ours.model)
    theirs = reference.ReferenceElectra(ours.model)
    agreed = compare_losses(setup, ours, theirs, batches[0])
    agreed.check()
    torch.backends.cuda.matmul.allow_tf32 = tf32
    length = setup.config.data.max_seq_length
    flops = {
        "a": statistics.mean(reference.flops(theirs, reference.Unpacking(batch).rows, length) for batch in batches),
        "b": statistics.mean(ours.flops_per_batch(batch) for batch in batches),
    }
    facts = {"ours": agreed.ours, "reference": agreed.reference, "tolerance": agreed.tolerance}
    return {**facts, "relative_difference": agreed.relative_difference}, flops


def summary(
    seconds: dict[str, list[float]],
    batches: list[dict[str, Any]],
    flops: dict[str, float],
    memory: dict[str, int | None],
) -> dict[str, Any]:
    """Summarize step times, tokens per second and ratios between variants.

    Args:
        seconds: variant → duration of every timed step.
        batches: packed batches of an epoch.
        flops: FLOPs per step of a and b.
        memory: variant → peak bytes; empty if not measured.
    """
    tokens = statistics.mean(int((batch["sequence_ids"] > 0).sum()) for batch in batches)
    median = {what: statistics.median(taken) for what, taken in seconds.items()}

    def percent(what: str, base: str) -> float | None:
        return round(100 * (median[what] / median[base] - 1), 2) if {what, base} <= set(median) else None

    known = memory.get("a") and memory.get("b")
    return {
        "tokens_per_step": tokens,
        "step_ms": {
            NAMES[what]: {"median": median_ms(taken), "min": round(1000 * min(taken), 3), "steps": len(taken)}
            for what, taken in seconds.items()
        },
        "tokens_per_second": {NAMES[what]: round(tokens / value) for what, value in median.items()},
        "speedup": round(median["a"] / median["b"], 3) if {"a", "b"} <= set(median) else None,
        "trainer_overhead_percent": percent("c", "b"),
        "callbacks_cost_percent": percent("c", "d"),
        "peak_memory_bytes": {NAMES[what]: value for what, value in memory.items()},
        "memory_ratio": round(memory["b"] / memory["a"], 3) if known else None,  # type: ignore[operator]
        "flops_per_step": {NAMES[what]: round(value) for what, value in flops.items()},
    }


def mfu(seconds: dict[str, list[float]], flops: dict[str, float], options: argparse.Namespace) -> dict[str, Any]:
    """Compute MFU: FLOPs that the step needs, divided by time and the GPU's peak for dense products."""
    if options.device != "gpu":
        return {"mfu": None, "mfu_note": "the peak of a CPU is not known"}
    peak = peak_flops(options.precision)
    if not peak:
        note = f"the peak of {torch.cuda.get_device_name()} in {options.precision} is not known"
        return {"mfu": None, "mfu_note": note}
    shares = {NAMES[what]: round(flops["b"] / (statistics.median(taken) * peak), 4) for what, taken in seconds.items()}
    return {"mfu": shares, "mfu_note": f"of {peak / 1e12:g} TFLOP/s, dense, in {options.precision}"}


def memory_in_processes(options: argparse.Namespace, arguments: list[str]) -> dict[str, int | None]:
    """Measure the peak memory of each variant, each in its own process, so that only its own buffers count.

    Raises:
        SystemExit: a process failed.
    """
    found = {}
    for what in (what for what in options.what if what in MEMORY_OF):
        command = [sys.executable, __file__, "--memory-only", what, *arguments]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"error: measuring the memory of {NAMES[what]} failed; see above, or set --skip-memory")
        found[what] = json.loads(done.stdout.splitlines()[-1])["bytes"]
    return found


def memory_of(options: argparse.Namespace, folder: Path) -> int | None:
    """Measure the peak bytes of building `options.memory_only` and running :data:`MEMORY_STEPS` steps."""
    options.what = [options.memory_only]
    options.warmup, options.segment = 1, MEMORY_STEPS - 1
    sizes = {"size": "tiny", "batch": 2, "vocab": 99, "data": None, "length": None, "overrides": []}
    tiny = argparse.Namespace(**{**vars(options), **sizes})
    run_memory_steps(set_up(tiny, folder / "warmup"), options.memory_only)
    setup = set_up(options, folder)
    with PeakMemory(setup.device) as peak:
        run_memory_steps(setup, options.memory_only)
    return peak.bytes


def run_memory_steps(setup: Setup, what: str) -> None:
    variant = setup.build(what, setup.workload.batches(setup.config, MEMORY_STEPS))
    variant.block(MEMORY_STEPS)
    if isinstance(variant, TrainerSteps):
        variant.trainer.close()
    del variant
    gc.collect()


if __name__ == "__main__":
    report_user_errors(main)()
