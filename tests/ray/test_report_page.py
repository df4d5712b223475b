"""The report as a page: what a screen reader and a narrow screen make of it."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from tests.pages import DARK, DESKTOP, PHONE, needs_browser, shown, violations
from tests.ray.conftest import Run


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


@needs_browser
def test_the_page_is_no_wider_than_a_phone(tiny_run: Run, tmp_path: Path):
    script = "document.title = document.documentElement.scrollWidth + ' of ' + innerWidth"
    told = shown(Path(tiny_run.result.report), script, tmp_path, PHONE)
    title = re.search(r"<title>(\d+) of (\d+)</title>", told)
    assert title is not None, told[-500:]
    width, window = int(title[1]), int(title[2])
    assert window <= 500
    assert width <= window


@needs_browser
@pytest.mark.parametrize(("size", "flags"), [(DESKTOP, ()), (DESKTOP, DARK), (PHONE, ())], ids=["desktop", "dark", "phone"])
def test_the_page_breaks_no_rule_of_accessibility(tiny_run: Run, tmp_path: Path, size: tuple[int, int], flags: tuple[str, ...]):
    assert violations(Path(tiny_run.result.report), tmp_path, size, flags) == []
