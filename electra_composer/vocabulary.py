"""Load tokenizers from a vocabulary file, a folder or the hub, train WordPiece on text, and identify vocabularies."""

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
from electra_composer.foreign_files import refuse_foreign
from electra_composer.word_limits import use_word_limit

# Names of the special tokens by role; the first of each is that of BERT and ELECTRA.
SPECIAL_NAMES = {
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]", "<cls>", "<s>"),
    "sep": ("[SEP]", "<sep>", "</s>"),
    "mask": ("[MASK]", "<mask>"),
}
# Ids 0 to 4 of a trained vocabulary, in the order of BERT's vocabulary file.
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
# Characters with an entry of their own in a trained vocabulary: the 1,000 most frequent (as in BERT's trainer), or as
# many as cover this fraction of the text (SentencePiece's `character_coverage` for Japanese and Chinese).
ALPHABET = 1000
COVERAGE = 0.9995
MUCH_LOST = 0.01  # fraction of characters changed by accent stripping above which training warns
_LOOK_CHARACTERS = 1_000_000  # examined for that warning
MIN_FREQUENCY = 2  # of a pair of pieces, to become an entry


def load_tokenizer(name_or_path: str, cased: bool = False, keep_accents: bool = False) -> PreTrainedTokenizerFast:
    """Load a fast tokenizer and check that it has the special tokens and contiguous ids that ELECTRA needs.

    Args:
        name_or_path: a BERT-style `vocab.txt` (one token per line, read as uncased WordPiece), a folder written by
            `save_pretrained`, a file saved by `tokenizers` (`….json`), or a name on the Hugging Face hub such as
            `google/electra-small-discriminator`.
        cased: do not lower-case the text; only for a `vocab.txt`, since other tokenizers define this themselves.
        keep_accents: do not strip accents from lower-cased text; only for a `vocab.txt`.

    Raises:
        UserError: not found, hub out of reach, not a fast tokenizer, a special token missing, gaps in the ids, or
            options that this kind of tokenizer does not take.
    """
    is_json = name_or_path.endswith(".json")
    if os.path.isfile(name_or_path) or not os.path.isdir(name_or_path):  # a folder may have a tokenizer beside weights
        refuse_foreign(name_or_path, "a vocab.txt, a tokenizer.json, a tokenizer's folder or its name on the hub")
    if os.path.isfile(name_or_path) and not is_json:
        tokenizer = _from_vocabulary_file(name_or_path, cased, keep_accents)
    elif cased or keep_accents:
        raise UserError(
            f"tokenizer {name_or_path}: defines case and accents itself; --cased and --keep-accents are only for a "
            "vocab.txt or --tokenizer train"
        )
    elif os.path.isfile(name_or_path):
        tokenizer = _from_tokenizers_file(name_or_path)
    else:
        is_folder = os.path.isdir(name_or_path)
        if not is_folder and (name_or_path.count("/") > 1 or name_or_path.startswith((".", "/", "~"))):
            raise UserError(f"tokenizer {name_or_path}: no such file or folder")
        online = False
        try:
            online = not is_folder and _hub_answers(name_or_path)
            tokenizer = AutoTokenizer.from_pretrained(
                name_or_path, use_fast=True, trust_remote_code=False, local_files_only=not online
            )
        except Exception as error:  # the hub client and a broken file raise many types; all mean: choose another
            if not is_folder and not online and not isinstance(error, RepositoryNotFoundError):
                raise UserError(
                    f"tokenizer {name_or_path}: no such file or folder; the Hugging Face Hub cannot be reached, and it "
                    "is not in the local cache. Connect to the network, or give a local vocab.txt or tokenizer folder "
                    "(in data_prep/convert_owt.py also --tokenizer train: make a vocabulary from the text)"
                ) from error
            reason = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
            what = "the folder holds no tokenizer" if is_folder else "no such file or folder, and not found on the hub"
            raise UserError(
                f"tokenizer {name_or_path}: {what} ({reason}); "
                "expected a vocab.txt, a tokenizer.json, a tokenizer's folder or its name on the hub"
            ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"tokenizer {name_or_path}: has no fast (tokenizers) version, which conversion needs")
    special_ids(tokenizer, name_or_path)
    last = max(tokenizer.get_vocab().values())
    if last >= len(tokenizer):
        raise UserError(
            f"tokenizer {name_or_path}: has {len(tokenizer):,} entries, but ids up to {last:,}; expected ids without "
            "gaps, since each id is a row of the embeddings"
        )
    return tokenizer


