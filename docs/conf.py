"""The site: the Markdown pages of this folder, built by `make docs` into build/docs.

Pages link to each other and to source files by the paths of the repository, so that the links also work where the
repository is read. In the site, a link to a file outside this folder leads to the repository: to the checkout that the
site was built from, or to the address in INPAINT_REPOSITORY_URL (as https://HOST/inpaint/blob/main).
A link to a missing file is a warning, and `make docs` fails on warnings.
"""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
LINK = re.compile(
    r"(?P<code>(`+)(?!`)(?:(?!\n\n).)+?(?<!`)\2(?!`))"
    r"|(?P<image>!?)(?P<text>\[[^][]*(?:\[[^][]*\][^][]*)*\])\((?P<target>[^()\s]+)\)",
    re.DOTALL,
)
FENCE = re.compile(r"\s*(`{3,}|~{3,})")
SCHEME = "repository"  # of links to files outside this folder, until their page is written
LOGGER = logging.getLogger(__name__)

project = "inpaint"
release = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
extensions = ["myst_parser"]
exclude_patterns = ["examples"]  # notebooks are read where they lie

myst_heading_anchors = 4
myst_url_schemes = {"http": None, "https": None, "mailto": None, SCHEME: None}

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_title = f"{project} {release}"
html_copy_source = False
html_use_index = False
html_show_copyright = False
html_theme_options = {"navigation_with_keys": False}

repository_url = os.environ.get("INPAINT_REPOSITORY_URL", "")


def resolve_links(markdown: str, folder: Path, page: str) -> str:
    """The Markdown with its relative links, which are relative to `folder`, as the page needs them."""

    def replace(match: re.Match[str]) -> str:
        if match["code"]:
            return match[0]
        target, hash_, fragment = match["target"].partition("#")
        if not target or re.match(r"[a-z][a-z0-9+.-]*:", target, re.IGNORECASE):
            return match[0]
        path = (folder / target).resolve()
        if not path.exists() or not path.is_relative_to(ROOT):
            LOGGER.warning("%s links to a missing file: %s", folder.relative_to(ROOT), target, location=page)
            return match[0]
        if path.is_relative_to(DOCS) or match["image"]:
            url = os.path.relpath(path, (DOCS / page).parent)
        else:
            url = f"{SCHEME}:{path.relative_to(ROOT).as_posix()}"
        return f"{match['image']}{match['text']}({url}{hash_}{fragment})"

    parts: list[str] = [""]  # text and fenced blocks in turn
    fence = ""
    for line in markdown.splitlines(keepends=True):
        marker = FENCE.match(line)
        if not fence and marker:
            fence = marker[1]
            parts += [line]
        elif fence and line.strip() == fence:
            fence = ""
            parts[-1] += line
            parts += [""]
        else:
            parts[-1] += line
    return "".join(part if FENCE.match(part) else LINK.sub(replace, part) for part in parts)


def on_source_read(app: Sphinx, page: str, content: list[str]) -> None:
    content[0] = resolve_links(content[0], (DOCS / page).parent, page)


def on_include_read(app: Sphinx, path: Path, page: str, content: list[str]) -> None:
    content[0] = resolve_links(content[0], (DOCS / path).resolve().parent, page)


def on_doctree_resolved(app: Sphinx, doctree: nodes.document, page: str) -> None:
    folder = Path(app.builder.get_target_uri(page)).parent  # of the page in the site
    base = app.config.repository_url.rstrip("/") or os.path.relpath(ROOT, Path(app.outdir) / folder)
    for link in doctree.findall(nodes.reference):
        if link.get("refuri", "").startswith(f"{SCHEME}:"):
            link["refuri"] = f"{base}/{link['refuri'].removeprefix(f'{SCHEME}:')}"


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_config_value("repository_url", "", "env", str)
    app.connect("source-read", on_source_read)
    app.connect("include-read", on_include_read)
    app.connect("doctree-resolved", on_doctree_resolved)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
