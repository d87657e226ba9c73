"""Utterances of one row: where each position stands, and there and back again."""

import torch

from funasr_mooer.modules.packing import lay_out


def test_positions_begin_again_with_each_utterance():
    packing = lay_out(torch.tensor([[1, 1, 1, 2, 3, 3]]))
    assert packing.position_ids.tolist() == [[0, 1, 2, 0, 0, 1]]
    assert packing.places.tolist() == [0, 1, 2, 3, 6, 7]
    assert (packing.utterances, packing.longest) == (3, 3)


def test_spread_puts_utterances_side_by_side_and_gather_back():
    packing, x = lay_out(torch.tensor([[7, 7, 8]])), torch.randn(1, 2, 3, 4)  # one row, 2 heads, 3 positions
    spread = packing.spread(x)
    assert torch.equal(spread[0], x[0, :, :2])
    assert torch.equal(spread[1, :, 0], x[0, :, 2])
    assert not spread[1, :, 1].any()
    assert torch.equal(packing.gather(spread.transpose(1, 2)), x.transpose(1, 2))
