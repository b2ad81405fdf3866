"""Descriptions of models and versions as HTML. Anybody who may write to the registry writes them, so no HTML of theirs
is passed on, links lead to http(s) addresses only, and pictures to those that the page allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import parse_qs, urlsplit

from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup

from pipelines.studio.shown import shown
from pipelines.tracking.markdown import without_spaces

MAX_CHARS = 20_000
HEADINGS_BELOW = 1  # a card's `##` becomes <h3>, below the page's <h2>

PictureAddress = Callable[[str], str]
"""Artifact path of a picture -> its address in the studio, or ''."""


def render_markdown(text: str, picture: PictureAddress = lambda path: "") -> Markup:
    """The text as HTML without foreign tags, styles and scripts; more than MAX_CHARS are cut off.

    `picture` maps a run's artifact, as model cards name it (`get-artifact?path=...`), to an address; other pictures are
    shown as their alternative text.
    """
    markdown = MarkdownIt("commonmark", {"html": False, "linkify": False}).enable("table")
    markdown.validateLink = _is_allowed_link  # type: ignore[method-assign]
    tokens = markdown.parse(without_spaces(text)[:MAX_CHARS])
    _adapt(tokens, picture)
    return Markup(markdown.renderer.render(tokens, markdown.options, {}))  # escaped by the renderer


def _is_allowed_link(url: str) -> bool:
    return url.startswith(("http://", "https://", "get-artifact?"))


def _adapt(tokens: Sequence[Token], picture: PictureAddress) -> None:
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(6, int(token.tag[1]) + HEADINGS_BELOW)}"
        elif token.type == "table_open":
            token.attrs["tabindex"] = "0"  # wide ones scroll, also by keyboard
        elif token.type in ("th_open", "td_open"):
            align = str(token.attrs.pop("style", ""))  # the page's policy refuses styles
            if align.endswith("right"):
                token.attrs["class"] = "number"
        if token.content and not token.children:
            token.content = shown(token.content)
        for child in token.children or ():
            _adapt_inline(child, picture)


def _adapt_inline(token: Token, picture: PictureAddress) -> None:
    if token.type == "link_open":
        if str(token.attrs.get("href", "")).startswith("get-artifact?"):
            del token.attrs["href"]
        else:
            token.attrs["rel"] = "noreferrer noopener"
    elif token.type == "image":
        address = picture(_artifact_path(token.attrs.get("src")))
        if address:
            token.attrs["src"], token.attrs["loading"] = address, "lazy"
        else:
            token.type, token.tag, token.nesting, token.attrs = "text", "", 0, {}
            token.children = None
    if token.type in ("text", "code_inline"):
        token.content = shown(token.content)


def _artifact_path(source: Any) -> str:
    """`a/b.png` of `get-artifact?path=a%2Fb.png&run_uuid=...`; '' for other addresses."""
    address = urlsplit(str(source or ""))
    return parse_qs(address.query).get("path", [""])[0] if address.path == "get-artifact" else ""