def _hub_answers(name: str) -> bool:
    """Ask the hub once, so that without a network the cache is used at once instead of after a minute of retries."""
    try:
        HfApi().model_info(name, timeout=10)
    except (OSError, HfHubHTTPError) as error:
        if isinstance(error, RepositoryNotFoundError):
            raise
        return False
    return True


def _from_vocabulary_file(path: str, cased: bool, keep_accents: bool) -> PreTrainedTokenizerFast:
    """Load a `vocab.txt` as a WordPiece tokenizer, after checking for duplicates and special tokens."""
    try:
        with open(path, encoding="utf-8") as file:
            tokens = [line.rstrip("\n") for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"tokenizer {path}: not a readable UTF-8 vocabulary file: {error}") from error
    twice = [token for token, count in Counter(tokens).items() if count > 1]
    if twice:
        raise UserError(f"tokenizer {path}: {twice[0]!r} occurs more than once; expected one token per line, each once")
    missing = [token for token in SPECIAL_TOKENS if token not in tokens]
    if missing:
        raise UserError(
            f"tokenizer {path}: none of its {len(tokens)} lines is {missing[0]}; expected a BERT-style vocab.txt, "
            f"one token per line, with {' '.join(SPECIAL_TOKENS)}"
        )
    return _word_piece(path, cased, keep_accents)


def _from_tokenizers_file(path: str) -> PreTrainedTokenizerFast:
    """Load a tokenizer of any kind saved by `tokenizers`; its special tokens are found by :data:`SPECIAL_NAMES`."""
    try:
        backend = Tokenizer.from_file(path)
    except Exception as error:  # tokenizers raises no more specific type
        raise UserError(
            f"tokenizer {path}: not a file saved by `tokenizers` ({' '.join(str(error).split())}); if it is a "
            "vocabulary of one token per line, give it a name that does not end in .json"
        ) from error
    names = {
        f"{role}_token": next(name for name in SPECIAL_NAMES[role] if backend.token_to_id(name) is not None)
        for role in SPECIAL_NAMES
        if any(backend.token_to_id(name) is not None for name in SPECIAL_NAMES[role])
    }
    # Workaround (transformers 4.57): PreTrainedTokenizerFast sets add_prefix_space of a byte-level pre-tokenizer to its
    # own default, which changes the tokens; goes when it keeps the setting of `tokenizer_object`.
    space = (json.loads(backend.to_str())["pre_tokenizer"] or {}).get("add_prefix_space", False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, add_prefix_space=space, **names)
    tokenizer.name_or_path = path
    return tokenizer


def _word_piece(path: str, cased: bool, keep_accents: bool) -> PreTrainedTokenizerFast:
    """Build BERT's WordPiece tokenizer. Lower-casing strips accents unless `keep_accents` is set."""
    tokenizer = ElectraTokenizerFast(
        vocab_file=path, do_lower_case=not cased, strip_accents=False if keep_accents or cased else None
    )
    use_word_limit(tokenizer)
    return tokenizer


def special_ids(tokenizer: PreTrainedTokenizerFast, name: str = "") -> dict[str, int]:
    """Return the ids of the special tokens by role: `pad`, `unk`, `cls`, `sep`, `mask`.

    Raises:
        UserError: a special token that ELECTRA needs (all but `unk`) is missing.
    """
    ids = {role: getattr(tokenizer, f"{role}_token_id") for role in ("pad", "unk", "cls", "sep", "mask")}
    missing = [f"[{role.upper()}]" for role, index in ids.items() if index is None and role != "unk"]
    if missing:
        raise UserError(
            f"tokenizer {name or tokenizer.name_or_path}: has no {' and no '.join(missing)} token; ELECTRA needs "
            "[CLS], [SEP], [MASK] and [PAD], as in the tokenizers of BERT and ELECTRA (docs/languages.md shows how to "
            "add them)"
        )
    return {role: int(index) for role, index in ids.items() if index is not None}


