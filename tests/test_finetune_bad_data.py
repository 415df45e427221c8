"""finetune.py on data with faults: what ends the start with one line, and what is left out and said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from glue_tiny import write_source
from tiny import ROOT

from electra_composer import finetune
from electra_composer.config_loading import load_config
from electra_composer.errors import UserError
from electra_composer.finetune_config import FinetuneConfig

GOOD = {
    "classification": ("train.csv", "text,label\n" + "good film,yes\nbad plot,no\n" * 6),
    "regression": ("train.csv", "text,score\n" + "good film,1\nbad plot,2.5\n" * 6),
    "tagging": ("train.conll", "the\tO\nfilm\tB-WORK\n\n" * 6),
    "qa": (
        "train.jsonl",
        json.dumps({"question": "the", "context": "a film", "answers": {"text": ["film"], "answer_start": [2]}}) + "\n",
    ),
}
QA = {"question": "the", "context": "a film", "answers": {"text": ["film"], "answer_start": [2]}}


def jsonl(**changes: object) -> str:
    return json.dumps(QA | changes) + "\n"


# kind, content of the validation file, the error (after the folder)
FAULTS = [
    ("classification", "text,label\ngood,yes\nbad,perhaps\n", "validation.csv:3: no training example has the label"),
    ("classification", "text,stars\ngood,yes\n", "data.columns.label=label: validation.csv has no such column"),
    ("classification", "text,label\ngood,yes,more\n", "validation.csv:2: 3 columns; expected 2"),
    ("classification", 'text,label\n"good,yes\nbad,no\n', "validation.csv:2: "),
    ("classification", b"text,label\ngood,yes\n\xff\xfe,no\n", "validation.csv:3: "),
    ("classification", "text,label\n,yes\n ,no\ngood,yes\n", "validation: 2 of 3 rows left out: 2 have an empty text"),
    ("classification", "text,label\n", "validation.csv: no rows"),
    ("classification", "", "validation.csv: "),
    ("regression", "text,score\ngood,1\nbad,many\n", "validation.csv:3: score is 'many'; expected a finite number"),
    ("regression", "text,score\ngood,nan\n", "validation.csv:2: score is 'nan'"),
    ("tagging", "the\tO\nfilm\n", "validation.conll:2: "),
    ("tagging", "the\tO\nfilm\tB-PERSON\n", "validation.conll:1: "),
    ("tagging", "the\tO\nfilm\tWORK\n", "validation.conll:1: "),
    ("qa", jsonl(answers=[7]), "validation.jsonl:1: "),
    ("qa", jsonl(context=7), "validation.jsonl:1: "),
    ("qa", jsonl() + "{broken\n", "validation.jsonl:2"),
    ("qa", jsonl(id="one") + jsonl(id="one"), "validation.jsonl:2: "),
]

# kind, content of the training file, what is said; the run goes on
LEFT_OUT = [
    ("classification", GOOD["classification"][1] + ",yes\ngood,\n", "2 of 14 rows left out: 1 has an empty text"),
    (
        "classification",
        GOOD["classification"][1] + '"two\nlines, ""quoted""",maybe\n',
        "1 of the 3 labels has a single",
    ),
    ("tagging", GOOD["tagging"][1] + "bad\tB-PLOT\n", "train"),
    ("qa", jsonl() * 4 + jsonl(answers={"text": ["plot"], "answer_start": [2]}), "1 of 5 rows left out: "),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_source(tmp_path_factory.mktemp("source"))


@pytest.fixture
def make_config(source: str, tmp_path: Path) -> Callable[..., FinetuneConfig]:
    def make(kind: str, train: str, validation: str | bytes) -> FinetuneConfig:
        name, _ = GOOD[kind]
        paths = {"train": tmp_path / name, "validation": tmp_path / name.replace("train", "validation")}
        paths["train"].write_text(train)
        paths["validation"].write_bytes(validation if isinstance(validation, bytes) else validation.encode())
        overrides = [f"data.{split}={path}" for split, path in paths.items()]
        overrides += [f"model.source={source}", f"checkpoints.folder={tmp_path / 'run'}", "trainer.precision=fp32"]
        return load_config(str(ROOT / "yamls" / f"{kind}.yaml"), overrides, FinetuneConfig)

    return make


@pytest.mark.parametrize(("kind", "validation", "message"), FAULTS)
def test_a_fault_is_one_line_with_its_place(
    make_config: Callable[..., FinetuneConfig], tmp_path: Path, kind: str, validation: str | bytes, message: str
) -> None:
    with pytest.raises(UserError) as caught:
        finetune.main(make_config(kind, GOOD[kind][1], validation))
    text = str(caught.value)
    assert "\n" not in text
    assert message in text.replace(f"{tmp_path}/", "")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("kind", "train", "said"), LEFT_OUT)
def test_what_is_left_out_is_said(
    make_config: Callable[..., FinetuneConfig], capsys: pytest.CaptureFixture[str], kind: str, train: str, said: str
) -> None:
    finetune.main(make_config(kind, train, GOOD[kind][1]), check_only=True)
    assert said in capsys.readouterr().out
