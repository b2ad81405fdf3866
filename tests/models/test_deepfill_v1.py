"""DeepFill v1: docs/papers.md 0.4 and 2.5, local box, losses and phase."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import build_model
from models.deepfill_v1 import Critic, DeepFillV1
from models.losses import discount_map, gradient_penalty, wgan_critic
from pipelines.check_recipe import check_recipe
from pipelines.recipe.load import load_recipe

CRITICS = ("local_critic", "global_critic")


def count_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def build(**options: Any) -> DeepFillV1:
    model = build_model("deepfill_v1", **{"width": 0.125, "size": 32, **options})
    assert isinstance(model, DeepFillV1)
    return model


def convolutions(network: nn.Module) -> list[nn.Conv2d]:
    return [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]


# -- networks --------------------------------------------------------------------------------------------------


def test_parameter_counts_are_the_released_codes() -> None:
    with torch.device("meta"):
        networks = build_model("deepfill_v1").networks
        baseline = build_model("deepfill_v1", attention=False).networks["generator"]
    generator = networks["generator"]
    assert {
        "coarse": count_parameters(generator.coarse),
        "refinement": count_parameters(generator.refinement),
        **{name: count_parameters(networks[name]) for name in CRITICS},
    } == {
        "coarse": 1_448_227,
        "refinement": 2_153_315,
        "local_critic": 4_339_329,
        "global_critic": 2_733_441,
    }
    assert (
        count_parameters(baseline) == count_parameters(generator) == 3_601_542
    )  # attention has no parameters
    assert len(convolutions(generator.coarse)) == 17
    assert [c.dilation[0] for c in convolutions(generator.coarse)] == [1] * 6 + [2, 4, 8, 16] + [1] * 7
    assert [c.dilation[0] for c in convolutions(generator.refinement.hallucination)] == [1] * 6 + [
        2,
        4,
        8,
        16,
    ]


def test_generator_keeps_the_size_and_its_range() -> None:
    generator = build().networks["generator"]
    for layer in convolutions(generator):
        layer.weight.data *= 3  # so that the output is clipped
    image, hole = torch.rand(2, 3, 24, 40) * 2 - 1, torch.zeros(2, 1, 24, 40, dtype=torch.bool)
    hole[:, :, 4:14, 8:20] = True
    for out in generator(image, hole):
        assert out.shape == image.shape
        assert out.min() == -1
        assert out.max() == 1


def test_the_output_depends_on_the_mask_but_not_on_the_holes_contents() -> None:
    generator = build().networks["generator"]
    image, hole = torch.rand(1, 3, 32, 32) * 2 - 1, torch.zeros(1, 1, 32, 32, dtype=torch.bool)
    hole[:, :, 8:20, 8:24] = True
    with torch.no_grad():
        before = generator(image, hole)
        after = generator(torch.where(hole, torch.nan, image), hole)
        without_hole = generator(image.masked_fill(hole, 0.0), torch.zeros_like(hole))
    for a, b, c in zip(before, after, without_hole, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


def test_without_attention_the_branch_keeps_its_convolutions() -> None:
    model, baseline = build(), build(attention=False)
    baseline.load_state_dict(model.state_dict())
    image, hole = torch.rand(1, 3, 32, 32) * 2 - 1, torch.zeros(1, 1, 32, 32, dtype=torch.bool)
    hole[:, :, 8:24, 8:24] = True
    generator, without = model.networks["generator"], baseline.networks["generator"]
    with torch.no_grad():
        (x1, x2), (y1, y2) = generator(image, hole), without(image, hole)
        assert torch.equal(x1, y1)
        assert not torch.equal(x2, y2)
        generator.refinement.attention = ForegroundOnly()
        assert torch.equal(generator(image, hole)[1], y2)


class ForegroundOnly(nn.Module):
    def forward(self, foreground: Tensor, background: Tensor, mask: Tensor) -> Tensor:
        assert mask.shape == (1, 1, 8, 8)
        assert mask.sum() == 16
        return foreground


def test_attention_options_reach_the_layer() -> None:
    options = {"masking": "released", "overlap": "released", "similarity": "cosine", "fuse": 0}
    layer = (
        build(**{f"attention_{k}": v for k, v in options.items()}).networks["generator"].refinement.attention
    )
    assert {name: getattr(layer, name) for name in options} == options


def test_critics_give_one_score_per_photograph() -> None:
    model = build(size=64)
    assert model.networks["local_critic"](torch.rand(2, 3, 32, 32)).shape == (2, 1)
    assert model.networks["global_critic"](torch.rand(2, 3, 64, 64)).shape == (2, 1)


# -- the local box ---------------------------------------------------------------------------------------------


def test_the_local_box_is_centred_on_each_hole_and_inside_the_photograph() -> None:
    model = build()
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    coordinates = torch.stack([y, x]).expand(5, -1, -1, -1)
    mask = torch.zeros(5, 1, 32, 32)
    mask[0, :, 6:20, 11:23] = 1  # a box with centre (13, 17)
    mask[1, :, :4, 30:] = 1  # at the border
    mask[2, :, 10, 12] = mask[2, :, 21, 3] = 1  # two pixels: their common box, 10..22 x 3..13
    mask[3] = 1  # larger than the box
    corners = model.crop_local(coordinates, mask)[:, :, 0, 0]
    assert corners.tolist() == [
        [5, 9],
        [0, 16],
        [8, 0],
        [8, 8],
        [8, 8],
    ]  # the last has no hole: the image's centre
    local = model.crop_local(coordinates, mask)
    expected = torch.stack(
        [coordinates[i, :, t : t + 16, s : s + 16] for i, (t, s) in enumerate(corners.int().tolist())]
    )
    assert torch.equal(local, expected)
    assert model.crop_local(mask, mask)[0].sum() == mask[0].sum()


# -- losses ----------------------------------------------------------------------------------------------------


class LinearCritic(nn.Module):
    """D(x) = <w, x>, with gradient w everywhere."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(*shape, dtype=torch.double))

    def forward(self, x: Tensor) -> Tensor:
        return (self.w * x).flatten(1).sum(1, keepdim=True)


