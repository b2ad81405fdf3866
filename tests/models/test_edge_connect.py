"""EdgeConnect: docs/papers.md 0.4 and 4.7, phases, generated and user-drawn edges."""

from __future__ import annotations

import math
from typing import Any

import pytest
import skimage.color
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import build_model
from models.edge_connect import (
    D1,
    D2,
    G1,
    G2,
    PERCEPTUAL_LAYERS,
    STYLE_LAYERS,
    Discriminator,
    EdgeConnect,
    EdgeGenerator,
    InpaintGenerator,
    rgb_to_gray,
)
from models.losses import (
    feature_matching,
    gan_fake,
    gan_generator,
    gan_real,
    gram_matrix,
    l1_over_hole,
    style_loss,
)


def count_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def build(**options: Any) -> EdgeConnect:
    small = {"width": 0.125, "residual_blocks": 1, "features": "efficientnet_lite0"}
    model = build_model("edge_connect", **{**small, **options})
    assert isinstance(model, EdgeConnect)
    return model


# -- networks --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_parameter_counts_are_the_papers() -> None:
    with torch.device("meta"):
        networks = build_model("edge_connect").networks
        without = EdgeGenerator(spectral_norm=False)
    assert {name: count_parameters(network) for name, network in networks.items()} == {
        G1: 10_761_089,
        D1: 2_762_752,
        G2: 10_774_595,
        D2: 2_763_776,
    }
    assert count_parameters(without) == 10_765_185
    assert sum(b.numel() for b in networks[G1].buffers()) == 50_963  # spectral norm's vectors
    assert not [*networks[G2].buffers()]


def test_generators_keep_the_size_and_their_ranges() -> None:
    one, three = torch.rand(2, 1, 32, 48), torch.rand(2, 3, 32, 48)
    edges, image = EdgeGenerator(0.1, 1)(one, one, one), InpaintGenerator(0.1, 1)(three, one, one)
    assert edges.shape == (2, 1, 32, 48)
    assert image.shape == (2, 3, 32, 48)
    for out in (edges, image):
        assert 0 < out.min() < out.max() < 1


def test_both_generators_ignore_the_image_in_the_hole() -> None:
    image, edge, mask = torch.rand(1, 3, 32, 32), torch.rand(1, 1, 32, 32).round(), torch.zeros(1, 1, 32, 32)
    mask[:, :, 8:20, 8:24] = 1
    other = torch.where(mask > 0, torch.rand_like(image), image)
    g1, g2 = EdgeGenerator(0.1, 1).eval(), InpaintGenerator(0.1, 1)
    assert torch.equal(g1(rgb_to_gray(image), edge, mask), g1(rgb_to_gray(other), edge * (1 - mask), mask))
    assert torch.equal(g2(image, edge, mask), g2(other, edge, mask))
    assert not torch.equal(
        g2(image, edge, mask), g2(image, edge * (1 - mask), mask)
    )  # G2 sees the edges in the hole


def test_a_bias_before_instance_norm_has_no_effect() -> None:
    g2 = InpaintGenerator(0.1, 2)
    x = torch.rand(2, 3, 32, 32), torch.rand(2, 1, 32, 32), torch.zeros(2, 1, 32, 32)
    before = g2(*x)
    with torch.no_grad():
        for layer in g2.body.modules():
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                assert layer.bias is not None
                layer.bias += 0.7
    torch.testing.assert_close(g2(*x), before, atol=1e-5, rtol=0)


def test_a_batch_of_two_gives_the_same_as_two_batches_of_one() -> None:
    g2 = InpaintGenerator(0.1, 2)
    x = torch.rand(2, 3, 32, 32), torch.rand(2, 1, 32, 32), torch.zeros(2, 1, 32, 32)
    both = g2(*x)
    for i in range(2):
        torch.testing.assert_close(both[i : i + 1], g2(*(t[i : i + 1] for t in x)), atol=1e-6, rtol=0)


def test_the_discriminators_receptive_field_is_70_pixels_and_its_output_30x30_for_256() -> None:
    d = Discriminator(2, 0.1)
    outputs = d(torch.rand(1, 2, 256, 256))
    assert [tuple(y.shape[1:]) for y in outputs] == [
        (6, 128, 128),
        (13, 64, 64),
        (26, 32, 32),
        (51, 31, 31),
        (1, 30, 30),
    ]
    x = torch.rand(1, 2, 256, 256, requires_grad=True)
    d(x)[-1][0, 0, 15, 15].backward()
    assert x.grad is not None
    receptive_field = x.grad.abs().sum((0, 1)) > 0
    assert (int(receptive_field.any(0).sum()), int(receptive_field.any(1).sum())) == (70, 70)


