"""Save finetuned models as folders of transformers, and load such folders, also those that others have finetuned.

    classification, regression   ElectraForSequenceClassification
    tagging                      ElectraForTokenClassification
    qa                           ElectraForQuestionAnswering

`pipeline("text-classification")`, `("ner")` and `("question-answering")` give the outputs of our model. A linear head
becomes the classification head of transformers by an exact equivalent (head_maps.py), in which the temperature of
calibrated logits and the scale of regression targets are folded. The key :data:`KEY` of `config.json`, which
transformers ignores, holds what our loader needs besides: the task, and the length of the training examples.

A head that transformers does not have (`model.head: joint`) is saved under its own names, with the `model_type`
:data:`OWN_TYPE`, which the pipelines and Auto classes of transformers refuse as unknown.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoTokenizer,
    ElectraConfig,
    ElectraForQuestionAnswering,
    ElectraForSequenceClassification,
    ElectraForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from electra_composer.atomic_files import replaced_folder
from electra_composer.checkpoints.transformers_folders import load_transformers
from electra_composer.checkpoints.weights import Pretrained
from electra_composer.disk import system_error
from electra_composer.errors import UserError, one_line
from electra_composer.finetune_config import TaskConfig, TaskModelConfig
from electra_composer.model.finetuning import ElectraWithHead
from electra_composer.model.head_maps import classifier_of_linear, scaled_classifier
from electra_composer.model.weight_maps import (
    State,
    encoder_config_of,
    encoder_from_transformers,
    encoder_to_transformers,
    transformers_config,
    under,
)
from electra_composer.tasks.base import Task
from electra_composer.tasks.kinds import build_task
from electra_composer.tasks.model import encoder_config
from electra_composer.tasks.other_models import learned_by_others
from electra_composer.tasks.text_pairs import TextTask

KEY = "electra_composer"
OWN_TYPE = "electra_composer"
VERSION = 1  # of the contents of KEY; a reader refuses later ones
LONGEST = 512  # tokens, for a folder that does not say how long the training examples were


class Form(NamedTuple):
    """A class of transformers, and the name of its head."""

    model_class: type[PreTrainedModel]
    head: str


FORMS = {
    "classification": Form(ElectraForSequenceClassification, "classifier"),
    "regression": Form(ElectraForSequenceClassification, "classifier"),
    "tagging": Form(ElectraForTokenClassification, "classifier"),
    "qa": Form(ElectraForQuestionAnswering, "qa_outputs"),
}


@dataclasses.dataclass
class SavedModel:
    """A finetuned model.

    Attributes:
        folder: where it was loaded from.
        model: in evaluation mode, fp32, on the CPU. Its head is that of transformers.
        task: with all that it has learned.
        max_seq_length: of its training examples.
    """

    folder: str
    model: ElectraWithHead
    task: Task
    tokenizer: PreTrainedTokenizerFast
    max_seq_length: int


def save_model(
    model: nn.Module, task: Task, source: Pretrained, max_seq_length: int, folder: str, overwrite: bool = False
) -> None:
    """Write a folder that transformers and :func:`load_model` read; it is complete or absent, even after a kill.

    Args:
        model: an :class:`ElectraWithHead` on any device; not modified.
        source: its sizes and its tokenizer are used.
        max_seq_length: tokens to which the saved tokenizer truncates.
        overwrite: replace a saved model once the new one is complete.

    Raises:
        UserError: the folder exists, is something else than a saved model, or cannot be written.
    """
    if os.path.lexists(folder) and not (overwrite and is_saved_model(folder)):
        found = "exists already" if is_saved_model(folder) else "exists and is not a saved model"
        raise UserError(f"{folder} {found}; choose another folder")
    # Workaround (torch 2.7): torch.compile puts `_orig_mod.` before parameter names; goes when state_dict omits it.
    state = {name.replace("_orig_mod.", ""): tensor.float().cpu() for name, tensor in model.state_dict().items()}
    sizes = encoder_config(source, task.model_config.dropout)
    weights = encoder_to_transformers(under(state, "embeddings."), under(state, "encoder."), sizes)
    weights = {f"electra.{name}": tensor for name, tensor in weights.items()}
    config = transformers_config(sizes, source.tokenizer.pad_token_id)
    config.classifier_dropout = task.model_config.classifier_dropout
    record = {
        "version": VERSION,
        "task": dataclasses.asdict(task.config),
        "model": dataclasses.asdict(task.model_config),
        "state": task.state(),
        "columns": dict(task.columns),
        "max_seq_length": max_seq_length,
    }
    try:
        with replaced_folder(folder, overwrite) as unfinished:
            if is_of_transformers(model.get_submodule("head")):
                weights |= _head_weights(task, state)
                _describe(config, task, record)
                _write_transformers(config, weights, FORMS[task.kind].model_class, unfinished)
            else:
                weights |= {f"head.{name}": tensor for name, tensor in under(state, "head.").items()}
                _write_own(config, weights, record, unfinished)
            tokenizer = copy.deepcopy(source.tokenizer)
            tokenizer.model_max_length = max_seq_length  # what `truncation=True` truncates to
            tokenizer.save_pretrained(unfinished)
    except Exception as error:  # tokenizers and safetensors raise types of their own for a full disk
        code = system_error(error)
        if code is None:
            raise
        raise UserError(f"cannot write the model to {folder}: {os.strerror(code)}; nothing was kept") from error


def is_saved_model(folder: str) -> bool:
    """Return whether a folder has a model that :func:`save_model` wrote."""
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
            return KEY in json.load(file)
    except (OSError, ValueError):
        return False


def is_of_transformers(head: nn.Module) -> bool:
    """Return whether transformers has such a head: a linear layer, or that of its classifier."""
    return isinstance(head, nn.Linear) or hasattr(head, "out_proj")


def _head_weights(task: Task, state: State) -> State:
    """Return the weights of the head by transformers' names."""
    head = under(state, "head.")
    if isinstance(task, TextTask):
        if "weight" in head:
            last = max(int(name.split(".")[2]) for name in state if name.startswith("encoder.layers."))
            head = classifier_of_linear(head, under(state, f"encoder.layers.{last}.mlp_norm."))
        factor, offset = map(torch.from_numpy, task.output_scale())
        head = scaled_classifier(head, factor, offset)
    return {f"{FORMS[task.kind].head}.{name}": tensor for name, tensor in head.items()}