def test_gradient_penalty_of_a_linear_critic_is_known() -> None:
    critic, (real, fake), alpha = LinearCritic(3, 8, 8), torch.randn(2, 4, 3, 8, 8).double(), torch.rand(4)
    everywhere, mask = torch.ones(4, 1, 8, 8), (torch.rand(4, 1, 8, 8) > 0.5).double()
    mask[3] = 0  # no hole: the norm is 0, its gradient finite
    w = critic.w
    torch.testing.assert_close(gradient_penalty(critic, real, fake, alpha, everywhere), (w.norm() - 1) ** 2)
    expected = torch.stack([((w * m).norm() - 1) ** 2 for m in mask]).mean()
    penalty = gradient_penalty(critic, real, fake, alpha, mask)
    torch.testing.assert_close(penalty, expected)
    (gradient,) = torch.autograd.grad(penalty, w)
    terms = [2 * ((w * m).norm() - 1) * w * m / (w * m).norm() for m in mask[:3]]
    torch.testing.assert_close(gradient, torch.stack(terms).sum(0) / 4)
    with torch.no_grad():
        w /= w.norm()
    assert gradient_penalty(critic, real, fake, alpha, everywhere) < 1e-12


def test_gradient_penalty_is_taken_at_the_interpolated_images() -> None:
    real, fake, mask = torch.zeros(3, 1, 1, 1), torch.full((3, 1, 1, 1), 4.0), torch.ones(3, 1, 1, 1)
    alpha = torch.tensor([0.0, 0.25, 1.0])  # D = x^2 / 2 has the gradient x = 4 alpha
    penalty = gradient_penalty(lambda x: x**2 / 2, real, fake, alpha, mask)
    torch.testing.assert_close(penalty, ((4 * alpha - 1) ** 2).mean())


def test_discount_map_of_the_released_code() -> None:
    for gamma, centre, mean in ((0.9, 0.001179, 0.252921), (0.99, 0.525597, 0.816087)):
        weight = discount_map(128, gamma)
        assert weight[0, 0] == weight[0, 77] == weight[50, 0] == 1
        assert weight[127, 64] == pytest.approx(gamma)
        assert weight[64, 64] == pytest.approx(centre, abs=1e-6)
        assert weight.mean() == pytest.approx(mean, abs=1e-5)
        i = torch.arange(128.0)
        row = torch.minimum(i, 128 - i)
        expected = torch.maximum(gamma ** row[:, None], gamma ** row[None])  # the released code's formula
        torch.testing.assert_close(weight, expected)


def test_discount_map_of_the_paper_is_symmetric() -> None:
    weight = build(size=256, discount="paper").discount_weights()
    assert weight.shape == (128, 128)
    for other in (weight.flip(0), weight.flip(1), weight.T):
        assert torch.equal(weight, other)
    assert weight[0, 50] == pytest.approx(0.99)
    assert weight[64, 64] == pytest.approx(0.99**64)
    torch.testing.assert_close(build(gamma=0.5).discount_weights(), discount_map(16, 0.5))
    torch.testing.assert_close(build().discount_weights(), discount_map(16, 0.9))


