"""The command `electra`: which command line each name stands for, and what it says of names that are none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from setuptools import find_packages
from tiny import ROOT

from electra_composer import command, shipped
from electra_composer.command import COMMANDS, Command, command_line, program_of, usage
from electra_composer.errors import UserError
from electra_composer.shipped import configurations, find_configuration

PRETRAIN = str(ROOT / "electra_composer/pretrain.py")


def electra(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, as its console script does."""
    script = "import sys; from electra_composer.command import main; sys.exit(main())"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-X", "importtime", "-c", script, *arguments]
    return subprocess.run(words, capture_output=True, text=True, env=environment, cwd=cwd, check=False)


def test_a_program_is_run_by_its_path() -> None:
    assert command_line(["pretrain", "small", "seed=2"]) == [sys.executable, PRETRAIN, "small", "seed=2"]
    convert = command_line(["convert", "--out", "x"])
    assert convert == [sys.executable, str(ROOT / "data_prep/convert_owt.py"), "--out", "x"]
    init = command_line(["init", "small"])
    assert init == [sys.executable, str(ROOT / "electra_composer/configurations.py"), "init", "small"]


def test_several_processes_are_started_by_the_launcher() -> None:
    launcher = [sys.executable, "-m", "composer.cli"]
    for words in (["-n", "2", "small"], ["small", "--nproc=2"], ["-n2", "small"]):
        assert command_line(["pretrain", *words]) == [*launcher, "--nproc", "2", PRETRAIN, "small"]
    nodes = ["--world_size", "16", "--node_rank", "0", "--master_port", "7", "--master_addr", "a"]
    assert command_line(["pretrain", "small", *nodes, "--check"]) == [*launcher, *nodes, PRETRAIN, "small", "--check"]
    assert command_line(["export", "-n", "2"])[2:] == ["-n", "2"]  # left to the program, which refuses it


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pretrian"], "electra pretrian: no such command; did you mean pretrain?"),
        (["zzz"], "electra zzz: no such command; valid are config, convert, "),
        (["pretrain", "-n", "two", "small"], "argument -n/--nproc: is 'two'; expected an integer from 1 to 100,000"),
        (["glue", "glue", "-n"], "argument -n/--nproc: expected one argument; see --help"),
    ],
)
def test_what_is_misspelt(words: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        command_line(words)
    assert str(caught.value).startswith(message)


def test_a_module_that_is_not_there_is_no_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(COMMANDS, "absent", Command("electra_composer.absent", "nothing"))
    assert "absent" not in usage()
    with pytest.raises(UserError, match="electra absent: no such command"):
        command_line(["absent"])
    monkeypatch.setattr(shipped, "REPOSITORY", tmp_path)
    (tmp_path / "electra_composer/absent").mkdir(parents=True)
    (tmp_path / "electra_composer/absent/__main__.py").touch()
    assert program_of(COMMANDS["absent"]) == tmp_path / "electra_composer/absent/__main__.py"


def test_help_imports_no_library(tmp_path: Path) -> None:
    done = electra("--help", cwd=tmp_path)
    assert done.returncode == 0
    for name in (
        "convert",
        "pretrain",
        "finetune",
        "glue",
        "predict",
        "export",
        "preview",
        "score",
        "init",
        "doctor",
        "config",
    ):
        assert f"\n  {name} " in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "composer", "transformers", "numpy"}
    assert electra(cwd=tmp_path).returncode == 2


def test_from_another_folder_by_the_name_of_a_configuration(tmp_path: Path) -> None:
    """The program itself answers, with its own status."""
    done = electra("pretrain", "small", "optimizer.lr=-1", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        "error: the command line: optimizer.lr is -1.0; expected a number in"
    )
    done = electra("glue", "gleu", cwd=tmp_path)
    error = "error: gleu: no such file, and no shipped configuration; did you mean glue?"
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, error)


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - {"pretrain", "finetune", "glue", "init", "config"}))
def test_usage_names_the_command(name: str, tmp_path: Path) -> None:
    """The others have usages of both forms, or are parts of one program."""
    done = electra(name, "--help", cwd=tmp_path)
    assert (done.returncode, done.stdout.split(" [")[0]) == (0, f"usage: electra {name}")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("electra pre", {"pretrain", "preview", "predict"}),
        ("electra pretrain sma", {"small", "small_google", "small_seed"}),
        ("electra init glu", {"glue"}),
        ("electra config di", {"diff"}),
        ("electra config diff qu", {"quickstart", "quickstart_glue"}),
        ("electra pretrain small optimizer.b", {"optimizer.betas=", "optimizer.bias_correction="}),
        ("electra pretrain small seed=1 trainer.prec", {"trainer.precision="}),
        ("electra glue glue wnli=c", {"classification", "coreference"}),
        ("electra finetune qa task.multi_label=", {"auto", "true", "false"}),
        ("electra export my", {"my.txt"}),
    ],
)
def test_completion_in_a_shell(line: str, expected: set[str], tmp_path: Path) -> None:
    """What argcomplete answers the shell; after `=`, which divides words in bash, the value alone."""
    (tmp_path / "my.txt").touch()
    answer = tmp_path / "answer"
    request = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
    environment = {**request, "_ARGCOMPLETE_STDOUT_FILENAME": str(answer), "_ARGCOMPLETE_COMP_WORDBREAKS": "=:"}
    script = f"import os; os.environ.update({environment}); from electra_composer.command import main; main()"
    subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True
    )
    assert set(answer.read_text().split()) == expected


def test_configurations_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_configuration("small") == find_configuration("small.yaml") == str(ROOT / "yamls/small.yaml")
    assert set(configurations()) == {path.stem for path in (ROOT / "yamls").glob("*.yaml")}
    (tmp_path / "small").mkdir()  # a folder is none
    assert find_configuration("small") == str(ROOT / "yamls/small.yaml")
    (tmp_path / "base.yaml").touch()  # a file comes first
    for name in ("base.yaml", "other.yaml", "folder/small", "seed=1", "--other"):
        assert find_configuration(name) == name


def test_the_wheel_has_every_package_and_the_command() -> None:
    """What setup.py adds to the packages that setuptools finds; `make test-wheel` uses the wheel."""
    script = f'[project.scripts]\nelectra = "{command.__name__}:main"\n'
    assert script in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = find_packages(str(ROOT), include=["electra_composer", "electra_composer.*"])
    folders = {path.parent for path in (ROOT / "electra_composer").rglob("*.py")}
    assert {str(folder.relative_to(ROOT)).replace("/", ".") for folder in folders} == set(found)
