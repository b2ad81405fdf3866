"""LPIPS, FID, KID, P-IDS and U-IDS: by hand, against other implementations, and in evaluations with random weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.optimize import minimize
from skimage.data import astronaut

from models.metric_networks import load_lpips
from pipelines.cli.features_option import feature_weights
from pipelines.evaluation.distances import frechet_distance, kernel_distance
from pipelines.evaluation.evaluate import evaluate
from pipelines.evaluation.feature_scores import (
    FeatureScorer,
    inception_discriminative_scores,
    inception_scores,
    min_photographs,
)
from pipelines.evaluation.metrics import INCEPTION_METRICS, METRIC_DEFINITIONS, higher_is_better
from pipelines.evaluation.results import EvaluationResult
from pipelines.evaluation.tables import feature_tables, table_markdown, table_text
from pipelines.recipe import EvaluationConfig, FeatureWeights
from pipelines.recipe.load import RecipeError, parse_recipe
from pipelines.run_report import ReportData, report_html
from support.metric_weights import write_alexnet, write_inception, write_vgg16

SIDE = 64


class Grey:
    """Fills the hole with grey."""

    sigma = None

    def __call__(self, image, mask, edge):
        return np.where(mask[..., None] != 0, np.uint8(128), image)


class Exact:
    """Returns the photographs."""

    sigma = None

    def __init__(self, photos) -> None:
        self.photos = [image for _, image in photos]

    def __call__(self, image, mask, edge):
        return next(p for p in self.photos if (p[mask == 0] == image[mask == 0]).all()).copy()


class Refuses:
    sigma = None

    def __call__(self, image, mask, edge):
        raise ValueError("the hole is too large")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("weights")
    files = {name: folder / f"{name}.pth" for name in ("alexnet", "vgg16", "inception")}
    write_alexnet(files["alexnet"])
    write_vgg16(files["vgg16"])
    write_inception(files["inception"])
    return files


@pytest.fixture(scope="module")
def photos() -> list[tuple[str, np.ndarray]]:
    picture = astronaut()
    corners = [(y, x) for y in range(0, 256, 64) for x in range(0, 256, 64)]
    return [(f"tile-{y}-{x}", picture[y : y + SIDE, x : x + SIDE].copy()) for y, x in corners]


def config(files: dict[str, Path], *networks: str, **fields) -> EvaluationConfig:
    features = FeatureWeights.model_validate({name: str(files[name]) for name in networks})
    return EvaluationConfig(**{"distance": None, "grid_rows": 0, "features": features, **fields})


def samples(n: int, dimensions: int, shift: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(n)
    real = rng.normal(size=(n, dimensions)).astype(np.float32)
    return real, (0.8 * real + rng.normal(shift, 0.7, size=(n, dimensions))).astype(np.float32)


# -- P-IDS and U-IDS ------------------------------------------------------------------------------------------


def test_inception_discriminative_scores_by_hand() -> None:
    """On one axis the boundary is at 0 by symmetry: one photograph and one filled picture lie on the wrong side."""
    real = np.array([[1.0], [1], [1], [1], [-1]])
    fake = -real
    assert inception_discriminative_scores(real, fake) == (
        20.0,
        20.0,
    )  # only in the last pair fake is above real
    other_pairs = fake[[4, 0, 1, 2, 3]]  # the filled picture at 1 now belongs to a photograph at 1
    assert inception_discriminative_scores(real, other_pairs) == (0.0, 20.0)


def test_inception_discriminative_scores_against_another_solver() -> None:
    """The SVM's optimum: |w|^2 / 2 + sum of squared hinges, with the constant as a regularised weight."""
    real, fake = samples(60, 4)
    x = np.c_[np.concatenate([real, fake]).astype(float), np.ones(120)]
    y = np.repeat([1.0, -1.0], 60)

    def objective(w: np.ndarray) -> tuple[float, np.ndarray]:
        slack = np.maximum(0, 1 - y * (x @ w))
        return w @ w / 2 + slack @ slack, w - 2 * x.T @ (y * slack)

    values = x @ minimize(objective, np.zeros(5), jac=True, tol=1e-12).x
    p_ids = 100 * np.mean(values[60:] > values[:60])
    u_ids = 100 * np.mean(values * y <= 0)
    assert 0 < p_ids < 50 < 100 - u_ids
    assert inception_discriminative_scores(real, fake) == pytest.approx((p_ids, u_ids))


def test_pictures_that_the_svm_cannot_tell_apart_score_half() -> None:
    real, _ = samples(50, 3)
    p_ids, u_ids = inception_discriminative_scores(real, real)
    assert (p_ids, u_ids) == (0.0, 50.0)  # P-IDS counts what is above, not what is equal
    with pytest.raises(ValueError, match="are no pairs"):
        inception_discriminative_scores(real, real[:40])
    with pytest.raises(ValueError, match="not finite"):
        inception_discriminative_scores(real, np.full_like(real, np.nan))


