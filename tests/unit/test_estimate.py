"""What a plan will take against what it took."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ims3_ray.config import ClusterConfig, RunConfig
from ims3_ray.io.storage import Storage
from ims3_ray.plan import make_plan
from ims3_ray.plan.estimate import Expected, Worker, account, describe, expect, hours_of, scaled
from ims3_ray.stages.export import Export
from tests.conftest import tiny_values

GPU, CORES = Worker("pool", cpus=4, gpus=1), Worker("finetune", cpus=2, gpus=0)


def expected(worker: Worker, seconds: float, flops: float, units: int = 1) -> Expected:
    return Expected(Export("make", {}, units=("a", "b")[:units], flops=flops), units, worker, seconds)


def test_hours_are_of_gpus_or_of_cores_and_cost_what_both_do():
    cluster = ClusterConfig(gpu_price=3.0, cpu_price=0.1, gpu_tflops=50, core_gflops=10)
    assert (GPU.flop_rate(cluster), CORES.flop_rate(cluster)) == (50e12, 20e9)
    stages = [expected(GPU, 7200, 0), expected(CORES, 1800, 0), expected(GPU, 3600, 0)]
    assert hours_of(stages) == {"GPU": 3.0, "core": 1.0}
    assert sum(stage.money(cluster) for stage in stages) == pytest.approx(3 * 3.4 + 0.5 * 0.2)
    cluster = ClusterConfig(gpu_price={"pool": 1.0, "finetune": 2.0}, cpu_price=None)
    assert sum(stage.money(cluster) for stage in stages) == pytest.approx(3.0)


def test_the_account_says_by_how_much_the_estimate_was_off_and_which_rate_would_have_been_right():
    cluster = ClusterConfig(gpu_tflops=50, gpu_price=2.0)
    done, not_run = expected(GPU, 3600, 50e12 * 3600), expected(GPU, 99, 1.0)
    found = account([done, not_run], {done.stage: 7200.0}, cluster)
    gpu = found["devices"]["GPU"]
    assert (gpu["expected_hours"], gpu["hours"], gpu["error"]) == (1.0, 2.0, -0.5)
    assert gpu["sustained"] == pytest.approx(25e12)
    assert (found["expected_money"], found["money"]) == (2.0, 4.0)
    assert found["lines"] == [
        "took 2 GPU-hours, start-up included; the estimate was 1 (-50%); cluster.gpu_tflops=25 would have been right",
        "cost 4.00; the estimate was 2.00",
    ]
    assert account([done], {}, cluster)["lines"] == []
    continued = replace(done, whole=False)
    assert account([continued], {continued.stage: 9.0}, cluster)["lines"] == []  # a part of it was made before


def test_what_is_decoded_is_no_floating_point_work():
    cluster = ClusterConfig(core_gflops=10)
    encode, embed = replace(expected(CORES, 300.0, 0), decoding=300.0), expected(CORES, 50.0, 1e12)
    found = account([encode, embed], {encode.stage: 300.0, embed.stage: 25.0}, cluster)
    assert found["devices"]["core"]["sustained"] == pytest.approx(1e12 / 50)  # 25 s of two cores
    assert "would have been right" not in account([encode], {encode.stage: 300.0}, cluster)["lines"][0]


def test_what_is_there_is_not_counted_again(tiny_world: Path, tmp_path: Path):
    plan = make_plan(RunConfig.model_validate(tiny_values(tiny_world, tmp_path, cluster={"cpu_price": 36.0})))
    storage = Storage.at(str(tmp_path))
    before = expect(plan, storage)
    assert {e.stage.title: e.missing for e in before}["generate (fine-tuned)"] == 6
    pixels = next(e for e in before if e.stage.title == "encode train images")
    assert pixels.stored == 90 * 8 * 8  # 30 images of each of 3 classes
    total = sum(e.seconds for e in before)
    text = describe(plan)
    assert f"costs {total / 3600 * 36:.2f} at cluster.cpu_price=36" in text
    made = next(e.stage for e in before if e.stage.title == "generate (fine-tuned)")
    made.artifact(storage).commit({"units": {unit: {} for unit in made.units[:3]}, "seconds": 1.0})
    after = next(e for e in expect(plan, storage) if e.stage is made)
    assert (after.missing, after.flops) == (3, made.flops / 2)
    assert "3/6 units" in describe(plan)


@pytest.mark.parametrize(("value", "text"), [(24.41e18, "24.4 E"), (999.0, "999 "), (1500, "1.5 k"), (0, "0 ")])
def test_large_numbers_have_prefixes(value: float, text: str):
    assert scaled(value) == text