def test_rgb_to_gray_is_skimages_rgb2gray() -> None:
    image = torch.rand(1, 3, 9, 7)
    expected = skimage.color.rgb2gray(image[0].permute(1, 2, 0).numpy())
    torch.testing.assert_close(rgb_to_gray(image)[0, 0], torch.from_numpy(expected))


# -- losses ----------------------------------------------------------------------------------------------------


def test_losses_for_logits_of_zero() -> None:
    logits = torch.zeros(2, 1, 6, 6)  # D = 0.5
    assert float((gan_real(logits) + gan_fake(logits)) / 2) == pytest.approx(math.log(2))
    assert float(gan_generator(logits)) == pytest.approx(math.log(2))
    assert float(gan_real(logits, "lsgan")) == pytest.approx(0.25)
    assert float(gan_fake(logits, "hinge")) == pytest.approx(1)


def test_feature_matching_sums_means_over_layers() -> None:
    real = [torch.rand(2, 4, 8, 8), torch.rand(2, 1, 3, 3)]
    assert float(feature_matching(real, real)) == 0
    assert float(feature_matching([r + 0.5 for r in real], real)) == pytest.approx(1.0)


def test_feature_matching_of_equal_edges_is_zero_in_training_mode(batch) -> None:
    """Real and generated edges pass through D1 with the same spectrally normalised weights."""
    model = build()
    phase = model.phase("edge")
    model.set_phase(phase)
    losses = model.generator_losses(batch, {"edge": batch["edge"].clone()}, phase)
    assert float(losses["FM"]) == 0


@pytest.mark.parametrize("fraction", [0.25, 0.5])
def test_l1_is_divided_by_the_hole_area(fraction) -> None:
    truth = torch.rand(2, 3, 8, 8)
    assert float(l1_over_hole(truth + 0.1, truth, torch.tensor(fraction))) == pytest.approx(
        0.1 / fraction, rel=1e-5
    )
    assert math.isfinite(float(l1_over_hole(truth + 0.1, truth, torch.tensor(0.0))))


def test_l1_uses_the_global_mask_mean_if_given(batch) -> None:
    """Two ranks with 3 and 5 photographs and unequal holes: the weighted mean of their losses is the whole batch's."""
    model = build()
    phase = model.phase("inpaint")
    mask = batch["mask"].clone()
    mask[:3, :, 8:16] = 0
    batch = {**batch, "mask": mask}
    out = {"image": torch.rand_like(batch["image"])}
    full = model.generator_losses(batch, out, phase)["l1"]
    rank_losses = [
        model.generator_losses(
            {**{k: v[samples] for k, v in batch.items()}, "mask_mean": mask.mean()},
            {"image": out["image"][samples]},
            phase,
        )["l1"]
        for samples in (slice(0, 3), slice(3, 8))
    ]
    torch.testing.assert_close(3 / 8 * rank_losses[0] + 5 / 8 * rank_losses[1], full)


def test_the_gram_matrix_of_a_constant_is_its_square_over_the_channels() -> None:
    torch.testing.assert_close(gram_matrix(torch.full((2, 5, 6, 7), 3.0)), torch.full((2, 5, 5), 9 / 5))
    a = {"x": torch.rand(1, 4, 5, 5)}
    order = torch.randperm(25)
    shuffled = {"x": a["x"].flatten(2)[:, :, order].view(1, 4, 5, 5)}
    assert float(style_loss(shuffled, a)) == pytest.approx(
        0, abs=1e-6
    )  # the positions of features do not matter


