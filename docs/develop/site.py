"""Hooks of mkdocs (`make docs`): pages that stand beside `docs/` are part of the site, and links to code are words."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
BESIDE = ("CONTRIBUTING.md", "CHANGELOG.md", "evals/**/*.md")
PARTS = ("Home", "Guides", "Reference", "Results", "Develop", "Evals")


def beside() -> list[str]:
    """Pages of the site that are no files of `docs/`, relative to the repository."""
    return sorted(page.relative_to(ROOT).as_posix() for pattern in BESIDE for page in ROOT.glob(pattern))


def with_links(text: str, page: str) -> str:
    """The Markdown of a page with links as they are on the site.

    Args:
        page: its path on the site: relative to `docs/`, or to the repository where it is one of `beside`.
    """
    others = beside()
    here = (ROOT if page in others else DOCS) / page

    def link(found: re.Match[str]) -> str:
        words, target = found[1], found[2]
        name, mark, anchor = target.partition("#")
        if "://" in target or target.startswith("mailto:") or not name:
            return found[0]
        place = Path(os.path.normpath(here.parent / name))
        if place.is_relative_to(DOCS):
            there = place.relative_to(DOCS).as_posix()
        elif not place.exists():
            return found[0]  # mkdocs says so
        elif (there := place.relative_to(ROOT).as_posix()) not in others:
            return words  # code, or a folder: it is in the repository, not on the site
        return f"[{words}]({os.path.relpath(there, Path(page).parent)}{mark}{anchor})"

    return re.sub(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)", link, text)


def on_files(files: Any, config: Any) -> Any:
    """Called by mkdocs: the pages beside `docs/`."""
    from mkdocs.structure.files import File

    for page in beside():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / page)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by mkdocs for every page."""
    return with_links(markdown, page.file.src_uri)


def on_nav(nav: Any, **_: Any) -> Any:
    """Called by mkdocs: the parts in the order of `PARTS`, then what stands alone."""
    nav.items.sort(key=lambda item: PARTS.index(item.title) if item.title in PARTS else item.is_section)
    return nav
