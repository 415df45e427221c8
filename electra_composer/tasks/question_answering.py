"""Extractive question answering: the answer of a question is a part of its context, or there is none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from electra_composer.errors import UserError
from electra_composer.finetune_config import TaskConfig, TaskModelConfig
from electra_composer.model.encoder import EncoderConfig
from electra_composer.model.finetuning import linear_head
from electra_composer.tasks.analysis import Analysis
from electra_composer.tasks.answers import best_threshold, score_answers, scores_with_null
from electra_composer.tasks.base import Output, Split, Task, Tokenized
from electra_composer.tasks.encoded import EncodedRows
from electra_composer.tasks.qa_analysis import analyse_answers
from electra_composer.tasks.qa_decoding import (
    Candidates,
    decode_beams,
    decode_logits,
    keep_beams,
    keep_logits,
    probabilities,
    spans_of,
)
from electra_composer.tasks.qa_head import JointHead, joint_loss, span_loss
from electra_composer.tasks.qa_windows import Questions, build_windows, tokenize_questions
from electra_composer.tasks.questions import all_answers, read_questions

SCORES = ("f1", "exact_match")
SCORES_WITH_NULL = ("has_answer_f1", "no_answer_f1", "best_f1", "best_exact_match")
NO_ANSWER = {"answer": "", "start": None, "end": None}


class QuestionAnswering(Task):
    """SQuAD 1.1, SQuAD 2.0, MRQA and alike.

    A question has no answer where `null score > null_threshold`. The null score is, with the head `linear`, the sum of
    the two logits of `[CLS]` minus that of the best answer, with the head `joint` the logit of its classifier; of all
    windows the smallest counts. Source: google-research/electra `finetune/qa/qa_metrics.py`.

    Attributes:
        unanswerable: whether questions may have no answer; None until it is known.
        joint: whether the head is google-research/electra's.
        null_threshold: chosen by :meth:`tune`; None: 0 for predictions, the best one for scores.
    """

    kind = "qa"
    roles: ClassVar[Mapping[str, Sequence[str | None]]] = {
        "id": ("id", "qid", "question_id", None),
        "question": ("question", "query"),
        "context": ("context", "passage", "paragraph", "text", "document"),
        "answers": ("answers", "answer"),
        "is_impossible": ("is_impossible", None),
    }
    label_roles, names_of_examples = ("answers", "is_impossible"), ("id",)
    per_token = True

    def __init__(self, config: TaskConfig, model: TaskModelConfig):
        super().__init__(config, model)
        if model.head == "transformers":
            raise UserError(
                "model.head=transformers is a head of classification; of qa, model.head=linear equals transformers' "
                "ElectraForQuestionAnswering: expected linear or joint"
            )
        self.unanswerable = None if config.unanswerable == "auto" else config.unanswerable
        self.joint = model.head == "joint"
        self.null_threshold: float | None = None

    @property
    def averages(self) -> bool:
        return not self.joint  # models search different beams

    @property
    def metrics(self) -> tuple[str, ...]:
        return SCORES if self.unanswerable is False else (*SCORES, *SCORES_WITH_NULL)

    def learn(self, train: Split) -> None:
        if self.unanswerable is None:
            self.unanswerable = any(answers is not None and not answers.texts for answers in all_answers(train))
        if self.score not in self.metrics:
            raise UserError(f"task.metric is {self.score}, but all questions have answers; expected f1 or exact_match")

    def state(self) -> dict[str, Any]:
        return {"unanswerable": self.unanswerable, "null_threshold": self.null_threshold}

    def load_state(self, state: dict[str, Any]) -> None:
        # A model that others have finetuned lacks these keys: every question has an answer.
        self.unanswerable, self.null_threshold = state.get("unanswerable", False), state.get("null_threshold")

    def tokenize(self, split: Split, tokenizer: PreTrainedTokenizerFast, progress: bool = False) -> Questions:
        questions = tokenize_questions(read_questions(split, bool(self.unanswerable)), split.name, tokenizer, progress)
        split.left_out.check()
        return questions

    def encode(self, examples: Tokenized, tokenizer: PreTrainedTokenizerFast, max_seq_length: int) -> EncodedRows:
        assert isinstance(examples, Questions)
        return build_windows(examples, tokenizer, max_seq_length, self.config.stride)

    def build_head(self, config: EncoderConfig) -> nn.Module:
        if self.joint:
            return JointHead(
                config.hidden_size, self.config.n_best, self.config.max_answer_length, bool(self.unanswerable)
            )
        return linear_head(config.hidden_size, 2)

    def forward(self, model: nn.Module, inputs: Sequence[Tensor], batch: Mapping[str, Any]) -> Any:
        if not self.joint:
            return model(*inputs)
        if model.training:
            return model(*inputs, batch["token_type_ids"], batch["start_positions"], None)
        return model(*inputs, batch["token_type_ids"], None, batch["may_start"] == 1)

    def loss(self, outputs: Any, batch: Mapping[str, Any]) -> Tensor:
        positions = batch["start_positions"], batch["end_positions"]
        if self.joint:
            return joint_loss(outputs, *positions, batch["impossible"])
        padding = batch["sequence_ids"] == 0
        starts, ends = outputs.float().masked_fill(padding[:, :, None], -torch.inf).unbind(-1)
        return span_loss(starts, ends, *positions)

    def keep(self, outputs: Any, batch: Mapping[str, Any]) -> list[Output]:
        """Return what `keep_logits` or, of the head `joint`, `keep_beams` returns."""
        if not self.joint:
            return keep_logits(outputs.float().cpu().numpy(), batch["sequence_ids"].sum(1).tolist())
        return keep_beams(**{name: values.cpu().numpy() for name, values in outputs.items()})

    def tune(self, rows: EncodedRows, outputs: Sequence[Output]) -> None:
        """Choose the threshold with the best F1, as SQuAD's `evaluate-v2.0.py` does."""
        if self.unanswerable:
            candidates = self._decode(rows, outputs)
            _, f1, answerable = _scored(rows, candidates)
            self.null_threshold = best_threshold(f1, candidates.null_scores, answerable)[1]

    def scores(self, rows: EncodedRows, outputs: Sequence[Output]) -> dict[str, float]:
        """Compute the scores at the threshold of no answer; `best_…` are those at the best threshold for each.

        Until :meth:`tune` has chosen the threshold, it is the one that it would choose: with the best F1 on these rows.
        """
        exact, f1, answerable = _scored(rows, candidates := self._decode(rows, outputs))
        if not self.unanswerable:
            return {"f1": float(f1.mean()), "exact_match": float(exact.mean())}
        return scores_with_null(exact, f1, candidates.null_scores, answerable, self.null_threshold)

    def predictions(self, rows: EncodedRows, outputs: Sequence[Output]) -> Iterator[dict[str, Any]]:
        """Yield the answer, its characters in the context, its probability, and the `n_best` candidates.

        `start` and `end` are null where there is no answer, `end` is exclusive. Probabilities are a softmax of the
        scores of the candidates and, if questions may have no answer, of that of no answer; with the head `joint` the
        probability of no answer is that of its classifier.
        """
        candidates = self._decode(rows, outputs)
        no_answer = self._no_answer(candidates)
        ids = rows.source.examples.texts.ids
        for index, spans in enumerate(spans_of(rows, candidates)):
            part = slice(candidates.offsets[index], candidates.offsets[index + 1])
            null_logit = candidates.null_logits[index] if self.unanswerable else -np.inf
            null, shares = probabilities(candidates.scores[part], null_logit)
            listed = [{**span._asdict(), "score": share} for span, share in zip(spans, shares, strict=True)]
            yield {
                **({} if ids[index] is None else {"id": ids[index]}),
                **({**NO_ANSWER, "score": null} if no_answer[index] else listed[0]),
                **({"no_answer_probability": null} if self.unanswerable else {}),
                "candidates": listed,
            }

    def analysis(self, rows: EncodedRows, outputs: Sequence[Output]) -> Analysis:
        return analyse_answers(rows.source.examples.texts, list(self.predictions(rows, outputs)))

    def collapsed(self, rows: EncodedRows, outputs: Sequence[Output]) -> bool:
        candidates = self._decode(rows, outputs)
        pairs = list(zip(_best(rows, candidates), self._no_answer(candidates), strict=True))
        return len(pairs) > 1 and len({"" if null else text for text, null in pairs}) == 1

    def _decode(self, rows: EncodedRows, outputs: Sequence[Output]) -> Candidates:
        if self.joint:
            return decode_beams(rows, outputs, self.config.n_best)
        return decode_logits(rows, outputs, self.config.n_best, self.config.max_answer_length)

    def _no_answer(self, candidates: Candidates) -> NDArray[np.bool_]:
        """Return the questions that are predicted to have no answer, bool `[questions]`."""
        if not self.unanswerable:
            return ~candidates.has_any
        return candidates.null_scores > (self.null_threshold or 0.0)


def _best(rows: EncodedRows, candidates: Candidates) -> list[str]:
    """Return the text of the best candidate of each question; empty without one."""
    return [spans[0].answer if spans else "" for spans in spans_of(rows, candidates.best())]


def _scored(
    rows: EncodedRows, candidates: Candidates
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """Return exact match and F1 of the best candidate of each question, and whether it has an answer."""
    golds = [answers.texts for answers in rows.source.examples.texts.answers]
    exact, f1 = score_answers(_best(rows, candidates), golds)
    return exact, f1, np.array([len(texts) > 0 for texts in golds])
