"""Model cards as HTML: no markup, script, style or address of others."""

from __future__ import annotations

import re

import pytest

from pipelines.registry.model_card import version_card
from pipelines.studio.markdown import MAX_CHARS, render_markdown


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "<!-- x --><svg onload=alert(1)>",
        "[a](javascript:alert(1))",
        "[a](data:text/html;base64,PHNjcmlwdD4=)",
        "[a]( jAvAsCrIpT:alert(1) )",
        "![a](javascript:alert(1))",
        "![a](http://evil.example/x.png)",
        "![a](/api/models)",
        "<javascript:alert(1)>",
        "[a](/models/x)",
        "[a]: javascript:alert(1)\n\n[a]",
        "```\n</code><script>alert(1)</script>\n```",
        "| a |\n|:--|\n| <script>alert(1)</script> |",
    ],
)
def test_nothing_of_others_is_active(text: str) -> None:
    html = render_markdown(text)
    assert not re.search(r"<(?!/?(p|code|pre|table|thead|tbody|tr|th|td|a)\b)\w", html), html
    assert not re.search(r"<[^>]*\s(on\w+|style|src)=", html), html
    assert not re.search(r'href="(?!https?://)', html), html


def test_a_card_keeps_its_structure() -> None:
    card = version_card("x", {"model": "edge_connect", "size": 64}, {"center/psnr_rgb_hole": 17.5}, "ab12")
    html = render_markdown(card)
    for text in ("<h3>Trained on</h3>", "<li>crops of 64 x 64 pixels</li>", "<strong>this version</strong>"):
        assert text in html
    assert '<td class="number">17.50</td>' in html
    assert "models:/x/VERSION" in html, "an address of a model is no path"
    assert "nbsp" not in html


def test_only_pictures_that_the_page_allows_are_shown() -> None:
    text = "![samples](get-artifact?path=samples%2Fa%20b.png&run_uuid=1) ![other](get-artifact?path=c.png)"
    html = render_markdown(text, lambda path: "/picture/1" if path == "samples/a b.png" else "")
    assert html.count("<img") == 1
    assert '<img src="/picture/1" alt="samples" loading="lazy" />' in html
    assert "other" in html


def test_links_paths_and_length() -> None:
    html = render_markdown("[paper](https://arxiv.org/abs/1) in `/home/ann/data`")
    assert '<a href="https://arxiv.org/abs/1" rel="noreferrer noopener">paper</a>' in html
    assert "/home/ann" not in html
    assert len(render_markdown("x" * 10 * MAX_CHARS)) < 2 * MAX_CHARS
