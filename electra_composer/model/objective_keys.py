"""Which keys have a meaning for an objective: a key that has none, and is set, is an error."""

from __future__ import annotations

from dataclasses import MISSING, fields

from electra_composer.config import ModelConfig, ObjectiveConfig
from electra_composer.errors import UserError

RTD = ("objective.disc_weight", "objective.rtd_label_smoothing", "objective.rtd_label_smoothing_style")
GENERATOR = ("objective.gen_weight", "objective.sampling", "objective.temperature", "objective.disallow_correct")
SHARED = (
    *("model.sharing", "model.tie_encoder", "model.generator_layers", "model.generator_embedding_size"),
    "model.init_generator_from",
)

BY_KIND: dict[str, tuple[str, ...]] = {
    "electra": (),
    "electra_15": (),
    "mlm": ("objective.generator", *GENERATOR, *RTD, *SHARED),
    "replace_mlm": RTD,
    "all_tokens_mlm": RTD,
    # Samples of another distribution than q are not the noise that the loss assumes, nor are smoothed labels.
    "electric": (
        *("objective.temperature", "objective.disallow_correct", "objective.mlm_label_smoothing"),
        *("objective.rtd_label_smoothing", "objective.rtd_label_smoothing_style"),
    ),
}
"""Keys without a meaning for a kind."""

BY_GENERATOR: dict[str, tuple[str, ...]] = {
    "trained": (),
    "frozen": ("objective.gen_weight",),
    "uniform": (
        *("objective.gen_weight", "objective.sampling", "objective.temperature", "objective.mask_style"),
        *SHARED,
    ),
    "unigram": ("objective.gen_weight", "objective.sampling", "objective.mask_style", *SHARED),
    "two_tower": ("objective.mask_style", "model.tie_encoder", "model.init_generator_from"),
}
"""Keys without a meaning for a generator."""

GENERATORS_OF_ELECTRIC = ("two_tower", "uniform", "unigram")


def keys_without_meaning(objective: ObjectiveConfig) -> frozenset[str]:
    """Return the keys that have no meaning for an objective."""
    given = objective.resolved()
    return frozenset((*BY_KIND[given.kind], *_without_meaning_for_generator(given)))


def _without_meaning_for_generator(given: ObjectiveConfig) -> tuple[str, ...]:
    if given.kind == "mlm":
        return ()
    keys = BY_GENERATOR[str(given.generator)]
    if given.kind != "replace_mlm" and given.generator not in ("trained", "two_tower"):
        return (*keys, "objective.mlm_label_smoothing")  # nothing is trained to predict masked tokens
    return keys


def check_objective(model: ModelConfig, objective: ObjectiveConfig) -> None:
    """Refuse keys that are set and have no meaning for the objective, and generators that do not fit it.

    A key that has its default is not refused: it changes nothing, and a resolved configuration has all keys.

    Raises:
        UserError: naming the keys.
    """
    given = objective.resolved()
    defaults = ObjectiveConfig(kind=objective.kind, generator=objective.generator).resolved()
    kind, generator = f"objective.kind={given.kind}", f"objective.generator={given.generator}"
    if objective.kind == "mlm" and objective.generator not in (None, "trained"):
        raise UserError(f"{generator} has no meaning with {kind}, which has no generator; remove it")
    if given.kind == "electric" and given.generator not in GENERATORS_OF_ELECTRIC:
        raise UserError(
            f"{generator} does not fit {kind}, which needs the probability of every token from its context alone; "
            f"expected one of {', '.join(GENERATORS_OF_ELECTRIC)}"
        )
    values = {f"objective.{name}": value for name, value in vars(given).items()}
    expected = {f"objective.{name}": value for name, value in vars(defaults).items()}
    for field in fields(ModelConfig):
        if field.default is not MISSING:
            values[f"model.{field.name}"], expected[f"model.{field.name}"] = getattr(model, field.name), field.default
    for reason, keys in ((kind, BY_KIND[given.kind]), (generator, _without_meaning_for_generator(given))):
        wrong = [key for key in keys if key != "objective.generator" and values[key] != expected[key]]
        if wrong:
            found = ", ".join(f"{key}={values[key]}" for key in wrong)
            back = " ".join(f"{key}={expected[key]}" for key in wrong)
            raise UserError(f"{found}: no meaning with {reason}; remove it, or set the default, {back}")
    if given.generator == "frozen" and model.sharing == "tied":
        raise UserError(
            f"{generator} with model.sharing=tied, where the discriminator would train the generator's embeddings; set "
            "model.sharing=untied or gdes"
        )
