"""The command `electra`: every program by name, from any folder: `electra pretrain small data.path=data/mine`.

It replaces itself by the program, so that this runs as it does by its path.
"""

from __future__ import annotations

if __name__ == "__main__":
    from electra_composer.program import begin

    begin()

import importlib.metadata
import os
import sys
from pathlib import Path
from typing import NamedTuple

from electra_composer.arguments import NAME, ArgumentParser, number
from electra_composer.errors import UserError, nearest, report_user_errors
from electra_composer.ranges import Range
from electra_composer.shipped import shipped


class Command(NamedTuple):
    """A program.

    Attributes:
        module: it is run by the path of its file.
        summary: for the list of commands.
        arguments: that come before those of the command line.
        launches: whether options of Composer's launcher may come before or between its arguments.
    """

    module: str
    summary: str
    arguments: tuple[str, ...] = ()
    launches: bool = False


COMMANDS = {
    "quickstart": Command("electra_composer.quickstart", "try every step on installed text, in minutes"),
    "convert": Command("data_prep.convert_owt", "text to shards"),
    "pretrain": Command("electra_composer.pretrain", "pretrain: electra pretrain small data.path=data/mine", (), True),
    "finetune": Command("electra_composer.finetune", "finetune on a task of your own", (), True),
    "glue": Command("electra_composer.glue", "finetune on GLUE", (), True),
    "predict": Command("electra_composer.predict", "predict with a finetuned model"),
    "export": Command("electra_composer.export", "write a pretrained model for transformers"),
    "push": Command("electra_composer.push", "upload a model to the Hugging Face hub"),
    "preview": Command("electra_composer.preview", "show shards, and what a model says of them"),
    "score": Command("electra_composer.score", "score sentences by their pseudo-log-likelihood"),
    "report": Command("electra_composer.report", "a report of runs"),
    "init": Command("electra_composer.configurations", "print a shipped configuration: electra init small", ("init",)),
    "config": Command("electra_composer.configurations", "compare two configurations: electra config diff A B"),
    "doctor": Command("electra_composer.doctor", "check this machine and its libraries"),
}
PROCESSES = Range(ge=1, le=100_000)


def program_of(command: Command) -> Path | None:
    """Return the file of a program, which of a package is its `__main__.py`; None if there is none."""
    path = command.module.replace(".", "/")
    files = (shipped(f"{path}.py"), shipped(f"{path}/__main__.py"))
    return next((file for file in files if file.is_file()), None)


def command_line(arguments: list[str]) -> list[str]:
    """Return the command line that `electra ARGUMENTS` stands for.

    Raises:
        UserError: there is no such command; the message has the nearest.
    """
    programs = {name: path for name, command in COMMANDS.items() if (path := program_of(command)) is not None}
    name, *rest = arguments
    if name not in programs:
        raise UserError(f"electra {name}: no such command; {nearest(name, list(programs))}")
    launcher: list[str] = []
    if COMMANDS[name].launches:
        launcher, rest = split_launcher(rest)
    run = [sys.executable, *(["-m", "composer.cli", *launcher] if launcher else [])]
    return [*run, str(programs[name]), *COMMANDS[name].arguments, *rest]


def split_launcher(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Divide arguments into the options of Composer's launcher and the rest.

    Raises:
        UserError: a number is missing, or none.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-n", "--nproc", type=number(PROCESSES))
    for option in ("--world_size", "--base_rank", "--node_rank", "--master_port"):
        parser.add_argument(option, type=number(Range(ge=0, le=100_000)))
    for option in ("--master_addr", "--stdout", "--stderr"):
        parser.add_argument(option)
    options, rest = parser.parse_known_args(arguments)
    given = {name: value for name, value in vars(options).items() if value is not None}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))], rest


def usage() -> str:
    """Describe the commands."""
    there = {name: command for name, command in COMMANDS.items() if program_of(command) is not None}
    lines = [f"  {name:10} {command.summary}" for name, command in there.items()]
    return "\n".join(
        [
            "usage: electra COMMAND …",
            "",
            *lines,
            "",
            "electra COMMAND --help describes a command, electra pretrain --help optimizer a part of its keys.",
            "pretrain, finetune and glue take the path of a YAML file or the name of a shipped one, and key=value.",
            "With -n PROCESSES they start by Composer's launcher, whose options for several nodes they take too.",
        ]
    )


@report_user_errors
def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    if "_ARGCOMPLETE" in os.environ:  # a shell asks for completions
        from electra_composer.completion import complete

        complete(name for name, command in COMMANDS.items() if program_of(command) is not None)
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        sys.exit(0 if arguments else 2)
    if arguments[0] == "--version":
        print(f"electra_composer {importlib.metadata.version('electra-composer')}")
        return
    command = command_line(arguments)
    sys.stdout.flush()
    os.execve(command[0], command, {**os.environ, NAME: f"electra {arguments[0]}"})


if __name__ == "__main__":
    main()
