"""GLCIC: docs/papers.md 0.4 and 5, phases, and the inputs of the discriminator."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import build_model
from models.glcic import GLCIC, PLACES365_MEAN, Branch, Discriminator, Generator
from models.hole_crop import crop, crop_corner


def count_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def build(**options: Any) -> GLCIC:
    model = build_model("glcic", **{"size": 32, "width": 0.0625, **options})
    assert isinstance(model, GLCIC)
    return model


def box_masks(size: int, *holes: tuple[int, int, int, int]) -> Tensor:
    """[B,1,S,S] with one box (top, bottom, left, right) each."""
    mask = torch.zeros(len(holes), 1, size, size)
    for m, (top, bottom, left, right) in zip(mask, holes, strict=True):
        m[:, top:bottom, left:right] = 1
    return mask


# -- networks --------------------------------------------------------------------------------------------------


def test_parameter_counts_are_the_papers() -> None:
    with torch.device("meta"):
        networks = build_model("glcic").networks
    assert count_parameters(networks["generator"]) == 6_072_131
    d = networks["discriminator"]
    assert [
        count_parameters(d),
        count_parameters(d.whole),
        count_parameters(d.local),
        count_parameters(d.fc),
    ] == [
        45_063_681,
        25_808_384,
        19_253_248,
        2_049,
    ]


def test_layers_are_the_papers() -> None:
    with torch.device("meta"):
        layers = [*Generator().body]
    convs = [m for m in layers if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    assert [
        (m.out_channels, m.kernel_size[0], m.stride[0], m.dilation[0], isinstance(m, nn.ConvTranspose2d))
        for m in convs
    ] == [
        (64, 5, 1, 1, False),
        (128, 3, 2, 1, False),
        (128, 3, 1, 1, False),
        (256, 3, 2, 1, False),
        (256, 3, 1, 1, False),
        (256, 3, 1, 1, False),
        (256, 3, 1, 2, False),
        (256, 3, 1, 4, False),
        (256, 3, 1, 8, False),
        (256, 3, 1, 16, False),
        (256, 3, 1, 1, False),
        (256, 3, 1, 1, False),
        (128, 4, 2, 1, True),
        (128, 3, 1, 1, False),
        (64, 4, 2, 1, True),
        (32, 3, 1, 1, False),
        (3, 3, 1, 1, False),
    ]
    kinds = [type(m).__name__ for m in layers]
    for i in range(0, 48, 3):  # 16 times conv, BN, ReLU
        assert kinds[i].startswith("Conv")
        assert kinds[i + 1 : i + 3] == ["BatchNorm2d", "ReLU"]
    assert kinds[48:] == ["Conv2d", "Sigmoid"]


def receptive_field(layers: list[nn.Module], side: int) -> tuple[int, int]:
    """Height and width in px of the receptive field of the central unit after `layers`, from its gradient."""
    x = torch.ones(1, 4, side, side, dtype=torch.double, requires_grad=True)
    y = x
    for layer in layers:
        if isinstance(layer, nn.Conv2d):  # positive weights, so that nothing cancels
            nn.init.constant_(layer.weight, 1 / layer.weight[0].numel())
            nn.init.zeros_(layer.bias)
        y = layer.double().eval()(y)
    centre = y.shape[2] // 2
    (gradient,) = torch.autograd.grad(y[0, :, centre, centre].sum(), x)
    field = gradient[0].abs().sum(0) > 0
    return int(field.any(1).sum()), int(field.any(0).sum())


def test_the_receptive_field_is_287_pixels_and_79_without_dilation() -> None:
    inner = [*Generator(width=1 / 64).body][: 12 * 3]
    assert receptive_field(inner, 400) == (287, 287)
    for layer in inner:
        if isinstance(layer, nn.Conv2d) and layer.dilation != (1, 1):
            layer.dilation = layer.padding = (1, 1)
    # the paper states 307 px, and 99 without: the same difference of 208 px, ((2 + 4 + 8 + 16) - 4) 2 x 4 px
    assert receptive_field(inner, 400) == (79, 79)


@pytest.mark.parametrize("size", [32, 64, 128, 256])
def test_branches_end_at_4x4_for_every_power_of_two(size) -> None:
    with torch.device("meta"):
        d = Discriminator(size)
    channels = [64, 128, 256, 512, 512, 512]
    for branch, levels in ((d.whole, size.bit_length() - 3), (d.local, size.bit_length() - 4)):
        convs = [m for m in branch if isinstance(m, nn.Conv2d)]
        assert [m.out_channels for m in convs] == channels[:levels]
        assert {(m.kernel_size, m.stride) for m in convs} == {((5, 5), (2, 2))}
        (fc,) = [m for m in branch if isinstance(m, nn.Linear)]
        assert (fc.in_features, fc.out_features) == (16 * channels[levels - 1], 1024)
    assert Branch(size, 0.05)(torch.rand(2, 3, size, size)).shape == (2, 51)


def test_c_sees_the_mean_color_in_the_hole() -> None:
    inputs: list[Tensor] = []
    g = build(mean_color=[0.2, 0.4, 0.6]).networks["generator"].eval()
    g.body.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    image, mask = torch.rand(1, 3, 32, 32), box_masks(32, (8, 20, 4, 24))
    hole = mask.bool().expand(-1, 3, -1, -1)
    out = g(image, mask)
    assert out.shape == image.shape
    assert 0 < out.min() < out.max() < 1
    assert torch.equal(out, g(torch.where(hole, torch.nan, image), mask))
    x, x_mask = inputs[0][:, :3], inputs[0][:, 3:]
    assert torch.equal(x_mask, mask)
    assert torch.equal(x[~hole], image[~hole])
    colour = torch.tensor([0.2, 0.4, 0.6])
    assert torch.equal(x[hole].view(3, -1), colour[:, None].expand(3, 12 * 20))
    assert build().options.mean_color == PLACES365_MEAN
    assert not any("mean" in key for key in g.state_dict() if "running" not in key)


# -- the discriminator's inputs --------------------------------------------------------------------------------


def test_patches_are_centred_on_the_hole_and_shifted_into_the_image() -> None:
    model = build()
    holes = [
        (10, 20, 14, 18),  # centred in the patch
        (11, 20, 14, 17),  # odd
        (0, 6, 28, 32),  # a corner
        (2, 30, 12, 20),  # longer than the patch
        (0, 0, 0, 0),  # no hole: the image's centre
    ]
    top, left = crop_corner(box_masks(32, *holes), model.options.size // 2)
    assert top.tolist() == [7, 7, 0, 8, 8]
    assert left.tolist() == [8, 7, 16, 8, 8]


def test_a_scattered_hole_counts_as_its_bounding_box() -> None:
    mask = torch.zeros(1, 1, 32, 32)
    mask[0, 0, 5, 9] = mask[0, 0, 24, 20] = 1
    assert [int(t) for t in crop_corner(mask, build().options.size // 2)] == [
        (5 + 25 - 16) // 2,
        (9 + 21 - 16) // 2,
    ]


def test_crops_are_slices_with_gradients() -> None:
    image = torch.rand(3, 3, 32, 32, requires_grad=True)
    top, left = torch.tensor([0, 7, 16]), torch.tensor([16, 3, 0])
    patch = crop(image, top, left, 16)
    expected = torch.stack([x[:, t : t + 16, s : s + 16] for x, t, s in zip(image, top, left, strict=True)])
    assert torch.equal(patch, expected)
    weight = torch.rand_like(patch)
    (gradient,) = torch.autograd.grad((patch * weight).sum(), image)
    assert torch.equal(crop(gradient, top, left, 16), weight)
    assert int((gradient != 0).sum()) == int((weight != 0).sum())


def test_real_patches_are_uniform_and_independent_per_photograph() -> None:
    uniform = torch.zeros(4, 4)
    uniform[:, 0] = torch.tensor([0.0, 0.5, 0.999, 1.0])  # 1.0: a double just below 1, rounded to float32
    uniform[:, 1] = torch.tensor([1.0, 0.999, 0.5, 0.0])
    model = build()
    top, left = model.random_corner({"uniform": uniform, "image": torch.empty(4, 3, 32, 32)})
    assert top.tolist() == [0, 8, 16, 16]
    assert left.tolist() == [16, 16, 8, 0]
    many = (torch.arange(17_000) / 17_000)[:, None].expand(-1, 4)
    top, _ = model.random_corner({"uniform": many, "image": torch.empty(17_000, 0)})
    assert torch.bincount(top).tolist() == pytest.approx([1000] * 17, abs=1)


@pytest.mark.parametrize("discriminator_input", ["completed", "output"])
def test_d_sees_the_composite_or_the_raw_output(discriminator_input, batch, training) -> None:
    model = build(discriminator_input=discriminator_input)
    phase = model.phase("joint")
    model.set_phase(phase)
    out = {"image": torch.rand(8, 3, 32, 32, requires_grad=True)}
    adv = model.generator_losses(batch, out, phase)["adv"]
    (gradient,) = torch.autograd.grad(adv, out["image"])
    outside = gradient * (1 - batch["mask"])
    assert (gradient * batch["mask"]).abs().sum() > 0
    assert (outside.abs().sum() == 0) == (discriminator_input == "completed")


# -- losses and phases -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["hole", "image"])
def test_rec_is_the_mse_on_the_hole(reduction, photos) -> None:
    model = build(reduction=reduction)
    mask = box_masks(32, *[(4, 12, 6, 6 + 2 * i) for i in range(1, 9)])
    out = torch.where(mask > 0, photos + 0.1, torch.rand_like(photos)).requires_grad_()
    rec = model.generator_losses({"image": photos, "mask": mask}, {"image": out}, model.phases[0])["rec"]
    assert rec.item() == pytest.approx(0.01 * (1.0 if reduction == "hole" else float(mask.mean())), rel=1e-5)
    (gradient,) = torch.autograd.grad(rec, out)
    assert (gradient * (1 - mask)).abs().max() == 0
    assert (gradient * mask).abs().sum() > 0


def test_rec_of_two_ranks_averages_to_that_of_one(photos) -> None:
    model = build()
    mask = box_masks(32, *[(4, 12, 6, 6 + 2 * i) for i in range(1, 9)])
    batch, out = {"image": photos, "mask": mask, "mask_mean": mask.mean()}, torch.rand_like(photos)
    halves = [{**batch, "image": photos[i : i + 4], "mask": mask[i : i + 4]} for i in (0, 4)]
    losses = [
        model.generator_losses(half, {"image": o}, model.phases[0])["rec"]
        for half, o in zip(halves, out.split(4), strict=True)
    ]
    full = model.generator_losses(batch, {"image": out}, model.phases[0])["rec"]
    torch.testing.assert_close(torch.stack(losses).mean(), full)


def test_rec_of_a_batch_without_holes_is_zero(photos) -> None:
    model = build()
    batch = {"image": photos, "mask": torch.zeros(8, 1, 32, 32)}
    assert float(model.generator_losses(batch, {"image": photos * 0.5}, model.phases[0])["rec"]) == 0


@pytest.mark.parametrize(("gan", "expected"), [("minimax", math.log(0.5)), ("nsgan", -math.log(0.5))])
def test_losses_for_logits_of_zero(gan, expected, batch) -> None:
    model = build(gan=gan)
    phase = model.phase("joint")
    nn.init.zeros_(model.networks["discriminator"].fc.weight)
    nn.init.zeros_(model.networks["discriminator"].fc.bias)
    out = model.generate(batch, phase)
    assert float(model.generator_losses(batch, out, phase)["adv"]) == pytest.approx(expected)
    assert float(model.discriminator_losses(batch, out, phase)["discriminator"]) == pytest.approx(
        2 * math.log(2)
    )


@pytest.mark.parametrize("gan", ["minimax", "nsgan"])
def test_the_gradients_of_both_adversarial_losses_raise_the_logits(gan, batch) -> None:
    """Their gradients have the same sign; the paper's (minimax) is smaller by the factor D / (1 - D)."""
    model = build(gan=gan)
    d = model.networks["discriminator"]
    logits = torch.full((8, 1), -3.0, requires_grad=True)
    d.forward = lambda image, patch: logits
    adv = model.generator_losses(batch, {"image": batch["image"]}, model.phase("joint"))["adv"]
    (gradient,) = torch.autograd.grad(adv, logits)
    probability = 1 / (1 + math.exp(3))
    expected = -probability if gan == "minimax" else probability - 1
    torch.testing.assert_close(gradient, torch.full_like(gradient, expected / 8))


