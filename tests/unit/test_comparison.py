"""What a comparison says of accuracies: pooled spreads, differences, the table."""

from __future__ import annotations

import math
import random
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scipy import stats

from ims3_ray.config import CompareConfig
from ims3_ray.config.loading import load_config
from ims3_ray.errors import UserError
from ims3_ray.plan import Plan, make_comparison
from ims3_ray.report.comparison import (
    LEVEL,
    accuracy_text,
    comparison_tables,
    difference,
    difference_text,
    holm,
    markdown,
    pooled,
    significant,
)
from ims3_ray.report.html import _compared
from ims3_ray.report.ranking import label_robust_score
from ims3_ray.report.results import summary, summary_text
from ims3_ray.stages.finetune import Finetune
from ims3_ray.synthesis.base import Costs
from ims3_ray.synthesis.dm import DM
from ims3_ray.synthesis.idc import IDC
from ims3_ray.synthesis.rded import RDED
from tests.conftest import tiny_values

CONFIGS = Path(__file__).parents[2] / "configs"


def test_the_spread_of_values_is_numpys():
    found = summary([70.0, 71.0, 75.0])
    assert found["mean"] == pytest.approx(72)
    assert found["std"] == pytest.approx(math.sqrt(7))
    assert found["sem"] == pytest.approx(math.sqrt(7 / 3))
    assert summary([70.0])["sem"] is None
    assert [summary_text(value) for value in (found, summary([70.0]), None)] == ["72.0 ± 2.6", "70.0", ""]


def test_the_error_of_a_mean_over_several_sets_is_that_of_their_means():
    draws = [[70.0, 71.0], [80.0, 81.0], [75.0, 75.5]]
    found = pooled(draws)
    values = [value for students in draws for value in students]
    assert found["mean"] == pytest.approx(statistics.fmean(values))
    assert found["std"] == pytest.approx(statistics.stdev(values))
    assert found["sem"] == pytest.approx(statistics.stdev([70.5, 80.5, 75.25]) / math.sqrt(3))
    assert found["sets"] == [70.5, 80.5, 75.25]
    assert accuracy_text(found) == f"{found['mean']:.1f} ± {found['sem']:.1f}"
    assert pooled([[70.0, 72.0]])["sem"] == pytest.approx(1.0)
    assert accuracy_text(pooled([[70.0, 72.0]])) == "71.0 ± 1.4", "of students"


def test_differences_are_tested_as_scipy_tests_them():
    one, other = [[72.0, 73.0], [74.5, 74.0], [72.0, 72.0]], [[71.0, 71.5], [70.0, 71.0], [71.5, 71.0], [71.0, 71.0]]
    found = difference(pooled(one), pooled(other))
    means = [[statistics.fmean(students) for students in draws] for draws in (one, other)]
    assert found["p"] == pytest.approx(stats.ttest_ind(*means, equal_var=False).pvalue)
    assert found["sem"] == pytest.approx(math.hypot(*(stats.sem(values) for values in means)))
    assert found["mean"] == pytest.approx(statistics.fmean(means[0]) - statistics.fmean(means[1]))
    same = pooled([[70.0, 70.0], [70.0, 70.0]])
    assert difference(same, same)["p"] == 1
    assert difference(same, pooled([[71.0], [71.0]]))["p"] is None, "two equal values on each side are no proof"


def test_a_difference_of_single_values_is_never_significant():
    found = difference(pooled([[72.0]]), pooled([[70.0, 70.2]]))
    assert found == {"mean": pytest.approx(1.9), "sem": None, "p": None}
    assert difference_text(found) == "+1.9"
    assert [significant({"p_holm": p}) for p in (None, 0.051, 0.049)] == [False, False, True]


def test_many_differences_are_judged_together():
    """Holm's step-down procedure, from its definition: the k-th smallest of m is compared with level / (m − k + 1)."""
    p = [0.01, 0.04, None, 0.03, 0.005]
    assert holm(p) == [pytest.approx(value) if value is not None else None for value in (0.03, 0.06, None, 0.06, 0.02)]
    rng = random.Random(0)
    for _ in range(200):
        tests = [rng.random() ** 4 for _ in range(rng.randint(1, 8))]
        refused, ordered = set(), sorted(range(len(tests)), key=tests.__getitem__)
        for rank, i in enumerate(ordered):
            if tests[i] >= LEVEL / (len(tests) - rank):
                break
            refused.add(i)
        assert {i for i, value in enumerate(holm(tests)) if value is not None and value < LEVEL} == refused


