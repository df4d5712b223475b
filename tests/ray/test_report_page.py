"""The report as a page: what a screen reader and a narrow screen make of it."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from tests.ray.conftest import Run

BROWSER = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)


class Tags(HTMLParser):
    """All tags of a page with their attributes, in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_page_has_a_language_names_for_pictures_headings_in_order_and_no_name_twice(tiny_run: Run):
    tags = Tags(Path(tiny_run.result.report).read_text()).found
    assert next(attributes for tag, attributes in tags if tag == "html")["lang"] == "en"
    assert sum(tag == "main" for tag, _ in tags) == 1
    pictures = [attributes for tag, attributes in tags if tag == "img"]
    assert pictures
    assert all(attributes["alt"] for attributes in pictures)
    charts = [attributes for tag, attributes in tags if tag == "svg"]
    assert charts
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in charts)
    levels = [int(tag[1]) for tag, _ in tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    names = [attributes["id"] for tag, attributes in tags if "id" in attributes and tag != "path"]
    assert len(set(names)) == len(names)


# A browser is a program of the system that no Python package brings; the test above looks at the page without one.
@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
def test_the_page_is_no_wider_than_a_phone(tiny_run: Run, tmp_path: Path):
    assert BROWSER is not None
    page = Path(tiny_run.result.report).read_text()
    measured = tmp_path / "page.html"
    script = "<script>document.title = document.documentElement.scrollWidth + ' of ' + innerWidth</script>"
    measured.write_text(page.replace("</body>", f"{script}</body>"))
    done = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
            f"--user-data-dir={tmp_path / 'browser'}", "--window-size=390,800", "--dump-dom", measured.as_uri(),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    title = re.search(r"<title>(\d+) of (\d+)</title>", done.stdout)
    assert title is not None, done.stderr[-500:]
    width, window = int(title[1]), int(title[2])
    assert window <= 500
    assert width <= window
