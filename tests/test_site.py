"""The site of docs/: it builds without a warning, makes no network requests, and has what its pages link."""

import logging
import re
from pathlib import Path

import pytest

mkdocs = pytest.importorskip("mkdocs", reason="uv sync --group docs")

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `mkdocs build --strict` writes."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        patch.chdir(ROOT)
        config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True)
        build(config)  # raises where anything was warned of
    return folder


@pytest.mark.slow
def test_the_site_is_built_strictly_and_has_every_page_of_docs_and_the_readme(site: Path) -> None:
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert len(pages) >= 14 and {path.stem for path in site.glob("*.html")} >= pages | {"index", "CONTRIBUTING"}
    assert "reinforcement learning" in (site / "index.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_site_asks_nothing_of_a_network(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        loaded = re.findall(
            r"<(?:script|img|iframe|source|link)\b[^>]*?\b(?:src|href)=[\"']?([^\"'\s>]+)", page.read_text()
        )
        assert [url for url in loaded if re.match(r"(https?:)?//", url)] == [], page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(https?:)?//", sheet.read_text()), sheet


@pytest.mark.slow
def test_a_link_to_a_source_leads_to_its_text_in_the_site(site: Path) -> None:
    walk = (site / "walk.html").read_text(encoding="utf-8")
    (link,) = set(re.findall(r"href=\"([^\"]*train/losses\.py\.html)\"", walk))
    listing = re.sub(r"<[^>]+>", "", (site / link).read_text(encoding="utf-8"))
    assert "def clipped_token_loss" in listing


@pytest.mark.slow
def test_a_page_that_links_what_is_not_there_stops_the_build(site: Path, tmp_path: Path) -> None:
    from mkdocs.commands.build import build
    from mkdocs.config import load_config
    from mkdocs.exceptions import Abort

    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# One\n\n[two](index.md#three)\n")
    validation = re.search(r"^validation:\n(?:  .*\n)+", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)
    assert validation is not None
    (tmp_path / "mkdocs.yml").write_text(f"site_name: x\n{validation[0]}")
    config = load_config(str(tmp_path / "mkdocs.yml"), site_dir=str(tmp_path / "out"), strict=True)
    logging.getLogger("mkdocs").setLevel(logging.INFO)
    with pytest.raises(Abort):
        build(config)
