"""Export a checkpoint to folders that transformers loads: `python electra_composer/export.py CHECKPOINT FOLDER`."""

from __future__ import annotations

if __name__ == "__main__":
    from electra_composer.program import begin

    begin()

import copy
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import ElectraForMaskedLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers import ElectraForPreTraining as ElectraDiscriminator

from electra_composer.arguments import ArgumentParser
from electra_composer.atomic_files import replaced_folder
from electra_composer.checkpoints.weights import Checkpoint, read_checkpoint
from electra_composer.disk import system_error
from electra_composer.errors import UserError, report_user_errors
from electra_composer.model.encoder import EncoderConfig
from electra_composer.model.weight_maps import (
    State,
    discriminator_to_transformers,
    generator_to_transformers,
    transformers_config,
)
from electra_composer.model_card import RESULTS_HELP, read_own_results, write_card
from electra_composer.next_steps import describe_end, finetune
from electra_composer.signals import unwind

NETWORKS = {
    "discriminator": (ElectraDiscriminator, lambda checkpoint: checkpoint.discriminator, discriminator_to_transformers),
    "generator": (ElectraForMaskedLM, lambda checkpoint: checkpoint.generator, generator_to_transformers),
}


def export(
    checkpoint: Checkpoint,
    folder: str,
    overwrite: bool = False,
    results: Sequence[Mapping[str, Any]] = (),
    repository: str | None = None,
) -> None:
    """Write `folder/discriminator` and `folder/generator` (safetensors, config and tokenizer each), and a model card.

    `ElectraForPreTraining.from_pretrained(folder/discriminator)` and `ElectraForMaskedLM.from_pretrained(folder/
    generator)` load them without missing or unexpected weights, and `AutoTokenizer` truncates to `max_positions`. The
    folder is complete or absent, even after a kill.

    Args:
        checkpoint: A checkpoint of `pretrain.py`.
        folder: Folder to create.
        overwrite: Replace an existing export once the new one is complete.
        results, repository: For the card; see :func:`write_card`.

    Raises:
        UserError: The folder exists, is not an export, or cannot be written.
    """
    folder = os.path.abspath(folder)
    if os.path.lexists(folder):
        if not overwrite:
            raise UserError(f"{folder} exists already; choose another folder, or pass --overwrite to replace it")
        if not os.path.isfile(os.path.join(folder, "discriminator", "config.json")):
            raise UserError(f"{folder} is not an export, so --overwrite does not replace it; choose another folder")
    try:
        with replaced_folder(folder, overwrite) as unfinished:
            for name, (model_class, config_of, to_transformers) in NETWORKS.items():
                config = config_of(checkpoint)
                state = to_transformers(checkpoint.state, config)
                _save(model_class, config, state, checkpoint.tokenizer, os.path.join(unfinished, name))
            write_card(unfinished, checkpoint, results, repository)
    except FileExistsError as error:  # restored after a kill that left only the former export, under another name
        raise UserError(f"{folder} exists already; pass --overwrite to replace it") from error
    except Exception as error:  # tokenizers and safetensors raise types of their own for a full disk
        code = system_error(error)
        if code is None:
            raise
        raise UserError(f"cannot write the export to {folder}: {os.strerror(code)}; nothing was kept") from error


def _save(
    model_class: type[PreTrainedModel],
    config: EncoderConfig,
    state: State,
    tokenizer: PreTrainedTokenizerFast,
    folder: str,
) -> None:
    with torch.device("meta"):
        model = model_class(transformers_config(config, tokenizer.pad_token_id))
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()  # the generator's output weights are its token embeddings, and are stored once
    os.makedirs(folder)
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = config.max_positions  # what `truncation=True` truncates to
    tokenizer.save_pretrained(folder)


def describe_export(checkpoint: Checkpoint, folder: str) -> str:
    """Describe the commands that come after an export."""
    discriminator, generator = os.path.join(folder, "discriminator"), os.path.join(folder, "generator")
    mask = checkpoint.tokenizer.mask_token
    code = f"from transformers import pipeline; print(pipeline('fill-mask', {generator!r})('a {mask}.'))"
    name, positions = os.path.basename(os.path.abspath(folder)), checkpoint.model_config.max_positions
    return describe_end(
        {},
        {
            "fill a mask": ["python", "-c", code],
            "finetune on GLUE": finetune(discriminator, name, positions),
        },
    )


@report_user_errors
def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = ArgumentParser(prog="python electra_composer/export.py", description=__doc__)
    parser.add_argument("checkpoint", help="a .pt file of pretrain.py, or its run folder (the newest checkpoint)")
    parser.add_argument("folder", help="folder to write discriminator/ and generator/ to")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it is an export")
    parser.add_argument("--results", action="append", default=[], metavar="FILE", help=RESULTS_HELP)
    arguments = parser.parse_args(argv)
    checkpoint = read_checkpoint(arguments.checkpoint)
    unwind()
    export(checkpoint, arguments.folder, arguments.overwrite, read_own_results(arguments.results, checkpoint))
    for name, model in (("discriminator", "ElectraForPreTraining"), ("generator", "ElectraForMaskedLM")):
        print(f"transformers.{model}.from_pretrained({os.path.join(arguments.folder, name)!r})")
    print(describe_export(checkpoint, arguments.folder))


if __name__ == "__main__":
    main()
