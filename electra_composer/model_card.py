"""Write the model card (README.md) of an export: what the networks are, and what they were made from and how.

The card names no paths and no time of this machine: an export of the same checkpoint with the same versions writes the
same bytes, so that a repeated upload finds nothing new.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from electra_composer import __version__
from electra_composer.checkpoints.saving import checkpoint_batch
from electra_composer.checkpoints.weights import Checkpoint, load_source
from electra_composer.errors import UserError
from electra_composer.finetuning.protocol import OF_SOURCE
from electra_composer.finetuning.report import render
from electra_composer.finetuning.results import describe_source
from electra_composer.finetuning.tasks import TASKS
from electra_composer.foreign_files import MASKED_LM
from electra_composer.glue_report import read_results
from electra_composer.storage.shard_folder import META, Meta

README = "README.md"
TAG = "electra_composer"  # by which a repository of ours is recognized
LIBRARIES = ("mosaicml", "torch", "transformers", "tokenizers")
TRAINER_KEYS = ("max_duration", "global_train_batch_size", "precision", "gradient_clip")
MAIN = ("discriminator", MASKED_LM)  # the network to finetune, if there are several
ABOUT = {
    "ElectraForPreTraining": "predicts of every token whether it was replaced; the encoder to finetune",
    "ElectraForMaskedLM": "predicts masked tokens",
}
USE = """The encoder is meant to be finetuned on a task: classification, regression, tagging, question answering.
Without finetuning it classifies no texts, and it generates none. It has learned from its training text only, with the
errors, gaps and prejudices of that text, and knows no language that is not in it. Measure it on your own data before
you rely on it."""
PAPER = "[ELECTRA](https://arxiv.org/abs/2003.10555), Clark et al. 2020"
OBJECTIVES = {
    "electra": f"""Replaced-token detection ({PAPER}): a generator fills masked positions, the discriminator predicts
of every token whether it was replaced.""",
    "electra_15": f"""Replaced-token detection at the masked positions only (ELECTRA 15%; {PAPER}, section 3.4).""",
    "mlm": "Masked language modelling ([BERT](https://arxiv.org/abs/1810.04805), Devlin et al. 2018).",
    "replace_mlm": f"""Masked language modelling with samples of a generator in place of masks (Replace MLM; {PAPER},
section 3.4).""",
    "all_tokens_mlm": f"""Prediction of all tokens from a text whose masked positions are filled by a generator, with a
copy mechanism, which is not exported (All-Tokens MLM; {PAPER}, section 3.4).""",
    "electric": """Noise-contrastive estimation of cloze probabilities
