"""Choose the saved models of a run of finetune.py to predict with."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

from electra_composer.errors import UserError
from electra_composer.finetuning.predictions import BEST, ENSEMBLE, check_select

RESULTS = "results.json"


def model_folders(run: str, select: str | None = None) -> list[str]:
    """Return the folders of the models to predict with; of several, the outputs are averaged.

    Args:
        run: folder of a saved model, folder of a run of finetune.py, its results file, or the name of a model on the
            hub.
        select: `best`, `ensemble`, or a seed; None: what the run was configured with.

    Raises:
        UserError: no such run, no saved models, or none of this seed.
    """
    results = run if run.endswith(".json") else os.path.join(run, RESULTS)
    if not os.path.isfile(results) or os.path.isfile(os.path.join(run, "config.json")):
        if select is not None:
            raise UserError(f"--select={select}, but {run} is not a run of finetune.py with {RESULTS}; leave it out")
        return [run]
    try:
        with open(results, encoding="utf-8") as file:
            content = json.load(file)
        models, select = content["models"], select or content["select"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{results}: not the results of finetune.py; expected its folder, or a saved model") from error
    if not models:
        raise UserError(f"{results}: no saved models; finetune with save=best or save=all")
    check_select(select, [model["seed"] for model in models])
    return [os.path.join(os.path.dirname(results), model["folder"]) for model in _select(models, select)]


def _select(models: Sequence[dict], select: str) -> Sequence[dict]:
    """Select from models in the order of their scores, the best first."""
    if select == ENSEMBLE:
        return models
    if select == BEST:
        return models[:1]
    return [model for model in models if str(model["seed"]) == select]
