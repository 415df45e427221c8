"""Tokenizers: loaded from a vocabulary file, a folder or the hub, or trained on text; and what identifies one."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, ElectraTokenizerFast, PreTrainedTokenizerFast

from electra_composer.errors import UserError

# What tokenizers call them; the first is what BERT and ELECTRA say.
SPECIAL_NAMES = {
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]", "<cls>", "<s>"),
    "sep": ("[SEP]", "<sep>", "</s>"),
    "mask": ("[MASK]", "<mask>"),
}
# In the order of BERT's own file, so that [PAD] is 0 and the rest follow; ids of a trained vocabulary.
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
# Characters that get an entry of their own in a trained vocabulary: the most frequent 1,000 (as BERT's trainer takes),
# or as many as make up this share of the text (SentencePiece's `character_coverage` for Japanese and Chinese).
ALPHABET = 1000
COVERAGE = 0.9995
MUCH_LOST = 0.01  # of the characters, taken apart with the accents, before a warning
_LOOK_CHARACTERS = 1_000_000  # that are looked at for it
MIN_FREQUENCY = 2  # a pair of pieces seen once is not worth an entry


def load_tokenizer(name_or_path: str, cased: bool = False, keep_accents: bool = False) -> PreTrainedTokenizerFast:
    """A fast tokenizer that has all that ELECTRA needs.

    Args:
        name_or_path: a BERT-style `vocab.txt` (one token a line, read as uncased WordPiece), a folder that
            `save_pretrained` wrote, a file that `tokenizers` saved (`….json`), or a name on the Hugging Face hub such
            as `google/electra-small-discriminator`.
        cased: do not lower-case the text; for a `vocab.txt`, any other tokenizer says this itself.
        keep_accents: do not take accents off lower-cased text; for a `vocab.txt`.

    Raises:
        UserError: nothing there, the hub out of reach, not a fast tokenizer, a special token missing, or options that
            are not for this one.
    """
    is_json = name_or_path.endswith(".json")
    if os.path.isfile(name_or_path) and not is_json:
        tokenizer = _from_vocabulary_file(name_or_path, cased, keep_accents)
    elif cased or keep_accents:
        raise UserError(
            f"tokenizer {name_or_path}: says itself what becomes of case and accents; --cased and --keep-accents are "
            "for a vocab.txt or a vocabulary to be trained"
        )
    elif os.path.isfile(name_or_path):
        tokenizer = _from_tokenizers_file(name_or_path)
    else:
        is_folder = os.path.isdir(name_or_path)
        if not is_folder and (name_or_path.count("/") > 1 or name_or_path.startswith((".", "/", "~"))):
            raise UserError(f"tokenizer {name_or_path}: no such file or folder")
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                name_or_path,
                use_fast=True,
                trust_remote_code=False,
                local_files_only=is_folder or not _hub_answers(name_or_path),
            )
        except Exception as error:  # whatever the hub client or a broken file raises, the person has to choose another
            reason = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
            what = (
                "a folder, but not of a tokenizer" if is_folder else "no file or folder here, and not had from the hub"
            )
            raise UserError(
                f"tokenizer {name_or_path}: {what} ({reason}); "
                "give a vocab.txt, a tokenizer.json, a tokenizer's folder or its name on the hub"
            ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"tokenizer {name_or_path}: has no fast (tokenizers) version, which conversion needs")
    special_ids(tokenizer, name_or_path)
    last = max(tokenizer.get_vocab().values())
    if last >= len(tokenizer):
        raise UserError(
            f"tokenizer {name_or_path}: has {len(tokenizer):,} entries, but ids up to {last:,}; number them through "
            "without gaps, since each id is a row of the embeddings"
        )
    return tokenizer


def _hub_answers(name: str) -> bool:
    """Ask the hub once: without a network, loading would try for most of a minute what the cache may well hold."""
    try:
        HfApi().model_info(name, timeout=10)
    except (OSError, HfHubHTTPError) as error:
        if isinstance(error, RepositoryNotFoundError):
            raise
        return False
    return True


def _from_vocabulary_file(path: str, cased: bool, keep_accents: bool) -> PreTrainedTokenizerFast:
    try:
        with open(path, encoding="utf-8") as file:
            tokens = [line.rstrip("\n") for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"tokenizer {path}: not a readable UTF-8 vocabulary file: {error}") from error
    twice = [token for token, count in Counter(tokens).items() if count > 1]
    if twice:
        raise UserError(f"tokenizer {path}: {twice[0]!r} stands there more than once; expected one token a line")
    missing = [token for token in SPECIAL_TOKENS if token not in tokens]
    if missing:
        raise UserError(
            f"tokenizer {path}: no line {missing[0]} among its {len(tokens)}; expected a BERT-style vocab.txt, "
            f"one token a line, with {' '.join(SPECIAL_TOKENS)}"
        )
    return _word_piece(path, cased, keep_accents)


def _from_tokenizers_file(path: str) -> PreTrainedTokenizerFast:
    """A tokenizer of any kind that `tokenizers` saved. Which of its tokens are special is told by their names."""
    try:
        backend = Tokenizer.from_file(path)
    except Exception as error:  # tokenizers raises nothing more specific
        raise UserError(
            f"tokenizer {path}: not a file that `tokenizers` saved ({' '.join(str(error).split())}); for a vocabulary "
            "of one token a line choose a name that does not end in .json"
        ) from error
    names = {
        f"{role}_token": next(name for name in SPECIAL_NAMES[role] if backend.token_to_id(name) is not None)
        for role in SPECIAL_NAMES
        if any(backend.token_to_id(name) is not None for name in SPECIAL_NAMES[role])
    }
    # transformers would set this of a byte-level pre-tokenizer to its own default, and give other tokens.
    space = (json.loads(backend.to_str())["pre_tokenizer"] or {}).get("add_prefix_space", False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, add_prefix_space=space, **names)
    tokenizer.name_or_path = path
    return tokenizer


def _word_piece(path: str, cased: bool, keep_accents: bool) -> PreTrainedTokenizerFast:
    """BERT's tokenizer: it takes accents off where it lower-cases, unless told otherwise."""
    return ElectraTokenizerFast(
        vocab_file=path, do_lower_case=not cased, strip_accents=False if keep_accents or cased else None
    )