def test_for_equal_images_all_losses_but_the_penalty_are_zero(batch) -> None:
    model = build()
    phase, real = model.phases[0], batch["image"] * 2 - 1
    out = dict.fromkeys(("coarse", "fine", "image"), real)
    critics, generator = (
        model.discriminator_losses(batch, out, phase),
        model.generator_losses(batch, out, phase),
    )
    assert critics["local"] == critics["global"] == generator["l1"] == generator["ae"] == 0
    assert wgan_critic(torch.tensor([1.0, 3.0]), torch.tensor([5.0, 1.0])) == 1


@pytest.mark.parametrize("known_fraction", [None, 0.5])
def test_l1_losses_of_a_constant_error(batch, known_fraction) -> None:
    model = build(coarse_alpha=1.5)
    real = batch["image"] * 2 - 1
    out = {"coarse": real + 0.2, "fine": real - 0.1, "image": real}
    extra = {} if known_fraction is None else {"mask_mean": torch.tensor(1 - known_fraction)}
    losses = model.generator_losses({**batch, **extra}, out, model.phases[0])
    error = 1.5 * 0.2 + 0.1
    torch.testing.assert_close(losses["l1"], error * model.discount_weights().mean())
    expected = error * float(1 - batch["mask"].mean()) / (known_fraction or float(1 - batch["mask"].mean()))
    assert float(losses["ae"]) == pytest.approx(expected, rel=1e-5)


def test_the_discounted_l1_sees_the_hole_and_the_other_the_known_pixels(batch) -> None:
    """The hole is the centre half, which is also the local box."""
    model, mask = build(), batch["mask"]
    real = batch["image"] * 2 - 1
    for region, zero in ((1 - mask, "l1"), (mask, "ae")):
        wrong = real + region
        losses = model.generator_losses(
            batch, {"coarse": wrong, "fine": wrong, "image": real}, model.phases[0]
        )
        assert {name for name in ("l1", "ae") if losses[name] == 0} == {zero}


def test_adversarial_losses_are_the_papers_formulas(batch) -> None:
    model = build()
    phase = model.phases[0]
    model.set_phase(phase)
    out = model.generate(batch, phase)
    image, mask = batch["image"] * 2 - 1, batch["mask"]
    torch.testing.assert_close(out["image"], mask * out["fine"] + (1 - mask) * image)
    local_critic, global_critic = (model.networks[name] for name in CRITICS)
    box = (slice(None), slice(None), slice(8, 24), slice(8, 24))
    losses = model.generator_losses(batch, out, phase)
    expected = -local_critic(out["image"][box]).mean() - global_critic(out["image"]).mean()
    torch.testing.assert_close(losses["adv"], expected)
    losses = model.discriminator_losses(batch, out, phase)
    fake = out["image"].detach()
    expected_local = local_critic(fake[box]).mean() - local_critic(image[box]).mean()
    torch.testing.assert_close(losses["local"], expected_local)
    torch.testing.assert_close(losses["global"], global_critic(fake).mean() - global_critic(image).mean())
    alpha = batch["uniform"]
    expected_local = gradient_penalty(local_critic, image[box], fake[box], alpha[:, 0], mask[box])
    torch.testing.assert_close(losses["gp_local"], expected_local)
    expected_global = gradient_penalty(global_critic, image, fake, alpha[:, 1], mask)
    torch.testing.assert_close(losses["gp_global"], expected_global)


def test_losses_of_two_half_batches_average_to_the_whole_batchs(batch) -> None:
    model = build()
    phase = model.phases[0]
    mask = batch["mask"].clone()
    mask[4:, :, 4:12] = 0  # the halves have different hole areas
    full_batch = {**batch, "mask": mask, "mask_mean": mask.mean()}

    def losses(samples: slice) -> dict[str, Tensor]:
        half = {k: v[samples] if isinstance(v, Tensor) and v.ndim else v for k, v in full_batch.items()}
        out = model.generate(half, phase)
        return model.discriminator_losses(half, out, phase) | model.generator_losses(half, out, phase)

    full, first, second = losses(slice(0, 8)), losses(slice(0, 4)), losses(slice(4, 8))
    for name, value in full.items():
        torch.testing.assert_close(value, (first[name] + second[name]) / 2)


