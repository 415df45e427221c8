"""Helpers of the tests of question answering: a small tokenizer, splits, tasks, random contexts."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import ElectraTokenizerFast

from electra_composer.finetune_config import TaskConfig, TaskModelConfig
from electra_composer.model.encoder import EncoderConfig
from electra_composer.tasks.base import Split
from electra_composer.tasks.question_answering import QuestionAnswering
from electra_composer.tasks.rows import LeftOut, Row

WORDS = ["red", "blue", "green", "black", "white", "what", "color", "is", "the", "car", "house", "tree", "book", "door"]
WORDS += ["in", "of", "and", "a", "north", "south"]
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *",.?()-", *LETTERS, *(f"##{c}" for c in LETTERS)]
VOCABULARY = list(dict.fromkeys(VOCABULARY))
COLUMNS = {"id": "id", "question": "question", "context": "context", "answers": "answers", "is_impossible": None}


def make_tokenizer() -> ElectraTokenizerFast:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "vocab.txt"
        file.write_text("\n".join(VOCABULARY) + "\n")
        return ElectraTokenizerFast(vocab_file=str(file))


def make_row(number: int, question: Any, context: Any, answers: Any = None, name: Any = None) -> Row:
    values = {"id": name or f"q{number}", "question": question, "context": context, "answers": answers}
    return Row(values, f"data.jsonl:{number}")


def make_split(name: str, examples: Sequence[tuple[Any, ...]], columns: dict[str, Any] = COLUMNS) -> Split:
    """Build a split of `(question, context, answers)`."""
    return Split(name, [make_row(number, *each) for number, each in enumerate(examples, 1)], columns, LeftOut(name))


def make_task(head: Any = "linear", **settings: Any) -> QuestionAnswering:
    return QuestionAnswering(TaskConfig(kind="qa", **settings), TaskModelConfig(source="", head=head))


def answers(*pairs: tuple[str, int]) -> dict[str, list[Any]]:
    return {"text": [text for text, _ in pairs], "answer_start": [start for _, start in pairs]}


def random_examples(count: int, seed: int = 0, longest: int = 60) -> list[tuple[str, str, dict[str, list[Any]]]]:
    """Draw questions about contexts of different lengths, some of them shared, with an answer inside."""
    rng = random.Random(seed)
    examples = []
    context = ""
    for index in range(count):
        if index % 3 != 1:
            context = " ".join(rng.choice(WORDS) for _ in range(rng.randint(4, longest)))
        words = context.split()
        first = rng.randrange(len(words))
        last = min(len(words), first + rng.randint(1, 3))
        start = len(" ".join(words[:first])) + (first > 0)
        text = " ".join(words[first:last])
        question = " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 8)))
        examples.append((question, context, answers((text, start))))
    return examples


def encoder_config(hidden_size: int = 16, positions: int = 64) -> EncoderConfig:
    return EncoderConfig(
        vocab_size=len(VOCABULARY),
        embedding_size=hidden_size,
        hidden_size=hidden_size,
        num_layers=2,
        num_heads=2,
        intermediate_size=4 * hidden_size,
        max_positions=positions,
        dropout=0.0,
        attention_dropout=0.0,
        initializer_range=0.02,
        layer_norm_eps=1e-12,
    )
