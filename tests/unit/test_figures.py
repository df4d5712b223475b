"""Charts of the reports: what they draw lies where the values say."""

from __future__ import annotations

import io
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from ims3_ray.report.figures import BOTTOM, HEIGHT, LEFT, WIDTH, curve_chart, line_chart
from ims3_ray.report.plots import curves, heat_map, scatter

FLOOR = HEIGHT - BOTTOM


def lines_of(svg: str) -> list[list[tuple[float, float]]]:
    """Points of every polyline, in pixels."""
    found = ElementTree.fromstring(svg).iter("polyline")
    return [[tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()] for line in found]  # type: ignore[misc]


def texts_of(svg: str) -> list[str]:
    return [text.text or "" for text in ElementTree.fromstring(svg).iter("text")]


def test_a_line_chart_spans_its_axes_and_shows_the_running_mean():
    svg = line_chart([(1, 4.0), (2, 2.0), (3, 0.0)], window=2)
    raw, smooth = lines_of(svg)
    assert raw == [(LEFT, 8.0), (LEFT + (WIDTH - LEFT - 8) / 2, 8 + (FLOOR - 8) / 2), (WIDTH - 8, FLOOR)]
    height = (FLOOR - 8) / 4
    assert [y for _, y in smooth] == pytest.approx([8, 8 + height, 8 + 3 * height], abs=0.05)  # means 4, 3, 1
    assert texts_of(svg) == ["4", "0", "1", "step 3"]


def test_a_line_of_one_or_of_equal_values_is_drawn():
    for points in ([(5, 1.0)], [(1, 2.0), (2, 2.0)]):
        for line in lines_of(line_chart(points)):
            assert all(LEFT <= x <= WIDTH - 8 and 8 <= y <= FLOOR for x, y in line)


def test_curves_share_their_axes_and_names_are_text():
    svg = curve_chart({"a<b> & c": [(1, 10.0), (3, 30.0)], "other": [(2, 20.0)]})
    first, second = lines_of(svg)
    assert first == [(LEFT, FLOOR), (WIDTH - 8, 8.0)]
    assert second == [(LEFT + (WIDTH - LEFT - 8) / 2, 8 + (FLOOR - 8) / 2)]
    assert texts_of(svg) == ["a<b> & c", "other", "30.0", "10.0", "1", "epoch 3"]
    colours = {line.attrib["stroke"] for line in ElementTree.fromstring(svg).iter("polyline")}
    assert len(colours) == 2


def picture(forms: dict[str, bytes]) -> np.ndarray:
    assert ElementTree.fromstring(forms["svg"]).tag.endswith("svg")
    return np.asarray(Image.open(io.BytesIO(forms["png"])).convert("RGB")).astype(int)


def orange(image: np.ndarray) -> np.ndarray:
    """Where the colour of the best is, as rows of (y, x)."""
    return np.argwhere((np.abs(image - [0xD1, 0x73, 0x0F]) < 12).all(axis=2))


def test_a_heat_map_frames_the_best_and_leaves_out_what_is_not_known():
    values = [[1.0, 2.0], [float("nan"), 4.0]]
    found = heat_map(("0.1", "0.2"), ("1", "2"), values, ("alpha", "beta", "accuracy"), best=(0, 1))
    image = picture(found)
    y, x = orange(image).mean(axis=0)
    assert x > image.shape[1] * 0.4
    other = orange(picture(heat_map(("0.1", "0.2"), ("1", "2"), values, ("a", "b", "c"), best=(1, 0))))
    assert other.mean(axis=0)[0] > y
    assert other.mean(axis=0)[1] < x
    text = found["svg"].decode()
    assert text.count("<!-- 4.0 -->") == 1
    assert "nan" not in text
    again = heat_map(("0.1", "0.2"), ("1", "2"), values, ("alpha", "beta", "accuracy"), best=(0, 1))
    assert again == found, "the same values give the same bytes"


def test_curves_and_scatters_name_their_axes_and_the_best_is_marked():
    lines = [("held-out", [70.0, 71.0], [0.5, 0.2])]
    left, right = (curves(("0.1", "0.2"), lines, "lambda", "accuracy", best=best) for best in (0, 1))
    marks = np.argwhere((picture(left) != picture(right)).any(axis=2))[:, 1]
    width = picture(left).shape[1]
    assert marks.min() < width / 3
    assert marks.max() > width * 2 / 3
    for name in ("lambda", "accuracy", "held-out", "0.1", "0.2"):
        assert f"<!-- {name} -->" in left["svg"].decode()
    linear, log = (scatter([(0.01, 1.0), (1.0, 2.0)], "lr", "accuracy", log=flag) for flag in (False, True))
    assert linear["png"] != log["png"]
    assert "<!-- lr -->" in log["svg"].decode()
