"""Load the tokenizer of a conversion, or train its vocabulary on a sample of the sources."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from electra_composer.atomic_files import replaced_folder
from electra_composer.corpus.chunks import EncodingSettings
from electra_composer.corpus.documents import ReadStats, no_text_error, part_documents
from electra_composer.corpus.options import TRAIN, Conversion
from electra_composer.corpus.part_conversion import Job
from electra_composer.corpus.progress import progress_bar
from electra_composer.corpus.source_parts import MIN_PART
from electra_composer.storage.shard_folder import TOKENIZER, id_dtype
from electra_composer.vocabulary import load_tokenizer, special_ids, train_tokenizer

SAMPLE_BYTES = 200_000_000  # of text to train a vocabulary on, from parts spread over all sources
SAMPLE_PARTS = 64  # at most; each costs the start of a reader


def load_or_train(options: Conversion, jobs: list[Job], workspace: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer that the options name.

    A trained one is saved in the workspace, so that a resumed conversion uses the same.
    """
    if options.tokenizer != TRAIN:
        return load_tokenizer(options.tokenizer, options.cased, options.keep_accents)
    saved = os.path.join(workspace, TOKENIZER)
    if not os.path.isdir(saved):
        sample = list(_sample(options, jobs))
        if not sample:
            raise no_text_error(options.sources)
        tokenizer = train_tokenizer(
            sample, options.vocab_size, options.cased, options.keep_accents, progress=options.progress
        )
        with replaced_folder(saved) as folder:
            tokenizer.save_pretrained(folder)
    tokenizer = load_tokenizer(saved)
    tokenizer.name_or_path = f"trained-{len(tokenizer)}"
    return tokenizer


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