def vocabulary_sha256(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the SHA-256 of the tokens in the order of their ids, one per line: the hash of the `vocab.txt` file.

    Ids without a token count as empty lines, so that equal hashes mean that every id is the same token.
    """
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    lines = [by_id.get(index, "") for index in range(max(by_id) + 1)]
    return hashlib.sha256("".join(f"{line}\n" for line in lines).encode("utf-8")).hexdigest()


def _warn_of_lost_marks(texts: list[str]) -> None:
    """Warn if stripping accents would destroy letters: vowels of Thai and Hindi, kana with dakuten, Hangul.

    Accents of Latin, Greek and Cyrillic, and the points of Hebrew and Arabic, are not counted.
    """
    sample = "".join(itertools.islice(itertools.chain.from_iterable(texts), _LOOK_CHARACTERS))
    lost = [character for character in sample if _is_taken_apart(character)]
    if len(lost) > MUCH_LOST * max(1, len(sample)):
        examples = " ".join(character for character, _ in Counter(lost).most_common(3))
        print(
            f"warning: stripping accents changes {len(lost) / len(sample):.0%} of this text's characters, such as "
            f"{examples}, which are letters or vowels in their script; train with --keep-accents or --cased",
            file=sys.stderr,
            flush=True,
        )


@functools.cache
def _is_taken_apart(character: str) -> bool:
    """Whether stripping accents removes this mark, or splits this letter of a script that needs its marks."""
    parts = unicodedata.normalize("NFD", character)
    name = unicodedata.name(character, "")
    if unicodedata.category(character) == "Mn":
        return not name.startswith(("COMBINING", "HEBREW", "ARABIC"))
    return len(parts) > 1 and name.startswith(("HIRAGANA", "KATAKANA", "HANGUL"))


def _alphabet_size(counts: list[int], vocab_size: int) -> int:
    """Return how many characters get entries, from their counts in descending order.

    Beyond :data:`ALPHABET`, characters take at most half of the vocabulary (two entries each); the rest is for words.
    """
    reached = itertools.accumulate(counts)
    enough = COVERAGE * sum(counts)
    needed = next((number for number, sum_ in enumerate(reached, 1) if sum_ >= enough), 0)
    return max(ALPHABET, min(needed, vocab_size // 4))


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, cased: bool = False, keep_accents: bool = False
) -> PreTrainedTokenizerFast:
    """Train a WordPiece vocabulary; the same texts in any order give the same vocabulary.

    Args:
        texts: the training text, held in memory; pieces of any size that do not split words.
        vocab_size: maximum number of entries; little text may give fewer.
        cased, keep_accents: see :func:`load_tokenizer`; cased text keeps its accents.

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
    # Workaround (tokenizers 0.22): WordPieceTrainer counts words in a hash table whose order changes from process to
    # process, and breaks ties by ids given in that order. The ids of the alphabet, at the start of a word and (`##`)
    # inside one, are therefore fixed beforehand; goes when the trainer is deterministic.
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
        special_tokens=numbered,  # special only to the trainer: this fixes their ids
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        continuing_subword_prefix="##",
        show_progress=False,  # prints blank lines
    )
    model.train_from_iterator(texts, trainer=trainer, length=len(texts))
    vocabulary = sorted(model.get_vocab(), key=model.get_vocab().__getitem__)
    try:
        with TemporaryDirectory() as folder:
            path = os.path.join(folder, "vocab.txt")
            with open(path, "w", encoding="utf-8", newline="\n") as file:
                file.writelines(f"{token}\n" for token in vocabulary)
            tokenizer = _word_piece(path, cased, keep_accents)
    except OSError as error:
        raise UserError(
            f"the vocabulary cannot be written to the folder for temporary files: {error.strerror}; free some space, "
            "or set TMPDIR to another folder"
        ) from error
    tokenizer.name_or_path = f"trained-{len(vocabulary)}"
    return tokenizer
