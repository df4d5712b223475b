"""Functions that the scripts of ``jobs/`` call with their config: ``run_…`` runs a job, ``plan_…`` yields the texts of its
``--dry-run``: the plan first, then what would refuse the run, which raises :class:`UserError` with the plan already shown."""

from __future__ import annotations

from collections.abc import Iterator

from ims3_ray.commands.checks import refusals
from ims3_ray.commands.distill import compare, distill, evaluate
from ims3_ray.config import CompareConfig, EvaluateConfig, PretrainConfig, RunConfig, SweepConfig
from ims3_ray.plan import make_comparison, make_evaluation, make_plan, make_sweep
from ims3_ray.plan.estimate import describe
from ims3_ray.pretraining.expected import with_expected_weights
from ims3_ray.report.terminal import print_comparison, print_result, print_sweep


def run_distill(config: RunConfig) -> None:
    print_result(distill(config))


def plan_distill(config: RunConfig) -> Iterator[str]:
    with with_expected_weights(config) as expected:
        plan = make_plan(expected.config)
        yield expected.told(describe(plan))
        yield from refusals(config, plan.needed())


def run_evaluate(config: EvaluateConfig) -> None:
    print_result(evaluate(config))


def plan_evaluate(config: EvaluateConfig) -> Iterator[str]:
    plan = make_evaluation(config)
    yield describe(plan)
    yield from refusals(config, plan.needed())


def run_compare(config: CompareConfig) -> None:
    print_comparison(compare(config))


def plan_compare(config: CompareConfig) -> Iterator[str]:
    with with_expected_weights(config) as expected:
        plan = make_comparison(expected.config)
        yield expected.told(describe(plan))
        yield from refusals(config, plan.needed())


def run_sweep(config: SweepConfig) -> None:
    from ims3_ray.search.tune import sweep  # imports Ray Tune, which the other jobs do not need

    print_sweep(sweep(config))


def plan_sweep(config: SweepConfig) -> Iterator[str]:
    from ims3_ray.search.results import describe_sweep
    from ims3_ray.search.tune import needed

    with with_expected_weights(config) as expected:
        plan = make_sweep(expected.config)
        yield expected.told(describe_sweep(plan))
        yield from refusals(config, needed(plan))


def run_pretrain(config: PretrainConfig) -> None:
    from ims3_ray.commands.pretrain import pretrain

    pretrain(config)


def plan_pretrain(config: PretrainConfig) -> Iterator[str]:
    from ims3_ray.commands.pretrain import needed, open_pretraining
    from ims3_ray.pretraining.plan import described

    target, _, _ = open_pretraining(config)
    yield described(target)
    yield from refusals(config, needed(config))
