"""GLCIC: papers.md 0.4 and 5, its phases, and what its discriminator compares."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import build_model
from models.glcic import GLCIC, PLACES, Branch, Discriminator, Generator
from models.window import around, crop


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def build(**options: Any) -> GLCIC:
    model = build_model("glcic", **{"size": 32, "width": 0.0625, **options})
    assert isinstance(model, GLCIC)
    return model


def boxes(size: int, *holes: tuple[int, int, int, int]) -> Tensor:
    """[B,1,S,S] with one box (top, bottom, left, right) each."""
    mask = torch.zeros(len(holes), 1, size, size)
    for m, (top, bottom, left, right) in zip(mask, holes, strict=True):
        m[:, top:bottom, left:right] = 1
    return mask


# -- networks --------------------------------------------------------------------------------------------------


def test_parameter_counts_are_the_papers() -> None:
    with torch.device("meta"):
        networks = build_model("glcic").networks
    assert count(networks["generator"]) == 6_072_131
    d = networks["discriminator"]
    assert [count(d), count(d.whole), count(d.local), count(d.fc)] == [
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


def innermost_sight(layers: list[nn.Module], side: int) -> tuple[int, int]:
    """Height and width in px of what the middle unit behind `layers` depends on, by its gradient."""
    x = torch.ones(1, 4, side, side, dtype=torch.double, requires_grad=True)
    y = x
    for layer in layers:
        if isinstance(layer, nn.Conv2d):  # positive throughout, so that nothing cancels
            nn.init.constant_(layer.weight, 1 / layer.weight[0].numel())
            nn.init.zeros_(layer.bias)
        y = layer.double().eval()(y)
    middle = y.shape[2] // 2
    (slope,) = torch.autograd.grad(y[0, :, middle, middle].sum(), x)
    seen = slope[0].abs().sum(0) > 0
    return int(seen.any(1).sum()), int(seen.any(0).sum())


def test_innermost_units_see_287_pixels_and_79_without_dilation() -> None:
    inner = [*Generator(width=1 / 64).body][: 12 * 3]
    assert innermost_sight(inner, 400) == (287, 287)
    for layer in inner:
        if isinstance(layer, nn.Conv2d) and layer.dilation != (1, 1):
            layer.dilation = layer.padding = (1, 1)
    # the paper quotes 307 px and 99 without: 208 apart as well, (2 + 4 + 8 + 16) - 4 times 2 x 4 px
    assert innermost_sight(inner, 400) == (79, 79)


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


def test_the_hole_has_the_mean_colour_and_is_not_seen() -> None:
    seen: list[Tensor] = []
    g = build(mean_colour=[0.2, 0.4, 0.6]).networks["generator"].eval()
    g.body.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    image, mask = torch.rand(1, 3, 32, 32), boxes(32, (8, 20, 4, 24))
    hole = mask.bool().expand(-1, 3, -1, -1)
    out = g(image, mask)
    assert out.shape == image.shape
    assert 0 < out.min() < out.max() < 1
    assert torch.equal(out, g(torch.where(hole, torch.nan, image), mask))
    x, x_mask = seen[0][:, :3], seen[0][:, 3:]
    assert torch.equal(x_mask, mask)
    assert torch.equal(x[~hole], image[~hole])
    colour = torch.tensor([0.2, 0.4, 0.6])
    assert torch.equal(x[hole].view(3, -1), colour[:, None].expand(3, 12 * 20))
    assert build().options.mean_colour == PLACES
    assert not any("mean" in key for key in g.state_dict() if "running" not in key)


# -- what D compares -------------------------------------------------------------------------------------------


def test_patches_lie_around_the_hole_clipped_into_the_image() -> None:
    model = build()
    holes = [
        (10, 20, 14, 18),  # in the middle of the patch
        (11, 20, 14, 17),  # odd
        (0, 6, 28, 32),  # a corner
        (2, 30, 12, 20),  # longer than the patch
        (0, 0, 0, 0),  # none: the image's middle
    ]
    top, left = around(boxes(32, *holes), model.options.size // 2)
    assert top.tolist() == [7, 7, 0, 8, 8]
    assert left.tolist() == [8, 7, 16, 8, 8]


def test_a_scattered_hole_counts_as_its_box() -> None:
    mask = torch.zeros(1, 1, 32, 32)
    mask[0, 0, 5, 9] = mask[0, 0, 24, 20] = 1
    assert [int(t) for t in around(mask, build().options.size // 2)] == [
        (5 + 25 - 16) // 2,
        (9 + 21 - 16) // 2,
    ]


def test_crops_are_slices_and_pass_gradients_on() -> None:
    image = torch.rand(3, 3, 32, 32, requires_grad=True)
    top, left = torch.tensor([0, 7, 16]), torch.tensor([16, 3, 0])
    patch = crop(image, top, left, 16)
    expected = torch.stack([x[:, t : t + 16, s : s + 16] for x, t, s in zip(image, top, left, strict=True)])
    assert torch.equal(patch, expected)
    weight = torch.rand_like(patch)
    (slope,) = torch.autograd.grad((patch * weight).sum(), image)
    assert torch.equal(crop(slope, top, left, 16), weight)
    assert int((slope != 0).sum()) == int((weight != 0).sum())


def test_real_patches_are_uniform_and_each_photographs_own() -> None:
    numbers = torch.zeros(4, 4)
    numbers[:, 0] = torch.tensor([0.0, 0.5, 0.999, 1.0])  # 1.0: what a double just below it becomes
    numbers[:, 1] = torch.tensor([1.0, 0.999, 0.5, 0.0])
    model = build()
    top, left = model.anywhere({"uniform": numbers, "image": torch.empty(4, 3, 32, 32)})
    assert top.tolist() == [0, 8, 16, 16]
    assert left.tolist() == [16, 16, 8, 0]
    many = (torch.arange(17_000) / 17_000)[:, None].expand(-1, 4)
    top, _ = model.anywhere({"uniform": many, "image": torch.empty(17_000, 0)})
    assert torch.bincount(top).tolist() == pytest.approx([1000] * 17, abs=1)


@pytest.mark.parametrize("judged", ["completed", "output"])
def test_d_sees_known_pixels_restored_or_the_raw_output(judged, batch, training) -> None:
    model = build(judged=judged)
    phase = model.phase("joint")
    model.set_phase(phase)
    out = {"image": torch.rand(8, 3, 32, 32, requires_grad=True)}
    adv = model.generator_losses(batch, out, phase)["adv"]
    (slope,) = torch.autograd.grad(adv, out["image"])
    outside = slope * (1 - batch["mask"])
    assert (slope * batch["mask"]).abs().sum() > 0
    assert (outside.abs().sum() == 0) == (judged == "completed")


# -- losses and phases -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["hole", "image"])
def test_rec_is_the_mse_on_the_hole(reduction, photos) -> None:
    model = build(reduction=reduction)
    mask = boxes(32, *[(4, 12, 6, 6 + 2 * i) for i in range(1, 9)])
    out = torch.where(mask > 0, photos + 0.1, torch.rand_like(photos)).requires_grad_()
    rec = model.generator_losses({"image": photos, "mask": mask}, {"image": out}, model.phases[0])["rec"]
    assert rec.item() == pytest.approx(0.01 * (1.0 if reduction == "hole" else float(mask.mean())), rel=1e-5)
    (slope,) = torch.autograd.grad(rec, out)
    assert (slope * (1 - mask)).abs().max() == 0
    assert (slope * mask).abs().sum() > 0


def test_rec_of_two_ranks_is_that_of_one(photos) -> None:
    model = build()
    mask = boxes(32, *[(4, 12, 6, 6 + 2 * i) for i in range(1, 9)])
    batch, out = {"image": photos, "mask": mask, "mask_mean": mask.mean()}, torch.rand_like(photos)
    parts = [{**batch, "image": photos[i : i + 4], "mask": mask[i : i + 4]} for i in (0, 4)]
    losses = [
        model.generator_losses(part, {"image": o}, model.phases[0])["rec"]
        for part, o in zip(parts, out.split(4), strict=True)
    ]
    whole = model.generator_losses(batch, {"image": out}, model.phases[0])["rec"]
    torch.testing.assert_close(torch.stack(losses).mean(), whole)


def test_a_batch_without_a_hole_has_no_loss_and_no_nan(photos) -> None:
    model = build()
    batch = {"image": photos, "mask": torch.zeros(8, 1, 32, 32)}
    assert float(model.generator_losses(batch, {"image": photos * 0.5}, model.phases[0])["rec"]) == 0


@pytest.mark.parametrize(("gan", "expected"), [("minimax", math.log(0.5)), ("nsgan", -math.log(0.5))])
def test_losses_of_an_undecided_discriminator(gan, expected, batch) -> None:
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
def test_both_adversarial_terms_make_the_output_more_convincing(gan, batch) -> None:
    """Their gradients have one direction, that of a higher logit; the paper's is the smaller by D / (1 - D)."""
    model = build(gan=gan)
    d = model.networks["discriminator"]
    logits = torch.full((8, 1), -3.0, requires_grad=True)
    d.forward = lambda image, patch: logits
    adv = model.generator_losses(batch, {"image": batch["image"]}, model.phase("joint"))["adv"]
    (slope,) = torch.autograd.grad(adv, logits)
    chance = 1 / (1 + math.exp(3))
    expected = -chance if gan == "minimax" else chance - 1
    torch.testing.assert_close(slope, torch.full_like(slope, expected / 8))


