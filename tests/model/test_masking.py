"""Masking and sampling against the rules of the paper's code and against closed forms.

Statistical tolerances are five binomial standard errors, √(p(1-p)/n), unless stated otherwise: with fixed seeds a test
passes always or never, and five allow for the number of comparisons.
"""

from __future__ import annotations

import math

import pytest
import torch

from electra_composer.model import masking

CLS, SEP, MASK, PAD = 2, 3, 4, 0
SPECIAL = (CLS, SEP, MASK)
LENGTH, ROWS, VOCAB = 128, 11_000, 1000
SLOTS = 19  # int(0.155 × 128)


@pytest.fixture(scope="module")
def corpus() -> tuple[torch.Tensor, torch.Tensor]:
    """`input_ids`, `sequence_ids` `[11000, 128]`: one example of 60 to 128 tokens per row, over 10⁶ tokens in total."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(60, LENGTH + 1, (ROWS,), generator=generator)
    middles = (lengths.double() * torch.rand(ROWS, generator=generator).double()).long().clamp(min=2)
    middles = torch.minimum(middles, lengths - 2)
    place = torch.arange(LENGTH)[None, :]
    input_ids = torch.randint(5, VOCAB, (ROWS, LENGTH), generator=generator)
    input_ids[:, 0] = CLS
    input_ids[place == middles[:, None]] = SEP
    input_ids[place == lengths[:, None] - 1] = SEP
    input_ids[place >= lengths[:, None]] = PAD
    sequence_ids = (place < lengths[:, None]).long()
    assert int(sequence_ids.sum()) > 10**6
    return input_ids, sequence_ids


def draw(corpus: tuple[torch.Tensor, torch.Tensor], seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw positions and weights; also return the candidates."""
    input_ids, sequence_ids = corpus
    candidates = masking.maskable(input_ids, sequence_ids, SPECIAL)
    counts = masking.mask_counts(candidates, sequence_ids, 0.15, SLOTS)
    noise = torch.rand(input_ids.shape, generator=torch.Generator().manual_seed(seed))
    positions, weights = masking.choose_positions(candidates, counts, SLOTS, noise)
    return positions, weights, candidates


@pytest.mark.parametrize(
    ("mask_prob", "length", "slots"),
    [(0.15, 128, 19), (0.15, 512, 79), (0.25, 512, 130), (0.25, 128, 32), (0.15, 64, 9), (0.15, 6, 0)],
)
def test_slots_of_a_row(mask_prob: float, length: int, slots: int) -> None:
    """(0.15 + 0.005) × 512 = 79.36 → 79, (0.25 + 0.005) × 512 = 130.56 → 130, … by hand."""
    assert masking.num_slots(mask_prob, length) == slots


def test_noise_is_one_number_per_position_and_three_per_slot() -> None:
    width = masking.noise_width(10, 4)
    assert width == 10 + 3 * 4
    parts = masking.split_noise(torch.arange(2 * width).view(2, width), 4)
    assert [tuple(part.shape) for part in parts] == [(2, 10), (2, 4), (2, 4), (2, 4)]
    assert torch.equal(torch.cat(parts, dim=1), torch.arange(2 * width).view(2, width))


@pytest.mark.parametrize(
    ("tokens", "candidates", "expected"),
    [
        (128, 125, 19),  # 19.2 rounded
        (100, 98, 15),
        (97, 95, 15),  # 14.55 rounded up
        (10, 8, 2),  # 1.5: to the even neighbour, as tf.round does
        (4, 2, 1),  # 0.6
        (3, 1, 1),  # 0.45 rounds to none: at least one
        (2, 0, 0),  # [CLS] [SEP]: nothing to mask
        (0, 0, 0),  # a row of padding
    ],
)
def test_mask_count_of_a_row(tokens: int, candidates: int, expected: int) -> None:
    """A fraction of the tokens, special ones included, rounded, at least 1, at most the number of candidates."""
    sequence_ids = (torch.arange(LENGTH) < tokens).long()[None]
    allowed = (torch.arange(LENGTH) < candidates)[None]
    assert masking.mask_counts(allowed, sequence_ids, 0.15, SLOTS).tolist() == [expected]