def test_critic_losses_need_no_generator_graph(batch) -> None:
    model = build()
    phase = model.phases[0]
    model.set_phase(phase)
    with torch.no_grad():
        out = model.generate(batch, phase)
    losses = model.discriminator_losses(batch, out, phase)
    sum(losses.values()).backward()
    assert all(p.grad is not None for name in CRITICS for p in model.networks[name].parameters())
    assert all(p.grad is None for p in model.networks["generator"].parameters())


def test_works_in_float64(batch) -> None:
    model = build().double()
    phase = model.phases[0]
    double = {k: v.double() for k, v in batch.items()}
    del double["uniform"]  # then sampled, in float32
    out = model.generate(double, phase)
    losses = model.discriminator_losses(double, out, phase) | model.generator_losses(double, out, phase)
    assert all(value.dtype == torch.double for value in losses.values())
    assert model.complete(double["image"], double["mask"]).dtype == torch.double


# -- phase, options, recipes -----------------------------------------------------------------------------------


def test_the_phase_is_the_papers() -> None:
    (phase,) = build().phases
    assert (phase.name, phase.optimizer, phase.betas, phase.critic_steps) == ("train", "adam", (0.5, 0.9), 5)
    assert phase.steps == 5_000_000
    assert phase.lr == dict.fromkeys(("generator", *CRITICS), 1e-4)
    assert build().weights(phase) == {
        "l1": 1.2,
        "ae": 1.2,
        "adv": 0.001,
        "local": 1.0,
        "global": 1.0,
        "gp_local": 10.0,
        "gp_global": 10.0,
    }


def test_the_generator_is_trained_at_every_fifth_step(batch, training) -> None:
    model = build()
    trainer = training.Trainer(model, model.phases[0])
    losses = [set(trainer.step(batch)) for _ in range(10)]
    assert [("adv" in names, "gp_local" in names) for names in losses] == (
        [(False, True)] * 4 + [(True, True)]
    ) * 2


def test_without_lambda_adv_no_critic_is_trained(batch, training) -> None:
    model = build(lambda_adv=0)
    (phase,) = model.phases
    assert (phase.discriminators, phase.critic_steps, phase.steps) == ((), 1, 1_000_000)
    assert set(training.Trainer(model, phase).step(batch)) == {"l1", "ae"}


def test_a_batch_of_another_size_is_refused(batch) -> None:
    model = build(size=64)
    with pytest.raises(ValueError, match="deepfill_v1 of size 64 trains on 64x64 px, not"):
        model.generate(batch, model.phases[0])


@pytest.mark.parametrize(
    "options",
    [
        {"size": 48},
        {"size": 0},
        {"width": 0},
        {"attention_masking": "tf"},
        {"attention_overlap": "paper"},
        {"attention_similarity": "exact"},
        {"attention_norm": "added"},
        {"attention_fuse": 2},
        {"lambda_adv": -1},
        {"lambda_gp": -1},
        {"coarse_alpha": -1},
        {"discount": "none"},
        {"gamma": 0},
        {"critic_steps": 0},
        {"lr": 0},
        {"beta2": 1},
    ],
)
def test_options_out_of_range_are_refused(options) -> None:
    with pytest.raises(ValueError, match=f"deepfill_v1 {next(iter(options))}"):
        build_model("deepfill_v1", **options)


def test_attention_norm_defaults_to_the_released_one() -> None:
    """Models stored before the option existed do not change."""
    layers = [
        build(**o).networks["generator"].refinement.attention for o in ({}, {"attention_norm": "smooth"})
    ]
    assert [layer.norm for layer in layers] == ["released", "smooth"]


@pytest.mark.parametrize("size", [(1, 1), (3, 9), (8, 8)])
def test_tiny_photographs_are_completed(size) -> None:
    model = build()
    x = torch.rand(1, 5, *size)
    x[:, 3] = 0
    x[:, 3, : (size[0] + 1) // 2] = 1
    completed = model.complete(x[:, :3], x[:, 3:4])
    assert completed.shape == (1, 3, *size)
    assert completed.isfinite().all()


@pytest.mark.parametrize("name", ["deepfill_v1", "deepfill_v1-small"])
def test_shipped_recipes_pass_the_check(name) -> None:
    recipe = load_recipe(name)
    check_recipe(recipe)
    (key,) = recipe.models
    assert recipe.models[key].options.get("size", 256) == recipe.data.size


def test_critics_are_glorot_uniform_with_zero_biases() -> None:
    critic = Critic(64, (64, 128))
    for layer in critic:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(layer.weight)
            bound = (6 / (fan_in + fan_out)) ** 0.5
            assert 0.9 * bound < layer.weight.abs().max() <= bound
            assert not layer.bias.any()
