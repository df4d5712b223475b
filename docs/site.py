"""Hooks of the site (mkdocs.yml): pages that lie in the root of the repository, and the names that docstrings refer to."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""File in the root → page of the site."""


def page_of(name: str) -> str:
    """The text of a file of the root as a page of the site."""
    text = (ROOT / name).read_text("utf-8").replace("](docs/", "](")
    for file, page in PAGES.items():
        text = text.replace(f"]({file})", f"]({page})")
    return text


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of the root. Called by mkdocs."""
    from mkdocs.structure.files import File

    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=page_of(name)))
    return files


ROLE = re.compile(r":(?:class|func|meth|attr|data|mod|exc):\s*<code>~?(?:[\w.]+\.)?(\w+)</code>")
"""A reference of a docstring, such as :class:`~ims3_ray.errors.UserError`, as it stands in the HTML."""


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Show a reference of a docstring as the name alone. Called by mkdocs."""
    return ROLE.sub(r"<code>\1</code>", html)
