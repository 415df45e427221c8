"""Error analysis of tagging: spans or words of each label, confusions of words, sentences with the largest loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from electra_composer.tasks.analysis import WORST, Analysis, confusions, per_label_scores
from electra_composer.tasks.base import Output
from electra_composer.tasks.sentences import Sentences
from electra_composer.tasks.spans import OUTSIDE, SpanTags
from electra_composer.tasks.tag_sets import NO_SPANS, TagSet


def analyse_tags(
    tags: TagSet, examples: Sentences, outputs: Sequence[Output], predicted: NDArray[np.int64]
) -> Analysis:
    """Describe the errors on tagged sentences.

    Args:
        outputs: logits of the words with a token.
        predicted: number of the tag of each word, int64 `[words]`.

    Returns:
        `per_label`: of strict spans or, without spans, of words. `confusion`: of words, by the label of their tag.
        `worst`: `loss` is the sum over the words of the sentence; `expected` and `predicted` are its spans, or the tags
        of the words that are wrong.
    """
    true = examples.labels
    assert true is not None
    if tags.scheme == NO_SPANS:
        right, expected, given = (
            np.bincount(each, minlength=len(tags.labels)) for each in (true[true == predicted], true, predicted)
        )
        return Analysis(
            labels=tags.labels,
            confusion=confusions(true, predicted),
            per_label=per_label_scores(right, expected, given, tags.labels),
            worst=_worst(tags, examples, outputs, predicted),
        )
    spans = SpanTags(tags.labels, tags.scheme)
    counts = spans.counts(*(spans.find(each, examples.word_offsets, strict=True) for each in (predicted, true)))
    return Analysis(
        labels=[OUTSIDE, *spans.kinds],
        confusion=confusions(spans.kind_numbers(true) + 1, spans.kind_numbers(predicted) + 1),
        per_label=per_label_scores(*counts, spans.kinds),
        worst=_worst(tags, examples, outputs, predicted),
    )


def _worst(
    tags: TagSet, examples: Sentences, outputs: Sequence[Output], predicted: NDArray[np.int64]
) -> list[dict[str, Any]]:
    true, words, offsets = examples.labels, examples.words, examples.word_offsets
    assert true is not None
    assert words is not None
    has_token = examples.first_tokens >= 0
    sentence = np.repeat(np.arange(len(words)), np.diff(offsets))
    losses = F.cross_entropy(
        torch.from_numpy(np.concatenate(outputs)), torch.from_numpy(true[has_token]), reduction="none"
    )
    totals = np.bincount(sentence[has_token], losses.double().numpy(), minlength=len(words))
    wrong = np.bincount(sentence, predicted != true, minlength=len(words)) > 0
    order = np.argsort(-totals, kind="stable")
    return [
        {
            "where": words[number].where,
            "text": " ".join(words[number].words),
            **{
                name: _described(tags, words[number].words, labels[part], true[part] != predicted[part])
                for name, labels in (("expected", true), ("predicted", predicted))
                for part in [slice(*offsets[number : number + 2])]
            },
            "loss": float(totals[number]),
        }
        for number in order[wrong[order]][:WORST].tolist()
    ]


def _described(tags: TagSet, words: list[str], labels: NDArray[np.int64], is_wrong: NDArray[np.bool_]) -> str:
    if tags.scheme == NO_SPANS:
        parts = ((words[position], tags.labels[labels[position]]) for position in np.flatnonzero(is_wrong))
    else:
        (found,) = SpanTags(tags.labels, tags.scheme).by_sentence(labels, np.array([0, len(labels)]))
        parts = ((" ".join(words[start:end]), kind) for start, end, kind in found)
    return ", ".join(f"{text} ({label})" for text, label in parts)
