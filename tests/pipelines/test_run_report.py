"""The report: a self-contained page that shows its data and escapes it."""

from __future__ import annotations

import itertools
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from pipelines.durations import format_duration
from pipelines.evaluation.evaluate import evaluate
from pipelines.evaluation.methods import baseline_methods
from pipelines.plots.images import Grid
from pipelines.plots.svg import StepNode, curve_svg, graph_svg
from pipelines.recipe import EvaluationConfig
from pipelines.run_report import (
    ReportData,
    TrainingCurves,
    curve_groups,
    link,
    report_html,
    write_report,
)

VOID = {"meta", "img", "br", "wbr"}


class PageParser(HTMLParser):
    """Checks that elements are closed in order; collects tags and links."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)


@pytest.fixture(scope="module")
def data() -> ReportData:
    rng = np.random.default_rng(0)
    photos = [(f"p{i}", rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for i in range(4)]
    evaluation = evaluate(
        baseline_methods(),
        photos,
        EvaluationConfig(masks=("center", "box_and_brush"), grid_rows=2, distance=None),
    )
    return ReportData(
        title="demo <1> & more",
        summary=["A sentence.", 'Another "one" & more.'],
        facts={"date": "2026-11-30 15:51 UTC", "MLflow": "mlflow ui --backend-store-uri sqlite:////<db>"},
        evaluation=evaluation,
        grids=[Grid("extra", ("truth", "result"), ((photos[0][1], None),), note="A note.")],
        curves={
            "a_model": TrainingCurves(
                {"l1": [(0, 1.0), (10, 0.5), (20, 0.4)], "empty": []}, [(0, "edge"), (10, "joint")]
            )
        },
        steps=[StepNode("shard", (), 1.0), StepNode("train-a_model", ("shard",), 75.0)],
        versions=[{"name": "a_model", "version": 3, "aliases": "champion"}],
        environment={"python": "3.11", "packages": {"torch": "2.13"}},
        recipe="name: demo  # <script>alert(1)</script>\n",
        photographs={"source": "/photos", "left out": "1 companion (._<b>.jpg)"},
    )


def test_the_page_is_complete_and_self_contained(data, tmp_path):
    path = write_report(tmp_path / "deep" / "report.html", data)
    page = path.read_text(encoding="utf-8")
    parser = PageParser()
    parser.feed(page)
    assert parser.open == []
    assert all(link.startswith("data:image/png;base64,") for link in parser.links)
    assert len(parser.links) == 2 * 2 * (2 + len(baseline_methods())) + 1
    assert not {"script", "link", "iframe"} & parser.tags
    assert "http" not in re.sub(r"data:image/png;base64,[^\"]+", "", page)
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]  # no temporary file is left


def test_data_is_shown_and_escaped(data):
    page = report_html(data)
    assert "demo &lt;1&gt; &amp; more" in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    best = max(row.metrics["psnr_rgb_hole"] for row in data.evaluation.rows if row.masks == "center")
    assert f'<td class="best">{best:.2f}</td>' in page
    assert "<th>MLflow</th><td>mlflow ui --backend-store-uri sqlite:////&lt;db&gt;</td>" in page
    for text in (
        "A sentence.",
        "2026-11-30 15:51 UTC",
        "A note.",
        "1 min 15 s",
        "packages.torch",
        "champion",
        "photographs_sha256",
    ):
        assert text in page
    assert "<th>left out</th><td>1 companion (._&lt;b&gt;.jpg)</td>" in page
    assert page.count("<figure>") == 1  # a metric without points has no chart


def test_empty_fields_have_no_section():
    page = report_html(ReportData("empty"))
    assert "<h2>" not in page
    assert "<h1>empty</h1>" in page


def test_curves_are_in_the_order_losses_validation_speed():
    line = [(0, 1.0), (10, 2.0)]
    names = ("val/psnr_rgb_hole", "seconds_per_step", "loss/b", "data_wait", "loss/a", "data/bad_samples")
    curves = TrainingCurves(dict.fromkeys(names, line) | {"data/samples_sum": line})
    drawn = [(group.title, [name for name, *_ in group.charts]) for group in curve_groups(curves)[0]]
    assert drawn == [
        ("Losses", ["loss/a", "loss/b"]),
        ("Validation", ["val/psnr_rgb_hole"]),
        ("Speed", ["data_wait", "seconds_per_step"]),
        ("Data", ["data/bad_samples"]),
    ]  # without the checksum
    page = report_html(ReportData("curves", curves={"net": curves}))
    positions = [page.index(f">{title}</h4>") for title, _ in drawn]
    assert positions == sorted(positions)


def test_there_are_no_empty_plots():
    curves = TrainingCurves(
        {
            "loss/l1": [(0, 1.0), (10, 0.5)],
            "loss/nan": [(0, float("nan")), (10, float("nan"))],
            "val/psnr_rgb_hole": [],
            "workers": [(0, 2.0)],
            "data/bad_samples": [(0, 0.0), (10, 0.0)],
        }
    )
    groups, not_drawn = curve_groups(curves)
    assert [(group.title, [name for name, *_ in group.charts]) for group in groups] == [
        ("Losses", ["loss/l1"])
    ]
    assert not_drawn == ["workers 2", "data/bad_samples 0"]
    page = report_html(ReportData("curves", curves={"net": curves}))
    assert page.count("<figure>") == page.count("<polyline") == 1
    assert "because the value is zero or there is only one: workers 2, data/bad_samples 0." in page
    assert curve_svg("l1", [(5, 1.0)]) == ""


def test_links_to_mlflow_are_escaped_and_only_there_if_known():
    curves = TrainingCurves({"loss": [(0, 1.0), (10, 2.0)]}, url="http://h:5000/#/experiments/1/runs/a")
    versions = [{"name": "net", "version": link("3", "http://h:5000/#/models/a&b/versions/3")}]
    page = report_html(ReportData("links", curves={"net": curves}, versions=versions))
    assert '<a class="aside" href="http://h:5000/#/experiments/1/runs/a">in MLflow</a>' in page
    assert '<td><a href="http://h:5000/#/models/a&amp;b/versions/3">3</a></td>' in page
    assert link("<3>", "") == "<3>"


def test_curves_are_drawn_to_scale():
    svg = ElementTree.fromstring(curve_svg("l1", [(0, 0.0), (50, 10.0), (100, 5.0), (70, float("nan"))]))
    line = svg.find("polyline").get("points")
    (x0, y0), (x1, y1), (x2, y2) = [map(float, point.split(",")) for point in line.split()]
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y1 == pytest.approx(2 * (y2 - y1), abs=0.2)
    assert "0" in [text.text for text in svg.findall("text")]


def test_curves_over_decades_are_logarithmic():
    svg = ElementTree.fromstring(curve_svg("style", [(0, 1000.0), (1, 10.0), (2, 0.1)]))
    heights = [float(point.split(",")[1]) for point in svg.find("polyline").get("points").split()]
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.2)


def test_long_curves_are_thinned_and_keep_their_range():
    values = np.random.default_rng(0).random(10_000)
    values[5_000] = 30.0
    svg = curve_svg("l1", list(enumerate(values)))
    assert len(svg) < 12_000
    spread = ElementTree.fromstring(svg).find("polygon").get("points").split()
    assert min(float(p.split(",")[1]) for p in spread) < 30  # the spike is in the band
    assert curve_svg("l1", []) == ""


def test_phases_are_marked_where_they_begin():
    svg = ElementTree.fromstring(curve_svg("l1", [(0, 1), (100, 2)], [(0, "edge"), (50, "joint")]))
    assert [line.get("class") for line in svg.findall("line")].count("phase") == 1
    assert {"edge", "joint"} <= {text.text for text in svg.findall("text")}


@pytest.mark.parametrize("starts", [(0, 50, 60, 70), (0, 1, 2, 3), (0, 97, 98, 99), (0, 25, 50, 75)], ids=str)
def test_names_of_phases_do_not_overlap(starts):
    names = ("edge", "inpaint_canny", "inpaint", "joint")
    phases = list(zip(starts, names, strict=True))
    svg = ElementTree.fromstring(curve_svg("l1", [(0, 1), (100, 2)], phases))
    _, _, width, height = map(float, svg.get("viewBox").split())
    boxes = []
    for text in svg.findall("text"):
        if text.text in names:
            x, y = float(text.get("x")), float(text.get("y"))
            boxes.append((x, y - 10, x + 5.6 * len(text.text), y))  # a wide font of 10.5 pixels
    assert len(boxes) == 4
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
    for a, b in itertools.combinations(boxes, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], (a, b)


def test_the_graph_places_steps_right_of_their_inputs():
    steps = [
        StepNode("shard", (), 3.0),
        StepNode("edges-sigma-2", ("shard",), 2.0, kind="edges", subject="sigma-2"),
        StepNode("train-b", ("shard", "edges-sigma-2"), 60.0, kind="train", subject="b"),
        StepNode("train-a", ("shard",), 30.0),
        StepNode("evaluate", ("shard", "train-a", "train-b"), None, "waiting"),
    ]
    svg = ElementTree.fromstring(graph_svg(steps))
    boxes = [rect for rect in svg.findall("rect") if rect.get("class").startswith("node")]
    left = {step.name: float(box.get("x")) for step, box in zip(steps, boxes, strict=True)}
    assert all(left[need] < left[step.name] for step in steps for need in step.needs)
    corners = {(box.get("x"), box.get("y")) for box in boxes}
    assert len(corners) == len(steps)
    assert len(svg.findall("path")) == 5  # arrows implied by others are left out
    words = [text.text for text in svg.findall("text")]
    assert "train · 1 min 00 s" in words
    assert "waiting" in words
    assert {"b", "sigma-2", "train-a"} <= {*words}
    assert graph_svg([]) == ""
    with pytest.raises(ValueError, match="needs itself"):
        graph_svg([StepNode("a", ("b",)), StepNode("b", ("a",))])


def test_format_duration():
    assert [format_duration(s) for s in (0.04, 9.94, 9.96, 59.4, 59.6, 3599.6, 7500)] == [
        "0.0 s", "9.9 s", "10 s", "59 s", "1 min 00 s", "1 h 00 min", "2 h 05 min",
    ]  # fmt: skip
