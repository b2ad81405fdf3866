"""A sweep's report: correct pictures, correct sentences, and all text from outside escaped."""

from __future__ import annotations

import base64
import io
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise, product

import numpy as np
import pytest
from markdown_it import MarkdownIt
from PIL import Image, ImageColor
from skimage.data import astronaut
from skimage.feature import canny

from pipelines.evaluation.evaluate import evaluate
from pipelines.evaluation.methods import baseline_methods
from pipelines.evaluation.results import EvaluationResult
from pipelines.plots.images import decode_png
from pipelines.recipe import EvaluationConfig
from pipelines.sweeps.report.drawing import BEST_COLOR, separate, wrap_path
from pipelines.sweeps.report.field_plots import _score_range, _split_baselines
from pipelines.sweeps.report.page import sweep_html, sweep_markdown, sweep_pictures
from pipelines.sweeps.report.statistics import field_axis, response_points
from pipelines.sweeps.report.strips import _edge_cell, _setting_samples, completion_strips
from pipelines.sweeps.report.text import summary_sentences, sweep_table, unfinished_trials
from pipelines.sweeps.results import FAILED, FINISHED, STOPPED, SweepResult, TrialRecord

PSNR, FD = "psnr_rgb_hole", "fd"
CURVE = [(100, 18.0), (200, 20.0), (300, 20.5)]
EVIL = "<script>alert('1')</script> | *x*"


def sweep(fields, rows, **kwargs) -> SweepResult:
    """rows: (values, (PSNR, FD)), or (values, reason of the failure)."""
    trials = tuple(
        TrialRecord(i, dict(values), FAILED, outcome, steps=100)
        if isinstance(outcome, str)
        else TrialRecord(
            i, dict(values), FINISHED, steps=300, scores=dict(zip((PSNR, FD), outcome)), curve=CURVE
        )
        for i, (values, outcome) in enumerate(rows)
    )
    return SweepResult("made-up", "a_model", fields, (PSNR, FD), trials, photographs=4, **kwargs)


def over_sigma(scores: dict[float, list[float]], **kwargs) -> SweepResult:
    """sigma -> PSNR per seed; FD = 40 - PSNR."""
    rows = [
        ({"edges.sigma": s, "seed": i}, (p, 40 - p)) for s, ps in scores.items() for i, p in enumerate(ps)
    ]
    return sweep({"edges.sigma": {"grid": list(scores)}, "seed": {"grid": [0, 1]}}, rows, **kwargs)


def many(count: int) -> SweepResult:
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        a, b = float(10 ** rng.uniform(-5, 0)), float(rng.uniform(0, 10))
        rows.append(({"model.lambda_adv": a, "model.lambda_s": b}, (20 + math.log10(a), 10 + b)))
    fields = {"model.lambda_adv": {"loguniform": [1e-5, 1]}, "model.lambda_s": {"uniform": [0, 10]}}
    return sweep(fields, rows)


def two_fields_and_seeds() -> SweepResult:
    cells = product((0, 0.001, 0.1), (1, 50), (0, 1))
    rows = [({"a": a, "b": b, "seed": s}, (20 - a + b / 50 + s / 10, 10 + a)) for a, b, s in cells]
    return sweep({"a": {"grid": [0, 0.001, 0.1]}, "b": {"grid": [1, 50]}, "seed": {"grid": [0, 1]}}, rows)


class MeanColor:
    """Fills the hole with the photograph's mean colour; uses true edges at its sigma."""

    uses_true_edges = True

    def __init__(self, sigma: float) -> None:
        self.sigma = sigma

    def __call__(self, image, mask, edge):
        return np.where(mask[..., None] != 0, image[mask == 0].mean(0).round().astype(np.uint8), image)


PHOTOS = [(f"tile-{y}", astronaut()[y : y + 64, 192:256].copy()) for y in (0, 64, 128, 192)]


@pytest.fixture(scope="module")
def evaluations() -> dict[int, EvaluationResult]:
    """trial number -> evaluation, for over_sigma({1: .., 3: ..}) with two seeds each."""
    spec = EvaluationConfig(masks=("center",), grid_rows=4, distance=None)
    by_sigma = {sigma: evaluate({"trial": MeanColor(sigma)}, PHOTOS, spec) for sigma in (1, 3)}
    return {0: by_sigma[1], 1: by_sigma[1], 2: by_sigma[3], 3: by_sigma[3]}