# -- FID and KID ----------------------------------------------------------------------------------------------


class FirstPixels(torch.nn.Module):
    """Six numbers per picture, as a stand-in for Inception in torchmetrics."""

    num_features = 6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :, 0, :2].flatten(1).float() / 50


def test_fid_and_kid_agree_with_torchmetrics_and_scipy() -> None:
    fid_module = pytest.importorskip("torchmetrics.image.fid")
    kid_module = pytest.importorskip("torchmetrics.image.kid")
    rng = np.random.default_rng(0)
    real, fake = rng.integers(0, 200, (40, 3, 8, 8)), rng.integers(40, 256, (40, 3, 8, 8))
    network = FirstPixels()
    a, b = (torch.from_numpy(x.astype(np.uint8)) for x in (real, fake))
    fid = fid_module.FrechetInceptionDistance(feature=network, input_img_size=(3, 8, 8)).set_dtype(
        torch.float64
    )
    kid = kid_module.KernelInceptionDistance(feature=network, subsets=2, subset_size=40)
    for metric in (fid, kid):
        metric.update(a, real=True)
        metric.update(b, real=False)
    x, y = (network(t).numpy() for t in (a, b))
    assert frechet_distance(x, y) == pytest.approx(float(fid.compute()), rel=1e-5)
    means, covariances = [v.mean(0) for v in (x, y)], [np.cov(v, rowvar=False) for v in (x, y)]
    expected = np.sum((means[0] - means[1]) ** 2) + np.trace(
        covariances[0] + covariances[1] - 2 * sqrtm(covariances[0] @ covariances[1]).real
    )
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-6)
    # all photographs in every subset: no chance is left
    assert kernel_distance(x, y, subset_size=40)[0] == pytest.approx(float(kid.compute()[0]), rel=1e-4)


def test_scores_of_a_set_are_the_formulas_on_its_features() -> None:
    real, fake = samples(130, 5)
    scores = inception_scores(real, fake)
    assert scores["fid"] == frechet_distance(real, fake)
    assert (scores["kid_inception"], scores["kid_inception_std"]) == kernel_distance(real, fake)
    assert (scores["p_ids_percent"], scores["u_ids_percent"]) == inception_discriminative_scores(real, fake)
    assert (scores["n"], scores["reasons"]) == (130, {})
    assert inception_scores(real, None)["reasons"] == dict.fromkeys(
        INCEPTION_METRICS, "not every photograph was completed"
    )


@pytest.mark.parametrize("n", [1, 2, 10])
def test_too_few_photographs_have_a_reason_instead_of_a_number(n: int) -> None:
    rng = np.random.default_rng(0)
    scores = inception_scores(*rng.normal(size=(2, n, 2048)).astype(np.float32))
    are = "photograph is" if n == 1 else "photographs are"
    least = {"fid": 2049, "kid_inception": 100, "p_ids_percent": 1025, "u_ids_percent": 1025}
    assert scores["reasons"] == {m: f"{n} {are} too few (at least {least[m]})" for m in INCEPTION_METRICS}
    assert set(scores) == {"n", "reasons"}


@pytest.mark.parametrize("metric", INCEPTION_METRICS)
def test_the_smallest_sets_that_have_a_score(metric: str) -> None:
    dimensions = 60
    least = min_photographs(metric, dimensions)
    assert metric in inception_scores(*samples(least, dimensions))
    assert metric in inception_scores(*samples(least - 1, dimensions))["reasons"]


def test_fewer_photographs_than_that_are_separated_whatever_they_show() -> None:
    """Why P-IDS and U-IDS need more: random points of both kinds, which nothing distinguishes."""
    rng = np.random.default_rng(0)
    x = 100 * rng.normal(size=(2 * 30, 60))
    augmented = np.c_[x, np.ones(60)]
    w = np.linalg.lstsq(augmented, np.repeat([1.0, -1.0], 30), rcond=None)[0]
    assert (np.sign(augmented @ w) == np.repeat([1, -1], 30)).all()
    assert min_photographs("u_ids_percent", 60) == 31


# -- in an evaluation -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluation(files, photos) -> EvaluationResult:
    methods = {"exact": Exact(photos), "grey": Grey(), "refuses": Refuses()}
    return evaluate(methods, photos[:2], config(files, "alexnet", "vgg16", "inception"))


