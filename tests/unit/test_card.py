"""The card of a distilled set, and the page of a report, from results that are written down here."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from ims3_ray.config import RunConfig, canonical
from ims3_ray.data.classes import ClassTable
from ims3_ray.report.card import accuracy_rows, chosen_text, dataset_card
from ims3_ray.report.html import render_report
from ims3_ray.report.markdown import plain, table
from ims3_ray.report.results import summary

NAMES = ("cat", "dog|<q>", "eel")


def row(*last: float, val: list[float] | None = None) -> dict[str, Any]:
    found = {"last": summary(last), "best": summary([value + 1 for value in last]), "per_class": [50.0, 60.0, 70.0]}
    found["curve"] = [{"epoch": 1, "loss": 1.5, "test": 40.0}, {"epoch": 4, "loss": 0.5, "test": last[0]}]
    return found | ({"val": summary(val)} if val else {})


@pytest.fixture
def results() -> dict[str, Any]:
    stages = [
        {"stage": "encode", "title": "encode train images", "key": "k1", "seconds": 3.0, "images": 30},
        {"stage": "select", "title": "select (IMS3)", "key": "k2", "seconds": 0.0, "images": 6},
    ]
    return {
        "name": "mine", "finished": "2026-01-02T03:04:05+00:00", "metric": "top-1 accuracy in %", "skipped_images": ["bad.png"],
        "stages": stages,
        "provenance": {
            "version": "1.2", "commit": "c0ffee", "libraries": {"python": "3.11"},
            "command": "jobs/distill.py 'data.path=/secret place/photos' generator=someone/dit",
            "hardware": ["a CPU with torch 2"], "data": {"train": "f00", "test": "ba4"},
            "weights": {"generator /secret/dit.safetensors": "d16e57"},
        },
        "exported": {"arm": "ims3", "held_out": {}},
        "sets": {
            "random": {"title": "Random real", "content": "0" * 16, "images": 6, "rows": {"hard/convnet-3": row(50.0)}},
            "ims3": {
                "title": "IMS3", "content": "abcdef0123456789", "images": 6,
                "rows": {"hard/convnet-3": row(60.0, 62.0, val=[60.5, 61.5])},
            },
        },
    }  # fmt: skip


def config() -> RunConfig:
    values = {"name": "mine", "storage": "/secret/place", "cluster": {"address": "secret:6379"}, "export": "ims3"}
    data = {"path": "/secret place/my photos", "test_path": "../secret/test.parquet", "captions": "~/secret/captions.csv"}
    weights = {"generator": "someone/dit", "encoder": "s3://secret/phi.safetensors"}
    return RunConfig.model_validate({**values, **weights, "data": data, "selection": {"images_per_class": 2}})


def classes() -> ClassTable:
    return ClassTable(NAMES, (0, 1, 2), (10, 10, 10))


def test_accuracies_stand_in_a_row_for_each_set_and_protocol(results: dict[str, Any]):
    assert accuracy_rows(results)[2:] == [
        "| Random real | hard/convnet-3 | 50.0 | 51.0 |  |",
        "| IMS3 | hard/convnet-3 | 61.0 ± 1.4 | 62.0 ± 1.4 | 61.0 ± 0.7 |",
    ]


def test_the_card_has_what_the_hub_reads_and_says_nothing_of_where_it_was_made(results: dict[str, Any]):
    card = dataset_card(config(), classes(), results)
    _, header, body = card.split("---\n", 2)
    (found,) = yaml.safe_load(header)["configs"]
    assert found["data_files"] == [{"split": "train", "path": "data/train-*.parquet"}]
    assert "6 images in 3 classes (cat, dog&#124;&lt;q&gt;, eel)" in body
    assert "arm IMS3" in body
    assert "`abcdef0123456789`" in body
    assert "secret" not in card
    shown = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert shown["selection"]["images_per_class"] == 2
    assert [shown["data"][key] for key in ("path", "test_path", "captions")] == ["my photos", "test.parquet", "captions.csv"]
    assert (shown["generator"], shown["encoder"]) == ("someone/dit", "phi.safetensors")
    assert "- command: jobs/distill.py data.path=photos generator=someone/dit" in body


def test_names_in_markdown_are_text():
    assert plain("a |\n<script>") == "a &#124; &lt;script&gt;"
    assert table(["method", "last"], [[plain("mine | yours"), 3]]) == [
        "| method | last |",
        "|---|---|",
        "| mine &#124; yours | 3 |",
    ]


def test_the_report_shows_every_set_its_curve_and_what_was_left_out(results: dict[str, Any]):
    losses = {
        "fine-tune": [{"step": 1.0, "loss": 2.0, "loss_diffusion": 0.5}, {"step": 2.0, "loss": 1.0, "loss_diffusion": 0.25}]
    }
    page = render_report(
        config(), classes(), results, sheets={"random": b"one", "ims3": b"two"},
        confusions={}, losses=losses, tables={},
    )  # fmt: skip
    for text in (
        "IMS3",
        "61.0 ± 1.4",
        "Random real",
        "bad.png",
        "encode train images",
        "L_Diff",
        "Test accuracy over epochs",
        "abcdef0123456789",
    ):
        assert text in page, text
    assert "dog|&lt;q&gt;" in page
    assert "<q>" not in page
    assert "data:image/png;base64,dHdv" in page, "the sheet lies in the page"
    assert 'src="http' not in page


def test_the_report_says_what_ran_and_nothing_else(results: dict[str, Any]):
    def page(**values: Any) -> str:
        changed = RunConfig.model_validate({**canonical(config()), **values})
        return render_report(changed, classes(), results, sheets={}, confusions={}, losses={}, tables={})

    assert "S3 chooses among" in page()
    assert "DiffFit&#39;s parameters only" in page()
    first = {"title": "DiT", "images": "generated", "select": "first"}
    assert "S3 chooses among" not in page(arms={"random": {**first, "title": "A"}, "ims3": first}, export="ims3")
    lora = page(finetune={"parameters": "lora"})
    assert "low-rank adapters only" in lora
    assert "all parameters" not in lora


def test_every_encoder_has_its_own_row_of_real_images(results: dict[str, Any]):
    samples = {"cat": 0.5, "eel": 0.25}
    results["recognised"] = {
        "pool": {"real": {"cat": 1.0, "eel": 0.9}, "samples": samples},
        "tuned": {"real": {"cat": 1.0, "eel": 0.9}, "samples": samples},
        "pool by other": {"real": {"cat": 0.6, "eel": 0.7}, "samples": samples},
    }  # fmt: skip
    page = render_report(config(), classes(), results, sheets={}, confusions={}, losses={}, tables={})
    rows = re.findall(r"<tr><td>([^<]*)</td><td>(\d+)</td>", page[page.index("What φ recognises") :])
    assert rows[:5] == [("real images", "95"), ("pool", "38"), ("tuned", "38"), ("real images", "65"), ("pool by other", "38")]


def test_the_card_of_a_set_of_all_images_counts_them(results: dict[str, Any]):
    results["sets"]["ims3"]["images"] = 30
    card = dataset_card(config(), classes(), results)
    assert "my photos: 30 images" in card
    assert "images a class" not in card.partition("made by")[0]


def test_the_card_says_what_chose_the_arm(results: dict[str, Any]):
    assert chosen_text(results) == ""
    results["exported"] = {"arm": "random", "held_out": {"ims3": 61.0, "random": 64.25}}
    assert chosen_text(results) == (
        ", chosen by the accuracy of its students on held-out training images: Random real 64.2 %, IMS3 61.0 %"
    )
    assert "(arm Random real, chosen by the accuracy" in dataset_card(config(), classes(), results)
