"""The context encoder for regions: docs/papers.md 0.4, 1.2, 1.3 and 1.6."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from models import build_model
from models.context_encoder import FILL_COLORS
from models.context_encoder_region import AlexNet, ContextEncoderRegion, RegionDiscriminator, UpConvolutions


def count_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def build(**options) -> ContextEncoderRegion:
    model = build_model("context_encoder_region", **{"size": 64, "width": 0.1, **options})
    assert isinstance(model, ContextEncoderRegion)
    return model


def hole_mask(size: int = 64) -> Tensor:
    mask = torch.zeros(2, 1, size, size)
    mask[0, :, 10:30, 8:40] = 1
    mask[1, :, 40:50, 20:30] = 1
    return mask


def test_parameter_counts_are_the_papers() -> None:
    with torch.device("meta"):
        generator = build_model("context_encoder_region").networks["generator"]
        ungrouped = AlexNet(227, 1.0, groups=1)
        released = build_model("context_encoder_region", architecture="released", size=128)
        centre = build_model("context_encoder")
    assert count_parameters(generator.encoder) == 2_334_080
    assert count_parameters(ungrouped) == 3_747_200
    assert count_parameters(generator.channelwise) == 331_776
    assert count_parameters(generator.mix) == 65_792
    assert count_parameters(generator.decoder) == 1_180_291
    # one more layer than the centre network: a 64 -> 64 convolution without bias, and its batch norm
    layer = 64 * 64 * 16 + 128
    for name in ("generator", "discriminator"):
        assert count_parameters(released.networks[name]) == count_parameters(centre.networks[name]) + layer


def test_map_sizes_at_227_are_the_papers() -> None:
    encoder = AlexNet(227, 0.1, 2)
    encoder_sizes: list[int] = []
    for layer in encoder:
        if isinstance(layer, (nn.Conv2d, nn.MaxPool2d)):
            layer.register_forward_hook(lambda _, __, y: encoder_sizes.append(y.shape[2]))
    encoder(torch.rand(1, 3, 227, 227))
    assert encoder_sizes == [55, 27, 27, 13, 13, 13, 13, 6]
    decoder, decoder_sizes = UpConvolutions(256, 0.1, 5), []
    for layer in decoder:
        if isinstance(layer, nn.ConvTranspose2d):
            layer.register_forward_hook(lambda _, __, y: decoder_sizes.append(y.shape[2]))
    decoder(torch.rand(1, 256, 6, 6))
    assert decoder_sizes == [11, 21, 41, 81, 161]


@pytest.mark.parametrize("size", [32, 64, 100, 128, 227, 256])
def test_the_output_is_the_full_window_in_range_at_any_size(size) -> None:
    model = build(size=size)
    assert model.networks["generator"].encoder.map_size >= 6
    out = model.networks["generator"](torch.randn(2, 3, size, size))
    assert out.shape == (2, 3, size, size)
    assert out.abs().max() <= 1
    assert RegionDiscriminator(size, 0.05)(out).shape == (2, 1, 1, 1)


@pytest.mark.parametrize("size", [32, 64, 128])
def test_the_released_networks_output_is_the_full_window(size) -> None:
    out = build(size=size, architecture="released").networks["generator"](torch.randn(2, 3, size, size))
    assert out.shape == (2, 3, size, size)
    assert out.abs().max() <= 1


@pytest.mark.parametrize("architecture", ["paper", "released"])
def test_the_hole_does_not_influence_the_output(architecture) -> None:
    model = build(architecture=architecture)
    image = torch.rand(2, 3, 64, 64, requires_grad=True)
    batch = {"image": image, "mask": hole_mask()}
    model.generate(batch, model.phases[0])["output"].square().sum().backward()
    assert image.grad is not None
    hole = hole_mask().expand_as(image) > 0
    assert image.grad[hole].abs().max() == 0
    assert image.grad[~hole].abs().max() > 0


@pytest.mark.parametrize("fill_color", ["paper", "released"])
def test_the_hole_has_the_fill_colour(fill_color) -> None:
    model, inputs = build(fill_color=fill_color), []
    model.networks["generator"].register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    image = torch.full((2, 3, 64, 64), torch.nan)
    image = torch.where(hole_mask() > 0, image, torch.tensor(0.5))
    model.generate({"image": image, "mask": hole_mask()}, model.phases[0])
    pixels = ((inputs[0] + 1) * 127.5).permute(0, 2, 3, 1)[hole_mask()[:, 0] > 0]
    torch.testing.assert_close(pixels, torch.tensor(FILL_COLORS[fill_color]).expand_as(pixels))


def test_l_rec_is_the_mean_square_over_the_hole_only() -> None:
    """Equation 1: independent of the hole's area and of the pixels outside."""
    model = build()
    image, mask = torch.rand(2, 3, 64, 64), hole_mask()
    truth = image * 2 - 1
    output = truth + 0.5 * mask + 0.3 * (1 - mask)
    out = {"output": output, "image": output}
    for weight in (mask, torch.ones_like(mask), mask * 0):
        error = 0.5 * mask + 0.3 * (1 - mask)
        expected = (error**2 * weight).sum() / weight.sum() if weight.any() else torch.tensor(0.0)
        rec = model.generator_losses({"image": image, "mask": weight}, out, model.phases[0])["rec"]
        torch.testing.assert_close(rec, expected)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 0.0),
        ({"architecture": "released"}, 0.001),
        ({"lambda_adv": 0.01}, 0.01),
        ({"architecture": "released", "lambda_adv": 0.0}, 0.0),
    ],
)
def test_the_default_lambda_adv_is_the_architectures(options, expected, batch) -> None:
    """If it is 0 no discriminator is trained. With D = 0.5 its loss is 2 ln 2, the generator's ln 2."""
    model = build(size=32, **options)
    phase = model.phases[0]
    nn.init.zeros_(model.networks["discriminator"].judge[-1].weight)
    out = model.generate(batch, phase)
    terms = model.discriminator_losses(batch, out, phase) | model.generator_losses(batch, out, phase)
    assert model.weights(phase).get("adv", 0.0) == expected
    if expected:
        assert terms["discriminator"].item() == pytest.approx(2 * math.log(2))
        assert terms["adv"].item() == pytest.approx(math.log(2))
    else:
        assert terms.keys() == {"rec"}
        assert phase.discriminators == ()