SIGMAS = {1: [22.0, 22.2], 3: [21.0, 21.4]}


def words(*values) -> SweepResult:
    return sweep(
        {"o": {"choice": values}}, [({"o": value}, (20.0 + i, 9.0)) for i, value in enumerate(values)]
    )


SIGMA_PICTURES = {"response-edges.sigma", "strip-sigma", "front", "training"}
WORD_PICTURES = {"response-o", "strip-settings", "front", "training"}
TWO_FIELDS = {"response-a", "response-b", "strip-settings", "parallel", "importance", "front", "training"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("result", "names"),
    [
        pytest.param(over_sigma(SIGMAS), SIGMA_PICTURES, id="sigma"),
        pytest.param(two_fields_and_seeds(), TWO_FIELDS, id="two fields and seeds"),
        pytest.param(over_sigma({1: [22.0]}), {"strip-settings", "training"}, id="one trial"),
        pytest.param(sweep({"a": {}}, [({"a": a}, "out of memory") for a in (1, 2)]), set(), id="all failed"),
        pytest.param(over_sigma({1: [math.nan], 2: [math.nan]}), {"training"}, id="all nan"),
        pytest.param(
            over_sigma({1: [22.0, math.nan], 2: [21.0, 21.5], 3: [20.0, 20.0]}), SIGMA_PICTURES, id="some nan"
        ),
        pytest.param(words("adam", "$sgd$"), WORD_PICTURES, id="words"),
        pytest.param(words(True, False), WORD_PICTURES, id="switches"),
    ],
)
def test_which_pictures_are_drawn(result, names, evaluations):
    pictures = sweep_pictures(result, evaluations)
    assert {name.removesuffix(".png") for name in pictures} == names
    for name, data in pictures.items():
        picture = Image.open(io.BytesIO(data))
        assert picture.format == "PNG"
        assert picture.width == 1080 or name.startswith("strip")
        assert len(data) < 250_000


@pytest.mark.slow
def test_curves_of_single_points_are_not_drawn(evaluations):
    result = over_sigma(SIGMAS)
    trials = tuple(replace(trial, curve=CURVE[:1]) for trial in result.trials)
    names = {
        name.removesuffix(".png") for name in sweep_pictures(replace(result, trials=trials), evaluations)
    }
    assert names == SIGMA_PICTURES - {"training"}


@pytest.mark.slow
@pytest.mark.parametrize("count", [60, pytest.param(200, marks=pytest.mark.soak)])
def test_pictures_of_many_trials_with_long_names_stay_small(count):
    page = sweep_html(replace(many(count), model="a_model_of_" + "many_words_" * 12), {}, "name: best\n")
    assert f"All {count} settings" in page
    pictures = [base64.b64decode(data) for data in re.findall(r'base64,([^"]+)"', page)]
    assert len(pictures) == 6  # two responses, parallel coordinates, importance, front, training
    assert max(map(len, pictures)) < 250_000


@pytest.mark.parametrize(
    ("scores", "side"),
    [({1: [23.0], 2: [22.0], 3: [21.0]}, "left"), ({1: [20.0], 2: [22.0], 3: [23.0]}, "right")],
)
def test_the_best_setting_is_marked_at_its_position(scores, side):
    picture = decode_png(sweep_pictures(over_sigma(scores), {})["response-edges.sigma.png"]).astype(int)
    marked = np.abs(picture - ImageColor.getrgb(BEST_COLOR)).sum(2) < 30
    dots = [x for x in range(1080) if marked[:, x].sum() > 12]  # columns of the two dots, not of thin letters
    centre = np.median(dots) / 1080
    assert centre < 0.4 if side == "left" else centre > 0.6


def test_only_near_baselines_are_drawn():
    methods = {"near": {PSNR: 21.1}, "far": {PSNR: 12.0}, "without": {FD: 3.0}, "nan": {PSNR: math.nan}}
    result = over_sigma(SIGMAS, baselines=methods)
    inside, outside = _split_baselines(
        result, PSNR, _score_range(response_points(result, "edges.sigma", PSNR))
    )
    assert inside == {"near": 21.1}
    assert outside == {"far": 12.0}


