"""Tables of embeddings brought to another number of rows."""

from __future__ import annotations

import torch

from electra_composer.model.adaptation import extend_rows, resize_positions


def test_new_rows_are_means_and_the_rest_is_zero() -> None:
    table = torch.randn(5, 3)
    extended = extend_rows(table, [[0, 1], [4]], 9)
    assert torch.equal(extended[:5], table)
    torch.testing.assert_close(extended[5:7], torch.stack([(table[0] + table[1]) / 2, table[4]]))
    assert not extended[7:].any()


def test_more_and_fewer_positions() -> None:
    table = torch.randn(40, 16)
    assert torch.equal(resize_positions(table, 30, "copy"), table[:30])
    assert torch.equal(resize_positions(table, 90, "copy"), torch.cat([table, table, table[:10]]))
    stretched = resize_positions(table, 79, "interpolate")
    torch.testing.assert_close(stretched[::2], table)
    torch.testing.assert_close(stretched[1::2], (table[:-1] + table[1:]) / 2)
