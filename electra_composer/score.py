"""Score sentences by their pseudo-log-likelihood: `python electra_composer/score.py CHECKPOINT [FILE]`.

    python electra_composer/score.py runs/electric sentences.txt --output scores.jsonl
    echo 'A fine film.' | python electra_composer/score.py runs/electric

CHECKPOINT is a run with objective.kind=electric, which scores a text by one forward, or objective.kind=mlm, which takes
one per token. Each line of the input is a text and gives a line of JSON, in the same order: the text, the sum of the
log probabilities of its tokens, each given all others, the number of tokens, and the mean. Lines are read and scored in
blocks: memory does not grow with their number.
"""

from __future__ import annotations

if __name__ == "__main__":
    from electra_composer.program import begin

    begin()

import argparse

from electra_composer.arguments import ArgumentParser, number, parse_early
from electra_composer.ranges import Range
from electra_composer.tasks.formats import STDIN, STDOUT, TEXT


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = ArgumentParser(prog="python electra_composer/score.py", description=__doc__, formatter_class=raw)
    parser.add_argument("checkpoint", help="a .pt file or run folder of pretrain.py")
    parser.add_argument("file", nargs="?", default=STDIN, help="a text per line, UTF-8; - (default): stdin")
    parser.add_argument("--output", default=STDOUT, help=".jsonl, .csv or .tsv; - (default): JSON lines to stdout")
    parser.add_argument("--tokens", action="store_true", help="add each token and its log probability")
    parser.add_argument("--truncate", action="store_true", help="score the beginning of a line that is too long")
    parser.add_argument("--batch-size", default=64, type=number(Range(ge=1, le=65536)), help="rows (default: 64)")
    parser.add_argument("--device", choices=["cpu", "gpu"], help="default: gpu if there is one")
    return parser.parse_args(arguments)


if __name__ == "__main__":  # before the imports that take seconds
    parse_early(parse)

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tqdm import tqdm

from electra_composer.checkpoints.weights import Checkpoint, read_checkpoint
from electra_composer.config import ObjectiveConfig
from electra_composer.corpus.tokenizer import without_truncation
from electra_composer.errors import UserError, report_user_errors
from electra_composer.model.electra import ElectraForPretraining
from electra_composer.model.pseudo_likelihood import KINDS, pseudo_log_likelihoods
from electra_composer.next_steps import describe_end
from electra_composer.signals import unwind
from electra_composer.tasks.inputs import blocks, open_input
from electra_composer.tasks.prediction_files import prediction_file
from electra_composer.tasks.rows import Row
from electra_composer.training.devices import choose_device

BLOCK = 4096  # lines that are in memory at a time


class Scorer:
    """Scores texts by a checkpoint.

    Args:
        checkpoint: of a run of one of the kinds of objectives that give probabilities to the tokens of a text.
        device: `cpu` or `cuda`.
        batch_size: rows of a forward.
        truncate: score the beginning of a text that is too long.

    Attributes:
        max_length: tokens of a text, at most: rows of the run without `[CLS]` and `[SEP]`. Later positions were not
            trained, even if the model has some.

    Raises:
        UserError: a run of another kind.
    """

    def __init__(self, checkpoint: Checkpoint, device: str = "cpu", batch_size: int = 64, truncate: bool = False):
        kind = ObjectiveConfig(**checkpoint.config["objective"]).kind
        if kind not in KINDS:
            expected = " or ".join(f"objective.kind={name}" for name in KINDS)
            raise UserError(
                f"{checkpoint.path}: a run with objective.kind={kind}, which gives no probability to the tokens of a "
                f"text; expected one with {expected}: pretrain one"
            )
        self.path, self.batch_size, self.truncate = checkpoint.path, batch_size, truncate
        self.model: ElectraForPretraining = checkpoint.build_model().to(device)
        self.max_length = checkpoint.config["data"]["max_seq_length"] - 2
        self.tokenizer = without_truncation(checkpoint.tokenizer)
        self.tokenizer.encode_special_tokens = True  # "[MASK]" in a text is text, as in a conversion

    def score(
        self, rows: Sequence[Row], with_tokens: bool = False, progress: Callable[[int], object] = lambda _: None
    ) -> Iterator[dict[str, Any]]:
        """Yield the record of each row in the order of the rows; they are computed in order of their lengths.

        Args:
            rows: with a column `text`.
            with_tokens: add the tokens and their log probabilities.
            progress: called with the number of rows of each batch.

        Raises:
            UserError: a text is too long.
        """
        encodings = self.tokenizer.encode_batch([row.values["text"].strip() for row in rows], add_special_tokens=False)
        texts = [encoding.ids[: self.max_length] for encoding in encodings]
        for row, encoding in zip(rows, encodings, strict=True):
            if len(encoding.ids) > self.max_length and not self.truncate:
                raise UserError(
                    f"{row.where}: has {len(encoding.ids):,} tokens; expected at most {self.max_length:,}, since rows "
                    f"of {self.path} have {self.max_length + 2:,}: divide the line, or pass --truncate"
                )
        scores: list[list[float]] = [[] for _ in texts]
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            found = pseudo_log_likelihoods(self.model, [texts[index] for index in chosen], self.batch_size)
            for index, each in zip(chosen, found, strict=True):
                scores[index] = each
            progress(len(chosen))
        for row, encoding, each in zip(rows, encodings, scores, strict=True):
            yield record_of(row.values["text"], encoding.tokens, each, with_tokens)


def record_of(text: str, tokens: Sequence[str], scores: Sequence[float], with_tokens: bool) -> dict[str, Any]:
    """Return a line of the output; a text without tokens has the score 0, and no mean."""
    total = math.fsum(scores)
    record = {
        "text": text,
        "score": total,
        "tokens": len(scores),
        "score_per_token": total / len(scores) if scores else None,
    }
    if with_tokens:
        record["token_scores"] = [list(pair) for pair in zip(tokens, scores, strict=False)]  # some may be truncated
    return record


@report_user_errors
def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    arguments = parse(argv)
    device = "cuda" if choose_device(arguments.device, "--device") == "gpu" else "cpu"
    scorer = Scorer(read_checkpoint(arguments.checkpoint), device, arguments.batch_size, arguments.truncate)
    lines, count = open_input(arguments.file, TEXT), 0
    unwind()
    with prediction_file(arguments.output) as write, tqdm(unit=" lines", disable=None) as bar:
        for block in blocks(lines, None, BLOCK):
            for record in scorer.score(block, arguments.tokens, bar.update):
                write(record)
            count += len(block)
    if arguments.output != STDOUT:
        print(describe_end({f"{count:,} scores": arguments.output}, {}))


if __name__ == "__main__":
    main()
