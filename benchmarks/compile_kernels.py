"""Compile every Triton kernel of the project for GPUs that need not be there; prints one JSON line.

    python benchmarks/compile_kernels.py [--capabilities 80 90]

The kernels are launched as in a training step of ELECTRA-Small and ELECTRA-Base, in bf16 and with dropout, but compiled
instead of run. For each: registers per thread, bytes of them that are spilled to memory, shared memory, and how many
blocks, and so warps, an SM holds at a time. The exit status is 1 if a kernel spills registers.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from machine import print_result

from electra_composer.errors import UserError, report_user_errors
from electra_composer.model.kernels.masked_lm import HAS_TRITON

SHARED_BYTES = {80: 164 * 2**10, 90: 228 * 2**10}
"""Of an SM; a block occupies 1 KiB more than it asks for (CUDA C++ programming guide, technical specifications)."""

REGISTERS, WARPS = 2**16, 64
"""Of an SM; registers are given to warps in units of 256 (the same table)."""

Row = dict[str, Any]


class AbsentGPU:
    """Stands in for Triton's driver, which would ask the CUDA library.

    Args:
        capability: compute capability × 10.
    """

    def __init__(self, capability: int):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        """Return a number that differs between targets, because Triton keeps compiled kernels by device."""
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


@contextmanager
def compile_only(capability: int) -> Iterator[list[Row]]:
    """Compile launched kernels instead of running them; yields a list that receives a row for each.

    Triton's driver stays replaced for the rest of the process: without a GPU there is none to return to.
    """
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    rows: list[Row] = []
    run = JITFunction.run

    def compile_instead(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled = run(kernel, *args, grid=grid, warmup=True, **options)
        tiles = {name: value for name, value in options.items() if name.startswith(("BLOCK", "STEP", "TILE"))}
        numbers = resources(compiled.asm["cubin"], compiled.metadata.shared, options["num_warps"], capability)
        rows.append({"kernel": kernel.__name__, "capability": capability, "tiles": tiles, **numbers})

    driver.set_active(AbsentGPU(capability))
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, {"TRITON_CACHE_DIR": folder}),
        mock.patch.object(JITFunction, "run", compile_instead),
    ):
        yield rows


def resources(machine_code: bytes, shared: int, warps: int, capability: int) -> Row:
    """Read the resources of a kernel from its machine code with NVIDIA's tool, which Triton contains."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(machine_code)
        file.flush()
        printed = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    used = re.search(r"REG:(\d+) STACK:(\d+)", printed)
    if used is None:
        raise RuntimeError(f"{tool} printed no resources: {printed!r}")
    registers, stack = map(int, used.groups())
    limits = [WARPS // warps, REGISTERS // (-(-registers // 8) * 256 * warps)]
    if capability in SHARED_BYTES:
        limits.append(SHARED_BYTES[capability] // (shared + 1024))
    return {"warps": warps, "registers": registers, "spilled": stack, "shared": shared, "blocks_per_sm": min(limits)}


def attention_step(length: int, heads: int, size: int = 64) -> None:
    """Launch attention with dropout, forward and backward; one row, since the grid is no part of a kernel."""
    from electra_composer.model.kernels.attention_triton import attention_triton

    qkv = torch.zeros(1, length, 3 * heads * size, dtype=torch.bfloat16, requires_grad=True)
    ids = torch.ones(1, length, dtype=torch.long)
    out, _ = attention_triton(qkv, ids, torch.zeros(1, dtype=torch.long), heads, 0.1)
    out.sum().backward()


def masked_lm_step(width: int, gumbel: bool, vocab_size: int = 30522) -> None:
    """Launch the masked-LM head for BERT's vocabulary, forward and backward."""
    from electra_composer.model.kernels.masked_lm_triton import masked_lm_triton

    padded = -(-vocab_size // 64) * 64
    features, weight = (torch.zeros(rows, width, dtype=torch.bfloat16, requires_grad=True) for rows in (64, padded))
    bias = torch.zeros(padded, requires_grad=True)
    targets, numbers = torch.zeros(64, dtype=torch.long), torch.zeros(64)
    options = (vocab_size, 1.0, False, 0.0, gumbel)
    loss, *_ = masked_lm_triton(features, weight, bias, targets, numbers, numbers, targets, *options)
    loss.backward()


def layers_step(width: int) -> None:
    """Launch the kernels around the products of a layer with its feed-forward, forward and backward."""
    from electra_composer.model.kernels.layers_triton import add_norm, gelu_bias

    x, residual, inner = (
        torch.zeros(16, n, dtype=torch.bfloat16, requires_grad=True) for n in (width, width, 4 * width)
    )
    bias, wide_bias = (torch.zeros(n, dtype=torch.bfloat16, requires_grad=True) for n in (width, 4 * width))
    weight, shift = (torch.zeros(width, requires_grad=True) for _ in range(2))
    stream, product, *_ = add_norm(x, bias, residual, weight, shift, torch.zeros(1, dtype=torch.long), 0.1, 1e-12)
    (stream.sum() + product.sum() + gelu_bias(inner, wide_bias).sum()).backward()


def embeddings_step(width: int, positions: int = 512) -> None:
    """Launch the embeddings' kernels, forward and backward."""
    from electra_composer.model.kernels.embeddings_triton import embed

    tables = [torch.zeros(entries, width, requires_grad=True) for entries in (64, positions, 2)]
    ids, seed = [torch.zeros(1, 16, dtype=torch.long)] * 3, torch.zeros(1, dtype=torch.long)
    weight, shift = (torch.zeros(width, requires_grad=True) for _ in range(2))
    stream, product, *_ = embed(*tables, *ids, weight, shift, seed, 0.1, 1e-12, torch.bfloat16)
    (stream.sum() + product.sum()).backward()


STEPS: dict[str, Callable[[], None]] = {
    "small, discriminator": lambda: attention_step(128, 4),
    "small, generator": lambda: attention_step(128, 1),
    "base at 512, discriminator": lambda: attention_step(512, 12),
    "base at 512, generator": lambda: attention_step(512, 4),
    "small, layers of the discriminator": lambda: layers_step(256),
    "small, layers of the generator": lambda: layers_step(64),
    "base, layers": lambda: layers_step(768),
    "large, layers": lambda: layers_step(1024),
    "small, embeddings": lambda: embeddings_step(128),
    "base, embeddings": lambda: embeddings_step(768),
    "small, masked LM": lambda: masked_lm_step(128, gumbel=False),
    "small, masked LM, gumbel": lambda: masked_lm_step(128, gumbel=True),
    "base, masked LM": lambda: masked_lm_step(768, gumbel=False),
}
"""Part of a training step → function that launches its kernels."""


def compile_steps(capability: int, steps: dict[str, Callable[[], None]]) -> list[Row]:
    """Return a row for every kernel of these steps."""
    from electra_composer.model.kernels import attention_triton

    rows = []
    with mock.patch.object(attention_triton, "compute_capability", return_value=divmod(capability, 10)):
        for step, launch in steps.items():
            with compile_only(capability) as compiled:
                launch()
            rows += [{"step": step, **row} for row in compiled]
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Compile and print; returns the exit status."""
    parser = argparse.ArgumentParser(prog="benchmarks/compile_kernels.py", description=__doc__.split("\n")[0])
    parser.add_argument("--capabilities", type=int, nargs="+", default=[80, 90], help="compute capability × 10")
    parser.add_argument("--steps", nargs="+", default=list(STEPS), metavar="STEP", help=f"of {', '.join(STEPS)}")
    options = parser.parse_args(arguments)
    if not HAS_TRITON or os.environ.get("TRITON_INTERPRET") == "1":
        raise UserError("the kernels are compiled by the package triton; install it, and unset TRITON_INTERPRET")
    if unknown := set(options.steps) - set(STEPS):
        raise UserError(f"--steps has {', '.join(sorted(unknown))}; expected some of {', '.join(STEPS)}")
    steps = {step: STEPS[step] for step in options.steps}
    rows = [row for capability in options.capabilities for row in compile_steps(capability, steps)]
    print_result("compile_kernels", kernels=rows)
    spilled = [f"{row['kernel']} ({row['step']}, sm_{row['capability']})" for row in rows if row["spilled"]]
    if spilled:
        print(f"spilled registers: {', '.join(spilled)}", file=sys.stderr)
    return int(bool(spilled))


if __name__ == "__main__":
    sys.exit(report_user_errors(main)())
