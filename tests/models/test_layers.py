"""Layers that papers share: papers.md 1.6."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models.layers import ChannelwiseLinear, crop_to, fold_spectral_, pad_to_multiple, spectral_


def test_channelwise_identity_is_the_identity() -> None:
    layer = ChannelwiseLinear(3, 4)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(16).expand(3, 16, 16))
    x = torch.rand(2, 3, 4, 4)
    assert torch.equal(layer(x), x)


def test_channelwise_permutation_moves_the_pixels_of_its_channel_only() -> None:
    layer, order = ChannelwiseLinear(2, 3), torch.randperm(9)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(9).expand(2, 9, 9))
        layer.weight[1] = torch.eye(9)[order].T  # output j is input order[j]
    x = torch.rand(1, 2, 3, 3)
    y = layer(x)
    assert torch.equal(y[:, 0], x[:, 0])
    assert torch.equal(y[0, 1].flatten(), x[0, 1].flatten()[order])


def test_channelwise_channels_never_meet() -> None:
    layer = ChannelwiseLinear(2, 3, bias=True)
    x = torch.rand(1, 2, 3, 3)
    y = layer(x)
    x[:, 0] += 1
    assert torch.equal(layer(x)[:, 1], y[:, 1])
    assert not torch.equal(layer(x)[:, 0], y[:, 0])


def test_channelwise_parameter_count_is_m_n4() -> None:
    assert sum(p.numel() for p in ChannelwiseLinear(256, 6).parameters()) == 331_776
    assert sum(p.numel() for p in ChannelwiseLinear(256, 6, bias=True).parameters()) == 331_776 + 9_216


@pytest.mark.parametrize(("size", "padded"), [((1, 5), (12, 12)), ((13, 16), (16, 16)), ((61, 91), (64, 92))])
def test_padding_repeats_the_border_and_cropping_undoes_it(size, padded) -> None:
    x = torch.rand(2, 3, *size)
    y = pad_to_multiple(x, 4, least=12)
    expected = nn.functional.pad(x, (0, padded[1] - size[1], 0, padded[0] - size[0]), mode="replicate")
    assert torch.equal(y, expected)
    assert torch.equal(crop_to(y, *size), x)


def test_spectral_norm_makes_the_largest_singular_value_one_and_folds_away() -> None:
    layer = spectral_(nn.Sequential(nn.Conv2d(3, 5, 3)))
    x = torch.rand(1, 3, 8, 8)
    for _ in range(50):
        layer(x)  # a power iteration each
    layer.eval()
    y, weight = layer(x), layer[0].weight
    assert float(torch.linalg.matrix_norm(weight.detach().flatten(1), 2)) == pytest.approx(1, abs=1e-3)
    fold_spectral_(layer)
    assert torch.equal(layer(x), y)
    assert list(layer.state_dict()) == ["0.bias", "0.weight"]
