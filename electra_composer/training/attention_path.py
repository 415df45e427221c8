"""Choice of the attention path of a run (model/kernels/attention.py): configured, or the fastest on this machine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from composer.utils import dist
from torch import Tensor

from electra_composer.config import TrainerConfig
from electra_composer.errors import UserError
from electra_composer.model.encoder import EncoderConfig
from electra_composer.model.kernels.attention import attention, pattern_of
from electra_composer.model.kernels.masked_lm import HAS_TRITON
from electra_composer.training.devices import resolve_device

log = logging.getLogger(__name__)

LARGEST_ERROR = 0.05
"""Of a token's vector, relative to its norm: rounding to bf16 gives up to 0.02, a wrong token about 1."""


def choose_attention(
    trainer: TrainerConfig, encoders: Sequence[EncoderConfig], rows: int, length: int
) -> tuple[str, str]:
    """Choose the attention path of a run, one for all its encoders.

    On CUDA, `auto` times forward and backward of the layers of all encoders, on a batch of the run's shape, with each
    path. Paths whose results differ from those of `sdpa` are not taken, with a warning. Rank 0 chooses for all ranks.

    Args:
        trainer: checked by :func:`resolve_device`.
        encoders: sizes of the run's encoders: generator and discriminator, or the one that is finetuned.
        rows: rows of a microbatch.
        length: tokens of a row.

    Returns:
        `sdpa`, `varlen` or `triton`, and the reason, for the log.

    Raises:
        UserError: `trainer.attention` is triton, and Triton is missing or does not support these sizes.
    """
    if trainer.attention == "triton" and (reason := triton_unsupported(encoders, length)):
        raise UserError(f"trainer.attention is triton, but {reason}; set trainer.attention=auto or sdpa")
    if trainer.attention != "auto":
        return trainer.attention, "trainer.attention"
    device, precision, _ = resolve_device(trainer)
    if device == "cpu":
        return "sdpa", "the only path on a CPU"
    choice = [("", "")]
    if dist.get_global_rank() == 0:
        dtype = {"fp32": torch.float32, "amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}[precision]
        paths = ["sdpa"] if precision == "fp32" else ["sdpa", "varlen"]
        paths += [] if triton_unsupported(encoders, length) else ["triton"]
        calls = {path: LayerCalls(path, encoders, rows, length, dtype, "cuda") for path in paths}
        choice = [fastest({path: calls[path].prepare for path in paths}, wrong_paths(calls))]
    dist.broadcast_object_list(choice)
    return choice[0]


def triton_unsupported(encoders: Sequence[EncoderConfig], length: int) -> str | None:
    """Return why the Triton path cannot be used for these encoders, or None."""
    if not HAS_TRITON:
        return "the package triton is missing"
    from electra_composer.model.kernels.attention_triton import unsupported

    reasons = [unsupported(length, encoder.hidden_size // encoder.num_heads) for encoder in encoders]
    wrong = next(filter(None, reasons), None)
    return wrong and f"it does not support {wrong}"


class LayerCalls:
    """Attention of one layer of each encoder with one path, on random inputs.

    Two examples per row, the second half as long, and a row with padding: packed rows have one or a few examples.
    """

    def __init__(
        self, path: str, encoders: Sequence[EncoderConfig], rows: int, length: int, dtype: torch.dtype, device: str
    ):
        self.encoders = encoders
        generator = torch.Generator(device).manual_seed(0)
        places = torch.arange(length, device=device)
        ids = (places >= length * 2 // 3).long().add(1).repeat(rows, 1)
        ids[0, length - length // 4 :] = 0
        self.pattern = pattern_of(ids, path)
        shapes = [(rows, length, 3 * encoder.hidden_size) for encoder in encoders]
        self.inputs = [
            torch.randn(shape, generator=generator, device=device, dtype=dtype).requires_grad_() for shape in shapes
        ]

    def run(self, number: int, dropout_p: float) -> tuple[Tensor, Tensor]:
        """Compute the result of one encoder's layer, and the gradient of its sum."""
        qkv, heads = self.inputs[number], self.encoders[number].num_heads
        (pattern,) = self.pattern.of_layers(1, dropout_p)
        out = attention(qkv, pattern, heads, dropout_p)
        return out.detach(), torch.autograd.grad(out, qkv, torch.ones_like(out))[0]

    def prepare(self) -> Callable[[], float]:
        """Return a function that measures the seconds of all layers, forward and backward."""
        timers = [
            device_timer(lambda number=number: self.run(number, self.encoders[number].attention_dropout))  # type: ignore[misc]
            for number in range(len(self.encoders))
        ]
        layers = [encoder.num_layers for encoder in self.encoders]
        return lambda: sum(count * timer() for count, timer in zip(layers, timers, strict=True))


def device_timer(run: Callable[[], object], calls: int = 10) -> Callable[[], float]:
    """Capture calls in a CUDA graph, and return a function that replays it and returns the device's seconds per call.

    Launches from Python take several times as long as the kernels, and in training they are captured as well.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compile, and allocate
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds() -> float:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls

    return seconds


def wrong_paths(calls: dict[str, LayerCalls]) -> dict[str, str]:
    """Compare results and gradients without dropout with those of `sdpa`, and warn of paths that differ.

    Returns:
        Path → difference in words, or the error of a path that could not be compared.
    """
    wrong = {}
    for path in [path for path in calls if path != "sdpa"]:
        try:
            errors = [
                token_error(ours, theirs)
                for number in range(len(calls[path].encoders))
                for ours, theirs in zip(calls[path].run(number, 0.0), calls["sdpa"].run(number, 0.0), strict=True)
            ]
        except Exception as error:  # of torch, out of memory, or of Triton's compiler, whose errors have no common base
            wrong[path] = first_line(error)
            continue
        if not max(errors) < LARGEST_ERROR:
            wrong[path] = f"differs from sdpa by {max(errors):.2g}"
            log.warning("attention: %s %s on this device and is not used; please report it", path, wrong[path])
    return wrong


def first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def token_error(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference of a token's vector, relative to its norm plus the mean norm."""
    ours, theirs = ours.float(), theirs.float()
    norms = theirs.norm(dim=-1)
    return ((ours - theirs).norm(dim=-1) / (norms + norms.mean())).nan_to_num(torch.inf).max().item()


def fastest(
    paths: dict[str, Callable[[], Callable[[], float]]], wrong: dict[str, str], repeats: int = 5
) -> tuple[str, str]:
    """Time several code paths in turn.

    Args:
        paths: name → function that prepares the path and returns a function that runs it and returns its seconds.
        wrong: name → reason, of paths that must not be taken.
        repeats: timed runs per path.

    Returns:
        The path with the smallest median time, and a text with all median times and the reasons against others.

    Raises:
        RuntimeError: all paths failed.
    """
    failed, ready = dict(wrong), {}
    for path, prepare in paths.items():
        if path not in failed:
            try:
                ready[path] = prepare()
            except Exception as error:  # see wrong_paths
                failed[path] = first_line(error)
    rounds = [{path: seconds() for path, seconds in ready.items()} for _ in range(repeats)]
    medians = {path: sorted(times[path] for times in rounds)[repeats // 2] for path in ready}
    words = [f"{path} {1e3 * medians[path]:.2f} ms" if path in medians else f"{path}: {failed[path]}" for path in paths]
    if not medians:
        raise RuntimeError(f"no path of attention runs here: {'; '.join(words)}")
    return min(medians, key=lambda path: medians[path]), "all layers, measured: " + ", ".join(words)
