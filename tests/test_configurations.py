"""`electra init` and `electra config diff`."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import ROOT

from electra_composer.config_loading import load_config
from electra_composer.configurations import copy_of, describe_configurations, differences, main
from electra_composer.errors import UserError
from electra_composer.shipped import configurations

SMALL = ROOT / "yamls" / "small.yaml"


def test_a_copy_loads_and_names_the_schema(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["init", "small"])
    text = capsys.readouterr().out
    assert text == copy_of("small.yaml")
    first, rest = text.split("\n", 1)
    assert first == f"# yaml-language-server: $schema={ROOT / 'yamls' / 'schema.json'}"
    assert rest == SMALL.read_text(encoding="utf-8").split("\n", 1)[1]
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    assert differences(str(tmp_path / "mine.yaml"), "small") == []
    with pytest.raises(UserError, match=r"no configuration smal is shipped; did you mean small\?"):
        copy_of("smal")


def test_without_a_name_they_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["init"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(configurations())
    assert all(len(line.split()) > 4 for line in lines)
    assert describe_configurations().splitlines() == lines


def test_differences_of_two_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Defaults count as values, interpolations are resolved, and keys of one file alone have a dash in the other."""
    folder = "checkpoints: {folder: 'runs/${run_name}'}\n"
    changes = "trainer: {fsdp: {verbose: true}, progress_bar: true}\noptimizer: {betas: [0.9, 0.98]}\n"
    (tmp_path / "a.yaml").write_text(f"run_name: mine\n{folder}loggers: {{wandb: {{}}}}\n")
    (tmp_path / "b.yaml").write_text(f"run_name: other\n{folder}{changes}")
    a, b = str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")
    assert sorted(differences(a, b)) == [
        ("checkpoints.folder", "runs/mine", "runs/other"),
        ("loggers", "—", "{}"),
        ("loggers.wandb", "{}", "—"),
        ("optimizer.betas", "[0.9, 0.999]", "[0.9, 0.98]"),
        ("run_name", "mine", "other"),
        ("trainer.fsdp", "null", "—"),
        ("trainer.fsdp.verbose", "—", "true"),
    ]
    main(["diff", a, a])
    assert capsys.readouterr().out == "no differences\n"


def test_a_run_folder_and_a_shipped_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The saved configuration of a run of small.yaml differs from it in what its command line gave."""
    from electra_composer.config import PretrainConfig
    from electra_composer.config_loading import to_yaml

    config = load_config(str(SMALL), ["seed=7", "data.path=data/mine"], PretrainConfig)
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    main(["diff", "small", str(tmp_path)])
    heading, *rows = (line.split() for line in capsys.readouterr().out.splitlines())
    assert heading == ["small", str(tmp_path)]
    assert rows == [["seed", "42", "7"], ["data.path", "data/owt", "data/mine"]]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("smal", r"smal: no such file, and no shipped configuration; did you mean small\?"),
        ("{tmp}", r"config.yaml: No such file or directory; expected a YAML file, a run folder, or the name"),
        ("{tmp}/list.yaml", r"list.yaml: expected keys and values at the top level"),
        ("{tmp}/bad.yaml", r"bad.yaml: .*Interpolation key 'nothing' not found"),
        ("{tmp}/broken.yaml", r"broken.yaml: "),
    ],
)
def test_what_cannot_be_compared(tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "list.yaml").write_text("[1, 2]")
    (tmp_path / "bad.yaml").write_text("run_name: ${nothing}")
    (tmp_path / "broken.yaml").write_text("a: [1\nb: {")
    with pytest.raises(UserError, match=message):
        differences("small", path.format(tmp=tmp_path))
