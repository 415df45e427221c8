"""Keys of the configuration in earlier versions, as users' files, run folders and checkpoints have them."""

from __future__ import annotations

from typing import Any

from electra_composer.errors import UserError

TIE_EMBEDDINGS = "tie_embeddings"  # in the section `model`, before `sharing`


def upgrade_model(model: dict[str, Any], embedding_size: Any) -> dict[str, Any]:
    """Replace the key `tie_embeddings` of a section `model` by the keys of today with the same meaning.

    Args:
        model: the section, or a part of it.
        embedding_size: value for `generator_embedding_size` where `tie_embeddings` is false: the generator's own
            embeddings had the width of the discriminator's.

    Returns:
        `model` itself if it has no such key, otherwise a new dictionary.

    Raises:
        UserError: `tie_embeddings` is neither true nor false, or is given beside `sharing`.
    """
    if TIE_EMBEDDINGS not in model:
        return model
    upgraded = {key: value for key, value in model.items() if key != TIE_EMBEDDINGS}
    tied = model[TIE_EMBEDDINGS]
    if "sharing" in upgraded:
        raise UserError("model.tie_embeddings and model.sharing are both given; remove model.tie_embeddings")
    if not isinstance(tied, bool):
        raise UserError(f"model.tie_embeddings is {tied!r}; set model.sharing to tied, untied or gdes in its place")
    if tied:
        return upgraded | {"sharing": "tied"}
    return {"generator_embedding_size": embedding_size} | upgraded | {"sharing": "untied"}
