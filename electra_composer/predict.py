"""Predict with a finetuned model: `python electra_composer/predict.py RUN --input new.csv --output out.jsonl`.

    python electra_composer/predict.py runs/classification --input new.csv --columns text=review
    echo 'A fine film.' | python electra_composer/predict.py runs/classification

Each line of the output has the position of the example, from 0, and its prediction. Examples are read and predicted in
blocks: memory does not grow with their number.
"""

from __future__ import annotations

if __name__ == "__main__":
    from electra_composer.program import begin

    begin()

import argparse
import sys

from electra_composer.arguments import ArgumentParser, number, parse_early
from electra_composer.errors import UserError, report_user_errors
from electra_composer.ranges import Range
from electra_composer.tasks.formats import FORMATS, STDIN, STDOUT, TEXT


def column_choice(text: str) -> tuple[str, str]:
    """Parse `role=column`."""
    role, equals, column = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"is {text!r}; expected role=column, such as text=review")
    return role, column


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = ArgumentParser(prog="python electra_composer/predict.py", description=__doc__, formatter_class=raw)
    parser.add_argument("run", help="folder of a run of finetune.py, of a saved model, or of a finetuned ELECTRA")
    parser.add_argument("--input", default=STDIN, help="file, folder or pattern; - (default): stdin, by line")
    parser.add_argument("--output", default=STDOUT, help=".jsonl, .csv or .tsv; - (default): JSON lines to stdout")
    parser.add_argument("--format", default="auto", choices=["auto", TEXT, *FORMATS], help="of the input")
    parser.add_argument("--no-header", action="store_true", help="the first line of a csv or tsv is an example")
    parser.add_argument(
        "--columns", nargs="+", default=[], type=column_choice, metavar="ROLE=COLUMN", help="text=review"
    )
    parser.add_argument("--copy", nargs="+", default=[], metavar="COLUMN", help="columns to copy to the output")
    parser.add_argument("--select", help="best, ensemble or a seed; default: predict.select of the run")
    parser.add_argument("--batch-size", default=64, type=number(Range(ge=1, le=65536)), help="examples (default: 64)")
    parser.add_argument("--max-seq-length", type=number(Range(ge=5, le=65535)), help="default: that of the training")
    parser.add_argument("--device", choices=["cpu", "gpu"], help="default: gpu if there is one")
    return parser.parse_args(arguments)


if __name__ == "__main__":  # before the imports that take seconds
    parse_early(parse)

from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from electra_composer.finetuning.model_choice import model_folders
from electra_composer.next_steps import describe_end
from electra_composer.signals import unwind
from electra_composer.tasks.base import Split, Task
from electra_composer.tasks.columns import find_columns
from electra_composer.tasks.inference import check_ensemble, predict
from electra_composer.tasks.inputs import blocks, open_input
from electra_composer.tasks.prediction_files import prediction_file
from electra_composer.tasks.rows import LeftOut
from electra_composer.tasks.saved import SavedModel, load_model
from electra_composer.tasks.tables import Table
from electra_composer.training.devices import choose_device

BLOCK = 4096  # rows that are in memory at a time


def load_models(run: str, select: str | None, device: str | None, max_seq_length: int | None) -> list[SavedModel]:
    """Load the models to predict with onto a device.

    Raises:
        UserError: no such models, no such device, or a length beyond the positions of a model.
    """
    name = "cuda" if choose_device(device, "--device") == "gpu" else "cpu"
    models = [load_model(folder) for folder in model_folders(run, select)]
    check_ensemble(models)
    for model in models:
        positions = model.model.embeddings.position.num_embeddings
        if max_seq_length is not None and max_seq_length > positions:
            raise UserError(f"--max-seq-length={max_seq_length}, but {model.folder} has {positions} positions")
        model.max_seq_length = max_seq_length or model.max_seq_length
        model.model.to(name)
    return models


def columns_of(table: Table, task: Task, given: Mapping[str, str]) -> dict[str, str | list[str] | None]:
    """Find the columns of the roles of a task, without its labels, and say them on stderr.

    Those of the training examples are taken where the table has them and no others are given.

    Raises:
        UserError: there is no such column.
    """
    wanted = {role: names for role, names in task.roles.items() if role not in task.label_roles}
    known = {role: name for role, name in task.columns.items() if role in wanted and name in table.columns}
    try:
        columns = find_columns(table, "--columns", wanted, {**known, **given})
    except UserError as error:
        raise UserError(str(error).replace("--columns.", "--columns ")) from error
    found = " ".join(f"{role}={name}" for role, name in columns.items() if name is not None)
    print(f"columns: {found}", file=sys.stderr)
    return {**dict.fromkeys(task.label_roles), **columns}


def predict_table(
    models: Sequence[SavedModel],
    table: Table,
    columns: Mapping[str, Any],
    copied: Sequence[str],
    output: str,
    batch_size: int,
) -> int:
    """Write the predictions for all rows of a table, and return their number.

    Args:
        columns: of the roles of the task.
        copied: columns that are copied to the output.

    Raises:
        UserError: a row cannot be read, or the output cannot be written.
    """
    count, task = 0, models[0].task
    device = next(models[0].model.parameters()).device
    document = columns.get("document") if task.config.context else None
    with prediction_file(output) as write, tqdm(unit=" rows", disable=None) as bar:
        for block in blocks(table, document, BLOCK):
            predictions = predict(models, Split("input", block, columns, LeftOut("input")), batch_size, device)
            for row, prediction in zip(block, predictions, strict=True):
                write({"index": count, **{name: row.values.get(name) for name in copied}, **prediction})
                count += 1
            bar.update(len(block))
    return count


@report_user_errors
def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    arguments = parse(argv)
    models = load_models(arguments.run, arguments.select, arguments.device, arguments.max_seq_length)
    table = open_input(arguments.input, arguments.format, not arguments.no_header)
    columns = columns_of(table, models[0].task, dict(arguments.columns))
    if absent := [name for name in arguments.copy if name not in table.columns]:
        raise UserError(f"--copy: {table.files[0]} has no column {absent[0]}; it has {', '.join(table.columns)}")
    unwind()
    count = predict_table(models, table, columns, arguments.copy, arguments.output, arguments.batch_size)
    if arguments.output != STDOUT:
        print(describe_end({f"{count:,} predictions": arguments.output}, {}))


if __name__ == "__main__":
    main()
