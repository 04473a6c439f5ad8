"""Makes the site of `docs/` whole: README.md is its first page, and what the pages link outside of `docs/` is in it too.

Where a repository is hosted, the links of a page lead to other files. Here each linked file becomes a page: Markdown as it is,
any other text as a listing. A linked folder becomes a list of its files. So the site needs no address of a repository, and
shows the sources that it was built from. `mkdocs.yml` names this file under `hooks`.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(!?\[[^\]]*\]\()(?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?\)")
"""A link to a file, in three parts: what stands before the path, the path, the anchor."""
CODE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
_origins: dict[str, str] = {}
"""The file in the repository of each page of the site."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what the pages link, and what those link in turn."""
    _origins.clear()
    waiting = ["README.md", *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    while waiting:
        origin = waiting.pop()
        if site_path(origin) in _origins:
            continue
        _origins[site_path(origin)] = origin
        if not origin.startswith("docs/"):
            files.append(File.generated(config, site_path(origin), content=content(ROOT / origin)))
        if origin.endswith(".md"):
            linked = LINK.findall(CODE.sub("", (ROOT / origin).read_text(encoding="utf-8")))
            targets = {resolved(origin, path) for _, path, _ in linked}
            waiting += sorted(path for path in targets if (ROOT / path).exists() and not is_asset(path))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages of the site."""
    origin = _origins[page.file.src_uri]
    if not origin.endswith(".md"):
        return markdown
    start = posixpath.dirname(page.file.src_uri)

    def rewritten(match: re.Match[str]) -> str:
        text, path, anchor = match.groups()
        target = site_path(resolved(origin, path))
        return f"{text}{posixpath.relpath(target, start or '.')}{anchor or ''})"

    return LINK.sub(rewritten, markdown)


def resolved(origin: str, path: str) -> str:
    """The path in the repository that a link of the file `origin` means."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(origin), path))


def is_asset(path: str) -> bool:
    """Whether a file of `docs/` is copied as it is, such as a picture."""
    return path.startswith("docs/") and not path.endswith(".md")


def site_path(origin: str) -> str:
    """Where a file of the repository is in the site.

    Example:
        >>> site_path("docs/walk.md"), site_path("src/ludic/types.py")
        ('walk.md', 'source/src/ludic/types.py.md')
    """
    if origin == "README.md":
        return "index.md"
    if origin.startswith("docs/"):
        return origin.removeprefix("docs/")
    return origin if origin.endswith(".md") else f"source/{origin}.md"


def content(path: Path) -> str:
    """The Markdown of a page that is made of a file or folder outside of `docs/`."""
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    name = path.relative_to(ROOT).as_posix()
    if path.is_dir():
        listed = sorted(child.name for child in path.iterdir() if not child.name.startswith((".", "__pycache__")))
        return f"# {name}\n\n" + "".join(f"- `{child}`\n" for child in listed)
    language = {".py": "python", ".sh": "bash"}.get(path.suffix, "text")
    return f"# {name}\n\n````{language}\n{path.read_text(encoding='utf-8')}````\n"
