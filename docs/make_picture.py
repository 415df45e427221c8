"""Draw the curves of a pretraining run for the README: losses of both models, and AUC of the discriminator.

    python docs/make_picture.py                                         # runs/quickstart/pretrain → docs/curves.png
    python docs/make_picture.py runs/electra-small --out curves.png

Reads `metrics.jsonl` of the run folder. If the run's shards are still there, the MLM loss that can be reached without
context is drawn too. Background is transparent and colours are of medium lightness, for light and dark pages alike.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from electra_composer.batches.baselines import loss_without_context
from electra_composer.batches.shards import read_data
from electra_composer.config import PretrainConfig
from electra_composer.config_loading import load_config
from electra_composer.errors import UserError, report_user_errors

ROOT = Path(__file__).resolve().parents[1]
TEXT, GRID = "#7d8590", "#7d859040"
GENERATOR, DISCRIMINATOR, REFERENCE = "#e0823d", "#3d8be0", "#8a63d2"
COLORS = 64  # of the PNG's palette

Points = tuple[list[int], list[float]]


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics file.

    Raises:
        UserError: no metrics file, or no pretraining metrics in it.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected the folder of a pretraining run with loggers.metrics_file")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if not any("metrics/train/mlm_loss" in row for row in rows):
        raise UserError(f"{path}: no metrics/train/mlm_loss; expected the folder of a pretraining run")
    return rows


def points(rows: list[dict[str, Any]], name: str) -> Points:
    """Return the steps at which a metric was logged, and its values."""
    found = [(row["step"], row[name]) for row in rows if name in row]
    return [step for step, _ in found], [value for _, value in found]


def reference_loss(run: Path) -> float | None:
    """Return the MLM loss that word frequencies alone reach, or None if the run's shards are not here."""
    try:
        config = load_config(str(run / "config.yaml"), [], PretrainConfig)
        return loss_without_context(config.data, read_data(config.data), config.objective)
    except UserError:
        return None


def draw(rows: list[dict[str, Any]], reference: float | None) -> bytes:
    """Return a PNG of three panels over steps."""
    figure = Figure(figsize=(9.2, 2.7), layout="constrained")
    generator, discriminator, auc = figure.subplots(1, 3)
    panel(generator, rows, "mlm_loss", "generator: MLM loss", GENERATOR, (reference, "without context"))
    panel(discriminator, rows, "rtd_loss", "discriminator: RTD loss", DISCRIMINATOR)
    panel(auc, rows, "rtd_auc", "discriminator: AUC, held-out text", DISCRIMINATOR, (0.5, "chance"))
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=180, transparent=True)
    small = io.BytesIO()
    image = Image.open(file).convert("RGBA").quantize(COLORS, method=Image.Quantize.FASTOCTREE)
    image.save(small, format="png", optimize=True)
    return small.getvalue()


def panel(
    axes: Any,
    rows: list[dict[str, Any]],
    metric: str,
    title: str,
    color: str,
    reference: tuple[float | None, str] = (None, ""),
) -> None:
    """Draw a metric over steps: training as a line, evaluation as points, `reference` as a dashed line with a label."""
    steps, values = points(rows, f"metrics/train/{metric}")
    if steps:
        axes.plot(steps, values, color=color, linewidth=1.6)
    steps, values = points(rows, f"metrics/eval/{metric}")
    if steps:
        axes.plot(steps, values, color=color, linewidth=0 if metric != "rtd_auc" else 1.6, marker="o", markersize=5)
    level, label = reference
    if level is not None:
        axes.axhline(level, color=REFERENCE, linestyle="--", linewidth=1.2)
        axes.annotate(
            f"{label}: {level:.2f}",
            (0.98, level),
            xycoords=("axes fraction", "data"),
            xytext=(0, 4),
            textcoords="offset points",
            ha="right",
            color=REFERENCE,
            fontsize=9,
        )
    axes.set_title(title, color=TEXT, fontsize=10)
    axes.set_xlabel("step", color=TEXT, fontsize=9)
    axes.set_xlim(0, max(row["step"] for row in rows))
    axes.margins(y=0.12)
    axes.locator_params(nbins=6)
    axes.grid(color=GRID, linewidth=0.6)
    axes.tick_params(colors=TEXT, labelsize=9)
    for name, spine in axes.spines.items():
        spine.set_color(TEXT)
        spine.set_visible(name in ("left", "bottom"))


@report_user_errors
def main(argv: list[str] | None = None) -> None:
    """Draw the picture as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, nargs="?", default=Path("runs/quickstart/pretrain"), help="run folder")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "curves.png", help="file to write (%(default)s)")
    options = parser.parse_args(argv)
    options.out.write_bytes(draw(read_metrics(options.run), reference_loss(options.run)))
    print(f"{options.out}: {options.out.stat().st_size:,} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
