"""Partial convolutions: docs/papers.md 0.4 and 6, the U-Net's masks, losses, phases. The layer: test_layers.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import build_model
from models.features import VGG_CHANNELS, VGG_CONVS_PER_LEVEL
from models.layers import PartialConv2d
from models.losses import dilate, gram_matrix, masked_l1, total_variation
from models.partial_conv import FEATURE_LAYERS, Generator, PartialConv
from support.public_networks import total_variation as port_total_variation

PIXEL_LOSSES_ONLY = {"lambda_perceptual": 0, "lambda_style": 0}  # no feature stack


def build(**options: Any) -> PartialConv:
    small = {"levels": 3, "width": 0.125, "features": "efficientnet_lite0"}
    model = build_model("partial_conv", **{**small, **options})
    assert isinstance(model, PartialConv)
    return model


def square_mask(size: int = 32, low: int = 8, high: int = 24) -> Tensor:
    mask = torch.zeros(2, 1, size, size)
    mask[:, :, low:high, low:high] = 1
    return mask


# -- the U-Net -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("levels", "parameters"), [(8, 32_859_732), (7, 25_779_796)])
def test_parameter_counts_are_the_papers(levels, parameters) -> None:
    with torch.device("meta"):
        model, default = build_model("partial_conv", levels=levels), build_model("partial_conv")
    assert sum(p.numel() for p in model.networks["generator"].parameters()) == parameters
    assert model.size_multiple == 2**levels
    assert default.size_multiple == 256  # 8 levels


def test_layers_are_the_papers_for_512_pixels() -> None:
    with torch.device("meta"):
        generator = Generator(8, 1.0)
    convs = [m for m in generator.modules() if isinstance(m, PartialConv2d)]
    down, up = convs[:8], convs[8:]
    assert [c.out_channels for c in down] == [64, 128, 256, 512, 512, 512, 512, 512]
    assert [c.kernel_size[0] for c in down] == [7, 5, 5, 3, 3, 3, 3, 3]
    assert [c.in_channels for c in up] == [1024, 1024, 1024, 1024, 768, 384, 192, 67]
    assert [c.out_channels for c in up] == [512, 512, 512, 512, 256, 128, 64, 3]
    assert {c.stride for c in down} == {(2, 2)}
    assert {(c.kernel_size, c.stride) for c in up} == {((3, 3), (1, 1))}
    assert [c.bias is not None for c in convs] == [False] * 15 + [True]
    blocks = [*generator.encoder, *generator.decoder]
    assert [isinstance(b.norm, nn.BatchNorm2d) for b in blocks] == [False] + [True] * 14 + [False]
    slopes = [getattr(b.activation, "negative_slope", None) for b in blocks]
    assert slopes == [0.0] * 8 + [0.2] * 7 + [None]


def test_initialisation_is_that_of_he_et_al() -> None:
    generator = Generator(5, 0.5)
    for block, slope in [*((b, 0.0) for b in generator.encoder), *((b, 0.2) for b in generator.decoder[:-1])]:
        weight = block.conv.weight
        expected = math.sqrt(2 / (1 + slope**2) / weight[0].numel())
        assert float(weight.detach().std()) == pytest.approx(expected, rel=0.05)


def test_each_resolution_is_halved_and_doubled_with_its_mask() -> None:
    generator = Generator(4, 0.1)
    calls: list[tuple[Any, ...]] = []
    for block in (*generator.encoder, *generator.decoder):
        block.register_forward_hook(lambda _m, inputs, out: calls.append((*inputs, out)))
    image, valid = torch.rand(2, 3, 32, 32), 1 - square_mask()
    assert generator(image, valid).shape == image.shape
    assert [entry[-1][0].shape[-1] for entry in calls] == [16, 8, 4, 2, 4, 8, 16, 32]
    for *_, (features, mask) in calls:
        assert mask.shape == (2, 1, *features.shape[2:])
        assert set(mask.unique().tolist()) <= {0.0, 1.0}
    x, mask, (skip, skip_mask), _ = calls[-1]
    assert skip is image  # the last skip: the image and its mask
    assert skip_mask is valid
    below, below_mask = calls[-2][-1]  # nearest: each pixel four times
    assert torch.equal(x, below.repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert torch.equal(mask, below_mask.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_the_holes_contents_influence_neither_outputs_nor_gradients() -> None:
    generator, valid, image = Generator(3, 0.1), 1 - square_mask(), torch.rand(2, 3, 32, 32)
    results = []
    for contents in (0.0, 1.0, torch.nan):
        generator.zero_grad()
        y = generator(torch.where(valid > 0, image, contents), valid)
        y.sum().backward()
        results.append([y, *(p.grad.clone() for p in generator.parameters())])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
    assert all(t.isfinite().all() for t in results[0])


def test_a_photograph_that_is_all_hole_becomes_the_mean_colour() -> None:
    model = build()
    nn.init.ones_(model.networks["generator"].decoder[-1].conv.bias)  # the bias is suppressed too
    completed = model.complete(torch.full((1, 3, 32, 32), torch.nan), torch.ones(1, 1, 32, 32))
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    torch.testing.assert_close(completed, mean.expand_as(completed))


def test_normalization_is_imagenets_or_symmetric() -> None:
    image, model = torch.rand(2, 3, 8, 8), build()
    normalized = model.normalizer.normalize(image)
    torch.testing.assert_close(normalized[:, 0], (image[:, 0] - 0.485) / 0.229)
    torch.testing.assert_close(model.normalizer.denormalize(normalized), image)
    symmetric = build(normalization="symmetric").normalizer
    torch.testing.assert_close(symmetric.normalize(image), image * 2 - 1)


# -- losses ----------------------------------------------------------------------------------------------------


def test_hole_and_valid_are_means_over_all_pixels() -> None:
    truth, mask = torch.rand(2, 3, 32, 32), square_mask()  # a quarter of the image
    assert float(masked_l1(truth + 0.2, truth, mask)) == pytest.approx(0.05, rel=1e-4)
    assert float(masked_l1(truth + 0.2, truth, 1 - mask)) == pytest.approx(0.15, rel=1e-4)
    assert float(masked_l1(truth + 0.2 * (1 - mask), truth, mask)) == 0


def test_total_variation_counts_pairs_inside_the_region() -> None:
    step = torch.zeros(2, 3, 32, 32)
    step[..., 16:] = 0.5  # one column of 32 pairs
    region = dilate(square_mask())
    assert torch.equal(region, square_mask(low=7, high=25))
    assert float(total_variation(step, region)) == pytest.approx(18 * 0.5 / 32**2)
    at_its_border = torch.zeros(2, 3, 32, 32)
    at_its_border[..., 7:] = 0.5  # between the region and the pixels outside
    assert float(total_variation(at_its_border, region)) == 0
    at_its_border[..., 7] = 0
    assert float(total_variation(at_its_border, region)) > 0  # between the hole and its neighbours
    assert float(total_variation(torch.full((1, 3, 8, 8), 0.3))) == 0


def test_total_variation_everywhere_is_the_mean_over_the_pairs() -> None:
    """As in naoto0804's code: S x S px have S (S - 1) horizontal and as many vertical pairs."""
    step = torch.zeros(2, 3, 32, 32)
    step[..., 16:] = 0.5  # one column of 32 pairs
    assert float(total_variation(step)) == pytest.approx(32 * 0.5 / (32 * 31))
    assert float(total_variation(step.mT)) == pytest.approx(32 * 0.5 / (32 * 31))
    for size in ((7, 7), (5, 9)):
        image = torch.rand(2, 3, *size, dtype=torch.double)
        assert float(total_variation(image)) == pytest.approx(float(port_total_variation(image)), rel=1e-12)


