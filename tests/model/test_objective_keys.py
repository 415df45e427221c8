"""Keys of the objective: each is refused or does something, and refusals name the key and the way out."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import fields
from typing import Any, get_args, get_type_hints

import pytest
import torch
from objective_cases import FROZEN, word_counts
from torch import Tensor

from electra_composer.config import ObjectiveConfig
from electra_composer.errors import UserError
from electra_composer.model.objectives import KINDS
from electra_composer.model.pretraining import ElectraPretraining

Make = Callable[..., Any]

GENERATORS = ("trained", "frozen", "uniform", "unigram", "two_tower")
ROWS = [[(12, 20)], [(20, 0)], [(6, 0)], [(16, 16)], [(32, 0)]]

# Another value of each key, and what else is set before and after. `masked_lm` chooses an implementation.
CHANGES: dict[str, tuple[Any, dict[str, Any]]] = {
    "mask_prob": (0.4, {}),
    "mask_draw": ("with_replacement", {}),
    "mask_style": (None, {}),  # the one that is not the kind's own
    "gen_weight": (3.0, {}),
    "disc_weight": (3.0, {}),
    "sampling": ("gumbel", {}),
    "temperature": (3.0, {}),
    "disallow_correct": (True, {}),
    "mlm_label_smoothing": (0.3, {}),
    "rtd_label_smoothing": (0.3, {"rtd_label_smoothing_style": "symmetric"}),  # of replaced tokens too
    "rtd_label_smoothing_style": ("symmetric", {"rtd_label_smoothing": 0.3}),
}
OF_MODEL = {"sharing": "gdes", "generator_layers": 2}

Result = tuple[list[tuple[str, torch.Size]], list[Tensor]]


def sizes_for(generator: str | None, **changes: Any) -> dict[str, Any]:
    frozen = {"sharing": "untied", **FROZEN} if generator == "frozen" else {}
    return {"num_layers": 1, **frozen, **changes}


@pytest.fixture
def outcome(make_model: Make, make_batch: Make, tiny_model_config: Make) -> Callable[..., Result | None]:
    """`outcome(objective, …)`: everything that a step computes, None if the keys are refused."""
    batch = make_batch(ROWS, vocab_size=8)

    def of(objective: dict[str, Any], **changes: Any) -> Result | None:
        try:
            config = tiny_model_config(**sizes_for(objective["generator"], **changes))
            model = ElectraPretraining(make_model(config, ObjectiveConfig(**objective))).train()
        except UserError:
            return None
        if model.model.objective.generator == "unigram":
            model.model.distribution.set_counts(word_counts(model.model.vocab_size))
        if model.model.mlm_head is not None:
            with torch.no_grad():
                model.model.mlm_head.bias[5:8] += 8.0  # the words of the batch: samples hit originals
        torch.manual_seed(1)
        outputs = model(batch)
        model.loss(outputs, model.count_batch(batch))["total"].backward()
        shapes = [(name, parameter.shape) for name, parameter in model.named_parameters()]
        results = [outputs["corrupted_ids"], outputs["masked_positions"], *outputs["stats"].values()]
        return shapes, results + [p.grad for p in model.parameters() if p.grad is not None]

    return of


def differ(left: Result, right: Result) -> bool:
    if left[0] != right[0] or len(left[1]) != len(right[1]):
        return True
    return not all(torch.equal(one, other) for one, other in zip(left[1], right[1], strict=True))


def test_every_key_has_a_change() -> None:
    assert {*CHANGES} == {field.name for field in fields(ObjectiveConfig)} - {"kind", "generator", "masked_lm"}
    kinds, generators = (get_args(get_type_hints(ObjectiveConfig)[name]) for name in ("kind", "generator"))
    assert set(kinds) == {*KINDS}
    assert set(GENERATORS) == set(get_args(generators[0]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_key_is_refused_or_changes_something(outcome: Callable[..., Result | None], kind: str) -> None:
    accepted = 0
    for generator in GENERATORS:
        before = outcome({"kind": kind, "generator": generator})
        if before is None:  # the pair itself
            assert (kind, generator) in NO_PAIRS
            continue
        assert (kind, generator) not in NO_PAIRS
        for key, (value, given) in CHANGES.items():
            objective = {"kind": kind, "generator": generator, **given}
            if key == "mask_style":
                value = "electra" if kind == "mlm" else "bert"
            base = outcome(objective) if given else before
            after = outcome({**objective, key: value})
            accepted += after is not None
            if after is not None:
                assert base is None or differ(base, after), f"{kind}, {generator}: {key} changes nothing"
        for key, value in OF_MODEL.items():
            after = outcome({"kind": kind, "generator": generator}, **{key: value})
            assert after is None or differ(before, after), f"{kind}, {generator}: model.{key} changes nothing"
    assert accepted > 2


NO_PAIRS = {
    *itertools.product(["mlm"], ["frozen", "uniform", "unigram", "two_tower"]),
    *itertools.product(["electric"], ["trained", "frozen"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_resolved_configuration_is_accepted_again(make_model: Make, tiny_model_config: Make, kind: str) -> None:
    """Checkpoints have all keys."""
    for generator in (None, *GENERATORS):
        if (kind, generator) not in NO_PAIRS:
            resolved = ObjectiveConfig(kind=kind, generator=generator).resolved()  # type: ignore[arg-type]
            assert resolved == resolved.resolved()
            make_model(tiny_model_config(**sizes_for(generator)), resolved, perturbed=False)


NONE = "no meaning with objective"


@pytest.mark.parametrize(
    ("objective", "model", "message"),
    [
        ({"kind": "mlm", "generator": "uniform"}, {}, "objective.generator=uniform has no meaning with .*=mlm.*remove"),
        ({"kind": "mlm", "disc_weight": 2.0}, {}, rf"objective.disc_weight=2.0: {NONE}.kind=mlm; remove.*weight=50.0"),
        (
            {"kind": "mlm", "gen_weight": 2.0, "temperature": 3.0, "sampling": "gumbel"},
            {"sharing": "untied"},
            rf"gen_weight=2.0, .*sampling=gumbel, .*temperature=3.0, model.sharing=untied: {NONE}.kind=mlm",
        ),
        ({"kind": "mlm"}, {"generator_layers": 1}, rf"model.generator_layers=1: {NONE}.kind=mlm"),
        ({"kind": "mlm"}, {"init_generator_from": "x"}, rf"model.init_generator_from=x: {NONE}.kind=mlm"),
        ({"kind": "replace_mlm", "disc_weight": 1.0}, {}, rf"disc_weight=1.0: {NONE}.kind=replace_mlm"),
        ({"kind": "all_tokens_mlm", "rtd_label_smoothing": 0.1}, {}, rf"smoothing=0.1: {NONE}.kind=all_tokens_mlm"),
        ({"kind": "electric", "generator": "trained"}, {}, "=trained does not fit .*electric.*two_tower, uniform, uni"),
        ({"kind": "electric", "temperature": 2.0}, {}, rf"temperature=2.0: {NONE}.kind=electric"),
        ({"kind": "electric", "mlm_label_smoothing": 0.1}, {}, rf"mlm_label_smoothing=0.1: {NONE}.kind=electric"),
        ({"generator": "uniform", "temperature": 2.0}, {}, rf"temperature=2.0: {NONE}.generator=uniform"),
        ({"generator": "unigram", "mask_style": "bert"}, {}, rf"mask_style=bert: {NONE}.generator=unigram"),
        ({"generator": "unigram", "mlm_label_smoothing": 0.1}, {}, rf"smoothing=0.1: {NONE}.generator=unigram"),
        ({"generator": "uniform"}, {"sharing": "gdes"}, rf"model.sharing=gdes: {NONE}.generator=uniform"),
        ({"generator": "two_tower"}, {"tie_encoder": True}, rf"model.tie_encoder=True: {NONE}.generator=two_tower"),
        ({"generator": "frozen"}, {}, "objective.generator=frozen with model.sharing=tied.*untied or gdes"),
        ({"generator": "frozen", "gen_weight": 2.0}, {"sharing": "untied"}, rf"gen_weight=2.0: {NONE}.generator=froz"),
        (
            {"kind": "all_tokens_mlm", "generator": "frozen", "mlm_label_smoothing": 0.1},
            {"sharing": "untied"},
            rf"mlm_label_smoothing=0.1: {NONE}.generator=frozen",
        ),
    ],
)
def test_refusals(
    make_model: Make, tiny_model_config: Make, objective: dict[str, Any], model: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        make_model(tiny_model_config(**model), ObjectiveConfig(**objective))
    assert "\n" not in str(error.value)
