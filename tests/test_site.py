"""The site that `make docs` builds from docs/: no warnings, every page, and nothing loaded from the network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    "getting-started",
    "photographs",
    "recipes",
    "training",
    "sweeps",
    "evaluation",
    "registry",
    "filling",
    "studio",
    "python-api",
    "clusters",
    "data-format",
    "architecture",
    "adding-a-model",
    "reliability",
    "troubleshooting",
    "security",
    "papers",
    "glossary",
    "release-notes",
]
LOADED = re.compile(
    r"""<(?:script|img|iframe|source|embed)\b[^>]*\bsrc=["']?(?:https?:)?//[^>]*>"""
    r"""|<link\b[^>]*\brel=["']?(?:stylesheet|icon|preload|preconnect)[^>]*\bhref=["']?(?:https?:)?//[^>]*>"""
    r"""|@import[^;]*//[^;]*;|url\(["']?(?:https?:)?//[^)]*\)"""
)
"""what a browser would load from another host: scripts, images, styles, fonts"""

pytestmark = pytest.mark.slow


def build(docs: Path, site: Path, repository_url: str = "") -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-d",
        f"{site}.doctrees",
        "-b",
        "html",
    ]
    environment = os.environ | {"INPAINT_REPOSITORY_URL": repository_url}
    return subprocess.run(
        [*command, str(docs), str(site)], env=environment, stderr=subprocess.PIPE, text=True, check=False
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site") / "html"
    result = build(ROOT / "docs", folder)
    assert result.returncode == 0, result.stderr
    return folder


def test_the_pages_stand_in_the_order_of_use(site: Path) -> None:
    index = (site / "index.html").read_text()
    links = re.findall(r'class="toctree-l1"><a class="reference internal" href="([\w-]+)\.html"', index)
    assert list(dict.fromkeys(links)) == PAGES


def test_nothing_is_loaded_from_the_network(site: Path) -> None:
    loaded = [
        f"{file.relative_to(site)}: {match}"
        for file in sorted(site.rglob("*"))
        if file.suffix in (".html", ".css", ".svg")
        for match in LOADED.findall(file.read_text())
    ]
    assert not loaded, "\n".join(loaded)


def test_links_of_the_site_lead_to_files(site: Path) -> None:
    for page in sorted(site.glob("*.html")):
        for target in re.findall(r'href="([^"#:?]+)["#?]', page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_included_pages_keep_their_links(site: Path) -> None:
    notes = (site / "release-notes.html").read_text()
    assert 'href="papers.html"' in notes
    assert 'href="docs/papers.html"' not in notes


def test_a_link_to_a_missing_file_fails_the_build_and_others_lead_to_the_repository(tmp_path: Path) -> None:
    docs, site = tmp_path / "docs", tmp_path / "site"
    docs.mkdir()
    for name in ("pyproject.toml", "docs/conf.py"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (docs / "index.md").write_text(
        "# Title\n\n[versions](../pyproject.toml#L7), [a link over\ntwo lines](../gone.py), `[code](../no.py)`\n"
        "```text\n[code](../no.py)\n```\n"
    )
    result = build(docs, site, "https://host/inpaint/blob/main/")
    assert result.returncode == 1
    assert "links to a missing file: ../gone.py" in result.stderr
    assert "no.py" not in result.stderr
    assert 'href="https://host/inpaint/blob/main/pyproject.toml#L7"' in (site / "index.html").read_text()
