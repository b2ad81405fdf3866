"""Charts of scores: which marks they have, their text alternatives, and no foreign markup."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from pipelines.studio.charts import (
    MAX_INTERVALS,
    BandPanel,
    BandPoint,
    VersionPoint,
    bands_chart,
    sparkline,
    versions_chart,
)

SVG = "{http://www.w3.org/2000/svg}"


def parse(svg: str) -> ElementTree.Element:
    text = str(svg).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return ElementTree.fromstring(text)


def marks(svg: str, tag: str, kind: str) -> list[ElementTree.Element]:
    return [item for item in parse(svg).iter(f"{SVG}{tag}") if kind in item.attrib.get("class", "").split()]


def points(count: int) -> list[VersionPoint]:
    return [VersionPoint(str(i + 1), 17 + i / 10, 16.5, 17.5 + i / 10) for i in range(count)]


@pytest.mark.parametrize("narrow", [False, True])
def test_versions_are_dots_with_intervals_and_aliases(narrow: bool) -> None:
    shown = points(3)
    shown[1] = VersionPoint("2", 18.0, aliases=("champion",), comparable=False, href="/models/x/2")
    svg = versions_chart("PSNR", shown, 2, narrow)
    assert len(marks(svg, "circle", "dot")) == 3
    assert len(marks(svg, "circle", "other")) == 1
    assert len(marks(svg, "line", "interval")) == 2
    (line,) = marks(svg, "polyline", "over-versions")
    assert len(line.attrib["points"].split()) == 2, "the one that is not comparable is left out"
    assert [text.text for text in marks(svg, "text", "alias")] == ["champion"]
    assert parse(svg).attrib["aria-label"] == "PSNR over 3 versions: 17.00 in version 1, 17.20 in version 3"
    assert "version 2 (champion): 18.00; another protocol, not comparable" in svg


def test_aliases_that_would_overlap_are_in_rows() -> None:
    shown = points(30)
    for i in (27, 28, 29):
        shown[i] = VersionPoint(str(i + 1), 18.0, aliases=(("champion", "candidate", "shadow")[i - 27],))
    labels = marks(versions_chart("PSNR", shown), "text", "alias")
    assert len({label.attrib["y"] for label in labels}) == 2, "the third one has room beside the first"


def test_many_versions_have_no_intervals() -> None:
    svg = versions_chart("PSNR", points(MAX_INTERVALS + 1))
    assert not marks(svg, "line", "interval")
    assert len(marks(svg, "circle", "dot")) == MAX_INTERVALS + 1


@pytest.mark.parametrize("value", [17.0, 0.0, 1e-9, 1e9, -3.0])
def test_one_version_and_equal_scores_have_a_chart(value: float) -> None:
    for count in (1, 3):
        svg = versions_chart("x", [VersionPoint(str(i), value) for i in range(count)])
        assert len(marks(svg, "circle", "dot")) == count
        assert "nan" not in svg


def test_scores_that_are_not_finite_are_left_out() -> None:
    assert versions_chart("x", [VersionPoint("1", math.inf)]) == ""
    assert sparkline("x", [VersionPoint("1", math.nan)]) == ""
    assert bands_chart(BandPanel("x", (BandPoint("all", math.inf),))) == ""


def test_bands_have_intervals_counts_and_baselines() -> None:
    panel = BandPanel(
        "PSNR hole",
        (BandPoint("all", 18.0, 17.0, 19.0, 12), BandPoint("0-10", 20.0, count=6), BandPoint("10-20", 16.0)),
        baselines={"Telea": {"all": 18.1, "0-10": 19.0}, "PatchMatch": {"all": 18.2}, "none": {}},
    )
    svg = bands_chart(panel)
    assert len(marks(svg, "circle", "dot")) == 3
    assert len(marks(svg, "line", "interval")) == 1
    assert len(marks(svg, "line", "baseline")) == 3
    texts = [text.text for text in marks(svg, "text", "label")]
    assert {"all", "n 12", "0-10", "n 6", "Telea", "PatchMatch"} <= set(texts)
    assert "none" not in texts
    assert parse(svg).attrib["aria-label"] == (
        "PSNR hole by hole area: all holes 18.00 (95 % interval 17.00 to 19.00), holes of 0-10 % 20.00, "
        "holes of 10-20 % 16.00"
    )
    ys = sorted(
        float(t.attrib["y"]) for t in marks(svg, "text", "label") if t.text in ("Telea", "PatchMatch")
    )
    assert ys[1] - ys[0] >= 11, "their labels do not overlap"


def test_foreign_names_are_escaped_and_nothing_is_styled_inline() -> None:
    name = '"><script>x</script>'
    for svg in (
        versions_chart(name, [VersionPoint(name, 1.0, aliases=(name,), href=name)]),
        bands_chart(BandPanel(name, (BandPoint(name, 1.0),), baselines={name: {name: 2.0}})),
        sparkline(name, points(2)),
    ):
        assert "<script" not in svg
        assert not re.search(r"\sstyle=", svg)
        parse(svg)
