"""Saved models of question answering: transformers' pipeline gives our answers, and both heads load again."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from task_models import WORDS, build_source, outputs_of, random_model, split_of, task_of
from transformers import ElectraForQuestionAnswering, pipeline

from electra_composer.checkpoints.weights import Pretrained
from electra_composer.model.weight_maps import transformers_config
from electra_composer.tasks.inference import predict
from electra_composer.tasks.question_answering import QuestionAnswering
from electra_composer.tasks.saved import load_model, save_model

LENGTH = 40
ROLES: Any = {"question": "question", "context": "context"}


@pytest.fixture
def source(tmp_path: Path) -> Pretrained:
    return build_source(tmp_path)


@pytest.fixture
def examples() -> list[dict[str, str]]:
    rng = random.Random(0)

    def words(count: int) -> str:
        return " ".join(rng.sample(WORDS, count))  # the pipeline adds up the scores of equal texts

    return [{"question": words(rng.randint(1, 5)), "context": words(rng.randint(5, 30))} for _ in range(12)]


def qa_task(head: str, unanswerable: bool, longest: int = 6) -> QuestionAnswering:
    task = task_of("qa", head, unanswerable=unanswerable, max_answer_length=longest)
    assert isinstance(task, QuestionAnswering)
    return task


def test_the_pipeline_gives_our_answers(source: Pretrained, tmp_path: Path, examples: list[dict[str, str]]) -> None:
    task = qa_task("linear", unanswerable=False)
    folder = str(tmp_path / "saved")
    save_model(random_model(task, source), task, source, LENGTH, folder)
    ours = list(predict([load_model(folder)], split_of(examples, "input", **ROLES), 5, torch.device("cpu")))
    answer = pipeline("question-answering", folder, device="cpu")
    for example, expected in zip(examples, ours, strict=True):
        found = answer(**example, max_answer_len=6, max_seq_len=LENGTH, doc_stride=8)
        assert (found["answer"], found["start"], found["end"]) == tuple(expected[n] for n in ("answer", "start", "end"))
    assert len({each["answer"] for each in ours}) > 6


@pytest.mark.parametrize("head", ["linear", "joint"])
@pytest.mark.parametrize("unanswerable", [False, True])
def test_a_model_loads_with_its_threshold_and_the_same_outputs(
    source: Pretrained, tmp_path: Path, examples: list[dict[str, str]], head: str, unanswerable: bool
) -> None:
    task = qa_task(head, unanswerable)
    task.null_threshold = -1.5 if unanswerable else None
    model = random_model(task, source)
    folder = str(tmp_path / "saved")
    save_model(model, task, source, LENGTH, folder)
    loaded = load_model(folder)
    assert isinstance(loaded.task, QuestionAnswering)
    assert loaded.task.state() == task.state()
    rows = task.encode(task.tokenize(split_of(examples, "input", **ROLES), source.tokenizer), source.tokenizer, LENGTH)
    expected, found = outputs_of(model, task, rows), outputs_of(loaded.model, loaded.task, rows)
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    predictions = list(loaded.task.predictions(rows, found))
    assert json.dumps(predictions) == json.dumps(list(task.predictions(rows, found)))


def test_a_model_that_others_have_finetuned_answers_every_question(
    source: Pretrained, tmp_path: Path, examples: list[dict[str, str]]
) -> None:
    torch.manual_seed(0)
    folder = str(tmp_path / "theirs")
    theirs = ElectraForQuestionAnswering(transformers_config(source.encoder, pad_id=0)).eval()
    theirs.save_pretrained(folder)
    source.tokenizer.save_pretrained(folder)
    loaded = load_model(folder)
    (prediction,) = predict([loaded], split_of(examples[:1], "input", **ROLES), 5, torch.device("cpu"))
    assert prediction["answer"]
    assert "no_answer_probability" not in prediction
    rows = loaded.task.encode(
        loaded.task.tokenize(split_of(examples, "input", **ROLES), loaded.tokenizer), loaded.tokenizer, LENGTH
    )
    (logits, *_) = outputs_of(loaded.model, loaded.task, rows)
    with torch.no_grad():
        batch = loaded.tokenizer(*examples[0].values(), return_tensors="pt")
        outputs = theirs(**batch)
    expected = torch.stack([outputs.start_logits[0], outputs.end_logits[0]], dim=-1)
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-5, atol=1e-5)
