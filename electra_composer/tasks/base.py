"""What a kind of task is: reading, labels, tokens, head, loss, scores and predictions."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from electra_composer.finetune_config import TaskConfig, TaskModelConfig
from electra_composer.model.encoder import EncoderConfig
from electra_composer.tasks.analysis import Analysis
from electra_composer.tasks.encoded import EncodedRows
from electra_composer.tasks.rows import LeftOut, Row

Output = NDArray[np.float32]
"""What is kept of the model's output for one row: an array whose mean over models is an ensemble."""

Columns = Mapping[str, str | list[str] | None]
"""Role, such as `text` → its column or columns; None: there is none."""


@dataclass
class Split:
    """One split of the data of a task.

    Attributes:
        name: `train`, `validation`, `test`, or `input` of predict.py.
        table: rows of the files.
        columns: columns of the roles.
        chosen: bool `[rows]`, the rows that belong to the split; None: all.
        left_out: rows that cannot be used; a task adds those it skips.
    """

    name: str
    table: Iterable[Row]
    columns: Columns
    left_out: LeftOut
    chosen: NDArray[np.bool_] | None = None

    def __iter__(self) -> Iterator[Row]:
        for number, row in enumerate(self.table):
            if self.chosen is None or self.chosen[number]:
                yield row


@dataclass
class Tokenized(abc.ABC):
    """Examples of a split as token ids, not yet cut to a length. A kind of task adds what it needs."""

    split: str

    @property
    @abc.abstractmethod
    def lengths(self) -> NDArray[np.int64]:
        """Number of tokens of each example without a cut, with special tokens, int64 `[examples]`."""


class Task(abc.ABC):
    """A kind of task, and what it has learned from the training examples.

    The order of calls: :meth:`learn`, :meth:`tokenize`, :meth:`encode`, :meth:`build_head`; then :meth:`loss` in
    training, and :meth:`keep` in evaluation, whose results :meth:`scores` and :meth:`predictions` read.

    Attributes:
        notes: what :meth:`learn` guessed, a line each, to be said.
        columns: of the training examples; predict.py takes the same ones where they exist.
    """

    kind: ClassVar[str]
    roles: ClassVar[Mapping[str, Sequence[str | None]]]
    """Role → names of its column, in order of preference; None at the end: optional."""
    label_roles: ClassVar[tuple[str, ...]]
    """Roles that examples to predict may lack."""
    names_of_examples: ClassVar[tuple[str, ...]] = ()
    """Roles of columns that only name an example: each split has its own, or none."""
    per_token: ClassVar[bool] = False
    """Whether the head reads every token's last hidden state, instead of that of `[CLS]`."""

    def __init__(self, config: TaskConfig, model: TaskModelConfig):
        self.config = config
        self.model_config = model
        self.notes: list[str] = []
        self.columns: Columns = {}

    unscaled: ClassVar[frozenset[str]] = frozenset()
    """Scores that are reported as they are, not × 100."""
    lower_is_better: ClassVar[frozenset[str]] = frozenset()

    @property
    def averages(self) -> bool:
        """Whether the mean over models of what :meth:`keep` returns is an ensemble."""
        return True

    @property
    @abc.abstractmethod
    def metrics(self) -> tuple[str, ...]:
        """Names of the scores; the first is the default of `task.metric`."""

    @property
    def score(self) -> str:
        """Name of the score of a run."""
        return self.config.metric or self.metrics[0]

    @abc.abstractmethod
    def learn(self, train: Split) -> None:
        """Read the training examples once: labels, scale of the targets, and the like.

        Raises:
            UserError: the column holds something else, or too few or too many labels.
        """

    @abc.abstractmethod
    def state(self) -> dict[str, Any]:
        """Return what was learned, as JSON values; it is saved with a model."""

    @abc.abstractmethod
    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state` returned."""

    @abc.abstractmethod
    def tokenize(self, split: Split, tokenizer: PreTrainedTokenizerFast, progress: bool = False) -> Tokenized:
        """Read and tokenize the examples of a split. Labels may be absent, except in training.

        Raises:
            UserError: a row that cannot be read, with file and line.
        """

    @abc.abstractmethod
    def encode(self, examples: Tokenized, tokenizer: PreTrainedTokenizerFast, max_seq_length: int) -> EncodedRows:
        """Cut or divide the examples to rows of at most `max_seq_length` tokens. `source` refers to the examples."""

    @abc.abstractmethod
    def build_head(self, config: EncoderConfig) -> nn.Module:
        """Build the head: last hidden states `[rows, hidden]` or, `per_token`, `[rows, length, hidden]` → logits."""

    def forward(self, model: nn.Module, inputs: Sequence[Tensor], batch: Mapping[str, Any]) -> Any:
        """Run the model; the default passes the inputs of the encoder."""
        return model(*inputs)

    @abc.abstractmethod
    def loss(self, outputs: Any, batch: Mapping[str, Any]) -> Tensor:
        """Return the loss of a batch, fp32: a mean, so that microbatches of equal size average to that of the batch."""

    @abc.abstractmethod
    def keep(self, outputs: Any, batch: Mapping[str, Any]) -> list[Output]:
        """Return what is needed of the outputs for each row of a batch, on the CPU."""

    @abc.abstractmethod
    def scores(self, rows: EncodedRows, outputs: Sequence[Output]) -> dict[str, float]:
        """Compute the scores of :attr:`metrics`, as fractions; NaN where a score is undefined.

        Args:
            outputs: of :meth:`keep`, in the order of the rows.
        """

    @abc.abstractmethod
    def predictions(self, rows: EncodedRows, outputs: Sequence[Output]) -> Iterator[dict[str, Any]]:
        """Yield the prediction of each example, in the order of the file, as JSON values."""

    def analysis(self, rows: EncodedRows, outputs: Sequence[Output]) -> Analysis:
        """Describe the errors on labelled rows."""
        return Analysis()

    def tune(self, rows: EncodedRows, outputs: Sequence[Output]) -> None:  # noqa: B027
        """Choose thresholds on the validation rows, after training. They become part of :meth:`state`."""

    def collapsed(self, rows: EncodedRows, outputs: Sequence[Output]) -> bool:
        """Return whether the predictions of several examples are all equal: a run that failed."""
        first, *rest = self.predictions(rows, outputs)
        return bool(rest) and all(each == first for each in rest)
