"""Adapt the embeddings of a network to the vocabulary and the positions of a run."""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedTokenizerFast

from electra_composer.checkpoints.networks import Network
from electra_composer.errors import UserError
from electra_composer.model.adaptation import extend_rows, resize_positions
from electra_composer.model.encoder import EncoderConfig


def adapt(network: Network, expected: EncoderConfig, positions: str, tokenizer: PreTrainedTokenizerFast) -> Network:
    """Bring the tables of a network to the vocabulary of a tokenizer and to another number of positions.

    Args:
        network: to adapt; stays as it is.
        expected: sizes to reach.
        positions: `copy` or `interpolate`, see :func:`resize_positions`.
        tokenizer: begins with the vocabulary of the network's own.

    Raises:
        UserError: it does not.
    """
    pieces = pieces_of_new_tokens(network, tokenizer)
    old = len(tokenizer) - len(pieces)
    embeddings = dict(network.embeddings)
    delta = None if network.delta is None else dict(network.delta)
    for tables in (embeddings, delta):
        if tables is not None:
            tables["word.weight"] = extend_rows(tables["word.weight"][:old], pieces, expected.padded_vocab_size)
            tables["position.weight"] = resize_positions(tables["position.weight"], expected.max_positions, positions)
    heads = []
    for head in (network.head, network.lm_head):
        if head is not None and "bias" in head:
            head = {**head, "bias": extend_rows(head["bias"][:old], pieces, expected.padded_vocab_size)}
        heads.append(head)
    return replace(network, embeddings=embeddings, delta=delta, head=heads[0], lm_head=heads[1])


def pieces_of_new_tokens(network: Network, tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Return, for each entry of the tokenizer beyond the vocabulary of a network, the ids of its old pieces.

    Raises:
        UserError: an old entry has another id, or none; or the network has no tokenizer, and another number of entries.
    """
    old, advice = network.tokenizer, f"convert the text with --tokenizer {network.source}"
    size = network.config.vocab_size if old is None else len(old)
    if len(tokenizer) < size or (old is None and len(tokenizer) > size):
        raise UserError(
            f"the tokenizer of the shards has {len(tokenizer):,} entries, {network.source} was trained with "
            f"{size:,}; {'convert the text with that of its training' if old is None else advice}"
        )
    if old is None:
        return []
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    for number, name in enumerate(old.convert_ids_to_tokens(list(range(size)))):
        if names[number] != name:
            raise UserError(
                f"the tokenizer of the shards has {names[number]!r} as entry {number:,}, {network.source} was trained "
                f"with {name!r}; {advice}"
            )
    ids = old.get_vocab()
    return [_pieces(name, old, ids) for name in names[size:]]


def _pieces(name: str, tokenizer: PreTrainedTokenizerFast, ids: dict[str, int]) -> list[int]:
    """Tokenize the text of a new entry by the old vocabulary; `##` marks the inside of a word (WordPiece)."""
    if not name.startswith("##"):
        return [ids[token] for token in tokenizer.tokenize(name)] or [ids[str(tokenizer.unk_token)]]
    pieces, rest = [], name.removeprefix("##")
    while rest:  # the longest match first, as at the start of a word
        end = next((end for end in range(len(rest), 0, -1) if f"##{rest[:end]}" in ids), None)
        if end is None:
            return [ids[str(tokenizer.unk_token)]]
        pieces.append(ids[f"##{rest[:end]}"])
        rest = rest[end:]
    return pieces