def special_ids(tokenizer: PreTrainedTokenizerFast, name: str = "") -> dict[str, int]:
    """Ids of the special tokens, by role: `pad`, `unk`, `cls`, `sep`, `mask`.

    Raises:
        UserError: the tokenizer lacks one that ELECTRA needs (all but `unk`).
    """
    ids = {role: getattr(tokenizer, f"{role}_token_id") for role in ("pad", "unk", "cls", "sep", "mask")}
    missing = [f"[{role.upper()}]" for role, index in ids.items() if index is None and role != "unk"]
    if missing:
        raise UserError(
            f"tokenizer {name or tokenizer.name_or_path}: has no {' and no '.join(missing)} token; ELECTRA needs "
            "[CLS], [SEP], [MASK] and [PAD], as the tokenizers of BERT and ELECTRA have (docs/languages.md says how to "
            "add them)"
        )
    return {role: int(index) for role, index in ids.items() if index is not None}


def vocabulary_sha256(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 of the tokens in the order of their ids, one a line: that of `vocab.txt` itself, if it came from one.

    Ids without a token count as empty lines, so that two vocabularies are the same only if every id means the same.
    """
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    lines = [by_id.get(index, "") for index in range(max(by_id) + 1)]
    return hashlib.sha256("".join(f"{line}\n" for line in lines).encode("utf-8")).hexdigest()


def _warn_of_lost_marks(texts: list[str]) -> None:
    """Say so if taking accents off would take letters apart: vowels of Thai and Hindi, kana with dakuten, Hangul.

    Those of Latin, Greek and Cyrillic, and the points of Hebrew and Arabic, readers do without.
    """
    sample = "".join(itertools.islice(itertools.chain.from_iterable(texts), _LOOK_CHARACTERS))
    lost = [character for character in sample if _is_taken_apart(character)]
    if len(lost) > MUCH_LOST * max(1, len(sample)):
        examples = " ".join(character for character, _ in Counter(lost).most_common(3))
        print(
            f"warning: taking accents off changes {len(lost) / len(sample):.0%} of this text's characters, such as "
            f"{examples}, which are letters or vowels in their script; train with --keep-accents or --cased",
            file=sys.stderr,
            flush=True,
        )


@functools.cache
def _is_taken_apart(character: str) -> bool:
    parts = unicodedata.normalize("NFD", character)
    name = unicodedata.name(character, "")
    if unicodedata.category(character) == "Mn":
        return not name.startswith(("COMBINING", "HEBREW", "ARABIC"))
    return len(parts) > 1 and name.startswith(("HIRAGANA", "KATAKANA", "HANGUL"))


def _alphabet_size(counts: list[int], vocab_size: int) -> int:
    """How many of the characters, given by their counts from the most frequent on, get entries.

    Those beyond :data:`ALPHABET` have at most half of the vocabulary, of which each takes two: the rest is for words.
    """
    reached = itertools.accumulate(counts)
    enough = COVERAGE * sum(counts)
    needed = next((number for number, sum_ in enumerate(reached, 1) if sum_ >= enough), 0)
    return max(ALPHABET, min(needed, vocab_size // 4))


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, cased: bool = False, keep_accents: bool = False, progress: bool = False
) -> PreTrainedTokenizerFast:
    """Train a WordPiece vocabulary; the same texts in any order give the same vocabulary.

    The trainer of `tokenizers` counts words in a hash table whose order changes from process to process, and breaks
    ties by ids given in that order. So what it would number as it goes is numbered beforehand: the most frequent
    characters, each as it stands at the start of a word and (`##`) inside one.

    Args:
        texts: the training text, held in memory; pieces of any size, in which no word is cut.
        vocab_size: entries wanted; small text may give fewer.
        cased, keep_accents: as of :func:`load_tokenizer`; cased text keeps its accents.

    Raises:
        UserError: no text, or `vocab_size` too small for the special tokens and the alphabet of the text.
    """
    if not (cased or keep_accents):
        texts = list(texts)
        _warn_of_lost_marks(texts)
    normalizer = normalizers.BertNormalizer(lowercase=not cased, strip_accents=False if keep_accents or cased else None)
    texts = [normalizer.normalize_str(text) for text in texts]
    characters: Counter[str] = Counter()
    for text in texts:
        characters.update(text)
    ranked = sorted((c for c in characters if not c.isspace()), key=lambda c: (-characters[c], c))
    alphabet = sorted(ranked[: _alphabet_size([characters[c] for c in ranked], vocab_size)])
    if not alphabet:
        raise UserError("no text to train a vocabulary on")
    numbered = [*SPECIAL_TOKENS, *alphabet, *(f"##{c}" for c in alphabet)]
    if vocab_size < len(numbered):
        raise UserError(
            f"vocab_size is {vocab_size}; this text needs at least {len(numbered)} for the special tokens and its "
            f"{len(alphabet)} characters"
        )
    model = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=MIN_FREQUENCY,
        special_tokens=numbered,  # "special" only to the trainer, whose way of fixing an id this is
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        continuing_subword_prefix="##",
        show_progress=progress,
    )
    model.train_from_iterator(texts, trainer=trainer, length=len(texts))
    vocabulary = sorted(model.get_vocab(), key=model.get_vocab().__getitem__)
    with TemporaryDirectory() as folder:
        path = os.path.join(folder, "vocab.txt")
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{token}\n" for token in vocabulary)
        tokenizer = _word_piece(path, cased, keep_accents)
    tokenizer.name_or_path = f"trained-{len(vocabulary)}"
    return tokenizer