def test_a_photograph_of_the_windows_size_is_not_resampled() -> None:
    model = build()
    image, mask = torch.rand(2, 3, 64, 64), hole_mask()
    completed = model.complete(image, mask)
    with torch.no_grad():
        expected = model.generate({"image": image, "mask": mask}, model.phases[0])["image"]
    torch.testing.assert_close(completed, (expected + 1) / 2, atol=1e-6, rtol=0)


def test_wrong_training_sizes_and_batches_of_one_are_refused() -> None:
    model, small = build(), {"image": torch.rand(2, 3, 32, 32), "mask": torch.zeros(2, 1, 32, 32)}
    with pytest.raises(ValueError, match="trains on 64x64 px"):
        model.generate(small, model.phases[0])
    model, single = (
        build(architecture="released"),
        {"image": torch.rand(1, 3, 64, 64), "mask": hole_mask()[:1]},
    )
    with pytest.raises(ValueError, match="at least 2"):
        model.generate(single, model.phases[0])


@pytest.mark.parametrize(
    "options",
    [
        {"architecture": "vgg"},
        {"size": 16},
        {"size": 100, "architecture": "released"},
        {"fill_color": "black"},
        {"width": 0},
        {"groups": 3},
        {"bottleneck": 0},
        {"lambda_adv": -1},
    ],
)
def test_options_out_of_range_are_refused(options) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        build_model("context_encoder_region", **options)
