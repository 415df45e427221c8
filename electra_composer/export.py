"""Export a checkpoint to folders that transformers loads: `python electra_composer/export.py CHECKPOINT FOLDER`."""

from __future__ import annotations

if __name__ == "__main__":
    from electra_composer.program import begin

    begin()

import argparse

from electra_composer.arguments import RESULTS_HELP, ArgumentParser, parse_early
from electra_composer.errors import UserError, report_user_errors


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(prog="python electra_composer/export.py", description=__doc__)
    parser.add_argument("checkpoint", help="a .pt file of pretrain.py, or its run folder (the newest checkpoint)")
    parser.add_argument("folder", help="folder to write discriminator/ and generator/ to")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it is an export")
    parser.add_argument("--results", action="append", default=[], metavar="FILE", help=RESULTS_HELP)
    return parser.parse_args(arguments)


if __name__ == "__main__":  # before the imports that take seconds
    parse_early(parse)

import copy
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from transformers import ElectraForMaskedLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers import ElectraForPreTraining as ElectraDiscriminator

from electra_composer.atomic_files import replaced_folder
from electra_composer.checkpoints.weights import Checkpoint, read_checkpoint
from electra_composer.disk import system_error
from electra_composer.foreign_files import EXPORTED_AS, MASKED_LM
from electra_composer.model.encoder import EncoderConfig
from electra_composer.model.sizes import detects, generates
from electra_composer.model.weight_maps import (
    State,
    discriminator_to_transformers,
    generator_to_transformers,
    masked_lm_to_transformers,
    transformers_config,
)
from electra_composer.model_card import read_own_results, write_card
from electra_composer.next_steps import describe_end, finetune
from electra_composer.signals import unwind


class Exported(NamedTuple):
    """A network to export."""

    name: str
    """Of its folder."""
    model_class: type[PreTrainedModel]
    config: EncoderConfig
    state: State


def networks_of(checkpoint: Checkpoint) -> list[Exported]:
    """Return the networks of a checkpoint that transformers has a class for.

    `discriminator`, or `masked_lm` where the discriminator predicts tokens (without the copy probability of
    `all_tokens_mlm`); and `generator`, if it is a masked language model.
    """
    state, sizes = checkpoint.state, checkpoint.discriminator
    if detects(checkpoint.objective):
        discriminator = discriminator_to_transformers(state, sizes)
        networks = [Exported("discriminator", ElectraDiscriminator, sizes, discriminator)]
    else:
        networks = [Exported(MASKED_LM, ElectraForMaskedLM, sizes, masked_lm_to_transformers(state, sizes))]
    if generates(checkpoint.objective) and checkpoint.objective.generator != "two_tower":
        generator = generator_to_transformers(state, checkpoint.generator)
        networks.append(Exported("generator", ElectraForMaskedLM, checkpoint.generator, generator))
    return networks


def export(
    checkpoint: Checkpoint,
    folder: str,
    overwrite: bool = False,
    results: Sequence[Mapping[str, Any]] = (),
    repository: str | None = None,
) -> None:
    """Write `folder/discriminator` and `folder/generator` (safetensors, config and tokenizer each), and a model card.

    `ElectraForPreTraining.from_pretrained(folder/discriminator)` and `ElectraForMaskedLM.from_pretrained(folder/
    generator)` load them without missing or unexpected weights, and `AutoTokenizer` truncates to `max_positions`. Other
    objectives have other networks (:func:`networks_of`). The folder is complete or absent, even after a kill.

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
        if not any(os.path.isfile(os.path.join(folder, name, "config.json")) for name in ("discriminator", MASKED_LM)):
            raise UserError(f"{folder} is not an export, so --overwrite does not replace it; choose another folder")
    try:
        with replaced_folder(folder, overwrite) as unfinished:
            for network in networks_of(checkpoint):
                _save(network, checkpoint.tokenizer, os.path.join(unfinished, network.name))
            write_card(unfinished, checkpoint, results, repository)
    except FileExistsError as error:  # restored after a kill that left only the former export, under another name
        raise UserError(f"{folder} exists already; pass --overwrite to replace it") from error
    except Exception as error:  # tokenizers and safetensors raise types of their own for a full disk
        code = system_error(error)
        if code is None:
            raise
        raise UserError(f"cannot write the export to {folder}: {os.strerror(code)}; nothing was kept") from error


def _save(network: Exported, tokenizer: PreTrainedTokenizerFast, folder: str) -> None:
    sizes = transformers_config(network.config, tokenizer.pad_token_id)
    if network.name == MASKED_LM:
        sizes.update({EXPORTED_AS: MASKED_LM})  # load_source then takes it for a discriminator
    with torch.device("meta"):
        model = network.model_class(sizes)
    model.load_state_dict(network.state, strict=True, assign=True)
    model.tie_weights()  # the generator's output weights are its token embeddings, and are stored once
    os.makedirs(folder)
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = network.config.max_positions  # what `truncation=True` truncates to
    tokenizer.save_pretrained(folder)


def describe_export(checkpoint: Checkpoint, folder: str) -> str:
    """Describe the commands that come after an export."""
    paths = {os.path.join(folder, network.name): network.model_class for network in networks_of(checkpoint)}
    lines = [f"transformers.{found.__name__}.from_pretrained({path!r})" for path, found in paths.items()]
    next_steps: dict[str, Sequence[str] | None] = {}
    path = next((path for path, found in paths.items() if found is ElectraForMaskedLM), None)
    mask = checkpoint.tokenizer.mask_token
    if path is not None:
        code = f"from transformers import pipeline; print(pipeline('fill-mask', {path!r})('a {mask}.'))"
        next_steps["fill a mask"] = ["python", "-c", code]
    name, positions = os.path.basename(os.path.abspath(folder)), checkpoint.model_config.max_positions
    next_steps["finetune on GLUE"] = finetune(next(iter(paths)), name, positions)
    return "\n".join([*lines, describe_end({}, next_steps)])


@report_user_errors
def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    arguments = parse(argv)
    checkpoint = read_checkpoint(arguments.checkpoint)
    unwind()
    export(checkpoint, arguments.folder, arguments.overwrite, read_own_results(arguments.results, checkpoint))
    print(describe_export(checkpoint, arguments.folder))


if __name__ == "__main__":
    main()