def losses_of(model: PartialConv, image: Tensor, output: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Generator losses of an output in [0,1]."""
    out = {"output": model.normalizer.normalize(output)}
    return model.generator_losses({"image": image, "mask": mask}, out, model.phases[0])


def test_losses_compare_the_output_and_its_composite_with_the_photograph() -> None:
    model, mask = build(), square_mask()
    image, other = torch.rand(2, 2, 3, 32, 32)
    everywhere, nowhere = torch.ones_like(mask), torch.zeros_like(mask)
    losses = losses_of(model, image, other, mask)
    assert all(float(value) > 0 for value in losses.values())
    same = losses_of(model, image, image, mask)
    assert all(float(same[name]) < 1e-3 * float(losses[name]) for name in same.keys() - {"tv"})
    full = losses_of(model, image, other, everywhere)
    assert float(full["valid"]) == 0
    torch.testing.assert_close(full["style_comp"], full["style_out"])  # the composite is the output
    none = losses_of(model, image, other, nowhere)
    assert float(none["hole"]) == float(none["tv"]) == 0
    assert float(none["style_comp"]) == 0  # the composite is the photograph
    torch.testing.assert_close(none["perceptual"], full["perceptual"] / 2)  # the composite's part is 0
    torch.testing.assert_close(none["style_out"], losses["style_out"])
    outside = losses_of(model, image, torch.where(mask > 0, image, other), mask)
    assert float(outside["hole"]) < 1e-6
    assert float(outside["style_comp"]) < 1e-3 * float(outside["style_out"])


def test_feature_losses_equal_their_formulas() -> None:
    model, mask = build(), square_mask()
    image, other = torch.rand(2, 2, 3, 32, 32)
    losses = losses_of(model, image, other, mask)
    stack, layers = model.feature_stack(), FEATURE_LAYERS["efficientnet_lite0"]
    gt, out, comp = (stack(x, layers) for x in (image, other, torch.where(mask > 0, other, image)))
    distance = sum(F.l1_loss(x[n], gt[n]) for x in (out, comp) for n in layers)
    torch.testing.assert_close(losses["perceptual"], distance, rtol=1e-4, atol=0)
    for name, x in (("style_out", out), ("style_comp", comp)):
        expected = sum(F.l1_loss(gram_matrix(x[n]), gram_matrix(gt[n])) for n in layers)
        torch.testing.assert_close(losses[name], expected, rtol=1e-3, atol=0)


def test_pixel_losses_are_of_normalised_images_and_tv_has_two_regions() -> None:
    image, mask = torch.rand(2, 3, 32, 32), square_mask()
    symmetric, imagenet = (
        losses_of(build(normalization=r, **PIXEL_LOSSES_ONLY), image, image + 0.1, mask)
        for r in ("symmetric", "imagenet")
    )
    assert float(symmetric["hole"]) == pytest.approx(0.25 * 0.2, rel=1e-4)
    scale = sum(1 / s for s in (0.229, 0.224, 0.225)) / 3
    assert float(imagenet["hole"]) == pytest.approx(0.25 * 0.1 * scale, rel=1e-4)
    everywhere = losses_of(
        build(normalization="symmetric", tv_region="whole", **PIXEL_LOSSES_ONLY), image, image, mask
    )["tv"]
    torch.testing.assert_close(everywhere.double(), port_total_variation(image * 2 - 1), rtol=1e-5, atol=0)
    assert everywhere > symmetric["tv"]


def test_losses_of_two_half_batches_average_to_the_whole_batchs(batch) -> None:
    model = build()
    mask = batch["mask"].clone()
    mask[:4, :, 8:16] = 0
    image, other = batch["image"], batch["image"].flip(0)
    full = losses_of(model, image, other, mask)
    halves = [
        losses_of(model, *(x[samples] for x in (image, other, mask))) for samples in (slice(4), slice(4, 8))
    ]
    for name, value in full.items():
        torch.testing.assert_close((halves[0][name] + halves[1][name]) / 2, value, msg=name)


def test_each_image_passes_through_the_feature_stack_once(batch, training) -> None:
    """Photograph, output and composite; the photograph without a graph."""
    model, images, graphs = build(), [], []
    model.feature_stack().register_forward_pre_hook(lambda _m, inputs: images.append(inputs[0]))
    model.feature_stack().register_forward_hook(
        lambda _m, _i, out: graphs.append(out["stage3"].requires_grad)
    )
    training.Trainer(model, model.phases[0]).step(batch)
    assert graphs == [False, True, True]
    assert images[0] is batch["image"]


def test_loss_weights_are_the_papers() -> None:
    with torch.device("meta"):
        model = build_model("partial_conv")
    expected = {
        "valid": 1,
        "hole": 6,
        "perceptual": 0.05,
        "style_out": 120,
        "style_comp": 120,
        "tv": 0.1,
    }
    assert all(model.weights(phase) == expected for phase in model.phases)


def test_losses_of_weight_0_are_omitted_and_the_feature_stack_is_not_loaded(batch) -> None:
    assert build(lambda_style=0).weights(build().phases[0]).keys() == {"valid", "hole", "tv", "perceptual"}
    model = build(features="vgg16", **PIXEL_LOSSES_ONLY)
    for phase in model.phases:
        model.set_phase(phase)  # needs no weights file
        losses = model.generator_losses(batch, model.generate(batch, phase), phase)
        assert losses.keys() == {"valid", "hole", "tv"}


def test_vgg16_is_the_papers_stack_and_missing_weights_are_reported(batch, tmp_path) -> None:
    model = build(features="vgg16")
    with pytest.raises(FileNotFoundError, match="vgg16 needs a weights file: download https"):
        model.load_loss_networks(model.phases[0])
    state, index, c_in = {}, 0, 3
    for channels, count in zip(VGG_CHANNELS, VGG_CONVS_PER_LEVEL["vgg16"]):
        for _ in range(count):
            state[f"features.{index}.weight"] = torch.randn(channels, c_in, 3, 3) * (2 / c_in / 9) ** 0.5
            state[f"features.{index}.bias"] = torch.zeros(channels)
            index, c_in = index + 2, channels
        index += 1
    torch.save(state, tmp_path / "vgg16.pth")
    model = build(features={"name": "vgg16", "weights": str(tmp_path / "vgg16.pth")})
    image, mask = batch["image"][:2], batch["mask"][:2]
    features = model.feature_stack()(image, FEATURE_LAYERS["vgg16"])
    assert [tuple(f.shape[1:]) for f in features.values()] == [(64, 16, 16), (128, 8, 8), (256, 4, 4)]
    assert all(float(value) > 0 for value in losses_of(model, image, image.flip(0), mask).values())


# -- phases ----------------------------------------------------------------------------------------------------


def test_two_phases_and_their_learning_rates() -> None:
    train, finetune = build().phases
    assert (train.name, finetune.name) == ("train", "finetune")
    assert (train.lr, finetune.lr) == ({"generator": 2e-4}, {"generator": 5e-5})
    assert not train.discriminators
    assert not finetune.discriminators


def test_fine_tuning_freezes_only_the_encoders_batch_norm(batch, training) -> None:
    model = build()
    generator = model.networks["generator"]
    norms = {
        part: [key for key in generator.state_dict() if key.startswith(part) and ".norm." in key]
        for part in ("encoder", "decoder")
    }
    assert len(norms["encoder"]) == len(norms["decoder"]) == 2 * 5
    for phase in model.phases:
        trainer = training.Trainer(model, phase)
        before = {key: value.clone() for key, value in generator.state_dict().items()}
        trainer.step(batch)
        changed = {
            key for key, value in generator.state_dict().items() if not torch.equal(value, before[key])
        }
        frozen = norms["encoder"] if phase.name == "finetune" else []
        assert changed == before.keys() - set(frozen), phase.name


def test_wrong_training_sizes_are_refused(batch) -> None:
    model = build(levels=5)
    phase = model.phases[0]
    model.set_phase(phase)
    with pytest.raises(ValueError, match="with 6 levels trains on multiples of 64 px, not 32x32"):
        build(levels=6).generate(batch, phase)
    one = {key: batch[key][:1] for key in ("image", "mask")}
    with pytest.raises(ValueError, match="at least 2 photographs of 32x32 px"):
        model.generate(one, phase)
    model.generate({key: value.repeat(1, 1, 1, 2) for key, value in one.items()}, phase)
    model.networks.eval()
    model.generate(one, phase)


def test_works_in_double_precision(batch) -> None:
    model = build(**PIXEL_LOSSES_ONLY).double()
    doubles = {key: batch[key].double() for key in ("image", "mask")}
    losses = model.generator_losses(doubles, model.generate(doubles, model.phases[0]), model.phases[0])
    assert {value.dtype for value in losses.values()} == {torch.float64}


# -- completion ------------------------------------------------------------------------------------------------


def test_padding_counts_as_hole() -> None:
    """21 x 40 px are completed like 24 x 40 px with three more rows of hole, whatever their contents."""
    model, image = build(), torch.rand(2, 3, 21, 40)
    mask = torch.zeros(2, 1, 21, 40)
    mask[:, :, 5:15, 9:20] = 1
    padded = torch.cat([model.normalizer.normalize(image), torch.full((2, 3, 3, 40), torch.nan)], dim=2)
    valid = torch.cat([1 - mask, torch.zeros(2, 1, 3, 40)], dim=2)
    model.networks.eval()
    with torch.no_grad():
        output = model.networks["generator"](padded, valid)
    expected = model.normalizer.denormalize(output)[:, :, :21].clamp(0, 1)
    completed = model.complete(image, mask)
    torch.testing.assert_close(completed[:, :, 5:15, 9:20], expected[:, :, 5:15, 9:20])


@pytest.mark.slow
def test_seven_levels_can_be_exported_for_any_size() -> None:
    completion = build(levels=7, width=0.02, **PIXEL_LOSSES_ONLY).frozen_completion()
    dynamic = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    x = torch.rand(2, 5, 61, 91)
    exported = torch.export.export(completion, (x,), dynamic_shapes=(dynamic,)).module()
    for size in ((2, 61, 91), (1, 33, 300)):
        x = torch.rand(size[0], 5, *size[1:])
        torch.testing.assert_close(exported(x), completion(x), atol=1e-5, rtol=0)


# -- options ---------------------------------------------------------------------------------------------------


def test_the_default_feature_layers_exist_and_others_can_be_chosen() -> None:
    model = build(features={"name": "efficientnet_lite0", "layers": ["stem"]}, lambda_style=0)
    stack = model.feature_stack()
    assert set(FEATURE_LAYERS["efficientnet_lite0"]) <= stack.layer_channels.keys()
    image, other = torch.rand(2, 2, 3, 32, 32)
    losses = losses_of(model, image, other, torch.zeros(2, 1, 32, 32))
    expected = F.l1_loss(stack(other, ["stem"])["stem"], stack(image, ["stem"])["stem"])
    torch.testing.assert_close(losses["perceptual"], expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"levels": 2},
        {"levels": 13},
        {"width": 0},
        {"normalization": "tanh"},
        {"tv_region": "hole"},
        {"features": "vgg13"},
        {"features": {"name": "vgg16", "wieghts": "x"}},
    ],
)
def test_options_out_of_range_are_refused(options) -> None:
    with pytest.raises(ValueError, match=f"partial_conv {next(iter(options))}"):
        build_model("partial_conv", **options)
