"""Tagging of words: named entities and other spans, or a tag per word such as parts of speech."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_f1_score
from transformers import PreTrainedTokenizerFast

from electra_composer.model.encoder import EncoderConfig
from electra_composer.model.finetuning import linear_head
from electra_composer.tasks.analysis import Analysis
from electra_composer.tasks.base import Output, Split, Task, Tokenized
from electra_composer.tasks.encoded import IGNORED, EncodedRows
from electra_composer.tasks.sentences import Sentence, Sentences, Words, divide, tokenize_sentences
from electra_composer.tasks.spans import SpanTags
from electra_composer.tasks.tag_sets import NO_SPANS, TagSet, learn_tags
from electra_composer.tasks.tagged_rows import check_lengths, tags_of, value_of, words_of
from electra_composer.tasks.tagging_analysis import analyse_tags
from electra_composer.tasks.text_pairs import TRAINED


class Tagging(Task):
    """A tag for each word, read from the last hidden state of its first token.

    Attributes:
        tags: the tags of the data.
    """

    kind = "tagging"
    roles: ClassVar[Mapping[str, Sequence[str | None]]] = {
        "tokens": ("tokens", "words", "token", "word", "text", "sentence"),
        "tags": ("tags", "ner_tags", "ner", "labels", "label", "tag", "chunk_tags", "upos", "pos_tags", "pos"),
        "document": ("document", "document_id", "doc_id", None),
    }
    label_roles = ("tags",)
    per_token = True
    tags: TagSet

    @property
    def metrics(self) -> tuple[str, ...]:
        scheme = self.tags.scheme if hasattr(self, "tags") else self.config.scheme
        if scheme == NO_SPANS:
            return ("accuracy", "macro_f1")
        return ("f1", "precision", "recall", "conlleval_f1", "accuracy", "macro_f1")

    @property
    def labels(self) -> list[str]:
        """Names of the tags, in the order of the model's outputs."""
        return self.tags.labels

    def learn(self, train: Split) -> None:
        self.tags = learn_tags(train, self.config.scheme, self.notes)

    def state(self) -> dict[str, Any]:
        return dataclasses.asdict(self.tags)

    def load_state(self, state: dict[str, Any]) -> None:
        self.tags = TagSet(**state)

    def tokenize(self, split: Split, tokenizer: PreTrainedTokenizerFast, progress: bool = False) -> Sentences:
        examples = tokenize_sentences(
            self._sentences(split), tokenizer, split.name, self.config.context, split.name != "train", progress
        )
        split.left_out.check()
        return examples

    def _sentences(self, split: Split) -> Iterator[Sentence]:
        """Yield the sentences of a split and, for context, those of its files that belong to another split."""
        for position, row in enumerate(split.table):
            is_example = split.chosen is None or bool(split.chosen[position])
            if not is_example and not self.config.context:
                continue
            words, document = words_of(row, split), value_of(row, split, "document")
            if not is_example:
                yield Sentence(words, None, document, False, row.where)
                continue
            split.left_out.total += 1
            tags = tags_of(row, split)
            if split.name in TRAINED and not words:
                split.left_out.add("have no words", row.where)
            elif split.name in TRAINED and tags is None:
                split.left_out.add("have words without a tag", row.where)
            else:
                labels = None
                if tags is not None:
                    check_lengths(words, tags, row)
                    labels = self.tags.numbers(tags, row)
                yield Sentence(words, labels, document, True, row.where)

    def encode(self, examples: Tokenized, tokenizer: PreTrainedTokenizerFast, max_seq_length: int) -> EncodedRows:
        assert isinstance(examples, Sentences)
        return divide(examples, max_seq_length, self.config.stride, tokenizer.cls_token_id, tokenizer.sep_token_id)

    def build_head(self, config: EncoderConfig) -> nn.Module:
        return linear_head(config.hidden_size, len(self.labels))

    def loss(self, outputs: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """Return the mean cross-entropy of the labelled tokens; 0 if there are none."""
        labels = batch["labels"]
        total = F.cross_entropy(outputs.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        return total / (labels != IGNORED).sum().clamp(min=1)

    def keep(self, outputs: Tensor, batch: Mapping[str, Any]) -> list[Output]:
        """Return the logits at the first token of each word of a row, fp32 `[words, labels]`."""
        is_word = batch["labels" if "labels" in batch else "words"] != IGNORED
        logits = outputs[is_word].float().cpu()
        return [part.numpy() for part in logits.split(is_word.sum(1).tolist())]

    def scores(self, rows: EncodedRows, outputs: Sequence[Output]) -> dict[str, float]:
        examples = rows.source
        assert isinstance(examples, Sentences)
        assert examples.labels is not None
        predicted, true = predicted_labels(examples, outputs, self.tags.fallback)[0], examples.labels
        accuracy = float((predicted == true).mean())
        if self.tags.scheme == NO_SPANS:
            pair = torch.from_numpy(predicted), torch.from_numpy(true)
            return {"accuracy": accuracy, "macro_f1": float(multiclass_f1_score(*pair, len(self.labels)))}
        tags = SpanTags(self.labels, self.tags.scheme)
        strict, lenient = (
            tags.scores(*(tags.find(each, examples.word_offsets, is_strict) for each in (predicted, true)))
            for is_strict in (True, False)
        )
        return {**strict, "conlleval_f1": lenient["f1"], "accuracy": accuracy}

    def analysis(self, rows: EncodedRows, outputs: Sequence[Output]) -> Analysis:
        predicted, _ = predicted_labels(rows.source, outputs, self.tags.fallback)
        return analyse_tags(self.tags, rows.source, outputs, predicted)

    def collapsed(self, rows: EncodedRows, outputs: Sequence[Output]) -> bool:
        """Return whether all words have the same tag."""
        predicted, _ = predicted_labels(rows.source, outputs, self.tags.fallback)
        return bool((predicted == predicted[0]).all())

    def predictions(self, rows: EncodedRows, outputs: Sequence[Output]) -> Iterator[dict[str, Any]]:
        """Yield `tags`, a tag per word in the scheme of the data, and `scores`, their probabilities.

        With spans, also `spans`, as conlleval reads the tags: label, start and end (words; the end is exclusive) and
        text. An example given as text also has `tokens`, its words, and `start_char` and `end_char` in each span. The
        score of a word without a token is null.
        """
        examples = rows.source
        assert isinstance(examples, Sentences)
        assert examples.words is not None
        labels, scores = predicted_labels(examples, outputs, self.tags.fallback)
        found: list[list[tuple[int, int, str]]] = []
        if self.tags.scheme != NO_SPANS:
            found = SpanTags(self.labels, self.tags.scheme).by_sentence(labels, examples.word_offsets)
        for number, words in enumerate(examples.words):
            mine = slice(*examples.word_offsets[number : number + 2])
            prediction: dict[str, Any] = {} if words.text is None else {"tokens": words.words}
            prediction["tags"] = self.tags.names(labels[mine].tolist())
            if found:
                prediction["spans"] = [describe_span(span, words) for span in found[number]]
            prediction["scores"] = [None if np.isnan(score) else score for score in scores[mine].tolist()]
            yield prediction


def predicted_labels(
    examples: Sentences, outputs: Sequence[Output], fallback: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the predicted number of each word of all examples and its probability, NaN if the word has no token."""
    has_token = examples.first_tokens >= 0
    labels, scores = np.full(len(has_token), fallback), np.full(len(has_token), np.nan)
    probabilities, best = torch.from_numpy(np.concatenate(outputs)).softmax(1).max(1)
    labels[has_token], scores[has_token] = best.numpy(), probabilities.numpy()
    return labels, scores


def describe_span(span: tuple[int, int, str], words: Words) -> dict[str, Any]:
    """Return a span, given as start, end and label, as JSON values."""
    start, end, label = span
    described = {"label": label, "start": start, "end": end}
    if words.text is None:
        return {**described, "text": " ".join(words.words[start:end])}
    begin, stop = words.places[start][0], words.places[end - 1][1]
    return {**described, "text": words.text[begin:stop], "start_char": begin, "end_char": stop}