def test_mask_count_is_at_most_the_slots() -> None:
    """25% of a full row of 128 would be 32; with 19 slots it is 19."""
    full = torch.ones(1, LENGTH, dtype=torch.long)
    assert masking.mask_counts(full.bool(), full, 0.25, SLOTS).tolist() == [SLOTS]


def test_mask_rate_over_a_million_tokens(corpus: tuple[torch.Tensor, torch.Tensor]) -> None:
    """15% of the tokens. Rounding moves a row by at most half a token, uniformly: √(rows / 12) tokens in all is one
    standard error; full rows lose a systematic 0.2 (19 slots for 19.2), under 1.5% of rows: 0.05% allowed for that."""
    sequence_ids = corpus[1]
    _, weights, _ = draw(corpus, 2)
    tokens = int(sequence_ids.sum())
    tolerance = 5 * math.sqrt(ROWS / 12) / tokens + 0.0005 * 0.15
    assert abs(weights.sum().item() / tokens - 0.15) < tolerance
    by_row = [min(19, max(1, round(0.15 * n))) for n in sequence_ids.sum(1).tolist()]
    off = torch.tensor(by_row) - weights.sum(1)
    assert off.abs().max() <= 1  # fp32 against double at exact halves
    assert (off != 0).double().mean() < 0.05


def test_never_special_tokens_or_padding(corpus: tuple[torch.Tensor, torch.Tensor]) -> None:
    input_ids, sequence_ids = corpus
    positions, weights, _ = draw(corpus, 3)
    used = weights > 0
    masked_tokens = input_ids.gather(1, positions)[used]
    assert not torch.isin(masked_tokens, torch.tensor([CLS, SEP, MASK, PAD])).any()
    assert (sequence_ids.gather(1, positions)[used] > 0).all()


def test_a_literal_mask_token_is_not_masked() -> None:
    input_ids = torch.tensor([[CLS, 7, MASK, 8, SEP, 0]])
    sequence_ids = torch.tensor([[1, 1, 1, 1, 1, 0]])
    assert masking.maskable(input_ids, sequence_ids, SPECIAL).tolist() == [[False, True, False, True, False, False]]