def test_the_strip_shows_the_edges_that_the_model_got(evaluations):
    result = over_sigma(SIGMAS)
    for group, sigma in zip(result.ranked_groups, (1, 3), strict=True):
        drawing = _edge_cell(_setting_samples(result, group, evaluations), "tile-128", sigma)
        grey = np.asarray(Image.fromarray(PHOTOS[2][1]).convert("RGB")) @ (0.2125, 0.7154, 0.0721) / 255
        expected = canny(grey, sigma)  # of the whole photograph, the hole's too
        lines = drawing.min(2) < 200
        assert expected[16:48, 16:48].any() or sigma == 3
        assert (lines == expected).mean() > 0.99


@pytest.mark.slow
def test_strips_have_one_row_per_sigma_or_at_most_eight_settings(evaluations):
    def height(result):
        ((_, _, png, _),) = completion_strips(result, dict.fromkeys(range(30), evaluations[0]))
        return decode_png(png).shape[0]

    two, three = (height(over_sigma({s: [20.0 + s] for s in range(1, 1 + n)})) for n in (2, 3))
    assert three - two == 144 + 7  # one cell and a gap more
    eight, thirty = (
        height(sweep({"a": {"grid": list(range(n))}}, [({"a": i}, (20.0 + i, 5.0)) for i in range(n)]))
        for n in (8, 30)
    )
    assert eight == thirty


@pytest.mark.parametrize(
    "wanted", [[0.1, 0.5, 0.9], [0.5, 0.5, 0.5], [0.0, 0.01, 1.0], [1.0, 0.99, 0.2, 0.98], [0.3]]
)
def test_labels_are_separated_in_order_and_no_more_than_needed(wanted):
    placed = separate(wanted, 0.1, 0.0, 1.0)
    order = np.argsort(wanted, kind="stable")
    assert (np.diff(np.array(placed)[order]) >= 0.1 - 1e-9).all()
    assert -1e-9 <= min(placed) <= max(placed) <= 1 + 1e-9
    if len(wanted) == 1 or np.diff(sorted(wanted)).min() >= 0.1:
        assert placed == pytest.approx(wanted)


def test_long_recipe_paths_are_wrapped_completely():
    broken = wrap_path("model.lambda_perceptual_of_features", 14)
    assert broken.replace("\n", "") == "model.lambda_perceptual_of_features"
    assert max(map(len, broken.split("\n"))) <= 14
    assert wrap_path("model.lambda_adv", 14) == "model.\nlambda_adv"


def test_the_margin_is_stated_in_standard_deviations_of_the_seeds():
    text = " ".join(summary_sentences(over_sigma({1: [22.0, 22.2], 3: [21.0, 21.4], 5: [19.0, 19.2]})))
    spread = math.sqrt((0.02 + 0.08 + 0.02) / 3)  # pooled: sums of squares over three degrees of freedom
    assert "Best is edges.sigma 1: PSNR hole 22.10 ± 0.14 dB, 0.90 dB over edges.sigma 3" in text
    assert (
        f"{0.9 / spread:.1f} times the standard deviation over the seeds of a setting ({spread:.2g} dB)"
        in text
    )
    assert "All other settings are distinguishable" in text
    assert "It is best in FD too" in text
    assert "edges.sigma 1 is better than every other setting in both PSNR hole and FD." in text


def test_insignificant_differences_are_not_called_better():
    close = " ".join(summary_sentences(over_sigma({1: [22.0, 22.6], 3: [21.9, 22.5], 5: [15.0, 15.4]})))
    assert re.search(r"Not distinguishable from the best in PSNR hole \([^)]*\): edges.sigma 3\.", close)
    alone = " ".join(summary_sentences(over_sigma({1: [22.0], 3: [21.9]})))
    assert "with one seed per setting it is unknown how much of that is chance" in alone
    assert "istinguishable" not in alone


