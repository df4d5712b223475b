"""Charts of the reports: what they draw lies where the values say."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from ims3_ray.report.figures import COLOURS, INK, accuracy_chart, curve_chart, loss_chart
from ims3_ray.report.plots import curves, heat_map, scatter


def paths_of(svg: str, colour: str) -> list[list[tuple[float, float]]]:
    """Points of every line of a colour, in the units of the SVG."""
    found = []
    for path in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}path"):
        if f"stroke: {colour}" in path.attrib.get("style", "") and path.attrib["d"].count("L") >= 1:
            numbers = [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", path.attrib["d"])]
            found.append(list(zip(numbers[::2], numbers[1::2], strict=True)))
    return found


def texts_of(svg: str) -> list[str]:
    return [text.text or "" for text in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def ratio(points: list[tuple[float, float]], axis: int) -> list[float]:
    """Where points lie between the first and the last along an axis."""
    places = [point[axis] for point in points]
    return [(place - places[0]) / (places[-1] - places[0]) for place in places]


def test_losses_are_drawn_where_they_are_and_so_is_their_running_mean():
    svg = loss_chart([(1, 4.0), (2, 2.0), (3, 0.0)], "L_IM", window=2)
    (raw,) = paths_of(svg, COLOURS[7])
    (means,) = paths_of(svg, COLOURS[0])
    assert ratio(raw, 0) == ratio(means, 0) == pytest.approx([0, 0.5, 1])
    assert ratio(raw, 1) == pytest.approx([0, 0.5, 1])
    assert ratio(means, 1) == pytest.approx([0, 1 / 3, 1])  # means 4, 3, 1
    assert raw[0] == pytest.approx(means[0])
    assert "step" in texts_of(svg)


def test_losses_of_one_step_and_equal_ones_are_drawn():
    for points in ([(5, 1.0)], [(1, 2.0), (2, 2.0)]):
        assert "step" in texts_of(loss_chart(points, "L_Diff"))


def test_curves_share_their_axes_and_names_are_text():
    svg = curve_chart({"a<b> & c": [(1, 10.0), (3, 30.0)], "other": [(2, 20.0), (3, 20.0)]}, "accuracies", "images")
    (first,), (second,) = paths_of(svg, COLOURS[0])[:1], paths_of(svg, COLOURS[1])[:1]
    assert second[0][0] == pytest.approx((first[0][0] + first[1][0]) / 2, abs=0.01)
    assert second[0][1] == pytest.approx((first[0][1] + first[1][1]) / 2, abs=0.01)
    assert {"a<b> & c", "other", "images"} <= set(texts_of(svg))


def test_accuracies_have_bars_of_their_deviation_on_an_axis_that_shows_differences():
    svg = accuracy_chart([("mine", 71.0, 0.5), ("theirs", 70.0, 0.25), ("one", 70.5, 0.0)], "mine", 'the "accuracies"')
    (mine,) = [path for path in paths_of(svg, COLOURS[0]) if path[0][1] == path[1][1]]
    theirs, one = [path for path in paths_of(svg, COLOURS[7]) if path[0][1] == path[1][1]]
    width = theirs[1][0] - theirs[0][0]
    assert mine[1][0] - mine[0][0] == pytest.approx(2 * width, rel=1e-3)
    assert mine[0][0] + mine[1][0] - theirs[0][0] - theirs[1][0] == pytest.approx(4 * width, rel=1e-3)  # 1.0 is twice 2 × 0.25
    assert one[0][0] == one[1][0]
    assert mine[0][1] < theirs[0][1] < one[0][1], "the first is on top"
    root = ElementTree.fromstring(svg)
    assert (root.attrib["role"], root.attrib["aria-label"]) == ("img", 'the "accuracies"')
    assert "mine ◂" in texts_of(svg)
    whole = float(root.attrib["viewBox"].split()[2])
    assert mine[1][0] - theirs[0][0] > whole / 2, "the axis spans what is drawn"


def test_a_figure_waits_for_a_thread_that_is_importing_ipython():
    """In a process of its own, since an import happens once."""
    code = (
        "import builtins, sys, threading, time, types\n"
        "begun = threading.Event()\n"
        "class Finder:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'IPython':\n"
        "            from importlib.machinery import ModuleSpec\n"
        "            return ModuleSpec(name, self)\n"
        "    def create_module(self, spec):\n"
        "        return None\n"
        "    def exec_module(self, module):\n"
        "        begun.set()\n"
        "        time.sleep(1)\n"
        "        module.version_info = (9, 0)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "threading.Thread(target=lambda: __import__('IPython')).start()\n"
        "begun.wait()\n"
        "from ims3_ray.report.plots import scatter\n"
        "print(len(scatter([(1, 2), (2, 3)], 'x', 'y', log=False)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr


def test_charts_take_the_colour_of_the_page_and_repeat_no_names():
    svg = accuracy_chart([("mine", 71.0, 0.5)], None, "x") + loss_chart([(1, 2.0), (2, 1.0)], "y")
    assert "currentColor" in svg
    assert INK not in svg
    assert "#000000" not in svg
    assert '<g id="' not in svg


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


def test_colours_of_a_heat_map_do_not_show_noise():
    """Values that differ by less than two standard deviations have nearly one colour; without a deviation they have all."""
    values = [[70.0, 70.4], [70.2, 70.1]]

    def colours(deviation: float) -> float:
        """How far the green of the four fields spreads."""
        image = picture(heat_map(("a", "b"), ("c", "d"), values, ("rows", "columns", "accuracy"), (0, 1), deviation))
        whole = np.argwhere((image.max(axis=2) - image.min(axis=2)) > 30)
        (top, left), (bottom, right) = whole.min(axis=0), whole.max(axis=0)
        line = image[top + (bottom - top) // 5, left : left + (right - left) // 2, 1]
        return float(np.percentile(line, 95)) - float(np.percentile(line, 5))

    assert colours(0.0) > 3 * colours(2.0)


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
