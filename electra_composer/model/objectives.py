"""The kinds of objectives (`objective.kind`), and which keys have a meaning for each of them."""

from __future__ import annotations

from electra_composer.config import ModelConfig, ObjectiveConfig
from electra_composer.model.electra import ElectraForPretraining
from electra_composer.model.electric import ElectricForPretraining
from electra_composer.model.masker import SpecialIds
from electra_composer.model.token_prediction import AllTokensMLM, MaskedLMForPretraining, ReplaceMLM

KINDS: dict[str, type[ElectraForPretraining]] = {
    "electra": ElectraForPretraining,
    "mlm": MaskedLMForPretraining,
    "replace_mlm": ReplaceMLM,
    "all_tokens_mlm": AllTokensMLM,
    "electra_15": ElectraForPretraining,
    "electric": ElectricForPretraining,
}


def build_pretraining_model(
    model: ModelConfig, objective: ObjectiveConfig, vocab_size: int, special_ids: SpecialIds, max_seq_length: int
) -> ElectraForPretraining:
    """Build the model of an objective; arguments and errors are those of :class:`ElectraForPretraining`."""
    return KINDS[objective.kind](model, objective, vocab_size, special_ids, max_seq_length)
