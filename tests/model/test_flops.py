"""Operations of a step of each objective, by hand from the sizes of the matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from objective_cases import FROZEN

from electra_composer.config import ObjectiveConfig
from electra_composer.model.pretraining import ElectraPretraining

Make = Callable[..., Any]

# Rows of 20 tokens in two examples of 12 and 8, and of 6 tokens: 26 tokens, squared lengths 144 + 64 + 36 = 244. 3 + 1
# are masked; 9 + 6 + 4 = 19 are not [CLS] or [SEP].
ROWS = [[(5, 7), (8, 0)], [(6, 0)]]
# Two layers of 32 (generator: 16), feed-forward 128 (64), embeddings of 16, vocabulary of 99.
DISCRIMINATOR = 6 * 26 * (2 * (4 * 1_024 + 2 * 4_096) + 512) + 12 * 2 * 32 * 244
GENERATOR = 6 * 26 * (2 * (4 * 256 + 2 * 1_024)) + 12 * 2 * 16 * 244
# Causal attention: a token reads itself and those before it, (244 + 26) / 2 = 135 pairs.
TOWERS = 2 * (6 * 26 * (2 * (4 * 256 + 2 * 1_024)) + 12 * 2 * 16 * 135)
RTD_HEAD = 6 * 26 * (32 * 32 + 32)
MLM_HEAD = 6 * 4 * (16 * 16 + 16 * 99)
CLOZE_HEAD = 6 * 19 * (32 * 16 + 16 * 99)
LM_HEAD = 32 * 16 + 16 * 99  # weights


@pytest.mark.parametrize(
    ("objective", "model", "expected"),
    [
        ({}, {}, DISCRIMINATOR + RTD_HEAD + GENERATOR + MLM_HEAD),
        ({"kind": "electra_15"}, {}, DISCRIMINATOR + RTD_HEAD + GENERATOR + MLM_HEAD),
        ({"kind": "mlm"}, {}, DISCRIMINATOR + 6 * 4 * LM_HEAD),
        ({"kind": "replace_mlm"}, {}, DISCRIMINATOR + 6 * 4 * LM_HEAD + GENERATOR + MLM_HEAD),
        ({"kind": "all_tokens_mlm"}, {}, DISCRIMINATOR + 6 * 26 * (LM_HEAD + 32) + GENERATOR + MLM_HEAD),
        ({"kind": "electric"}, {}, DISCRIMINATOR + RTD_HEAD + TOWERS + CLOZE_HEAD),
        ({"generator": "two_tower"}, {}, DISCRIMINATOR + RTD_HEAD + TOWERS + CLOZE_HEAD),
        ({"generator": "uniform"}, {}, DISCRIMINATOR + RTD_HEAD),
        ({"kind": "electric", "generator": "unigram"}, {}, DISCRIMINATOR + RTD_HEAD),
        (
            {"generator": "frozen"},
            {"sharing": "untied", **FROZEN},  # 2 instead of 6 operations a weight: no backward
            DISCRIMINATOR + RTD_HEAD + 2 * 26 * 2 * 3_072 + 4 * 2 * 16 * 244 + 2 * 4 * (256 + 1_584),
        ),
    ],
)
def test_operations_by_hand(
    make_model: Make,
    make_batch: Make,
    tiny_model_config: Make,
    objective: dict[str, Any],
    model: dict[str, Any],
    expected: int,
) -> None:
    built = ElectraPretraining(make_model(tiny_model_config(**model), ObjectiveConfig(**objective)))
    assert built.flops_per_batch(make_batch(ROWS)) == expected