def test_a_joint_step_with_alpha_0_equals_a_step_of_the_first_phase(batch, training) -> None:
    first, joint = build(alpha=0), build(alpha=0)
    joint.load_state_dict(first.state_dict())
    with_alpha = copy.deepcopy(joint)
    with_alpha.options = build(alpha=0.1).options
    for model, phase in ((first, "completion"), (joint, "joint"), (with_alpha, "joint")):
        training.Trainer(model, model.phase(phase)).step(batch)
    one, two, other = (m.networks["generator"] for m in (first, joint, with_alpha))
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(one.parameters(), two.parameters(), strict=True))
    assert all(torch.equal(v, two.state_dict()[key]) for key, v in one.state_dict().items())
    assert not torch.equal(one.body[0].weight.grad, other.body[0].weight.grad)


def test_phases_are_the_papers() -> None:
    model = build()
    g, d = ("generator",), ("discriminator",)
    assert [(p.name, p.steps, p.generators, p.discriminators) for p in model.phases] == [
        ("completion", 90_000, g, ()),
        ("discriminator", 10_000, (), d),
        ("joint", 400_000, g, d),
    ]
    assert {p.optimizer for p in model.phases} == {"adadelta"}
    assert {rate for p in model.phases for rate in p.lr.values()} == {1.0}
    adam = build(optimizer="adam", lr_adam=2e-3)
    assert {p.optimizer for p in adam.phases} == {"adam"}
    assert {rate for p in adam.phases for rate in p.lr.values()} == {2e-3}