def results_of(config: CompareConfig, accuracy: dict[tuple[str, int, int], list[float]]) -> tuple[Plan[Any], dict[str, Any]]:
    """A plan's sets without stages, and results with accuracies by (arm, K, draw)."""
    sets, found = {}, {}
    for (arm, k, draw), values in accuracy.items():
        name = f"{arm}-{k}-{draw}"
        sets[name] = SimpleNamespace(arm=arm, ipc=k, draw=draw)
        row = {"last": summary(values), "best": summary(values)}
        found[name] = {"title": config.arms[arm].title, "content": f"hash{name}", "rows": {"hard/convnet-3": row}}
    return SimpleNamespace(config=config, sets=sets), {"sets": found}  # type: ignore[return-value]


def test_the_table_marks_differences_that_are_sure():
    overrides = ["budgets=[10]", "draws=[0, 1]", "published.ims3={hard/convnet-3: {10: 41.8 ± 0.3}}"]
    arms = ["dit", "ims3", "random"]
    config = load_config(CompareConfig, CONFIGS / "methods" / "all.yaml", [*overrides, "against=dit"])
    config = config.model_copy(
        update={"arms": {name: config.arms[name] for name in config.arms if name in (*arms, "random_real")}}
    )
    accuracy = {
        ("random_real", 10, 0): [60.0, 61.0], ("random_real", 10, 1): [60.2, 60.4],
        ("dit", 10, 0): [70.0, 70.4], ("dit", 10, 1): [70.2, 70.0],
        ("ims3", 10, 0): [70.1, 70.5], ("ims3", 10, 1): [70.0, 70.2],
    }  # fmt: skip
    (table,) = comparison_tables(*results_of(config, accuracy))
    text = markdown(config, [table])
    lines = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("| ")}
    assert "| **-9.8 ± " in lines["Random real"]
    assert "| +0.0 ± " in lines["IMS3"] or "| +0.1 ± " in lines["IMS3"]
    assert "41.8 ± 0.3" in lines["IMS3"]
    assert "`hashims3-10-0` `hashims3-10-1`" in lines["IMS3"]
    assert "the standard error over the sets of all run seeds" in text
    chart = _compared(table)
    assert 'aria-label="Accuracy of each method at 10 images a class with hard/convnet-3"' in chart
    assert all(f">{line['title']}<" in chart for line in table["lines"])
    herding = [70.0, 71.0, 72.0]
    same, found = results_of(config.model_copy(update={"arms": {"dit": config.arms["dit"]}}), {
        ("dit", 10, 0): herding, ("dit", 10, 1): herding,
    })  # fmt: skip
    for each in found["sets"].values():
        each["content"] = "the same"  # what chooses without chance chooses the same whatever the seed
    ((line,),) = ([table["lines"][0]] for table in comparison_tables(same, found))
    assert line["content"] == ["the same"]
    assert line["last"] == {**summary(herding), "count": 3}
    assert "student seeds 0, 1, 2" in text


def test_methods_have_the_scores_of_dd_ranking():
    """Against the formulas of the paper (arXiv:2505.13300), with shares that are written down here."""
    config = load_config(
        CompareConfig, CONFIGS / "compare" / "ablation.yaml", ["budgets=[10]", "draws=[0]", "against=random_real"]
    )
    arms = ("ims3", "full", "random_real")
    config = config.model_copy(update={"arms": {name: config.arms[name] for name in arms}})
    accuracy = {("ims3", 10, 0): [70.0, 70.52], ("full", 10, 0): [87.89], ("random_real", 10, 0): [52.0, 52.52]}
    (table,) = comparison_tables(*results_of(config, accuracy))
    scores = {line["arm"]: line["ranking"] for line in table["lines"]}
    assert scores["full"] is scores["random_real"] is None
    assert scores["ims3"]["hlr"] == pytest.approx(17.63)
    assert scores["ims3"]["ior"] == pytest.approx(18.0)
    alpha = 0.5 * 0.18 - 0.5 * 0.1763
    assert scores["ims3"]["lrs"] == pytest.approx(100 * (math.exp(alpha) - math.exp(-1)) / (math.e - math.exp(-1)))
    text = markdown(config, [table])
    assert "| 17.6 | +18.0 | 27.0 |" in text
    assert "HLR is what the method's set lacks" in text
    assert [label_robust_score(1, -1), label_robust_score(-1, 1)] == pytest.approx([0, 1])

    alone = config.model_copy(update={"arms": {name: config.arms[name] for name in ("ims3", "random_real")}})
    del accuracy["full", 10, 0]
    (table,) = comparison_tables(*results_of(alone, accuracy))  # nothing is said without the whole data
    assert not any(line["ranking"] for line in table["lines"])
    assert "HLR" not in markdown(alone, [table])