def test_a_joint_step_without_alpha_is_a_step_of_the_first_phase(batch, training) -> None:
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
    assert {p.optimiser for p in model.phases} == {"adadelta"}
    assert {rate for p in model.phases for rate in p.lr.values()} == {1.0}
    adam = build(optimiser="adam", lr_adam=2e-3)
    assert {p.optimiser for p in adam.phases} == {"adam"}
    assert {rate for p in adam.phases for rate in p.lr.values()} == {2e-3}


def test_weights_are_the_papers_and_the_ports() -> None:
    model, port = build(), build(scale_discriminator=True)
    assert [model.weights(p) for p in model.phases] == [
        {"rec": 1.0},
        {"discriminator": 1.0},
        {"rec": 1.0, "adv": 0.0004, "discriminator": 1.0},
    ]
    assert port.weights(port.phase("discriminator")) == {"discriminator": 1.0}
    assert port.weights(port.phase("joint"))["discriminator"] == 0.0002


def test_the_second_phase_leaves_c_and_its_statistics_alone(batch, training) -> None:
    model = build()
    before = {key: value.clone() for key, value in model.networks["generator"].state_dict().items()}
    trainer = training.Trainer(model, model.phase("discriminator"))
    losses = [float(trainer.step(batch)["discriminator"]) for _ in range(3)]
    assert all(torch.equal(v, before[key]) for key, v in model.networks["generator"].state_dict().items())
    assert losses[-1] < losses[0]


def test_all_phases_run_in_double(batch, training) -> None:
    model = build().double()
    double = {key: value.double() for key, value in batch.items()}
    for phase in model.phases:
        losses = training.Trainer(model, phase).step(double)
        assert all(value.dtype == torch.double for value in losses.values())


def test_other_training_sizes_are_named() -> None:
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
        {"judged": "hole"},
        {"optimiser": "sgd"},
        {"mean_colour": [0.5, 0.5]},
        {"mean_colour": [104, 117, 123]},
    ],
)
def test_options_out_of_range_are_named(options) -> None:
    with pytest.raises(ValueError, match=f"glcic .*{next(iter(options))}"):
        build_model("glcic", **options)