def test_loss_weights_are_the_papers_or_the_ports() -> None:
    model, port = build(), build(scale_discriminator=True)
    assert [model.weights(p) for p in model.phases] == [
        {"rec": 1.0},
        {"discriminator": 1.0},
        {"rec": 1.0, "adv": 0.0004, "discriminator": 1.0},
    ]
    assert port.weights(port.phase("discriminator")) == {"discriminator": 1.0}
    assert port.weights(port.phase("joint"))["discriminator"] == 0.0002


def test_the_second_phase_changes_neither_c_nor_its_statistics(batch, training) -> None:
    model = build()
    before = {key: value.clone() for key, value in model.networks["generator"].state_dict().items()}
    trainer = training.Trainer(model, model.phase("discriminator"))
    losses = [float(trainer.step(batch)["discriminator"]) for _ in range(3)]
    assert all(torch.equal(v, before[key]) for key, v in model.networks["generator"].state_dict().items())
    assert losses[-1] < losses[0]


def test_all_phases_run_in_double_precision(batch, training) -> None:
    model = build().double()
    double = {key: value.double() for key, value in batch.items()}
    for phase in model.phases:
        losses = training.Trainer(model, phase).step(double)
        assert all(value.dtype == torch.double for value in losses.values())


def test_other_training_sizes_are_refused() -> None:
    model = build()
    with pytest.raises(ValueError, match="glcic of size 32 trains on 32x32 px, not \\(64, 64\\)"):
        model.generate(
            {"image": torch.rand(2, 3, 64, 64), "mask": torch.zeros(2, 1, 64, 64)}, model.phases[0]
        )


@pytest.mark.parametrize(
    "options",
    [
        {"size": 100},
        {"size": 16},
        {"width": 0},
        {"alpha": -1},
        {"reduction": "sum"},
        {"gan": "hinge"},
        {"discriminator_input": "hole"},
        {"optimizer": "sgd"},
        {"mean_color": [0.5, 0.5]},
        {"mean_color": [104, 117, 123]},
    ],
)
def test_options_out_of_range_are_refused(options) -> None:
    with pytest.raises(ValueError, match=f"glcic .*{next(iter(options))}"):
        build_model("glcic", **options)