def test_no_position_twice(corpus: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Including unused slots, whose scatter must not overwrite a used one."""
    positions, _, _ = draw(corpus, 4)
    ordered = positions.sort(dim=1).values
    assert (ordered[:, 1:] > ordered[:, :-1]).all()


def test_weights_are_ones_then_zeros(corpus: tuple[torch.Tensor, torch.Tensor]) -> None:
    _, weights, _ = draw(corpus, 4)
    assert set(weights.unique().tolist()) <= {0.0, 1.0}
    assert (weights[:, 1:] <= weights[:, :-1]).all()
    assert weights.dtype == torch.float32


def test_every_candidate_equally_often() -> None:
    """97 candidates of 100 tokens, 15 masked: each 15/97 of 20,000 draws, within five standard errors."""
    rows = 20_000
    input_ids = torch.full((1, 100), 9)
    input_ids[0, [0, 50, 99]] = torch.tensor([CLS, SEP, SEP])
    sequence_ids = torch.ones(1, 100, dtype=torch.long)
    candidates = masking.maskable(input_ids, sequence_ids, SPECIAL).expand(rows, -1)
    counts = masking.mask_counts(candidates, sequence_ids.expand(rows, -1), 0.15, 15)
    positions, weights = masking.choose_positions(candidates, counts, 15, torch.rand(rows, 100))
    assert (weights == 1).all()
    share = torch.bincount(positions.flatten(), minlength=100) / rows
    expected = 15 / 97
    assert share[[0, 50, 99]].sum() == 0
    deviation = (share[input_ids[0] == 9] - expected).abs().max()
    assert deviation < 5 * math.sqrt(expected * (1 - expected) / rows)


def test_noise_of_zero_still_prefers_candidates() -> None:
    """0 is a possible uniform number and must rank above positions that are not candidates."""
    candidates = torch.tensor([[False, False, True, False, True, False]])
    positions, weights = masking.choose_positions(candidates, torch.tensor([2]), 3, torch.zeros(1, 6))
    assert sorted(positions[weights > 0].tolist()) == [2, 4]


def test_masking_is_dynamic(corpus: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Two draws of a row overlap in 15% of their positions, within five standard errors."""
    first, weights, candidates = draw(corpus, 5)
    second, _, _ = draw(corpus, 6)
    marks = torch.zeros(ROWS, LENGTH).scatter(1, first, weights)
    again = torch.zeros(ROWS, LENGTH).scatter(1, second, weights)
    masked = weights.sum().item()
    expected = (weights.sum(1) ** 2 / candidates.sum(1)).sum().item() / masked
    overlap = (marks * again).sum().item() / masked
    assert abs(overlap - expected) < 5 * math.sqrt(expected * (1 - expected) / masked)
    same, _, _ = draw(corpus, 5)
    assert torch.equal(first, same)


def shares_of(style: str, tokens: torch.Tensor) -> tuple[float, float, float]:
    """Fractions of `[MASK]`, unchanged and other tokens in the output of `mask_tokens`, with every slot used."""
    weights = torch.ones_like(tokens, dtype=torch.float32)
    out = masking.mask_tokens(tokens, weights, style, MASK, VOCAB, torch.rand(tokens.shape), torch.rand(tokens.shape))
    masked, kept = out == MASK, out == tokens
    return masked.double().mean().item(), kept.double().mean().item(), (~masked & ~kept).double().mean().item()


def test_electra_style_is_85_15_0() -> None:
    tokens = torch.randint(5, VOCAB, (1000, 1000))
    masked, kept, other = shares_of("electra", tokens)
    error = math.sqrt(0.85 * 0.15 / tokens.numel())
    assert abs(masked - 0.85) < 5 * error
    assert abs(kept - 0.15) < 5 * error
    assert other == 0.0


def test_bert_style_is_80_10_10() -> None:
    """A random token is `[MASK]` or the original with probability 1/1000 each: fractions shift by 10% of that."""
    tokens = torch.randint(5, VOCAB, (1000, 1000))
    masked, kept, other = shares_of("bert", tokens)
    for found, expected in ((masked, 0.8 + 1e-4), (kept, 0.1 + 1e-4), (other, 0.1 - 2e-4)):
        assert abs(found - expected) < 5 * math.sqrt(expected * (1 - expected) / tokens.numel())


def test_bert_style_random_tokens_are_uniform() -> None:
    tokens = torch.full((500, 1000), 7)
    random_numbers = torch.rand(tokens.shape)
    out = masking.mask_tokens(
        tokens, torch.ones(tokens.shape), "bert", MASK, 50, torch.full(tokens.shape, 0.85), random_numbers
    )
    share = torch.bincount(out.flatten(), minlength=50).double() / tokens.numel()
    assert share.numel() == 50  # all ids, none beyond
    assert (share - 1 / 50).abs().max() < 5 * math.sqrt(0.02 * 0.98 / tokens.numel())


@pytest.mark.parametrize("edge", [0.0, 1 - 2.0**-24])
def test_bert_style_at_the_edges_of_the_noise(edge: float) -> None:
    out = masking.mask_tokens(
        torch.tensor([[7]]), torch.ones(1, 1), "bert", MASK, 30522, torch.tensor([[0.85]]), torch.tensor([[edge]])
    )
    assert 0 <= out.item() < 30522


@pytest.mark.parametrize("style", ["electra", "bert"])
def test_unused_slots_keep_their_token(style: str) -> None:
    tokens = torch.randint(5, VOCAB, (100, 100))
    zeros = torch.zeros(tokens.shape)
    out = masking.mask_tokens(tokens, zeros, style, MASK, VOCAB, torch.rand(tokens.shape), torch.rand(tokens.shape))
    assert torch.equal(out, tokens)


def test_unknown_style_is_refused() -> None:
    one = torch.ones(1, 1)
    with pytest.raises(ValueError, match="'electra' or 'bert'"):
        masking.mask_tokens(one.long(), one, "roberta", MASK, VOCAB, one, one)


def test_labels() -> None:
    """Replaced means different from the original and not padding; a sample equal to the original is original."""
    originals = torch.tensor([[CLS, 7, 8, SEP, PAD]])
    corrupted = torch.tensor([[CLS, 9, 8, SEP, 5]])
    sequence_ids = torch.tensor([[1, 1, 1, 1, 0]])
    labels = masking.replaced_labels(corrupted, originals, sequence_ids)
    assert labels.tolist() == [[False, True, False, False, False]]