def test_style_depends_on_the_hole_only_and_perceptual_on_the_whole_image(batch) -> None:
    model = build()
    phase = model.phase("inpaint")
    image, mask = batch["image"], batch["mask"]

    def losses(fake: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return model.generator_losses({**batch, "mask": mask}, {"image": fake}, phase)

    outside = image + 0.3 * (1 - mask)
    assert float(losses(outside, mask)["s"]) == 0
    assert float(losses(outside, mask)["p"]) > 0
    assert float(losses(image + 0.3 * mask, mask)["s"]) > 0
    assert float(losses(image + 0.3, torch.zeros_like(mask))["s"]) == 0
    assert float(losses(image, mask)["p"]) == 0


def test_loss_weights_and_learning_rates_are_the_released_ones() -> None:
    model = build_model("edge_connect", width=0.05)
    assert model.weights(model.phase("edge")) == {"D1": 1, "adv1": 1, "FM": 10}
    assert model.weights(model.phase("inpaint")) == {"D2": 1, "l1": 1, "adv2": 0.1, "p": 0.1, "s": 250}
    assert [p.name for p in model.phases] == ["edge", "inpaint_canny", "inpaint", "joint"]
    assert model.phase("edge").lr == pytest.approx({G1: 1e-4, D1: 1e-5})
    assert model.phase("joint").lr == pytest.approx({G1: 1e-6, D1: 1e-7, G2: 1e-6, D2: 1e-7})
    assert all(p.betas == (0, 0.9) and p.uses_edges for p in model.phases)


@pytest.mark.parametrize("gan", ["nsgan", "lsgan", "hinge"])
def test_every_gan_kind_can_be_trained(gan, batch, training) -> None:
    model = build(gan=gan, lambda_p=0, lambda_s=0)
    trainer = training.Trainer(model, model.phase("joint"))
    assert all(v.isfinite() for v in trainer.step(batch).values())


# -- phases ----------------------------------------------------------------------------------------------------


def test_g2_gets_true_edges_first_and_generated_ones_in_later_phases(batch) -> None:
    model = build().eval()
    g1, g2, mask, edge = model.networks[G1], model.networks[G2], batch["mask"], batch["edge"]
    with torch.no_grad():
        generated = g1(rgb_to_gray(batch["image"]), edge, mask)
        composite = torch.where(mask > 0, generated, edge)
        expected = {"inpaint_canny": edge, "inpaint": composite, "joint": composite}
        for name, edges in expected.items():
            out = model.generate(batch, model.phase(name))
            torch.testing.assert_close(out["image"], g2(batch["image"], edges, mask), msg=name)


def test_g1_learns_from_g2s_losses_in_the_joint_phase_only(batch) -> None:
    model = build()
    for name in ("inpaint", "joint"):
        phase = model.phase(name)
        model.set_phase(phase)
        model.zero_grad()
        model.generate(batch, phase)["image"].sum().backward()
        gradients = [p.grad for p in model.networks[G1].parameters()]
        assert all((g is not None) == (name == "joint") for g in gradients)


def test_the_joint_phases_gradient_is_the_sum_of_both_losses_gradients(batch) -> None:
    """docs/papers.md 0.3: the released code frees G1's graph before G1's own loss needs it."""
    model = build(lambda_p=0, lambda_s=0)
    phase = model.phase("joint")
    model.set_phase(phase)
    model.networks.eval()  # no power iteration between the passes
    weights, g1 = model.weights(phase), [*model.networks[G1].parameters()]

    def gradient(*terms: str) -> list[Tensor]:
        losses = model.generator_losses(batch, model.generate(batch, phase), phase)
        return list(torch.autograd.grad(torch.stack([weights[t] * losses[t] for t in terms]).sum(), g1))

    both, edges, image = gradient("adv1", "FM", "l1", "adv2"), gradient("adv1", "FM"), gradient("l1", "adv2")
    for b, e, i in zip(both, edges, image, strict=True):
        torch.testing.assert_close(b, e + i, atol=1e-6, rtol=1e-3)


def test_joint_without_d1_trains_g1_with_g2s_losses_only() -> None:
    phase = build(joint_without_d1=True).phase("joint")
    assert phase.discriminators == (D2,)
    assert phase.generators == (G1, G2)
    assert build(joint_without_d1=True).weights(phase).keys() == {"D2", "l1", "adv2", "p", "s"}


def test_no_network_runs_more_often_than_needed(batch, training) -> None:
    """D(real) and D(fake) for D; for G, D(fake), and D(real) for feature matching; two passes per feature loss."""
    model = build()
    calls: list[str] = []
    for name, network in [*model.networks.items(), ("phi", model.feature_stack())]:
        network.register_forward_hook(lambda *_, name=name: calls.append(name))
    expected = {
        "edge": {G1: 1, D1: 4},
        "inpaint_canny": {G2: 1, D2: 3, "phi": 4},
        "inpaint": {G1: 1, G2: 1, D2: 3, "phi": 4},
        "joint": {G1: 1, D1: 4, G2: 1, D2: 3, "phi": 4},
    }
    for phase in model.phases:
        trainer = training.Trainer(model, phase)
        calls.clear()
        trainer.step(batch)
        assert {name: calls.count(name) for name in calls} == expected[phase.name]


def test_with_true_edges_or_without_edges_there_is_only_g2(batch, training) -> None:
    for edge_input, phase, channels in (("canny", "inpaint_canny", 4), ("none", "inpaint", 3)):
        model = build(edge_input=edge_input, lambda_p=0, lambda_s=0)
        assert [*model.networks] == [G2, D2]
        assert [p.name for p in model.phases] == [phase]
        assert model.networks[G2].body[1].in_channels == channels
        losses = training.Trainer(model, model.phases[0]).step(batch)
        assert losses.keys() == {"D2", "l1", "adv2"}
    with torch.device("meta"):
        without = build_model("edge_connect", edge_input="none").networks[G2]
    assert count_parameters(without) == 10_774_595 - 64 * 49  # the first layer's weights for the edge channel


def test_completion_passes_true_edges_to_g2_or_needs_none(batch) -> None:
    image, mask, edge = batch["image"], batch["mask"], batch["edge"]
    canny, none = build(edge_input="canny").eval(), build(edge_input="none").eval()
    with torch.no_grad():
        expected = canny.networks[G2](image, edge, mask)
    completed = canny.complete(image, mask, edge)
    torch.testing.assert_close(completed[:, :, 8:24, 8:24], expected[:, :, 8:24, 8:24])
    with pytest.raises(ValueError, match="needs edges"):
        canny.complete(image, mask)
    assert torch.equal(none.complete(image, mask), none.complete(image, mask, edge))
    assert none.generate({**batch, "edge": None}, none.phases[0])["image"].shape == image.shape


# -- completion ------------------------------------------------------------------------------------------------


def test_user_drawn_edges_replace_g1s_in_their_photograph_only() -> None:
    model = build().eval()
    image, mask, edge = torch.rand(2, 3, 32, 32), torch.zeros(2, 1, 32, 32), torch.zeros(2, 1, 32, 32)
    mask[:, :, 8:24, 8:24] = 1
    edge[:, :, 2, :] = 1
    generated = model.complete(image, mask, edge)
    user_edges = edge.clone()
    user_edges[1, :, 12:16, 12] = 1
    completed = model.complete(image, mask, user_edges)
    assert torch.equal(completed[0], generated[0])
    with torch.no_grad():
        expected = model.networks[G2](image, user_edges, mask)
    torch.testing.assert_close(completed[1, :, 8:24, 8:24], expected[1, :, 8:24, 8:24])


def test_the_error_for_missing_edges_names_load_model() -> None:
    with pytest.raises(ValueError, match="load_model"):
        build().complete(torch.rand(1, 3, 32, 32), torch.zeros(1, 1, 32, 32))


def test_training_without_edges_is_refused(batch) -> None:
    model = build()
    with pytest.raises(ValueError, match="phase edge needs edges"):
        model.generate({**batch, "edge": None}, model.phase("edge"))


# -- features --------------------------------------------------------------------------------------------------


def test_missing_weights_are_reported_before_training_starts() -> None:
    model = build_model("edge_connect", width=0.05)
    model.set_phase(model.phase("edge"))  # needs none
    for name in ("inpaint_canny", "inpaint", "joint"):
        with pytest.raises(FileNotFoundError, match="vgg19 needs a weights file"):
            model.load_loss_networks(model.phase(name))
    without = build_model("edge_connect", width=0.05, lambda_p=0, lambda_s=0)
    without.load_loss_networks(without.phase("inpaint"))


def test_the_default_feature_layers_exist_and_others_can_be_chosen(batch) -> None:
    model = build(
        features={"name": "efficientnet_lite0", "perceptual": ["stage1"], "style": ["stem"]}, lambda_s=0
    )
    stack = model.feature_stack()
    assert {
        *PERCEPTUAL_LAYERS["efficientnet_lite0"],
        *STYLE_LAYERS["efficientnet_lite0"],
    } <= stack.layer_channels.keys()
    fake = batch["image"].flip(0)
    losses = model.generator_losses(batch, {"image": fake}, model.phase("inpaint"))
    expected = F.l1_loss(stack(fake, ["stage1"])["stage1"], stack(batch["image"], ["stage1"])["stage1"])
    torch.testing.assert_close(losses["p"], expected)
    assert "s" not in losses


@pytest.mark.parametrize(
    "options",
    [
        {"edge_input": "sobel"},
        {"gan": "wgan"},
        {"features": "vgg16"},
        {"features": {"name": "vgg19", "wieghts": "x"}},
        {"lr_drop_at": 0},
        {"width": 0},
        {"residual_blocks": -1},
    ],
)
def test_options_out_of_range_are_refused(options) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        build_model("edge_connect", **options)
