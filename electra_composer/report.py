"""Write a report of pretraining runs: one HTML file that needs no network, and PNGs.

    python -m electra_composer.report runs/electra-small
    python -m electra_composer.report runs/first runs/second --output compared.html
    python -m electra_composer.report runs/electra-small --watch

It shows losses, predictions, speed and memory over steps, tokens or time; what both models make of the same text at
several stages of training; the scores of finetuning; starts, checkpoints and settings. See docs/reports.md.
"""

from __future__ import annotations

if __name__ == "__main__":
    from electra_composer.program import begin

    begin()

import argparse
from collections.abc import Sequence

from electra_composer.arguments import ArgumentParser, number, parse_early
from electra_composer.errors import UserError, one_line, report_user_errors
from electra_composer.ranges import Range


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="python -m electra_composer.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder of pretrain.py (checkpoints.folder)")
    parser.add_argument("--output", metavar="FILE.html", help="(report.html in the run's folder; of several, here)")
    parser.add_argument(
        "--results", nargs="+", default=[], metavar="FILE", help="results.json of glue.py or finetune.py to add"
    )
    parser.add_argument("--no-tokens", action="store_true", help="read no checkpoints")
    parser.add_argument(
        "--watch",
        nargs="?",
        const=30,
        type=number(Range(ge=1, le=86400)),
        metavar="SECONDS",
        help="write it again every %(const)s seconds while a run is running, and print its progress",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":  # before the imports that take seconds
    parse_early(_parse)

import logging
import os
import time

from electra_composer.atomic_files import write_file
from electra_composer.reports.page import Report, compose, pictures, render
from electra_composer.reports.runs import read_run, read_runs
from electra_composer.reports.summary import status_line

log = logging.getLogger(__name__)

REPORT = "report.html"  # in a run's folder
MOST_RUNS = 12


def write_report(report: Report, output: str, refresh: int | None = None) -> list[str]:
    """Write the page and, beside it, its pictures as `<name>-curves.png` and `<name>-results.png`.

    Args:
        refresh: seconds after which a browser loads the page again, while its runs are running; there are no pictures
            then.

    Returns:
        The paths; each file is replaced atomically.

    Raises:
        UserError: a file cannot be written.
    """
    stem = os.path.splitext(output)[0]
    content: dict[str, str | bytes] = {output: render(report, refresh)}
    if refresh is None:
        content |= {f"{stem}-{name}.png": png for name, png in pictures(report).items()}
    try:
        for path, each in content.items():
            write_file(path, each)
    except OSError as error:
        raise UserError(f"{output}: the report cannot be written: {error.strerror}; give another --output") from error
    return list(content)


def write_report_of_run(folder: str) -> str | None:
    """Write the report of a run that has ended into its folder.

    Returns:
        Its path; None, after a warning in one line, if that is not possible. It never raises an error: the run is done,
        and its exit status is not that of its report.
    """
    output = os.path.join(folder, REPORT)
    try:
        write_report(compose([read_run(folder)]), output)
    except Exception as error:  # also a bug of a library that draws
        log.warning("no report was written to %s: %s", output, one_line(error, 300) or type(error).__name__)
        return None
    return output


def watch(folders: Sequence[str], results: Sequence[str], output: str, seconds: int, with_tokens: bool) -> None:
    """Write the report every `seconds` until no run is running; the page reloads itself meanwhile.

    The tokens are computed again when there is a new checkpoint.
    """
    known: dict[tuple[str, int], Report] = {}
    while True:
        runs = read_runs(folders, results)
        is_running = any(run.is_running for run in runs)
        newest = [(run.folder, run.checkpoints[-1].batch if run.checkpoints else 0) for run in runs]
        key = (str(newest), len(newest))
        report = compose(runs, with_tokens and key not in known)
        if key in known:
            report.tokens = known[key].tokens
        known = {key: report}
        write_report(report, output, seconds if is_running else None)
        for run in runs:
            print(status_line(run), flush=True)
        if not is_running:
            return
        time.sleep(seconds)


@report_user_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = _parse(arguments)
    folders = list(dict.fromkeys(os.path.normpath(folder) for folder in options.runs))
    if len(folders) > MOST_RUNS:
        raise UserError(f"{len(folders)} runs; expected at most {MOST_RUNS}, whose curves can be told apart")
    output = options.output or (os.path.join(folders[0], REPORT) if len(folders) == 1 else REPORT)
    if not output.endswith((".html", ".htm")):
        raise UserError(f"--output {output}: expected a file name that ends in .html; the PNGs are written beside it")
    if options.watch is not None:
        print(f"open {output} in a browser; it reloads every {options.watch} s until the run ends", flush=True)
        watch(folders, options.results, output, options.watch, not options.no_tokens)
        return
    runs = read_runs(folders, options.results)
    for run in runs:
        print(status_line(run))
        for note in run.notes:
            print(f"  {note}")
    print("written: " + ", ".join(write_report(compose(runs, not options.no_tokens), output)))


if __name__ == "__main__":
    main()
