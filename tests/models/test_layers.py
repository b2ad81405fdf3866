"""Layers that papers share: docs/papers.md 1.6, 3.7 and 6.6."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from models.layers import (
    ChannelwiseLinear,
    GatedConv2d,
    PartialConv2d,
    add_spectral_norm_,
    crop_to,
    fold_spectral_norm_,
    init_glorot_,
    pad_to_multiple,
)


def test_channelwise_identity_matrices_give_the_identity() -> None:
    layer = ChannelwiseLinear(3, 4)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(16).expand(3, 16, 16))
    x = torch.rand(2, 3, 4, 4)
    assert torch.equal(layer(x), x)


def test_a_channelwise_permutation_permutes_the_pixels_of_its_channel_only() -> None:
    layer, order = ChannelwiseLinear(2, 3), torch.randperm(9)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(9).expand(2, 9, 9))
        layer.weight[1] = torch.eye(9)[order].T  # output j is input order[j]
    x = torch.rand(1, 2, 3, 3)
    y = layer(x)
    assert torch.equal(y[:, 0], x[:, 0])
    assert torch.equal(y[0, 1].flatten(), x[0, 1].flatten()[order])


def test_channelwise_channels_are_independent() -> None:
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
def test_padding_repeats_the_border_and_cropping_inverts_it(size, padded) -> None:
    x = torch.rand(2, 3, *size)
    y = pad_to_multiple(x, 4, min_size=12)
    expected = nn.functional.pad(x, (0, padded[1] - size[1], 0, padded[0] - size[0]), mode="replicate")
    assert torch.equal(y, expected)
    assert torch.equal(crop_to(y, *size), x)


def test_spectral_norm_makes_the_largest_singular_value_one_and_can_be_folded() -> None:
    layer = add_spectral_norm_(nn.Sequential(nn.Conv2d(3, 5, 3)))
    x = torch.rand(1, 3, 8, 8)
    for _ in range(50):
        layer(x)  # one power iteration
    layer.eval()
    y, weight = layer(x), layer[0].weight
    assert float(torch.linalg.matrix_norm(weight.detach().flatten(1), 2)) == pytest.approx(1, abs=1e-3)
    fold_spectral_norm_(layer)
    assert torch.equal(layer(x), y)
    assert list(layer.state_dict()) == ["0.bias", "0.weight"]


# -- partial convolution: docs/papers.md 6.6 ----------------------------------------------------------------------


def partial_conv(c_in: int = 3, c_out: int = 4, kernel: int = 3, **options: Any) -> PartialConv2d:
    layer = PartialConv2d(c_in, c_out, kernel, **options)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    return layer


def reference_partial_conv(layer: PartialConv2d, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """W^T (X . M) sum(1)/sum(M) + b if sum(M) > 0 else 0, for each window; mask [B,C,H,W]."""
    (k, _), (s, _), (p, _) = layer.kernel_size, layer.stride, layer.padding
    windows, valid = (nn.functional.unfold(t, k, padding=p, stride=s) for t in (x * mask, mask))  # [B,CKK,L]
    total = valid.sum(1, keepdim=True)
    y = layer.weight.flatten(1) @ windows * (valid.shape[1] / total)
    if layer.bias is not None:
        y = y + layer.bias[:, None]
    y = torch.where(total > 0, y, 0)
    side = (x.shape[2] + 2 * p - k) // s + 1
    return y.unflatten(2, (side, -1)), (total > 0).to(x).unflatten(2, (side, -1))


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "bias"),
    [(3, 1, 1, True), (3, 2, 1, False), (5, 2, 2, True), (7, 2, 3, False), (3, 1, 0, True)],
)
@pytest.mark.parametrize("shared", [True, False])
def test_partial_convolution_is_the_papers_formula(kernel, stride, padding, bias, shared) -> None:
    layer = partial_conv(3, 4, kernel, stride=stride, padding=padding, bias=bias).double()
    x = torch.randn(2, 3, 14, 11, dtype=torch.float64)
    mask = (torch.rand(2, 1 if shared else 3, 14, 11) > 0.8).double()
    mask[:, :, :9, :8] = 0
    y, new_mask = layer(x, mask)
    expected, expected_mask = reference_partial_conv(layer, x, mask.expand(-1, 3, -1, -1))
    torch.testing.assert_close(y, expected)
    assert torch.equal(new_mask, expected_mask)
    assert 0 < new_mask.mean() < 1


def test_partial_convolution_with_a_skip_equals_that_of_the_concatenation() -> None:
    """Valid pixels are counted per mask: where one is hole the other may be valid."""
    layer = partial_conv(8, 4, 3, padding=1, bias=True).double()
    a, b = torch.randn(2, 5, 9, 9, dtype=torch.float64), torch.randn(2, 3, 9, 9, dtype=torch.float64)
    m, n = ((torch.rand(2, 1, 9, 9) > 0.8).double() for _ in range(2))
    y, new_mask = layer(a, m, (b, n))
    full = torch.cat([m.expand(-1, 5, -1, -1), n.expand(-1, 3, -1, -1)], dim=1)
    x = torch.cat([a, b], dim=1)
    for expected, expected_mask in (reference_partial_conv(layer, x, full), layer(x, full)):
        torch.testing.assert_close(y, expected)
        assert torch.equal(new_mask, expected_mask)


def test_partial_convolution_without_a_hole_is_a_convolution() -> None:
    layer, x = partial_conv(bias=True), torch.rand(2, 3, 9, 9)
    y, new_mask = layer(x, torch.ones(2, 1, 9, 9))
    torch.testing.assert_close(y, nn.functional.conv2d(x, layer.weight, layer.bias), atol=1e-6, rtol=0)
    assert torch.equal(new_mask, torch.ones(2, 1, 7, 7))


def test_zero_padding_counts_as_hole() -> None:
    layer, x = partial_conv(padding=1), torch.rand(1, 3, 9, 9)
    y, new_mask = layer(x, torch.ones(1, 1, 9, 9))
    scale = torch.ones(9, 9)
    scale[[0, -1]] = 1.5
    scale[:, [0, -1]] *= 1.5  # 2.25 in the corners
    assert scale[0, 0] == 2.25
    torch.testing.assert_close(y, nn.functional.conv2d(x, layer.weight, padding=1) * scale)
    assert new_mask.min() == 1


def test_partial_convolution_without_valid_pixels_is_exactly_zero() -> None:
    layer = partial_conv(padding=1, bias=True)
    y, new_mask = layer(torch.full((1, 3, 9, 9), torch.nan), torch.zeros(1, 1, 9, 9))
    assert torch.equal(y, torch.zeros(1, 4, 9, 9))
    assert torch.equal(new_mask, torch.zeros(1, 1, 9, 9))


def test_averaging_keeps_a_constant_wherever_a_pixel_is_valid() -> None:
    layer = partial_conv(2, 1, 5, padding=2)
    nn.init.constant_(layer.weight, 1 / (2 * 5 * 5))
    mask = (torch.rand(1, 2, 24, 24) > 0.97).float()  # one mask per channel
    y, new_mask = layer(torch.full((1, 2, 24, 24), 0.7), mask)
    assert 0 < new_mask.mean() < 1
    torch.testing.assert_close(y, 0.7 * new_mask)


@pytest.mark.parametrize("width", [1, 2, 6, 7])
def test_a_hole_closes_after_half_its_width_in_layers(width) -> None:
    layer, x, mask = partial_conv(1, 1, 3, padding=1), torch.rand(1, 1, 16, 16), torch.ones(1, 1, 16, 16)
    mask[:, :, 4 : 4 + width, 4 : 4 + width] = 0
    layers = 0
    while mask.min() == 0:
        x, mask = layer(x, mask)
        layers += 1
    assert layers == (width + 1) // 2


@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_the_mask_is_dilated_by_the_kernel(kernel) -> None:
    mask = (torch.rand(1, 1, 32, 32) > 0.98).float()
    _, new_mask = partial_conv(3, 1, kernel, padding=kernel // 2)(torch.rand(1, 3, 32, 32), mask)
    expected = scipy.ndimage.binary_dilation(mask[0, 0].numpy(), np.ones((kernel, kernel)))
    assert torch.equal(new_mask[0, 0] > 0, torch.from_numpy(expected))


def test_the_holes_contents_are_not_used_forward_or_backward() -> None:
    layer, mask = partial_conv(padding=1, bias=True), (torch.rand(1, 1, 12, 12) > 0.6).float()
    known = torch.rand(1, 3, 12, 12) * mask
    results = []
    for contents in (0.0, torch.nan, torch.inf):
        x = torch.where(mask > 0, known, contents).requires_grad_()
        y, _ = layer(x, mask)
        layer.zero_grad()
        (y * y.detach()).sum().backward()
        assert torch.equal(x.grad * (1 - mask), torch.zeros_like(x))
        results.append((y, x.grad, layer.weight.grad.clone()))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_masks_add_no_parameters_no_state_and_no_convolution() -> None:
    layer, plain = partial_conv(16, 8, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1, bias=False)
    assert list(layer.state_dict()) == ["weight"]
    assert not [*layer.buffers()]
    x, mask, flops = torch.rand(1, 16, 8, 8), torch.ones(1, 1, 8, 8), []
    for run in (lambda: layer(x, mask), lambda: layer(x[:, :9], mask, (x[:, 9:], mask)), lambda: plain(x)):
        with FlopCounterMode(display=False) as counter:
            run()
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] == flops[2] > 0


# -- gated convolution: docs/papers.md 3.7 ------------------------------------------------------------------------


def gated_conv(gate_bias: float, **options: Any) -> tuple[Tensor, Tensor]:
    """Outputs of the layer, with gate weights 0 and this gate bias, and of the plain convolution of the features."""
    layer, x = GatedConv2d(3, 4, **options), torch.randn(2, 3, 9, 12)
    with torch.no_grad():
        layer.conv.weight[4:] = 0
        layer.conv.bias[4:] = gate_bias
        conv = layer.conv
        features = nn.functional.conv2d(
            x, conv.weight[:4], conv.bias[:4], conv.stride, conv.padding, conv.dilation
        )
        return layer(x), features


@pytest.mark.parametrize(
    "options", [{}, {"kernel": 5}, {"stride": 2}, {"dilation": 4}, {"activation": nn.functional.relu}]
)
def test_gates_scale_the_features_by_one_half_or_zero(options) -> None:
    activation = options.get("activation", nn.functional.elu)
    for gate_bias, factor in ((1e4, 1.0), (0.0, 0.5), (-1e4, 0.0)):
        y, features = gated_conv(gate_bias, **options)
        assert y.shape == ((2, 4, 5, 6) if "stride" in options else (2, 4, 9, 12))
        torch.testing.assert_close(y, factor * activation(features), atol=1e-6, rtol=1e-5)


def test_one_convolution_computes_features_and_gates() -> None:
    layer, x = GatedConv2d(3, 4), torch.randn(1, 3, 8, 8)
    assert sum(p.numel() for p in layer.parameters()) == 8 * (3 * 9 + 1)
    both = layer.conv(x).detach().numpy()
    a, g = both[:, :4], both[:, 4:]
    expected = np.where(a > 0, a, np.expm1(a)) / (1 + np.exp(-g))
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, atol=1e-6)


def test_glorot_initialisation_is_uniform_within_its_bound() -> None:
    layer = init_glorot_(nn.Sequential(nn.Conv2d(32, 64, 5)))[0]
    bound = (6 / (25 * (32 + 64))) ** 0.5
    assert 0.999 * bound < float(layer.weight.detach().max()) <= bound
    assert float(layer.weight.detach().var()) == pytest.approx(bound**2 / 3, rel=0.02)
    assert not layer.bias.any()