def test_sentences_about_trends():
    steady = " ".join(summary_sentences(over_sigma({s: [25.0 - s] for s in (0.5, 1, 2, 3, 4, 5)})))
    assert "PSNR hole falls steadily with edges.sigma (Spearman's rho -1.00 over 6 settings" in steady
    assert "FD rises steadily with edges.sigma" in steady
    bent = " ".join(summary_sentences(over_sigma({s: [25.0 - (s - 2.6) ** 2] for s in (0.5, 1, 2, 3, 4, 5)})))
    assert "PSNR hole shows no monotone trend with edges.sigma beyond chance" in bent


def test_a_result_worse_than_a_baseline_is_reported():
    text = " ".join(
        summary_sentences(over_sigma(SIGMAS, baselines={"telea": {PSNR: 23.0}, "patchmatch": {PSNR: 23.5}}))
    )
    assert (
        "In PSNR hole the best setting is 1.40 dB worse than the best untrained method, patchmatch (23.50)."
        in text
    )


@pytest.mark.slow
def test_the_head_says_how_the_best_setting_compares_and_where_the_run_is():
    facts = {
        "date": "2026-11-30 15:51 UTC",
        "minutes": "3",
        "MLflow": "http://h/#/experiments/1/runs/a",
        "search": "grid",
    }
    result = over_sigma(SIGMAS, baselines={"telea": {PSNR: 23.0}}, about=facts)
    page = sweep_html(result, {}, "")
    head, body = page[: page.index("</header>")], page[page.index("</header>") :]
    leads = re.findall(r'<p class="lead">(.+?)</p>', head)
    assert leads[0].startswith("Best is edges.sigma 1")
    assert "distinguishable from the best in PSNR hole" in leads[1]
    assert leads[2:] == [
        "In PSNR hole the best setting is 0.90 dB worse than the best untrained method, telea (23.00)."
    ]
    assert all(lead not in body for lead in leads)
    assert "<th>date</th><td>2026-11-30 15:51 UTC</td>" in head
    assert "<th>duration</th><td>3 min</td>" in head
    assert f'<a href="{facts["MLflow"]}">' in head
    assert "<th>search</th><td>grid</td>" in body


def test_a_sweep_without_a_finished_trial_reports_the_reasons():
    rows = [({"a": a}, f"out of memory {EVIL}") for a in (1, 2)] + [({"a": 3}, "non-finite loss at step 7")]
    result = sweep({"a": {"grid": [1, 2, 3]}}, rows, baselines={"telea": {PSNR: 20.0}})
    text, page = sweep_markdown(result), sweep_html(result, {}, "")
    for report in (text, page):
        assert "No trial finished, of 3" in report
        assert "2 trials failed: out of memory" in report
        assert "1 trial failed: non-finite loss at step 7 (trial 2: a 3, step 100)" in report
    assert "There is no best recipe" in page
    assert "inpaint run" not in page


def test_stopped_and_changed_trials_are_listed():
    result = over_sigma(SIGMAS)
    first, second, *others = result.trials
    changed = replace(second, changes=[(150, {"model.lambda_adv": 0.0012345})])
    stopped = replace(first, state=STOPPED, reason="behind the median", scores={}, steps=100)
    changed_result = replace(result, trials=(stopped, changed, *others))
    assert unfinished_trials(changed_result) == [
        "1 trial stopped: behind the median (trial 0: edges.sigma 1, seed 0, step 100)"
    ]
    text = sweep_markdown(changed_result)
    assert "trial 1: from step 150 on model.lambda_adv 0.001234" in text
    assert "3 of 4 trials finished; 1 stopped" in text
    assert "1 finished, 1 stopped" in re.sub("1 stopped, 1 finished", "1 finished, 1 stopped", text)


def parse_table(text: str) -> list[list[str]]:
    """The rows of the first table, parsed by another Markdown implementation."""
    rows: list[list[str]] = []
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    for before, token in pairwise(tokens):
        if before.type == "tr_open":
            rows.append([])
        if before.type in ("td_open", "th_open"):
            rows[-1].append("".join(f"[{c.content}]" if c.level else c.content for c in token.children or ()))
    return rows


