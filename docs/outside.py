"""A hook of MkDocs: README, CONTRIBUTING, CHANGELOG and the studies are pages of the site, too, and links find them."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "experiments/**/*.md", "experiments/**/*.png")
START = "start.md"  # README.md, because a README would be the front page, which is docs/index.md
LINK = re.compile(r"\[(?P<label>[^][]*)\]\((?P<target>[^()\s]+)\)|(?<= src=\")(?P<source>[^\"]+)(?=\")")


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages and pictures from outside docs/."""
    for path in sorted(path for pattern in OUTSIDE for path in ROOT.glob(pattern)):
        files.append(File.generated(config, site_uri(path.relative_to(ROOT).as_posix()), abs_src_path=str(path)))


def on_page_markdown(markdown: str, page: Page, files: Files, **_: Any) -> str:
    """Let each link lead where it leads in the repository; one to what the site has not becomes plain text."""
    uri = page.file.src_uri
    folder = posixpath.dirname(repository_path(uri))

    def follow(link: re.Match[str]) -> str:
        target, hash_sign, anchor = (link["target"] or link["source"]).partition("#")
        if not target or ":" in target:
            return link[0]
        path = posixpath.normpath(posixpath.join(folder, target))
        path = f"{path}/README.md" if (ROOT / path / "README.md").is_file() else path
        found = site_uri(path)
        if found not in files.src_uris:
            return link["label"]
        relative = posixpath.relpath(found, posixpath.dirname(uri) or ".") + hash_sign + anchor
        return relative if link["source"] else f"[{link['label']}]({relative})"

    return LINK.sub(follow, markdown)


def site_uri(path: str) -> str:
    """Where the site keeps a file of the repository."""
    return START if path == "README.md" else path.removeprefix("docs/")


def repository_path(uri: str) -> str:
    """Where the repository keeps a file of the site."""
    if uri == START:
        return "README.md"
    return uri if (ROOT / uri).is_file() else f"docs/{uri}"
