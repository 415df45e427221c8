"""The task of question answering: learning, training, thresholds, predictions."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from qa_tiny import WORDS, answers, encoder_config, make_split, make_task, make_tokenizer, random_examples

from electra_composer.errors import UserError
from electra_composer.model.finetuning import ElectraWithHead
from electra_composer.tasks.encoded import EncodedRows, collate
from electra_composer.tasks.inference import check_ensemble
from electra_composer.tasks.kinds import build_task
from electra_composer.tasks.model import TaskModel
from electra_composer.tasks.question_answering import QuestionAnswering
from electra_composer.tasks.saved import SavedModel

TOKENIZER = make_tokenizer()
CONTEXT = "the red car is in the blue house"


def encode(task: QuestionAnswering, name: str, examples: Sequence[tuple[Any, ...]]) -> EncodedRows:
    split = make_split(name, examples)
    if name == "train":
        task.learn(split)
    return task.encode(task.tokenize(split, TOKENIZER), TOKENIZER, 32)


def certain(rows: EncodedRows, spans: Sequence[tuple[int, int]], height: float = 5.0) -> list[NDArray[np.float32]]:
    """Return logits of `height` for one span of tokens of each row, and 0 elsewhere."""
    outputs = []
    for (start, end), length in zip(spans, rows.lengths, strict=True):
        output = np.zeros((length, 2), dtype=np.float32)
        output[start, 0] = output[end, 1] = height
        outputs.append(output)
    return outputs


@pytest.mark.parametrize(
    ("setting", "golds", "expected"),
    [
        ("auto", [answers(("red", 4))], False),
        ("auto", [answers(("red", 4)), answers()], True),
        (False, [answers()], False),
        (True, [answers(("red", 4))], True),
    ],
)
def test_whether_questions_may_have_no_answer(setting: Any, golds: list[Any], expected: bool) -> None:
    task = make_task(unanswerable=setting)
    task.learn(make_split("train", [("what", CONTEXT, each) for each in golds]))
    assert task.unanswerable is expected
    assert task.metrics[:2] == ("f1", "exact_match")
    assert ("best_f1" in task.metrics) is expected


def test_a_score_of_unanswerable_questions_needs_such_questions() -> None:
    task = make_task(metric="best_f1")
    assert task.score in task.metrics  # it may be, until the examples are read
    with pytest.raises(
        UserError, match=r"^task.metric is best_f1, but all questions have answers; expected f1 or exact"
    ):
        task.learn(make_split("train", [("what", CONTEXT, "red")]))


def test_the_kind_and_its_heads() -> None:
    task = make_task()
    assert type(build_task(task.config, task.model_config)) is QuestionAnswering
    assert task.averages
    assert not make_task("joint").averages  # models search different beams
    model = SavedModel("runs/qa", None, make_task("joint"), TOKENIZER, 32)  # type: ignore[arg-type]
    check_ensemble([model])
    with pytest.raises(UserError, match=r"^runs/qa: outputs of model.head=joint cannot be averaged"):
        check_ensemble([model, model])
    with pytest.raises(UserError, match=r"^model.head=transformers .* expected linear or joint"):
        make_task("transformers")


def test_scores_and_predictions_of_certain_outputs() -> None:
    task = make_task(n_best=3)
    examples = [
        ("what color is the car", CONTEXT, answers(("red", 4))),
        ("what is in the house", CONTEXT, answers(("the red car", 0))),
    ]
    encode(task, "train", examples)
    rows = encode(task, "validation", examples)
    first = rows.first_lengths.tolist()
    outputs = certain(rows, [(first[0] + 1, first[0] + 1), (first[1] + 1, first[1] + 2)])
    assert task.scores(rows, outputs) == {"f1": 1.0, "exact_match": 1.0}
    predictions = list(task.predictions(rows, outputs))
    assert json.loads(json.dumps(predictions)) == predictions
    assert [(each["id"], each["answer"], each["start"], each["end"]) for each in predictions] == [
        ("q1", "red", 4, 7),
        ("q2", "red car", 4, 11),
    ]
    assert CONTEXT[4:11] == "red car"
    assert all(0.5 < each["score"] <= 1 for each in predictions)
    assert all("no_answer_probability" not in each for each in predictions)
    for each in predictions:
        assert each["candidates"][0] == {name: each[name] for name in ("answer", "start", "end", "score")}
        scores = [candidate["score"] for candidate in each["candidates"]]
        assert scores == sorted(scores, reverse=True)
        assert sum(scores) == pytest.approx(1.0)
        assert len(scores) == 3


def test_no_answer_is_predicted_above_the_threshold_that_was_tuned() -> None:
    task = make_task(n_best=4)
    examples = [("what", CONTEXT, answers(("red", 4))), ("what", CONTEXT, answers()), ("of", CONTEXT, answers())]
    encode(task, "train", examples)
    rows = encode(task, "validation", examples)
    first = rows.first_lengths.tolist()
    outputs = certain(rows, [(first[0] + 1, first[0] + 1), (first[1] + 2, first[1] + 2), (0, 0)])
    outputs[1][0] = 4.0  # the null score of the second question is 8 - 10, that of the first -10
    assert task.null_threshold is None
    assert task.scores(rows, outputs)["f1"] == 1.0  # at the best threshold
    assert [each["answer"] for each in task.predictions(rows, outputs)] == ["red", "car", ""]  # at 0
    task.tune(rows, outputs)
    assert task.null_threshold == pytest.approx(-10)
    other = make_task(n_best=4)
    other.load_state(json.loads(json.dumps(task.state())))
    scores = other.scores(rows, outputs)
    assert set(scores) == set(other.metrics)
    assert set(scores.values()) == {1.0}
    predictions = list(other.predictions(rows, outputs))
    assert [each["answer"] for each in predictions] == ["red", "", ""]
    assert (predictions[1]["start"], predictions[1]["end"]) == (None, None)
    assert predictions[2]["score"] == predictions[2]["no_answer_probability"] > 0.9
    for each in predictions:
        total = each["no_answer_probability"] + sum(candidate["score"] for candidate in each["candidates"])
        assert total == pytest.approx(1.0)


def test_questions_to_predict_need_no_answers_and_no_ids() -> None:
    task = make_task()
    split = make_split("input", [("what", CONTEXT, None), ("", "", None)])
    split.columns = {role: column for role, column in split.columns.items() if role in ("question", "context")}
    rows = task.encode(task.tokenize(split, TOKENIZER), TOKENIZER, 32)
    first, second = task.predictions(rows, certain(rows, [(rows.first_lengths[0],) * 2, (0, 0)]))
    assert (first["answer"], "id" in first) == ("the", False)
    assert second == {"answer": "", "start": None, "end": None, "score": 0.0, "candidates": []}


def test_runs_whose_answers_are_all_equal_have_collapsed() -> None:
    task = make_task()
    rows = encode(task, "validation", [("what", CONTEXT, "red"), ("what color", CONTEXT, "blue")])
    first = rows.first_lengths.tolist()
    assert task.collapsed(rows, certain(rows, [(place + 1, place + 1) for place in first]))
    assert not task.collapsed(rows, certain(rows, [(first[0] + 1, first[0] + 1), (first[1] + 2, first[1] + 2)]))


def test_the_analysis_lists_the_wrong_answers_and_the_scores_by_the_word_that_asks() -> None:
    task = make_task(unanswerable=True)
    rows = encode(
        task,
        "validation",
        [("What is red", CONTEXT, answers(("car", 8))), ("in which house", CONTEXT, "blue"), ("a", CONTEXT, answers())],
    )
    first = rows.first_lengths.tolist()
    analysis = task.analysis(rows, certain(rows, [(place + 2, place + 2) for place in first]))
    assert [(row["label"], row["f1"], row["examples"]) for row in analysis.per_label] == [
        ("what", 1.0, 1),
        ("which", 0.0, 1),
        ("no answer", 0.0, 1),
    ]
    assert [(row["where"], row["expected"], row["predicted"]) for row in analysis.worst] == [
        ("data.jsonl:2", "blue", "car"),
        ("data.jsonl:3", "", "car"),
    ]
    json.dumps(vars(analysis))


def colored(count: int, seed: int) -> list[tuple[str, str, dict[str, list[Any]]]]:
    """Contexts with one color and a direction, which are the answer, or without."""
    rng = random.Random(seed)
    examples = []
    for index in range(count):
        words = [rng.choice(WORDS[5:-2]) for _ in range(rng.randint(5, 40))]
        gold = answers()
        if index % 4:
            place = rng.randrange(len(words))
            color = f"{rng.choice(WORDS[:5])} {rng.choice(WORDS[-2:])}"
            gold = answers((color, len(" ".join(words[:place])) + (place > 0)))
            words.insert(place, color)
        examples.append(("what color", " ".join(words), gold))
    return examples


@pytest.mark.parametrize("head", ["linear", "joint"])
def test_training_finds_the_answers(head: str) -> None:
    torch.manual_seed(1)
    task = make_task(head, stride=12)
    rows = encode(task, "train", colored(256, seed=0))
    held_out = encode(task, "validation", colored(60, seed=1))
    assert len(held_out) > 60  # some contexts are divided
    config = encoder_config(hidden_size=32)
    model = TaskModel(ElectraWithHead(config, task.build_head(config), 0.0, task.per_token), task)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)

    def evaluate() -> dict[str, float]:
        model.eval()
        with torch.no_grad():
            batch = collate([held_out[index] for index in range(len(held_out))], pad_id=0)
            outputs = task.keep(model(batch), batch)
        return {**task.scores(held_out, outputs), "answers": len(list(task.predictions(held_out, outputs)))}

    before = evaluate()
    model.train()
    for part in torch.randperm(len(rows)).repeat(3).split(32):
        batch = collate([rows[index] for index in part.tolist()], pad_id=0)
        optimizer.zero_grad()
        model.loss(model(batch), batch).backward()
        optimizer.step()
    after = evaluate()
    assert before["has_answer_f1"] < 0.4
    assert after["best_f1"] > 0.9
    assert after["answers"] == 60


def test_the_order_and_length_of_batches_do_not_matter() -> None:
    task = make_task("joint", stride=8, unanswerable=True)
    rows = encode(task, "validation", random_examples(6))
    config = encoder_config()
    model = TaskModel(ElectraWithHead(config, task.build_head(config), 0.0, task.per_token), task, rows).eval()
    together = collate([rows[index] for index in range(len(rows))], pad_id=0)
    with torch.no_grad():
        kept = task.keep(model(together), together)
        for index in range(len(rows)):
            alone = collate([rows[index]], pad_id=0)
            (output,) = task.keep(model(alone), alone)
            spans = {tuple(span[:2]): span[2] for span in kept[index].tolist()}
            assert {tuple(span[:2]): span[2] for span in output.tolist()} == pytest.approx(spans, abs=1e-4)