@pytest.mark.slow
def test_lpips_is_scored_per_photograph(evaluation, files, photos) -> None:
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[16:48, 16:48] = 1  # the centre mask
    for metric, network in (("lpips_alex", "alexnet"), ("lpips_vgg", "vgg16")):
        lpips = load_lpips(network, files[network])
        pairs = [(image, Grey()(image, mask, None)) for _, image in photos[:2]]
        tensors = [[torch.from_numpy(p).permute(2, 0, 1)[None] / 127.5 - 1 for p in pair] for pair in pairs]
        with torch.no_grad():
            expected = [float(lpips(*pair)) for pair in tensors]
        assert evaluation.values["center"]["grey"][metric] == pytest.approx(expected, rel=1e-5)
        assert evaluation.values["center"]["exact"][metric] == [0.0, 0.0]
        assert evaluation.row("grey").metrics[metric] == pytest.approx(np.mean(expected), rel=1e-5)
        assert evaluation.to_metrics("grey")[f"center/{metric}"] == evaluation.score("grey", metric)


@pytest.mark.slow
def test_two_evaluations_have_the_same_bits(evaluation, files, photos) -> None:
    methods = {"exact": Exact(photos), "grey": Grey(), "refuses": Refuses()}
    again = evaluate(methods, photos[:2], config(files, "alexnet", "vgg16", "inception"))
    assert json.dumps(again.to_dict()) == json.dumps(evaluation.to_dict())


@pytest.mark.slow
def test_inception_features_do_not_depend_on_the_batch(files, photos) -> None:
    scorer = FeatureScorer(FeatureWeights.model_validate({"inception": str(files["inception"])}))
    images = [image for _, image in photos[:3]]
    features = scorer.inception(images)
    assert features.shape == (3, 2048)
    np.testing.assert_array_equal(scorer.inception(images[1:2]), features[1:2])


@pytest.mark.slow
def test_the_table_says_what_is_missing_and_whose_weights_these_are(evaluation, files) -> None:
    (table,) = feature_tables(evaluation)
    assert table.headings == ("LPIPS alex", "LPIPS vgg", "FID", "KID", "P-IDS %", "U-IDS %")
    cells = {method: [cell.text for cell in line] for method, line in table.lines}
    assert cells["exact"][:2] == ["0.0000", "0.0000"]
    assert cells["grey"][2:] == ["n/a"] * 4
    assert cells["refuses"] == ["n/a"] * 6
    assert table.lines[0][1][0].best
    assert not table.lines[1][1][0].best
    text = " ".join(table_text(evaluation).split())
    assert "FID n/a: 2 photographs are too few (at least 2049)" in text
    assert "P-IDS and U-IDS n/a: 2 photographs are too few (at least 1025)" in text
    sha256 = hashlib.sha256(files["vgg16"].read_bytes()).hexdigest()
    assert f"VGG-16 has other weights than the published ones (sha256 {sha256[:12]})" in text
    assert max(map(len, table_text(evaluation).splitlines())) <= 100
    assert "| LPIPS alex | LPIPS vgg |" in table_markdown(evaluation)
    page = report_html(ReportData("title", evaluation=evaluation))
    assert "Scores on published networks" in page
    assert "LPIPS v0.1 on AlexNet" in page


@pytest.mark.slow
def test_published_scores_leave_the_protocol_comparable(evaluation, files, photos) -> None:
    without = evaluate({"grey": Grey()}, photos[:2], EvaluationConfig(distance=None, grid_rows=0))
    assert evaluation.protocol.comparable_with(without.protocol)
    assert evaluation.row("grey").metrics.items() >= without.row("grey").metrics.items()
    assert evaluation.protocol.features == {
        name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in sorted(files.items())
    }
    assert "features" not in without.protocol.to_dict()
    assert "set_scores" not in without.to_dict()
    assert feature_tables(without) == []
    assert set(METRIC_DEFINITIONS) >= set(without.row("grey").metrics)


@pytest.mark.slow
def test_saving_and_loading_keeps_the_scores(evaluation) -> None:
    written: dict[str, bytes] = {}
    evaluation.save(written.__setitem__)
    loaded = EvaluationResult.load(written.__getitem__)
    assert loaded.to_dict() == evaluation.to_dict()
    assert table_text(loaded) == table_text(evaluation)


def test_a_photograph_that_is_too_small_for_the_network_has_no_lpips(files) -> None:
    photos = [("small", astronaut()[:24, :40].copy())]
    result = evaluate({"grey": Grey()}, photos, config(files, "alexnet", "vgg16"))
    assert "lpips_alex" not in result.row("grey").metrics  # needs 31 pixels
    assert result.row("grey").metrics["lpips_vgg"] > 0


