"""Electric: energies for cloze probabilities, by noise-contrastive estimation (Clark et al., arXiv 2012.08561).

Electric models p(x_t | x without t) = exp(-E(x)_t) / Z, with energies E from the discriminator and Z about 1. As in
ELECTRA, some tokens of a text are replaced by samples of a noise distribution q, and a classifier tells these from the
others; here the classifier's logit is not free, but that of a token being noise if the model is right:

    log(k q(x_t) / (n exp(-E(x)_t))) = E(x)_t + log q(x_t | x without t) + log(k / n),

with k / n = mask_prob / (1 - mask_prob), the share of noise (`electric_objective` in google-research/electra
`run_pretraining.py`). A sample that equals the original is noise all the same. q must give a
probability to every token from its context alone, hence two towers rather than a masked language model.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from electra_composer.model.electra import ElectraForPretraining, rtd_loss, rtd_stats
from electra_composer.model.generators import Inputs, Samples
from electra_composer.model.kernels.attention import pattern_of
from electra_composer.model.masker import Masked


class ElectricForPretraining(ElectraForPretraining):
    """`objective.kind: electric`; :meth:`discriminate` returns energies."""

    def train_on(
        self, corrupted_ids: Tensor, samples: Samples, inputs: Inputs, masked: Masked
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Compute the loss of noise-contrastive estimation, over all tokens.

        Returns:
            `rtd_loss`; `rtd_logits [rows, length]` fp32: positive means noise; `energies [rows, length]` fp32;
            `replaced`, `judged [rows, length]` booleans: noise, and all tokens; and the statistics.
        """
        assert samples.log_q is not None
        energies = self.discriminate(corrupted_ids, inputs.token_type_ids, inputs.position_ids, inputs.pattern)
        prior = math.log(self.objective.mask_prob / (1.0 - self.objective.mask_prob))
        logits = energies + samples.log_q.detach() + prior
        noise = masked.places()
        loss = rtd_loss(logits, noise, inputs.tokens, self.objective)
        outputs = {
            "rtd_loss": loss,
            "rtd_logits": logits.detach(),
            "energies": energies.detach(),
            "replaced": noise,
            "judged": inputs.tokens,
        }
        return outputs, {"tokens": inputs.tokens.sum().float(), **rtd_stats(logits, noise, inputs.tokens, loss)}

    @torch.no_grad()
    def log_likelihoods(
        self, input_ids: Tensor, token_type_ids: Tensor, position_ids: Tensor, sequence_ids: Tensor
    ) -> Tensor:
        """Estimate log p(x_t | x without t) = -E(x)_t of every token, by one forward.

        Args:
            input_ids, token_type_ids, position_ids, sequence_ids: integers `[rows, length]`, unmasked.

        Returns:
            fp32 `[rows, length]`, up to log Z, which training brings close to 0; 0 for padding.
        """
        pattern = pattern_of(sequence_ids, self.attention_path)
        energies = self.discriminate(input_ids, token_type_ids, position_ids, pattern)
        return torch.where(sequence_ids > 0, -energies, 0.0)