def _describe(config: ElectraConfig, task: Task, record: dict[str, Any]) -> None:
    """Set labels and problem type of a configuration."""
    state = task.state()
    labels = state.get("labels") or state.get("names")
    if labels is not None:
        config.id2label, config.label2id = dict(enumerate(labels)), {name: i for i, name in enumerate(labels)}
    if task.kind == "regression":
        config.problem_type = "regression"
    elif task.kind == "classification":
        kind = "multi" if state["multi_label"] else "single"
        config.problem_type = f"{kind}_label_classification"
    scaled = task.scaled_state() if isinstance(task, TextTask) else state
    setattr(config, KEY, {**record, "state": scaled})


def _write_transformers(config: ElectraConfig, weights: State, kind: type[PreTrainedModel], folder: str) -> None:
    with torch.device("meta"):
        model = kind(config)
    model.load_state_dict(weights, strict=True, assign=True)
    model.save_pretrained(folder, safe_serialization=True)


def _write_own(config: ElectraConfig, weights: State, record: dict[str, Any], folder: str) -> None:
    content = {**config.to_dict(), "model_type": OWN_TYPE, "architectures": [ElectraWithHead.__name__], KEY: record}
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
    safetensors.torch.save_file(weights, os.path.join(folder, "model.safetensors"), {"format": "pt"})