def test_enough_photographs_get_every_score(files, photos, monkeypatch: pytest.MonkeyPatch) -> None:
    """With features of few dimensions, sixteen photographs are enough for all but KID."""
    monkeypatch.setattr(
        FeatureScorer,
        "inception",
        lambda self, images: np.stack([i.reshape(-1, 3).mean(0) for i in images]).astype(np.float32),
    )
    methods = {"exact": Exact(photos), "grey": Grey()}
    result = evaluate(methods, photos, config(files, "inception", masks=("center", "box")))
    for masks in ("center", "box"):
        exact, grey = (result.set_metrics(method, masks) for method in methods)
        assert set(exact) == set(grey) == {"fid", "p_ids_percent", "u_ids_percent"}
        assert exact["fid"] == pytest.approx(0, abs=1e-6)
        assert grey["fid"] > 1
        assert exact["u_ids_percent"] == 50
        assert result.to_metrics("grey")[f"{masks}/fid"] == grey["fid"]
    table = feature_tables(result)[0]
    assert table.headings == ("FID", "KID", "P-IDS %", "U-IDS %")
    best = {
        heading: [m for m, cells in table.lines if cells[i].best] for i, heading in enumerate(table.headings)
    }
    assert best["FID"] == ["exact"]


def test_which_direction_is_better() -> None:
    assert all(map(higher_is_better, ("p_ids_percent", "u_ids_percent", "edge_f1", "psnr_rgb")))
    assert not any(map(higher_is_better, ("lpips_alex", "fid", "kid_inception", "fd", "kid", "l1_percent")))


# -- configuration --------------------------------------------------------------------------------------------


def recipe(**evaluate_section) -> object:
    return parse_recipe({"name": "a", "model": {"name": "glcic"}, "evaluate": evaluate_section}).evaluate


def test_weights_are_text_or_a_section() -> None:
    sha256 = "AB" * 32
    written = recipe(
        features={"alexnet": f"https://host/a.pth#sha256={sha256}", "vgg16": {"weights": "v.pth"}}
    )
    assert written.features.alexnet.weights == "https://host/a.pth"
    assert written.features.alexnet.sha256 == sha256.lower()
    assert written.features.vgg16.sha256 is None
    assert list(written.features.networks) == ["alexnet", "vgg16"]
    assert "features" not in EvaluationConfig().model_dump()  # step keys of older recipes stay
    assert recipe(features={"inception": "i.pth"}) == recipe(features={"inception": {"weights": "i.pth"}})
    with pytest.raises(RecipeError, match=r"evaluate\.features\.alexnet\.sha256: 'abc' is no SHA-256"):
        recipe(features={"alexnet": "a.pth#sha256=abc"})
    with pytest.raises(RecipeError, match=r"evaluate\.features\.alexnett"):
        recipe(features={"alexnett": "a.pth"})


def test_the_option_features() -> None:
    weights = feature_weights(["alexnet=a.pth", "inception=s3://b/i.pth#sha256=" + "0" * 64])
    assert weights is not None
    assert weights.inception is not None
    assert (weights.inception.weights, weights.vgg16) == ("s3://b/i.pth", None)
    assert feature_weights([]) is None
    for texts in (["a.pth"], ["resnet=a.pth"], ["vgg16=a.pth", "vgg16=b.pth"]):
        with pytest.raises(
            ValueError, match=r"^--features .*: give one NETWORK=FILE for each of alexnet, vgg16"
        ):
            feature_weights(texts)
    with pytest.raises(ValueError, match=r"^--features vgg16=: give the path or address of a weights file$"):
        feature_weights(["vgg16="])
    with pytest.raises(ValueError, match=r"^--features vgg16=a#sha256=1: '1' is no SHA-256"):
        feature_weights(["vgg16=a#sha256=1"])


def test_missing_and_wrong_weights_are_named_before_anything_is_scored(files, photos, tmp_path: Path) -> None:
    def run(**networks: str) -> None:
        evaluate(
            {"grey": Grey()}, photos[:1], EvaluationConfig(features=FeatureWeights.model_validate(networks))
        )

    with pytest.raises(
        FileNotFoundError, match=r"^features\.vgg16: no weights file .*absent\.pth: the published one"
    ):
        run(vgg16=str(tmp_path / "absent.pth"))
    with pytest.raises(ValueError, match=r"^features\.inception: .*it is not the Inception v3 of FID$"):
        run(inception=str(files["vgg16"]))
    with pytest.raises(ValueError, match=r"^features\.alexnet: .*sha256"):
        run(alexnet=f"{files['alexnet']}#sha256={'0' * 64}")
    with pytest.raises(
        ValueError, match=r"^features\.alexnet: weights https://host/a\.pth: a download needs a sha256"
    ):
        run(alexnet="https://host/a.pth")