([Electric](https://arxiv.org/abs/2012.08561), Clark et al. 2020): the discriminator gives the energy of each token.""",
}
HOW = "Trained with the settings below by electra_composer, on Composer and Streaming."


def networks_in(folder: str) -> dict[str, str]:
    """Return the networks of an export: name of the subfolder → class of transformers, the main one first."""
    found = {}
    for name in sorted(os.listdir(folder), key=lambda name: (name not in MAIN, name)):
        path = os.path.join(folder, name, "config.json")
        if os.path.isfile(path):
            with open(path, encoding="utf-8") as file:
                found[name] = json.load(file)["architectures"][0]
    return found


def read_own_results(paths: Sequence[str], checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Read results of finetuning a checkpoint.

    Args:
        paths: results.json of `glue.py` or `finetune.py`, or folders with one.

    Raises:
        UserError: not a results file, or of other weights.
    """
    found = []
    for path in paths:
        results = read_results(os.path.join(path, "results.json") if os.path.isdir(path) else path)
        if (
            results["settings"].get(f"weights_sha256{OF_SOURCE}")
            != describe_source(load_source(checkpoint.path), random_init=False)["weights_sha256"]
        ):
            raise UserError(
                f"{path}: results of other weights than {checkpoint.path}; expected those of finetuning this "
                "checkpoint (model.source) or an export of it"
            )
        found.append(results)
    return found


def write_card(
    folder: str, checkpoint: Checkpoint, results: Sequence[Mapping[str, Any]] = (), repository: str | None = None
) -> None:
    """Write `README.md` into the folder of an export.

    Args:
        results: from :func:`read_own_results`.
        repository: name on the hub, where the main network is not in a subfolder.
    """
    card = ModelCard(build_card(networks_in(folder), checkpoint, results, repository))
    card.save(os.path.join(folder, README))


def build_card(
    networks: Mapping[str, str],
    checkpoint: Checkpoint,
    results: Sequence[Mapping[str, Any]] = (),
    repository: str | None = None,
) -> str:
    """Return the text of the card; see :func:`write_card`."""
    config = checkpoint.config
    name = repository.split("/")[-1] if repository else str(config.get("run_name", "electra"))
    metas = _metas(config["data"])
    data = ModelCardData(
        library_name="transformers",
        tags=["electra", TAG],
        datasets=sorted({name for meta in metas.values() if meta for name in _hub_data_sets(meta)}) or None,
        model_name=name,
        eval_results=[result for each in results for result in _eval_results(each)] or None,
    )
    sections = {
        "Networks": _networks(networks, repository),
        "Intended use": USE,
        "How it was made": " ".join((OBJECTIVES[checkpoint.objective.kind], HOW, _training(checkpoint))),
        "Data": _data(config["data"], metas),
        **({"Results": "\n\n".join(map(_results, results))} if results else {}),
        "Settings": f"```yaml\n{yaml.safe_dump(_settings(config), sort_keys=False)}```",
        "Versions": f"Exported with electra_composer {__version__}, "
        + ", ".join(f"{library} {importlib.metadata.version(library)}" for library in LIBRARIES)
        + ".",
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    return f"---\n{data.to_yaml()}\n---\n\n# {name}\n\n{body}\n"


def _networks(networks: Mapping[str, str], repository: str | None) -> str:
    rows = [["network", "class of transformers", "what it does"]]
    rows += [[name, f"`{kind}`", ABOUT.get(kind, "")] for name, kind in networks.items()]
    lines = [f"from transformers import AutoTokenizer, {', '.join(sorted(set(networks.values())))}", ""]
    for number, (name, kind) in enumerate(networks.items()):
        place = f'"{repository}"' if repository else f'"{name}"'
        if repository and number:
            place += f', subfolder="{name}"'
        lines.append(f"{name} = {kind}.from_pretrained({place})")
    first = repository or next(iter(networks))
    lines.append(f'tokenizer = AutoTokenizer.from_pretrained("{first}")')
    return f"{render(rows)}\n\n```python\n" + "\n".join(lines) + "\n```"


def _training(checkpoint: Checkpoint) -> str:
    """Describe the length of training so far."""
    config, step = checkpoint.config, checkpoint_batch(os.path.realpath(checkpoint.path))
    rows, length = config.get("trainer", {}).get("global_train_batch_size"), config["data"]["max_seq_length"]
    parts = []
    if step is not None and rows is not None:
        seen = "" if checkpoint.tokens is None else f": {checkpoint.tokens:,} tokens, without padding"
        parts.append(
            f"This checkpoint is that of step {step:,}, after {step * rows:,} rows of at most {length} tokens{seen}."
        )
    start = config["model"].get("init_from")
    if start is not None:
        parts.append(f"Training started from the weights of {_public_name(str(start))}.")
    return " ".join(parts)


def _metas(data: Mapping[str, Any]) -> dict[str, Meta | None]:
    """Return `meta.json` of the folders of shards by their names; None for one that is not here any more."""
    folders = [stream["path"] for stream in (data.get("streams") or {}).values()] or [data.get("path")]
    return {_public_name(folder): _read_meta(folder) for folder in folders if folder}


def _read_meta(folder: str) -> Meta | None:
    try:
        with open(os.path.join(folder, META), encoding="utf-8") as file:
            return Meta.from_json(file.read(), folder)
    except (OSError, ValueError):
        return None


def _hub_data_sets(meta: Meta) -> list[str]:
    return [source["dataset"] for source in meta.conversion.get("sources", []) if source.get("path") == "hub"]


def _data(data: Mapping[str, Any], metas: Mapping[str, Meta | None]) -> str:
    rows = [["shards", "source", "documents", "tokens"]]
    for folder, meta in metas.items():
        if meta is None:
            rows.append([folder, "(not known here)", "", ""])
            continue
        for label, counts in meta.sources.items():
            rows.append([folder, _public_name(label), f"{counts.documents:,}", f"{counts.tokens:,}"])
    meta = next((meta for meta in metas.values() if meta), None)
    text = f"Rows of at most {data['max_seq_length']} tokens."
    if meta is not None:
        text += f" Vocabulary: {_public_name(meta.tokenizer.name)}, {meta.tokenizer.vocab_size:,} entries."
    return f"{text}\n\n{render(rows)}"


def _results(results: Mapping[str, Any]) -> str:
    rows = [["task", "metric", "mean", "std", "scores by seed"]]
    for task in results["tasks"].values():
        seeds = ", ".join(f"{run['seed']}: {_number(run['score'])}" for run in task["runs"])
        rows.append([task["task"], task["metric"], _number(task["mean"]), _number(task["std"]), seeds])
    return f"Scores × 100 on the development sets, finetuned once per seed.\n\n{render(rows)}"


def _eval_results(results: Mapping[str, Any]) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="text-classification" if name in TASKS else name,
            dataset_type="glue" if name in TASKS else "custom",
            dataset_name=f"GLUE {task['task']}" if name in TASKS else task["task"],
            dataset_config=name if name in TASKS else None,
            dataset_split="validation",
            metric_type=task["metric"],
            metric_value=round(task["mean"], 2),
            metric_name=f"{task['metric']} × 100, mean of {task['n']} seeds",
        )
        for name, task in results["tasks"].items()
        if task["mean"] is not None
    ]


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that decide the weights, without paths."""
    model = dict(config["model"])
    for key in ("init_from", "init_generator_from"):
        if model.get(key):
            model[key] = _public_name(str(model[key]))
    trainer = {key: config["trainer"][key] for key in TRAINER_KEYS if key in config.get("trainer", {})}
    rest = {key: config[key] for key in ("objective", "optimizer", "schedule") if key in config}
    return {"seed": config.get("seed"), "model": model, **rest, "trainer": trainer}


def _public_name(path: str) -> str:
    """Return the last part of a path of this machine; other names, such as those on the hub, as they are."""
    is_path = os.path.exists(path) or path.startswith(("/", ".", "~")) or path.count("/") > 1
    return os.path.basename(os.path.normpath(path)) if is_path else path


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