def load_model(source: str) -> SavedModel:
    """Load a model that :func:`save_model` wrote, or another finetuned ELECTRA of transformers.

    Args:
        source: a folder, or the name of a model on the hub.

    Raises:
        UserError: not found, damaged, or no finetuned ELECTRA.
    """
    content = read_config(source)
    task = task_of(source, content)
    if content.get("model_type") == OWN_TYPE:
        sizes, weights, tokenizer = _read_own(source, content)
    else:
        sizes, weights, tokenizer, missing = load_transformers(source, FORMS[task.kind].model_class)
        if missing:
            raise UserError(f"{source}: weights of the head are missing, such as {missing[0]}; finetune it first")
        head = under(weights, f"{FORMS[task.kind].head}.")
        weights = {**weights, **{f"head.{name}": tensor for name, tensor in head.items()}}
    embeddings, encoder = encoder_from_transformers(under(weights, "electra."), sizes)
    state = {f"embeddings.{name}": tensor for name, tensor in embeddings.items()}
    state |= {f"encoder.{name}": tensor for name, tensor in encoder.items()}
    state |= {name: tensor for name, tensor in weights.items() if name.startswith("head.")}
    with torch.device("meta"):
        model = ElectraWithHead(sizes, task.build_head(sizes), task.model_config.classifier_dropout, task.per_token)
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise UserError(f"{source}: its weights do not fit its config.json: {one_line(error, 300)}") from error
    length = content.get(KEY, {}).get("max_seq_length") or min(tokenizer.model_max_length, LONGEST)
    return SavedModel(source, model.eval(), task, tokenizer, min(length, sizes.max_positions))


def read_config(source: str) -> dict[str, Any]:
    """Return the `config.json` of a folder or of a model on the hub.

    Raises:
        UserError: there is none, or it is not of an ELECTRA.
    """
    if os.path.exists(source) and not os.path.isfile(os.path.join(source, "config.json")):
        raise UserError(f"{source}: no finished run of finetune.py, and no config.json; expected {_expected()}")
    try:
        content, _ = ElectraConfig.get_config_dict(source)
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: no finetuned model: {one_line(error, 200)}; expected {_expected()}") from error
    if content.get("model_type") not in ("electra", OWN_TYPE):
        raise UserError(f"{source}: a model of type {content.get('model_type')}; expected {_expected()}")
    return content


def task_of(source: str, content: Mapping[str, Any]) -> Task:
    """Restore the task of a model from its `config.json`.

    Raises:
        UserError: no finetuned model, or one of a later version.
    """
    record = content.get(KEY)
    if record is not None and record["version"] > VERSION:
        raise UserError(f"{source}: saved by a later version of electra_composer; update this one")
    if record is None:
        classes = content.get("architectures") or ["no class"]
        kind = next((kind for kind, form in FORMS.items() if form.model_class.__name__ in classes), None)
        if kind is None:
            raise UserError(f"{source}: {', '.join(classes)} in its config.json; expected {_expected()}")
        config, state = learned_by_others(kind, ElectraConfig.from_dict(dict(content)))
        model = TaskModelConfig(source=source)
    else:
        config, model, state = TaskConfig(**record["task"]), TaskModelConfig(**record["model"]), record["state"]
    if FORMS[config.kind].model_class is ElectraForSequenceClassification:
        model = dataclasses.replace(model, head="transformers")
    task = build_task(config, model)
    task.load_state(state)
    task.columns = {} if record is None else record["columns"]
    return task


def _read_own(source: str, content: Mapping[str, Any]) -> tuple[Any, State, PreTrainedTokenizerFast]:
    try:
        weights = safetensors.torch.load_file(os.path.join(source, "model.safetensors"))
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{source}: a damaged model: {one_line(error, 200)}; finetune it again") from error
    return encoder_config_of(ElectraConfig.from_dict({**content, "model_type": "electra"})), weights, tokenizer


def _expected() -> str:
    names = dict.fromkeys(form.model_class.__name__ for form in FORMS.values())
    return f"a folder that finetune.py saved, or one of transformers' {', '.join(names)}"
