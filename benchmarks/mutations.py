"""Apply faults to the code, one at a time, and report which the tests catch.

    python benchmarks/mutations.py
    python benchmarks/mutations.py --only clip schedule

Each mutation replaces one piece of text in a copy of the checkout and runs the test modules that should fail. Prints
`caught` with the first failing test, or `missed`, one line each, then one JSON line. Exits with 1 if a mutation was
missed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]


class Mutation(NamedTuple):
    """A fault: `old`, which occurs once in `path`, becomes `new`."""

    name: str
    fault: str
    path: str
    old: str
    new: str
    tests: str  # test modules, separated by spaces


MUTATIONS = [
    Mutation(
        "sign",
        "the RTD loss enters the total with a minus sign",
        "electra_composer/model/pretraining.py",
        "self.model.objective.gen_weight * mlm + self.model.objective.disc_weight * rtd",
        "self.model.objective.gen_weight * mlm - self.model.objective.disc_weight * rtd",
        "tests/model/test_pretraining.py",
    ),
    Mutation(
        "schedule",
        "the learning rate is one step ahead during warmup",
        "electra_composer/training/schedules.py",
        "(min(1.0, step / warmup) if warmup else 1.0)",
        "(min(1.0, (step + 1) / warmup) if warmup else 1.0)",
        "tests/training/test_schedules.py",
    ),
    Mutation(
        "tie",
        "the generator gets embeddings of its own",
        "electra_composer/model/networks.py",
        'None if model.sharing == "tied" else Embeddings(generator)',
        "Embeddings(generator)",
        "tests/model/test_electra.py",
    ),
    Mutation(
        "detach",
        "with sharing gdes, the RTD loss trains the generator's embeddings",
        "electra_composer/model/encoder.py",
        "(table.detach() for table in self._base[0].tables())",
        "self._base[0].tables()",
        "tests/model/test_sharing.py",
    ),
    Mutation(
        "attention",
        "attention crosses the examples of a row",
        "electra_composer/model/kernels/attention.py",
        "sequence_ids[:, None, :, None] != sequence_ids[:, None, None, :]",
        "(sequence_ids[:, None, :, None] > 0) != (sequence_ids[:, None, None, :] > 0)",
        "tests/model/kernels/test_attention.py tests/model/test_electra.py",
    ),
    Mutation(
        "seed",
        "the random state is not set for a batch, so that a resumed run draws other masks",
        "electra_composer/training/callbacks.py",
        "torch.default_generator.manual_seed(seed)",
        "pass",
        "tests/training/test_callbacks.py tests/checkpoints/test_exact_resume.py",
    ),
    Mutation(
        "column",
        "token types and positions of a batch are swapped",
        "electra_composer/batches/collation.py",
        '("input_ids", "token_type_ids", "position_ids", "sequence_ids")',
        '("input_ids", "position_ids", "token_type_ids", "sequence_ids")',
        "tests/batches/test_collation.py",
    ),
    Mutation(
        "clip",
        "gradients are not clipped",
        "electra_composer/training/numerical_guard.py",
        "if self.gradient_clip:",
        "if False:",
        "tests/training/test_numerical_guard.py",
    ),
    Mutation(
        "lock",
        "a second run may train in the same folder",
        "electra_composer/checkpoints/resuming.py",
        "fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "pass",
        "tests/checkpoints/test_resuming.py",
    ),
    Mutation(
        "hash",
        "the hash of a fetched shard is not checked",
        "electra_composer/batches/row_dataset.py",
        "validate_hash=HASH",
        "validate_hash=None",
        "tests/batches/test_remote_shards.py",
    ),
    Mutation(
        "label",
        "original tokens are labelled as replaced, and replaced ones as original",
        "electra_composer/model/masking.py",
        "(corrupted != originals) & (sequence_ids > 0)",
        "(corrupted == originals) & (sequence_ids > 0)",
        "tests/model/test_masking.py",
    ),
]


def apply(mutation: Mutation, checkout: Path) -> None:
    """Put the fault into a checkout.

    Raises:
        ValueError: the text to be replaced does not occur exactly once; update the mutation.
    """
    path = checkout / mutation.path
    text = path.read_text(encoding="utf-8")
    if text.count(mutation.old) != 1:
        raise ValueError(
            f"{mutation.name}: {mutation.old!r} occurs {text.count(mutation.old)} times in {mutation.path}"
        )
    path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")


def first_failure(mutation: Mutation) -> str | None:
    """Run the tests of a mutation on a copy of this checkout; the first that fails, None if all pass."""
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder) / "checkout"
        names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
            "\n"
        )
        for name in filter(None, names):
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, checkout / name, follow_symlinks=False)
        apply(mutation, checkout)
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", *mutation.tests.split()],
            cwd=checkout,
            env={**os.environ, "PYTHONPATH": str(checkout)},
            capture_output=True,
            text=True,
            check=False,
        )
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if done.returncode not in (0, 1) or done.returncode != bool(found):
        raise RuntimeError(f"{mutation.name}: pytest ended with {done.returncode}\n{done.stdout}{done.stderr}")
    return found[1] if found else None


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [mutation.name for mutation in MUTATIONS]
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, metavar="NAME", help="of " + ", ".join(names)
    )
    options = parser.parse_args()
    caught = {}
    for mutation in tqdm([each for each in MUTATIONS if each.name in options.only], desc="mutations"):
        caught[mutation.name] = failure = first_failure(mutation)
        tqdm.write(f"{'missed' if failure is None else 'caught'}  {mutation.fault}: {failure or mutation.tests}")
    print(
        json.dumps({"benchmark": "mutations", "caught": sum(map(bool, caught.values())), "of": len(caught), **caught})
    )
    sys.exit(None in caught.values())


if __name__ == "__main__":
    main()
