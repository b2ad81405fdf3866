"""DeepFill v2: docs/papers.md 0.4, 3.1 to 3.3, 3.5 and 3.7. Gated convolution: test_layers; attention: test_attention."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models import build_model
from models.deepfill_v2 import DeepFillV2, Discriminator, Generator
from models.layers import GatedConv2d
from models.losses import gan_fake, gan_generator, gan_real


def count_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def build(**options: Any) -> DeepFillV2:
    model = build_model("deepfill_v2", **{"width": 0.125, **options})
    assert isinstance(model, DeepFillV2)
    return model


def scale_up_weights(network: nn.Module) -> nn.Module:
    """Scale the gated convolutions up, in place: freshly initialised, 30 gates pass on almost nothing of the input."""
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, GatedConv2d):
                layer.conv.weight.mul_(3)
    return network


def record_inputs(module: nn.Module) -> list[Any]:
    """A list that receives the arguments of each further call of the module."""
    calls: list[Any] = []
    module.register_forward_pre_hook(lambda _, args: calls.append(args))
    return calls


# -- generator -------------------------------------------------------------------------------------------------


def test_parameter_counts_are_the_released_codes() -> None:
    with torch.device("meta"):
        free, guided = (build_model("deepfill_v2", guided=guided).networks for guided in (False, True))
    assert count_parameters(free["generator"]) == 4_052_478
    assert count_parameters(free["generator"].coarse) == 1_631_151
    assert count_parameters(free["generator"].refinement) == 2_421_327
    assert count_parameters(guided["generator"]) == 4_053_678
    assert count_parameters(free["discriminator"]) == 5_946_816
    assert count_parameters(guided["discriminator"]) == 5_948_416


def test_layers_are_those_of_the_released_code() -> None:
    """Channels after the gate, kernel, stride and dilation of every gated convolution, in order."""
    with torch.device("meta"):
        g = Generator()

    def layers(module: nn.Module) -> list[tuple[int, ...]]:
        convs = [m for m in module.modules() if isinstance(m, GatedConv2d)]
        return [
            (m.conv.out_channels // 2, m.conv.kernel_size[0], m.conv.stride[0], m.conv.dilation[0])
            for m in convs
        ]

    dilated = [(96, 3, 1, d) for d in (2, 4, 8, 16)]
    plain, out = [(96, 3, 1, 1)] * 2, [(48, 3, 1, 1), (48, 3, 1, 1), (24, 3, 1, 1), (12, 3, 1, 1)]
    start = [(24, 5, 1, 1), (48, 3, 2, 1), (48, 3, 1, 1), (96, 3, 2, 1)]
    assert layers(g.coarse) == start + plain + dilated + plain + out
    narrow = [(24, 5, 1, 1), (24, 3, 2, 1), (48, 3, 1, 1)]
    r = g.refinement
    assert layers(r.hallucination) == [*narrow, (48, 3, 2, 1), *plain, *dilated]
    assert layers(r.before_attention) == [*narrow, (96, 3, 2, 1), *plain]
    assert layers(r.after_attention) == plain
    assert layers(r.merge) == plain + out
    gated = [m for m in g.modules() if isinstance(m, GatedConv2d)]
    with_relu = [m for m in gated if m.activation is nn.functional.relu]
    assert with_relu == [r.before_attention[-1]]  # the last before the attention; ELU everywhere else
    assert all(m.activation is nn.functional.elu for m in gated if m not in with_relu)
    ungated = [m for m in g.modules() if isinstance(m, nn.Conv2d) and m not in [x.conv for x in gated]]
    assert [(m.in_channels, m.out_channels, m.kernel_size) for m in ungated] == [(12, 3, (3, 3))] * 2


def test_outputs_keep_the_size_and_range() -> None:
    hole = torch.zeros(2, 1, 32, 48, dtype=torch.bool)
    hole[:, :, 8:20, 8:24] = True
    for x in scale_up_weights(Generator(0.125))(torch.rand(2, 3, 32, 48) * 2 - 1, hole):
        assert x.shape == (2, 3, 32, 48)
        assert -1 <= x.min() < -0.01 < 0.01 < x.max() <= 1


@pytest.mark.parametrize("guided", [False, True])
def test_the_inputs_of_both_stages(guided, batch) -> None:
    """Stage 1: masked RGB, (sketch), ones, mask; stage 2: the composite alone."""
    model = build(guided=guided)
    g = model.networks["generator"]
    stage1, stage2 = record_inputs(g.coarse), record_inputs(g.refinement)
    branches = [
        record_inputs(branch) for branch in (g.refinement.hallucination, g.refinement.before_attention)
    ]
    out = model.generate(batch, model.phases[0])
    image, mask, edge = batch["image"] * 2 - 1, batch["mask"], batch["edge"]
    sketch = [edge * mask] if guided else []
    expected = torch.cat([image * (1 - mask), *sketch, torch.ones_like(mask), mask], dim=1)
    assert torch.equal(stage1[0][0], expected)
    composite = out["coarse"] * mask + image * (1 - mask)
    torch.testing.assert_close(stage2[0][0], composite)
    for branch in branches:
        torch.testing.assert_close(branch[0][0], composite)
    torch.testing.assert_close(out["composite"], out["refined"] * mask + image * (1 - mask))


def test_the_attention_sees_each_photographs_mask_at_a_quarter_of_the_size() -> None:
    g = scale_up_weights(Generator(0.125))
    hole = torch.rand(2, 1, 64, 32) > 0.5
    calls = record_inputs(g.refinement.attention)
    g(torch.rand(2, 3, 64, 32), hole)
    foreground, background, mask = calls[0]
    assert torch.equal(foreground, background)
    assert foreground.shape == (2, 12, 16, 8)
    assert torch.equal(mask, hole[:, :, ::4, ::4].float())


def test_known_pixels_influence_the_output_and_holes_do_not() -> None:
    g = scale_up_weights(Generator(0.125))
    hole = torch.zeros(1, 1, 32, 32, dtype=torch.bool)
    hole[:, :, 8:20, 8:24] = True
    image = torch.rand(1, 3, 32, 32)
    other = torch.where(hole, image, image.roll(1, 3))
    for a, b, c in zip(
        g(image, hole), g(image.masked_fill(hole, torch.nan), hole), g(other, hole), strict=True
    ):
        assert torch.equal(a, b)
        assert not torch.allclose(a, c, atol=1e-3)


def test_attention_options_are_exact_released_or_smooth() -> None:
    names = ("masking", "overlap", "norm", "fuse", "kernel", "rate", "softmax_scale", "similarity")
    results = []
    for attention, expected in (
        ("exact", ["exact", "exact", "released"]),
        ("released", ["released", "released", "released"]),
        ("smooth", ["released", "released", "smooth"]),
    ):
        torch.manual_seed(0)
        model = build(attention=attention)
        scale_up_weights(model.networks["generator"])
        layer = model.networks["generator"].refinement.attention
        assert [getattr(layer, n) for n in names] == [*expected, 3, 3, 2, 10.0, "released"]
        mask = torch.zeros(1, 1, 32, 32)
        mask[:, :, 8:24, 8:24] = 1
        results.append(model.complete(torch.ones(1, 3, 32, 32).tril(), mask))
    assert not torch.equal(*results[:2])


# -- discriminator ---------------------------------------------------------------------------------------------


def test_discriminator_gives_4096_logits_for_256_pixels_and_at_least_one_for_small_sizes() -> None:
    with torch.device("meta"):
        d = Discriminator()
        assert d(torch.empty(2, 4, 256, 256)).flatten(1).shape == (2, 4096)
        assert d(torch.empty(2, 4, 256, 256)).shape == (2, 256, 4, 4)
    d = Discriminator(4, 0.05)
    for size, logits in ((32, 1), (64, 1), (72, 2), (128, 2)):
        assert d(torch.rand(1, 4, size, size)).shape[2:] == (logits, logits)


def test_the_discriminators_receptive_field_is_253_pixels() -> None:
    d = Discriminator(4, 0.05)
    x = torch.rand(1, 4, 256, 256, requires_grad=True)
    d(x)[0, :, 2, 2].sum().backward()
    assert x.grad is not None
    receptive_field = x.grad.abs().sum((0, 1)) > 0
    assert (int(receptive_field.any(0).sum()), int(receptive_field.any(1).sum())) == (253, 253)


def test_the_discriminator_is_six_convolutions_each_with_leaky_relu() -> None:
    d = Discriminator(4, 0.1).eval()
    x = torch.rand(2, 4, 64, 64)
    y = x
    convs = [m for m in d if isinstance(m, nn.Conv2d)]
    assert len(convs) == 6
    for conv in convs:
        y = nn.functional.conv2d(y, conv.weight, conv.bias, stride=2, padding=2)
        y = torch.maximum(y, 0.2 * y)
    torch.testing.assert_close(d(x), y)
    assert y.min() < 0 < y.max()


def test_the_spectral_norm_is_one_whatever_the_weights_scale() -> None:
    d = Discriminator(4, 0.1)
    x = torch.rand(1, 4, 32, 32)
    for _ in range(100):
        d(x)  # one power iteration
    d.eval()
    before = d(x)
    for conv in d:
        if isinstance(conv, nn.Conv2d):
            kernel = conv.weight.detach().permute(2, 3, 1, 0).flatten(0, 2).numpy()  # [k k c_in, c_out]
            assert np.linalg.svd(kernel, compute_uv=False)[0] == pytest.approx(1, abs=1e-3)
            with torch.no_grad():
                conv.parametrizations.weight.original.mul_(7)  # type: ignore[operator, union-attr]
    torch.testing.assert_close(d(x), before)


@pytest.mark.parametrize("guided", [False, True])
def test_the_discriminators_inputs_are_image_mask_and_sketch(guided, batch) -> None:
    model = build(guided=guided)
    phase = model.phases[0]
    calls = record_inputs(model.networks["discriminator"])
    out = model.generate(batch, phase)
    model.discriminator_losses(batch, out, phase)
    model.generator_losses(batch, out, phase)
    conditions = [batch["mask"], *([batch["edge"] * batch["mask"]] if guided else [])]
    images = (batch["image"] * 2 - 1, out["composite"], out["composite"])
    for (x,), image in zip(calls, images, strict=True):
        assert torch.equal(x, torch.cat([image, *conditions], dim=1))
    assert [x.requires_grad for (x,) in calls] == [False, False, True]


def test_real_and_fake_use_the_same_weights_after_one_power_iteration(batch) -> None:
    model = build()
    phase = model.phases[0]
    model.set_phase(phase)
    d = model.networks["discriminator"]
    twin, truth, logits = copy.deepcopy(d), batch["image"] * 2 - 1, []
    d.register_forward_hook(lambda *args: logits.append(args[2]))
    model.discriminator_losses(batch, {"composite": truth.clone()}, phase)
    assert torch.equal(*logits)
    twin(torch.cat([truth, batch["mask"]], dim=1))
    assert all(torch.equal(a, b) for a, b in zip(d.buffers(), twin.buffers(), strict=True))


# -- losses ----------------------------------------------------------------------------------------------------


def test_hinge_is_zero_beyond_the_margin_and_one_at_zero() -> None:
    real, fake = torch.rand(2, 8, 4, 4).add(1).requires_grad_(), torch.rand(2, 8, 4, 4).neg().sub(1)
    fake.requires_grad_()
    loss = (gan_real(real, "hinge") + gan_fake(fake, "hinge")) / 2
    loss.backward()
    assert float(loss.detach()) == 0
    assert real.grad is not None
    assert fake.grad is not None
    assert not real.grad.any()
    assert not fake.grad.any()
    zero = torch.zeros(2, 8, 4, 4)
    assert float((gan_real(zero, "hinge") + gan_fake(zero, "hinge")) / 2) == 1
    assert float(gan_generator(zero, "hinge")) == 0


def test_losses_are_the_papers_formulas(batch) -> None:
    """Hinge over every element, l1 over the whole image in [-1,1], each stage by itself."""
    model = build().eval()
    phase = model.phases[0]
    truth, d = batch["image"] * 2 - 1, model.networks["discriminator"]
    with torch.no_grad():
        # constant errors, and noise that spreads the logits to both sides of the margins
        out = {"coarse": truth + 0.3, "refined": truth - 0.1, "composite": 1e4 * torch.randn_like(truth)}
        logits = [d(torch.cat([x, batch["mask"]], dim=1)).numpy() for x in (truth, out["composite"])]
        losses = model.discriminator_losses(batch, out, phase) | model.generator_losses(batch, out, phase)
    assert float(losses["l1_coarse"]) == pytest.approx(0.3, rel=1e-5)
    assert float(losses["l1"]) == pytest.approx(0.1, rel=1e-5)
    on_real, on_fake = logits
    expected = 0.5 * np.maximum(0, 1 - on_real).mean() + 0.5 * np.maximum(0, 1 + on_fake).mean()
    assert on_fake.min() < -1 < on_fake.max()
    assert float(losses["discriminator"]) == pytest.approx(expected, rel=1e-5)
    assert float(losses["adv"]) == pytest.approx(-on_fake.mean(), rel=1e-4)


def test_the_adversarial_gradient_is_in_the_hole_only_and_that_of_l1_everywhere(batch) -> None:
    model = build()
    phase = model.phases[0]
    out = model.generate(batch, phase)
    losses = model.generator_losses(batch, out, phase)
    known = (batch["mask"] == 0).expand_as(out["refined"])
    (adv,) = torch.autograd.grad(losses["adv"], out["refined"], retain_graph=True)
    (l1,) = torch.autograd.grad(losses["l1"], out["refined"])
    assert adv[~known].any()
    assert not adv[known].any()
    assert l1[known].all()


def test_loss_weights_and_learning_rates_are_the_released_ones() -> None:
    model = build()
    (phase,) = model.phases
    assert model.weights(phase) == {"l1_coarse": 1, "l1": 1, "adv": 1, "discriminator": 1}
    assert phase.lr == {"generator": 1e-4, "discriminator": 1e-4}
    assert (phase.betas, phase.critic_steps, phase.optimizer) == ((0.5, 0.999), 1, "adam")
    weighted = build(lambda_l1=3, lambda_adv=0.5)
    assert weighted.weights(phase) == {"l1_coarse": 3, "l1": 3, "adv": 0.5, "discriminator": 1}


def test_without_lambda_adv_the_discriminator_does_not_run(batch, training) -> None:
    model = build(lambda_adv=0)
    calls = record_inputs(model.networks["discriminator"])
    losses = training.Trainer(model, model.phases[0]).step(batch)
    assert losses.keys() == model.weights(model.phases[0]).keys() == {"l1_coarse", "l1"}
    assert not calls


def test_a_step_runs_the_generator_once_and_the_discriminator_three_times(batch, training) -> None:
    model = build()
    calls = {name: record_inputs(network) for name, network in model.networks.items()}
    training.Trainer(model, model.phases[0]).step(batch)
    assert {name: len(inputs) for name, inputs in calls.items()} == {"generator": 1, "discriminator": 3}


def test_works_in_double_precision(batch, training) -> None:
    model = build(guided=True).double()
    double = {key: value.double() for key, value in batch.items()}
    losses = training.Trainer(model, model.phases[0]).step(double)
    assert {value.dtype for value in losses.values()} == {torch.float64}
    assert model.complete(double["image"], double["mask"], double["edge"]).dtype == torch.float64


# -- guided ----------------------------------------------------------------------------------------------------


def photos_with_sketch() -> tuple[Tensor, Tensor, Tensor]:
    """Two photographs with holes; the second has a sketch in its hole."""
    image, mask, edge = torch.rand(2, 3, 33, 47), torch.zeros(2, 1, 33, 47), torch.zeros(2, 1, 33, 47)
    mask[:, :, 8:24, 8:24] = 1
    edge[1, :, 10:20, 15] = 1
    return image, mask, edge


def test_a_sketch_changes_its_own_photograph_and_edges_outside_the_hole_change_nothing() -> None:
    model = build(guided=True)
    scale_up_weights(model.networks["generator"])
    assert model.takes_edges
    assert not model.needs_edges
    image, mask, edge = photos_with_sketch()
    without, guided = model.complete(image, mask), model.complete(image, mask, edge)
    assert torch.equal(without, model.complete(image, mask, torch.zeros_like(edge)))
    assert torch.equal(without[0], guided[0])
    assert not torch.equal(without[1], guided[1])
    outside = torch.maximum(edge, (torch.rand_like(edge) > 0.5) * (1 - mask))
    assert torch.equal(model.complete(image, mask, outside), guided)


def test_an_unguided_model_ignores_edges() -> None:
    image, mask, edge = photos_with_sketch()
    model = build()
    scale_up_weights(model.networks["generator"])
    assert torch.equal(model.complete(image, mask), model.complete(image, mask, edge))


@pytest.mark.slow
def test_a_guided_model_learns_from_sketches_and_exports(batch, training) -> None:
    model = build(guided=True)
    training.Trainer(model, model.phases[0]).step(batch)
    for network in model.networks.values():
        first = next(m for m in network.modules() if isinstance(m, nn.Conv2d))
        weight = next(p for p in first.parameters() if p.ndim == 4)
        assert weight.grad is not None
        assert weight.grad[:, 3:].abs().sum((0, 2, 3)).gt(0).all()  # of sketch, mask (and ones)
    scale_up_weights(model.networks["generator"])
    # in double precision: scaled-up weights magnify rounding errors
    completion, x = model.frozen_completion().double(), torch.cat(photos_with_sketch(), dim=1).double()
    dynamic = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    exported = torch.export.export(completion, (x,), dynamic_shapes=(dynamic,)).module()
    for y in (x, x[1:, :, :, 3:30], x.repeat(2, 1, 3, 2)):
        torch.testing.assert_close(exported(y), completion(y), atol=1e-9, rtol=0)
        one_by_one = torch.cat([completion(y[i : i + 1]) for i in range(len(y))])
        torch.testing.assert_close(one_by_one, completion(y), atol=1e-9, rtol=0)


def test_training_a_guided_model_without_edges_is_refused(batch) -> None:
    model = build(guided=True)
    with pytest.raises(ValueError, match="deepfill_v2 guided needs edges"):
        model.generate({**batch, "edge": None}, model.phases[0])
    assert build().generate({**batch, "edge": None}, build().phases[0])


# -- completion and options ------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["exact", "released", "smooth"])
def test_a_photograph_that_is_all_hole_is_completed(attention) -> None:
    image, mask = torch.full((1, 3, 20, 9), torch.nan), torch.ones(1, 1, 20, 9)
    assert build(attention=attention).complete(image, mask).isfinite().all()


@pytest.mark.parametrize(
    "options",
    [
        {"width": 0},
        {"attention": "tf"},
        {"lambda_adv": -1},
        {"lambda_l1": -0.1},
        {"lr": 0},
        {"beta1": 1},
        {"beta2": -0.5},
    ],
)
def test_options_out_of_range_are_refused(options) -> None:
    with pytest.raises(ValueError, match=f"deepfill_v2 {next(iter(options))}"):
        build_model("deepfill_v2", **options)