def test_the_markdown_table_is_valid_and_the_best_is_bold():
    about = {"commit": "abc", "command": "inpaint sweep `x`", "minutes": "3"}
    result = over_sigma(SIGMAS, baselines={"a|b": {PSNR: 20.0, FD: 25.0}}, about=about)
    text = sweep_markdown(result)
    head, *rows = parse_table(text)
    assert head == ["edges.sigma", "seeds", "PSNR hole, dB", "FD", "steps", "state"]
    assert rows[0] == ["[1]", "2", "[22.10 ± 0.14]", "[17.90 ± 0.14]", "300", "finished"]
    assert rows[1] == ["3", "2", "21.20 ± 0.28", "18.80 ± 0.28", "300", "finished"]
    assert rows[2] == ["a|b", "", "20.00", "25.00", "", "not trained"]
    html = MarkdownIt().render(text)
    assert (
        html.index("command: <code>inpaint sweep `x`</code>")
        < html.index("<code>abc")
        < html.index("minutes")
    )


def test_markdown_from_outside_is_escaped():
    result = replace(two_fields_and_seeds(), name=EVIL, about={"command": EVIL})
    result = replace(
        result, trials=(replace(result.trials[0], state=FAILED, reason=EVIL), *result.trials[1:])
    )
    html = MarkdownIt("commonmark").enable("table").render(sweep_markdown(result))
    assert "<script" not in html
    assert "<em>" not in html
    assert html.count("alert('1')") == 3


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.alternatives: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "action")]
        self.alternatives += [value for name, value in attrs if name == "alt"]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.slow
def test_the_page_is_valid_self_contained_and_escaped(evaluations):
    result = over_sigma(SIGMAS, about={"command": EVIL, "commit": "abc"}, baselines={EVIL: {PSNR: 20.0}})
    result = replace(result, name=f"a {EVIL}", model=EVIL)
    result = replace(
        result, trials=(*result.trials, TrialRecord(4, {"edges.sigma": 3, "seed": 2}, FAILED, EVIL))
    )
    page = sweep_html(result, evaluations, f"name: best  # {EVIL}\n")
    parser = Page()
    parser.feed(page)
    assert parser.open == []
    assert not {"script", "link", "iframe", "form"} & set(parser.tags)
    assert all(link.startswith("data:image/png;base64,") for link in parser.links)
    assert len(parser.links) == len(sweep_pictures(result, evaluations)) == 4
    assert all(parser.alternatives)
    assert "<script" not in page
    assert page.count("alert(&#39;1&#39;)") >= 5
    assert "inpaint run " in page
    assert "each of [1, 3]" in page


@pytest.mark.slow
def test_lists_as_values_survive_json(evaluations):
    rows = [({"edges.sigma": v}, (20.0 + i, 9.0 + i)) for i, v in enumerate(([1, 2], [2, 3, 4], 2))]
    result = SweepResult.from_json(sweep({"edges.sigma": {"grid": [[1, 2], [2, 3, 4], 2]}}, rows).to_json())
    pictures = sweep_pictures(result, evaluations)
    assert {"response-edges.sigma.png", "strip-sigma.png", "front.png"} <= set(pictures)
    assert "Best is edges.sigma 2: PSNR hole 22.00 dB, 1.00 dB over edges.sigma [2, 3, 4]" in sweep_html(
        result, {}, ""
    )
    cells = [line[0].text for line in sweep_table(result).setting_rows]
    assert cells == ["2", "[2, 3, 4]", "[1, 2]"]


def test_scores_over_decades_are_drawn():
    """A diverged setting has an FD of thousands, the others of tens."""
    rows = [({"a": a}, (20.0, fd)) for a, fd in ((1, 10.0), (2, 12.0), (3, 4000.0))]
    pictures = sweep_pictures(sweep({"a": {"grid": [1, 2, 3]}}, rows), {})
    assert {"response-a.png", "front.png"} <= set(pictures)
    assert field_axis(sweep({"a": {}}, rows), "a").kind == "linear"


def test_the_baselines_keep_their_order_below_the_settings():
    table = sweep_table(over_sigma(SIGMAS, baselines={name: {PSNR: 1.0} for name in baseline_methods()}))
    assert [line[0].text for line in table.baseline_rows] == list(baseline_methods())
    assert {len(line) for line in (*table.setting_rows, *table.baseline_rows, table.headings)} == {6}
