"""Context encoder: docs/papers.md 0.4 and 1.6, and the position of its context window."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import build_model
from models.context_encoder import FILL_COLORS, ContextEncoder, Discriminator, Generator
from models.hole_crop import ContextWindow, resampling_matrix
from models.losses import gan_fake, gan_generator, gan_real


def count_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def build(**options) -> ContextEncoder:
    model = build_model("context_encoder", **{"size": 64, "width": 0.125, **options})
    assert isinstance(model, ContextEncoder)
    return model


def box_mask(height: int, width: int, top: int, left: int, h: int, w: int) -> Tensor:
    mask = torch.zeros(1, 1, height, width)
    mask[:, :, top : top + h, left : left + w] = 1
    return mask


def test_parameter_counts_are_the_papers() -> None:
    with torch.device("meta"):
        model = build_model("context_encoder")
    assert count_parameters(model.networks["generator"]) == 71_124_544
    assert count_parameters(model.networks["discriminator"]) == 2_765_568


def test_layers_at_128_are_the_papers() -> None:
    with torch.device("meta"):
        generator = Generator(128, 1.0, 4000)
    down = [m.out_channels for m in generator if isinstance(m, nn.Conv2d)]
    up = [m.out_channels for m in generator if isinstance(m, nn.ConvTranspose2d)]
    assert down == [64, 64, 128, 256, 512, 4000]
    assert up == [512, 256, 128, 64, 3]


@pytest.mark.parametrize("size", [32, 64, 128, 256])
def test_the_output_is_the_centre_half_in_range_at_every_power_of_two(size) -> None:
    centre = Generator(size, 0.05, 4000)(torch.randn(2, 3, size, size))
    assert centre.shape == (2, 3, size // 2, size // 2)
    assert centre.abs().max() <= 1
    assert Discriminator(size, 0.05)(centre).shape == (2, 1, 1, 1)


@pytest.mark.parametrize(("overlap", "frame"), [(7, 1596), (4, 960), (0, 0)])
def test_the_overlap_has_ten_times_the_weight(overlap, frame) -> None:
    weight = build(size=128, overlap=overlap).overlap_weights()
    assert weight.shape == (64, 64)
    assert int((weight == 10).sum()) == frame
    assert float(weight.sum()) == 64**2 + 9 * frame


def test_the_blanked_square_does_not_influence_the_output() -> None:
    model = build(size=128, overlap=7)
    image = torch.rand(2, 3, 128, 128, requires_grad=True)
    model.generate({"image": image}, model.phases[0])["centre"].square().sum().backward()
    assert image.grad is not None
    inside = image.grad[:, :, 39:89, 39:89]  # 32 + 7 to 96 - 7
    assert inside.abs().max() == 0
    assert (image.grad[:, :, 38, 39:89].abs().sum(1) > 0).all()
    assert (image.grad[:, :, 89, 39:89].abs().sum(1) > 0).all()


@pytest.mark.parametrize("fill_color", ["paper", "released"])
def test_the_blanked_square_has_the_fill_colour(fill_color) -> None:
    blanked = build(fill_color=fill_color, overlap=0).window.blank_center(torch.zeros(1, 3, 64, 64))
    pixels = (blanked[0, :, 16:48, 16:48] + 1) * 127.5
    expected = {"paper": (123, 117, 104), "released": (117, 104, 123)}[fill_color]
    torch.testing.assert_close(pixels, torch.tensor(expected).float().view(3, 1, 1).expand(3, 32, 32))


def test_losses_for_logits_of_zero() -> None:
    logits = torch.zeros(4, 1, 1, 1)  # D = 0.5
    assert float(gan_real(logits) + gan_fake(logits)) == pytest.approx(2 * math.log(2))
    assert float(gan_generator(logits)) == pytest.approx(math.log(2))


def test_l_rec_is_the_weighted_mean_square_in_minus_one_to_one() -> None:
    model = build(overlap=0, lambda_adv=0)
    image = torch.rand(2, 3, 64, 64)
    truth = image[:, :, 16:48, 16:48] * 2 - 1
    losses = model.generator_losses({"image": image}, {"centre": truth + 0.5}, model.phases[0])
    assert losses.keys() == {"rec"}
    assert float(losses["rec"]) == pytest.approx(0.25)


def test_without_lambda_adv_no_discriminator_is_trained() -> None:
    model = build(lambda_adv=0)
    assert model.phases[0].discriminators == ()
    assert model.discriminator_losses({}, {}, model.phases[0]) == {}
    assert model.weights(model.phases[0]) == {"rec": 0.999}


def test_learning_rates_are_the_papers() -> None:
    phase = build_model("context_encoder", width=0.05).phases[0]
    assert phase.lr == {"generator": 2e-3, "discriminator": 2e-4}
    assert phase.betas == (0.5, 0.999)


# -- windows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overlap", "hole", "expected"),
    [
        (0, (16, 16, 32, 32), (0, 0, 64)),  # the training geometry
        (0, (20, 24, 8, 8), (16, 20, 16)),  # the smallest: twice the hole, centred on it
        (0, (20, 24, 8, 6), (16, 19, 16)),
        (0, (0, 0, 8, 8), (-4, -4, 16)),  # a corner: the window leaves the photograph
        (0, (0, 30, 4, 12), (-6, 24, 24)),  # a flat hole at the border: shifted in as far as the hole allows
        (0, (6, 30, 4, 12), (0, 24, 24)),
        (8, (24, 24, 16, 16), (0, 0, 64)),  # with overlap: the blanked square, 16 of 64
        (8, (16, 16, 32, 32), (0, 0, 64)),  # larger than that: the output block
    ],
)
def test_the_window_is_the_smallest_that_contains_the_hole(overlap, hole, expected) -> None:
    top, left, side = ContextWindow(64, overlap, FILL_COLORS["paper"]).locate(box_mask(64, 64, *hole) > 0)
    assert (int(top), int(left), int(side)) == expected


@pytest.mark.parametrize("overlap", [0, 4])
def test_every_hole_lies_in_the_centre_half_of_its_window(overlap) -> None:
    window = ContextWindow(64, overlap, FILL_COLORS["paper"])
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        height, width = (int(n) for n in torch.randint(20, 200, (2,), generator=generator))
        h, w = (int(torch.randint(1, min(height, width) // 2 + 1, (), generator=generator)) for _ in range(2))
        y, x = (int(torch.randint(0, n + 1, (), generator=generator)) for n in (height - h, width - w))
        top, left, side = (int(t) for t in window.locate(box_mask(height, width, y, x, h, w) > 0))
        assert side <= min(height, width)
        for start, low, length in ((top, y, h), (left, x, w)):
            assert start + side / 4 - 0.5 <= low  # 0.5: odd sides
            assert low + length <= start + 3 * side / 4 + 0.5


def test_a_centre_hole_of_the_training_size_is_the_generators_output() -> None:
    model = build(overlap=0)
    image, mask = torch.rand(2, 3, 64, 64), box_mask(64, 64, 16, 16, 32, 32).repeat(2, 1, 1, 1)
    completed = model.complete(image, mask)
    model.networks.eval()
    with torch.no_grad():
        centre = model.generate({"image": image}, model.phases[0])["centre"]
    torch.testing.assert_close(completed[:, :, 16:48, 16:48], (centre + 1) / 2, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("hole", "photo"), [((40, 12), (64, 64)), ((64, 64), (64, 64)), ((12, 40), (200, 70))]
)
def test_a_hole_without_context_gives_a_one_line_error(hole, photo) -> None:
    with pytest.raises(ValueError, match=f"{hole[1]}x{hole[0]} px .* at most {min(photo) // 2} px") as error:
        build().complete(torch.rand(1, 3, *photo), box_mask(*photo, 0, 0, *hole))
    assert "\n" not in str(error.value)


def test_the_resampling_matrix_copies_pixels_at_step_one_and_repeats_the_border() -> None:
    line = torch.rand(1, 10, 1)
    start, step = torch.tensor([3.0]), torch.tensor([1.0])
    assert torch.equal(resampling_matrix(start, step, 5, 10) @ line, line[:, 3:8])
    beyond = resampling_matrix(torch.tensor([-2.0]), step, 4, 10) @ line
    assert torch.equal(beyond[0, :, 0], line[0, [0, 0, 0, 1], 0])


@pytest.mark.parametrize("count", [13, 32, 50, 100])
def test_the_resampling_matrix_is_an_antialiased_bilinear_resize(count) -> None:
    line = torch.rand(1, 1, 50, 3)
    matrix = resampling_matrix(torch.tensor([0.0]), torch.tensor([50 / count]), count, 50)
    expected = F.interpolate(line, (count, 3), mode="bilinear", antialias=True, align_corners=False)
    inner = slice(count // 8, -(count // 8))  # torch truncates the filter at the ends
    torch.testing.assert_close((matrix @ line[0])[:, inner], expected[0][:, inner], atol=1e-5, rtol=0)


def test_wrong_training_sizes_and_batches_of_one_are_refused() -> None:
    model = build()
    with pytest.raises(ValueError, match="trains on 64x64 px"):
        model.generate({"image": torch.rand(2, 3, 32, 32)}, model.phases[0])
    with pytest.raises(ValueError, match="at least 2"):
        model.generate({"image": torch.rand(1, 3, 64, 64)}, model.phases[0])


@pytest.mark.parametrize(
    "options", [{"size": 100}, {"size": 16}, {"fill_color": "black"}, {"width": 0}, {"overlap": 25}]
)
def test_options_out_of_range_are_refused(options) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        build_model("context_encoder", **options)
