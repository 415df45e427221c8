"""Load the tokenizer of a conversion, and train or extend its vocabulary on a sample of the sources."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from electra_composer.atomic_files import replaced_folder
from electra_composer.corpus.added_words import add_words
from electra_composer.corpus.chunks import EncodingSettings
from electra_composer.corpus.documents import ReadStats, no_text_error, part_documents
from electra_composer.corpus.options import TRAIN, Conversion
from electra_composer.corpus.part_conversion import Job
from electra_composer.corpus.progress import progress_bar
from electra_composer.corpus.source_parts import MIN_PART
from electra_composer.storage.shard_folder import META, TOKENIZER, id_dtype
from electra_composer.vocabulary import load_tokenizer, special_ids, train_tokenizer
from electra_composer.word_limits import use_word_limit

Result = TypeVar("Result")

SAMPLE_BYTES = 200_000_000  # of text to train a vocabulary on, from parts spread over all sources
SAMPLE_PARTS = 64  # at most; each costs the start of a reader


def load_given(options: Conversion) -> PreTrainedTokenizerFast | None:
    """Return the tokenizer that the options name; None if a vocabulary is to be trained.

    WordPiece takes BERT's limit on the length of a word; only the tokenizer of a folder of shards stays as it is, so
    that further shards are made with the same.
    """
    if options.tokenizer == TRAIN:
        return None
    tokenizer = load_tokenizer(options.tokenizer, options.cased, options.keep_accents)
    path = os.path.abspath(options.tokenizer)
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    if not os.path.isfile(os.path.join(os.path.dirname(folder), META)):
        use_word_limit(tokenizer)
    return tokenizer


def train_or_load(
    options: Conversion, jobs: list[Job], workspace: str, given: PreTrainedTokenizerFast | None
) -> PreTrainedTokenizerFast:
    """Return a tokenizer with a vocabulary trained on the sources, or with that of `given` extended by their words.

    It is saved in the workspace, so that a resumed conversion uses the same.
    """
    saved = os.path.join(workspace, TOKENIZER)
    if not os.path.isdir(saved):
        sample = list(_sample(options, jobs))
        if not sample:
            raise no_text_error(options.sources)
        count = options.add_vocabulary
        if given is None or count is None:
            work = f"training a vocabulary of at most {options.vocab_size:,} entries"
            make = partial(train_tokenizer, sample, options.vocab_size, options.cased, options.keep_accents)
        else:
            work = f"choosing at most {count:,} words to add to the vocabulary"
            make = partial(add_words, given, sample, count)
        if options.progress:
            print(work, flush=True)
        tokenizer = _interruptible(make)
        with replaced_folder(saved) as folder:
            tokenizer.save_pretrained(folder)
    tokenizer = load_tokenizer(saved)
    added = 0 if given is None else len(tokenizer) - len(given)
    tokenizer.name_or_path = f"trained-{len(tokenizer)}" if given is None else f"{options.tokenizer}+{added}"
    return tokenizer


def _interruptible(function: Callable[[], Result]) -> Result:
    """Call a function in a thread, so that signals are handled while it runs code that checks for none."""
    result: Future[Result] = Future()

    def run() -> None:
        try:
            result.set_result(function())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return result.result()


def _sample(options: Conversion, jobs: list[Job]) -> Iterator[str]:
    """Yield text to train on: the beginnings of parts spread over all sources, in proportion to their sizes."""
    chosen = jobs[:: max(1, -(-len(jobs) // SAMPLE_PARTS))]
    with progress_bar("reading text for the vocabulary", options.progress) as bar:
        for job in chosen:
            documents = part_documents(job.part, options.sources, ReadStats())
            mask = job.selection.chosen
            if mask is not None:
                documents = itertools.compress(documents, mask.tolist())
            size = 0
            for document in documents:
                yield document.text
                bar.update(document.size)
                size += document.size
                if size >= max(MIN_PART, SAMPLE_BYTES // len(chosen)):
                    break


def encoding_settings(options: Conversion, tokenizer: PreTrainedTokenizerFast) -> EncodingSettings:
    """Return what workers need to turn documents into examples."""
    ids = special_ids(tokenizer)
    return EncodingSettings(
        without_truncation(tokenizer).to_str(),
        options.max_seq_length,
        ids["cls"],
        ids["sep"],
        options.lines,
        options.overflow,
        options.val_fraction,
        options.seed,
        id_dtype(len(tokenizer)),
    )


def without_truncation(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """Return a copy of the backend tokenizer that neither truncates nor pads."""
    plain = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    plain.no_truncation()
    plain.no_padding()
    return plain
