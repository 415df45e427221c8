"""Bring embedding tables to another vocabulary and another number of positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def extend_rows(table: Tensor, pieces: list[list[int]], rows: int) -> Tensor:
    """Append to a table the means of some of its rows, and zeros up to a number of rows.

    Args:
        table: `[entries, …]`.
        pieces: for each new row the rows to average.
        rows: of the result.

    Returns:
        `[rows, …]`.
    """
    new = [table[torch.tensor(piece)].mean(0, keepdim=True) for piece in pieces]
    used = torch.cat([table, *new])
    return torch.cat([used, used.new_zeros(rows - len(used), *used.shape[1:])])


def resize_positions(table: Tensor, positions: int, how: str) -> Tensor:
    """Change the number of position embeddings `[old positions, width]`.

    With fewer, the first are kept. With more, `copy` repeats the table from its beginning, as Longformer does (Beltagy
    et al. 2020, section 5): neighbours keep their relation, except at the seams. `interpolate` stretches it linearly,
    as vision transformers do: all positions differ, and neighbours are closer than they were.

    Returns:
        `[positions, width]`.
    """
    old = len(table)
    if positions <= old:
        return table[:positions].clone()
    if how == "copy":
        return table[torch.arange(positions) % old]
    stretched = F.interpolate(table.T[None], size=positions, mode="linear", align_corners=True)
    return stretched[0].T.contiguous()
