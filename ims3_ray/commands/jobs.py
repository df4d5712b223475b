"""Functions that the scripts of ``jobs/`` call with their config: ``run_…`` runs a job, ``plan_…`` describes its plan."""

from __future__ import annotations

from ims3_ray.commands.checks import refusals
from ims3_ray.commands.distill import compare, distill, evaluate
from ims3_ray.config import CompareConfig, EvaluateConfig, PretrainConfig, RunConfig, SweepConfig
from ims3_ray.plan import make_comparison, make_evaluation, make_plan, make_sweep
from ims3_ray.plan.estimate import describe
from ims3_ray.pretraining.expected import with_expected_weights
from ims3_ray.report.terminal import print_comparison, print_result, print_sweep


def run_distill(config: RunConfig) -> None:
    print_result(distill(config))


def plan_distill(config: RunConfig) -> str:
    with with_expected_weights(config) as expected:
        plan = make_plan(expected.config)
        return "\n".join([expected.told(describe(plan)), *refusals(config, plan.needed())])


def run_evaluate(config: EvaluateConfig) -> None:
    print_result(evaluate(config))


def plan_evaluate(config: EvaluateConfig) -> str:
    plan = make_evaluation(config)
    return "\n".join([describe(plan), *refusals(config, plan.needed())])


def run_compare(config: CompareConfig) -> None:
    print_comparison(compare(config))


def plan_compare(config: CompareConfig) -> str:
    with with_expected_weights(config) as expected:
        plan = make_comparison(expected.config)
        return "\n".join([expected.told(describe(plan)), *refusals(config, plan.needed())])


def run_sweep(config: SweepConfig) -> None:
    from ims3_ray.search.tune import sweep  # imports Ray Tune, which the other jobs do not need

    print_sweep(sweep(config))


def plan_sweep(config: SweepConfig) -> str:
    from ims3_ray.search.results import describe_sweep
    from ims3_ray.search.tune import needed

    with with_expected_weights(config) as expected:
        plan = make_sweep(expected.config)
        return "\n".join([expected.told(describe_sweep(plan)), *refusals(config, needed(plan))])


def run_pretrain(config: PretrainConfig) -> None:
    from ims3_ray.commands.pretrain import pretrain

    pretrain(config)


def plan_pretrain(config: PretrainConfig) -> str:
    from ims3_ray.commands.pretrain import needed, open_pretraining
    from ims3_ray.pretraining.plan import described

    target, _, _ = open_pretraining(config)
    return "\n".join([described(target), *refusals(config, needed(config))])
