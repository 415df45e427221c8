"""Decoding of answers against plain loops over all spans."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from qa_tiny import make_split, make_task, make_tokenizer, random_examples

from electra_composer.tasks import qa_decoding
from electra_composer.tasks.encoded import EncodedRows
from electra_composer.tasks.qa_decoding import (
    Candidates,
    decode_beams,
    decode_logits,
    keep_beams,
    probabilities,
    span_of,
    spans_of,
)

TOKENIZER = make_tokenizer()
EXAMPLES = random_examples(25, seed=3)


@pytest.fixture(scope="module")
def rows() -> EncodedRows:
    task = make_task(stride=6)
    return task.encode(task.tokenize(make_split("validation", EXAMPLES), TOKENIZER), TOKENIZER, 24)


def draw_outputs(rows: EncodedRows, seed: int = 0) -> list[NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(length, 2)).astype(np.float32) for length in rows.lengths]


def all_spans(
    rows: EncodedRows, outputs: list[NDArray[np.float32]], longest: int
) -> list[list[tuple[float, int, int]]]:
    """Return score, first and last character of every valid answer of each question, best first."""
    found: list[list[tuple[float, int, int]]] = [[] for _ in EXAMPLES]
    for index in range(len(rows)):
        row, example = rows[index], rows.source.example[index]
        places = TOKENIZER(EXAMPLES[example][1], add_special_tokens=False, return_offsets_mapping=True)[
            "offset_mapping"
        ]
        shift = rows.source.firsts[index] - row.first_length
        for start in range(row.first_length, len(row.input_ids) - 1):
            if row.per_token["may_start"][start]:
                for end in range(start, min(start + longest, len(row.input_ids) - 1)):
                    score = float(outputs[index][start, 0] + outputs[index][end, 1])
                    found[example].append((score, places[start + shift][0], places[end + shift][1]))
    return [sorted(each, reverse=True) for each in found]


def listed(candidates: Candidates, question: int) -> list[tuple[float, int, int]]:
    part = slice(candidates.offsets[question], candidates.offsets[question + 1])
    columns = candidates.scores[part], candidates.starts[part], candidates.ends[part]
    return list(zip(*(column.tolist() for column in columns), strict=True))


@pytest.mark.parametrize(("longest", "chunk"), [(5, 1024), (30, 7)])
def test_the_best_answers_are_those_of_a_search_of_all_spans(
    rows: EncodedRows, longest: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qa_decoding, "ROW_CHUNK", chunk)
    outputs = draw_outputs(rows)
    candidates = decode_logits(rows, outputs, 8, longest)
    expected = all_spans(rows, outputs, longest)
    for question, spans in enumerate(expected):
        assert listed(candidates, question)[0] == pytest.approx(spans[0])
    # With as many starts as tokens nothing is left out.
    every = decode_logits(rows, outputs, 1000, longest)
    for question, spans in enumerate(expected):
        np.testing.assert_allclose(listed(every, question), spans, rtol=1e-6)


def test_the_null_score_is_the_smallest_of_the_windows_minus_the_best_answer(rows: EncodedRows) -> None:
    outputs = draw_outputs(rows, seed=1)
    candidates = decode_logits(rows, outputs, 8, 5)
    for question in range(len(EXAMPLES)):
        windows = np.flatnonzero(rows.source.example == question)
        null = min(float(outputs[index][0].sum()) for index in windows)
        scores = [score for score, _, _ in listed(candidates, question)]
        assert candidates.null_scores[question] == pytest.approx(null - scores[0], rel=1e-5)
        probability, shares = probabilities(np.array(scores), candidates.null_logits[question])
        softmax = np.exp([null, *scores]) / np.exp([null, *scores]).sum()
        np.testing.assert_allclose([probability, *shares], softmax, rtol=1e-5)


def test_beams_give_the_spans_that_they_hold(rows: EncodedRows) -> None:
    rng = np.random.default_rng(2)
    count = len(rows)
    starts = np.stack([rng.choice(length - 2, 3, replace=False) + 1 for length in rows.lengths])
    # Only valid starts and ends have finite log-probabilities.
    may_start = np.stack([rows[index].per_token["may_start"][starts[index]] for index in range(count)])
    start_log_probs = np.where(may_start == 1, rng.normal(size=(count, 3)), -np.inf).astype(np.float32)
    ends = np.repeat(starts[:, :, None], 2, axis=2)
    ends[:, :, 1] += 1
    valid = ends < (rows.lengths - 1)[:, None, None]
    end_log_probs = np.where(valid, rng.normal(size=ends.shape), -np.inf).astype(np.float32)
    no_answer = rng.normal(size=count).astype(np.float32)
    kept = keep_beams(starts, start_log_probs, ends, end_log_probs, no_answer)
    assert all(output.dtype == np.float32 and np.isfinite(output).all() for output in kept)
    candidates = decode_beams(rows, kept, 4)
    for question, (_, context, _) in enumerate(EXAMPLES):
        places = TOKENIZER(context, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        expected = []
        windows = np.flatnonzero(rows.source.example == question)
        for index in windows:
            shift = rows.source.firsts[index] - rows.first_lengths[index]
            for k, j in np.ndindex(3, 2):
                score = start_log_probs[index, k] + end_log_probs[index, k, j]
                if np.isfinite(score):
                    place = places[starts[index, k] + shift][0], places[ends[index, k, j] + shift][1]
                    expected.append((float(score), *place))
        assert listed(candidates, question) == sorted(expected, reverse=True)[:4]
        smallest = no_answer[windows].min() if expected else np.inf
        assert candidates.null_scores[question] == candidates.null_logits[question] == smallest


def test_answers_are_parts_of_the_context_without_whitespace_around_them(rows: EncodedRows) -> None:
    candidates = decode_logits(rows, draw_outputs(rows), 5, 4)
    for (_, context, _), spans in zip(EXAMPLES, spans_of(rows, candidates), strict=True):
        for span in spans:
            assert span.answer == context[span.start : span.end] == span.answer.strip() != ""
    assert span_of("a  red car ", 1, 7) == ("red", 3, 6)  # tokens of some tokenizers begin with a space
