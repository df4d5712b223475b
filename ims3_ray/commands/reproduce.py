"""Makes a table or figure of the paper."""

from __future__ import annotations

from functools import partial

from ims3_ray.commands.distill import compare
from ims3_ray.config import CompareConfig, SweepConfig, WorkConfig
from ims3_ray.config.paper import Reproduction
from ims3_ray.io.storage import Storage
from ims3_ray.report.reproduction import figures_of, markdown_of
from ims3_ray.report.results import Results, RunResult
from ims3_ray.report.terminal import print_comparison, print_sweep


def reproduce(reproduction: Reproduction) -> str:
    """Make all runs, which continue where they were interrupted, and return the address of the table beside the printed one.

    Raises the errors of :func:`ims3_ray.commands.distill.compare` and :func:`ims3_ray.search.tune.sweep`.
    """
    found = dict[str, Results]()
    for name, config in reproduction.runs.items():
        print(f"{reproduction.name}, {name}", flush=True)
        found[name] = _made(config).results
    config = next(iter(reproduction.runs.values()))
    storage, folder = Storage.at(config.storage), f"paper/{reproduction.name}{'-small' if reproduction.small else ''}"
    for file, data in figures_of(reproduction, found).items():
        storage.write(f"{folder}/{file}", data)
    storage.write(f"{folder}/table.md", markdown_of(reproduction, found).encode())
    return storage.address(f"{folder}/table.md")


def _made(config: CompareConfig | SweepConfig) -> RunResult:
    if isinstance(config, SweepConfig):
        from ims3_ray.search.tune import sweep  # imports Ray Tune, which comparisons do not need

        result = sweep(config)
        print_sweep(result)
        return result
    result = compare(config)
    print_comparison(result)
    return result


def run_reproduction(reproduction: Reproduction) -> None:
    """Make the table or figure and print it, on a node that has CPUs."""
    from ims3_ray.cluster.off_head import run_off_the_head

    run_off_the_head(partial(_reproduce_and_print, reproduction), next(iter(reproduction.runs.values())))


def _reproduce_and_print(reproduction: Reproduction, config: WorkConfig) -> None:
    place = reproduce(reproduction)
    print(f"beside the printed figures: {place}", flush=True)
