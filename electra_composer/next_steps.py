"""The end of a program's output: where the results are, and the commands that come next."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from electra_composer.shipped import is_installed, shipped

SMALL, GLUE = "yamls/small.yaml", "yamls/glue.yaml"
SMALL_PATH, SMALL_LENGTH, SMALL_POSITIONS = "data/owt", 128, 512  # in SMALL
GLUE_SOURCE, GLUE_LENGTH = "runs/electra-small", 128  # in GLUE

Command = Sequence[str]


def describe_end(results: Mapping[str, str | None], commands: Mapping[str, Command | None]) -> str:
    """Format results and commands, quoted for a shell.

    Args:
        results: what it is → its path; None: left out.
        commands: what it does → the command line; None, or one whose program or YAML is not there: left out.
    """
    rows = {name: path for name, path in results.items() if path is not None}
    width = max(map(len, rows), default=0)
    lines = [f"{name:{width}}  {path}" for name, path in rows.items()]
    offered = {what: command for what, command in commands.items() if command is not None and _is_there(command)}
    for what, command in offered.items():
        lines += [f"{what}:", f"  {shlex.join(command)}"]
    return "\n".join(lines)


def _is_there(command: Command) -> bool:
    return all(os.path.isfile(word) for word in command if word.endswith((".py", ".yaml")) and "=" not in word)


def in_repository(path: str) -> str:
    """Return the path of a file of this repository: relative to the current folder if it is below it, else absolute."""
    full, here = shipped(path), Path.cwd()
    return str(full.relative_to(here) if full.is_relative_to(here) else full)


def program(name: str, configuration: str | None = None) -> list[str]:
    """Return the start of a command: a program by its path, or, without the repository, by the command `electra`.

    Args:
        configuration: path of its YAML file in the repository; such a program is started by Composer's launcher.
    """
    if is_installed():
        return ["electra", name, *([Path(configuration).stem] if configuration else [])]
    path = in_repository(f"electra_composer/{name}.py")
    return ["composer", path, in_repository(configuration)] if configuration else ["python", path]


def override(key: str, value: object) -> str:
    """Format `key=value` so that it is read back as this value."""
    text = str(value)
    # Plain YAML only for words and paths: OmegaConf reads more texts as numbers than yaml does, such as 1e-3.
    if isinstance(value, str) and not (re.match("[^\\W\\d]|/", text) and yaml.safe_load(text) == text):
        text = json.dumps(text, ensure_ascii=False)
    return f"{key}={text}"


def preview(folder: str, *arguments: str) -> Command:
    """Return the command that shows shards."""
    return ["python", "-m", "electra_composer.preview", folder, *arguments]


def pretrain(out: str, max_seq_length: int, is_remote: bool) -> Command:
    """Return the command that pretrains ELECTRA-Small on converted text."""
    name = os.path.basename(os.path.normpath(out))
    command = program("pretrain", SMALL)
    if is_remote:
        command += [override("data.remote", out), override("data.path", os.path.join("data", name))]
    elif out != SMALL_PATH:
        command.append(override("data.path", out))
    if out != SMALL_PATH:
        command.append(override("run_name", f"electra-small-{name}"))
    if max_seq_length != SMALL_LENGTH:
        command.append(override("data.max_seq_length", max_seq_length))
    if max_seq_length > SMALL_POSITIONS:
        command.append(override("model.max_positions", max_seq_length))
    return command


def finetune(source: str, name: str, max_positions: int) -> Command:
    """Return the command that finetunes `source` on GLUE. `name` becomes part of the folder of the results."""
    command = program("glue", GLUE)
    if source != GLUE_SOURCE:
        command += [override("model.source", source), override("checkpoints.folder", f"runs/glue-{name}")]
    if max_positions < GLUE_LENGTH:
        command.append(override("data.max_seq_length", max_positions))
    return command


def export(checkpoint: str, name: str) -> Command:
    """Return the command that exports a checkpoint for `transformers`."""
    return [*program("export"), checkpoint, os.path.join("exports", name)]


def score(checkpoint: str) -> Command:
    """Return the command that scores sentences of a file of one's own."""
    program = in_repository("electra_composer/score.py")
    return ["python", program, checkpoint, "sentences.txt", "--output", "scores.jsonl"]


def describe_scores(results: str, record: str, predictions: str | None, source: str) -> str:
    """Format the end of finetuning.

    Args:
        results, record, predictions: paths of the results file, the record of all runs and the submission.
        source: `model.source`.
    """
    is_export = os.path.isfile(os.path.join(source, "config.json"))
    ours = source if os.path.exists(source) and not is_export else None
    return describe_end(
        {
            "results": f"{results} (.md, .csv and .png beside it)",
            "all runs": record,
            "predictions": predictions,
        },
        {
            "statistics over models, with the results of each": [
                *("python", in_repository("electra_composer/glue_report.py"), results)
            ],
            "export for transformers": ours and export(ours, os.path.basename(os.path.normpath(ours))),
        },
    )


PIPELINES = {"classification": "text-classification", "regression": "text-classification", "tagging": "ner"}
"""Kind of a task → transformers' pipeline for it, of those that take a text."""


def describe_task(results: str, record: str, predictions: str | None, model: str | None, kind: str) -> str:
    """Format the end of finetuning on a task of one's own.

    Args:
        results, record, predictions: paths of the results file, the record of all runs and the predictions.
        model: folder of the best model.
        kind: of the task.
    """
    code = f"from transformers import pipeline; print(pipeline({PIPELINES.get(kind)!r}, {model!r})('A text.'))"
    new = ["--input", "new.jsonl", "--output", "predictions.jsonl"]
    return describe_end(
        {
            "results": f"{results} (.md, .csv and .png beside it)",
            "all runs": record,
            "best model": model,
            "predictions": predictions,
        },
        {
            "predict": model and [*program("predict"), model, *new],
            "use it in transformers": (model and kind in PIPELINES and ["python", "-c", code]) or None,
        },
    )