def test_draws_are_runs_of_other_seeds_and_budgets_share_pools(tiny_world: Path, tmp_path: Path):
    values = {**tiny_values(tiny_world, tmp_path), "name": "c", "budgets": [1, 2], "draws": [0, 5], "against": "dit"}
    methods = load_config(CompareConfig, CONFIGS / "methods" / "all.yaml").arms
    values["arms"] = {name: arm.model_dump() for name, arm in methods.items() if name in ("dit", "ims3", "random_real")}
    plan = make_comparison(CompareConfig.model_validate(values))
    assert len(plan.sets) == 3 * 2 * 2
    for kind, count in (("encode", 2), ("finetune", 2), ("generate", 4), ("select", 12), ("evaluate", 12)):
        assert sum(stage.name == kind for stage in plan.stages) == count, kind
    seeds = {stage.params["seed"] for stage in plan.stages if stage.name in ("generate", "finetune")}
    assert seeds == {0, 5}
    pools = [stage for stage in plan.stages if stage.name == "generate" and "finetune" in stage.inputs]
    assert all(len(stage.units) == 3 * 2 for stage in pools)  # three subgroups of two images, in units of four
    embeds = [stage for stage in plan.stages if stage.name == "embed" and stage.inputs["images"] in pools]
    assert all(stage.units == stage.inputs["images"].units for stage in embeds)


def test_stages_of_several_seeds_have_different_titles(tiny_world: Path, tmp_path: Path):
    values = {**tiny_values(tiny_world, tmp_path), "name": "c", "budgets": [1], "draws": [0, 5], "against": "dit"}
    methods = load_config(CompareConfig, CONFIGS / "methods" / "all.yaml").arms
    values["arms"] = {name: arm.model_dump() for name, arm in methods.items() if name in ("dit", "ims3")}
    plan = make_comparison(CompareConfig.model_validate(values))
    titles = [stage.title for stage in plan.stages]
    assert len(set(titles)) == len(titles)
    assert {"fine-tune, seed 0", "fine-tune, seed 5", "generate (fine-tuned), seed 5"} <= set(titles)
    tunings = [stage for stage in plan.stages if isinstance(stage, Finetune)]
    assert [tuning.prefix(0) for tuning in tunings] == ["fine_tune_seed_0/", "fine_tune_seed_5/"]


def test_more_images_than_a_class_has_are_refused_by_the_option_that_asks_for_them(tiny_world: Path, tmp_path: Path):
    values = {**tiny_values(tiny_world, tmp_path), "name": "c", "budgets": [2000], "against": "random_real"}
    random = load_config(CompareConfig, CONFIGS / "methods" / "random.yaml").arms
    with pytest.raises(UserError, match=r"fewer than budgets=2000; lower it"):
        make_comparison(CompareConfig.model_validate({**values, "arms": random}))


def test_a_comparison_of_nothing_is_refused(tiny_world: Path, tmp_path: Path):
    with pytest.raises(UserError, match="there is no arm"):
        make_comparison(CompareConfig.model_validate({**tiny_values(tiny_world, tmp_path), "name": "c"}))


@pytest.mark.parametrize("name", ["imagewoof", "imagenette", "imageidc"])
def test_the_papers_figures_stand_beside_rows_that_exist(name: str):
    config = load_config(CompareConfig, CONFIGS / "compare" / f"{name}.yaml")
    assert set(config.published) <= set(config.arms)
    for rows in config.published.values():
        assert set(rows) <= {*config.evaluation.rows, "higher/resnet-18"}
        assert all(set(figures) <= set(config.budgets) for figures in rows.values())
    assert "ims3" in config.published


@pytest.mark.parametrize("path", sorted((CONFIGS / "compare").glob("*.yaml")), ids=lambda path: path.stem)
def test_pixel_methods_have_the_settings_of_their_images(path: Path):
    config = load_config(CompareConfig, path)
    large, synthesis = config.data.size > 64, config.synthesis
    costs = Costs({}, (1300,) * 10, max(config.budgets), config.data.size, config.data.channels)
    assert DM.preparation_bytes(synthesis.of(DM), costs) < 4e9
    idc, rded = synthesis.of(IDC), synthesis.of(RDED)
    assert (idc.network, idc.lr_size) == (("resnetap-10", 224) if large else ("convnet-3", 32))
    assert (rded.factor == 2) == large or "rded" not in config.arms
    made_for_soft_labels = {"rded", "sre2l"} & set(config.arms)
    if made_for_soft_labels and config.evaluation.teacher.weights is None:
        assert any(protocol.labels == "soft" for protocol in config.evaluation.protocols.values())
        assert config.evaluation.teacher.training.epochs == 90
