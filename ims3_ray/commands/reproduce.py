"""Makes a table or figure of the paper."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from ims3_ray.commands.distill import compare
from ims3_ray.config import CompareConfig, SweepConfig, WorkConfig
from ims3_ray.config.paper import Reproduction, described_names, read_reproduction
from ims3_ray.engine.folder import check_folder
from ims3_ray.errors import UserError
from ims3_ray.io.storage import Storage
from ims3_ray.plan import make_comparison
from ims3_ray.plan.precision import decided
from ims3_ray.plan.reproduction import described, plan_of, share_of
from ims3_ray.report.reproduction import Minutes, figures_of, markdown_of, minutes_of
from ims3_ray.report.results import Results, RunResult
from ims3_ray.report.terminal import print_comparison, print_sweep


def reproduce(reproduction: Reproduction) -> str:
    """Make all runs, which continue where they were interrupted, and return the address of the table beside the printed one.

    Raises the errors of :func:`ims3_ray.commands.distill.compare` and :func:`ims3_ray.search.tune.sweep`.
    """
    check_runs(reproduction)
    found, minutes = dict[str, Results](), dict[str, Minutes]()
    for name, config in reproduction.runs.items():
        print(f"{reproduction.name}, {name}", flush=True)
        if name in reproduction.minutes:
            _check_nothing_is_there(config)
        found[name] = _made(config).results
        if name in reproduction.minutes and isinstance(config, CompareConfig):
            minutes[name] = _minutes(config)
    config = next(iter(reproduction.runs.values()))
    storage, folder = Storage.at(config.storage), f"paper/{reproduction.name}{'-small' if reproduction.small else ''}"
    figures = figures_of(reproduction, found)
    for file, data in figures.items():
        storage.write(f"{folder}/{file}", data)
    drawn = [file for file in figures if file.endswith(".png")]
    storage.write(f"{folder}/table.md", markdown_of(reproduction, found, minutes, drawn).encode())
    return storage.address(f"{folder}/table.md")


def check_runs(reproduction: Reproduction) -> None:
    """Raises :class:`UserError` for a run that would be refused, before any is made."""
    for name, config in reproduction.runs.items():
        if name in reproduction.minutes and isinstance(config, CompareConfig) and len(config.draws) * len(config.budgets) > 1:
            raise UserError(
                f"{reproduction.name} has the minutes of one set of each method; leave draws and budgets at one value each"
            )
        check_folder(decided(config), Storage.at(config.storage))


def _check_nothing_is_there(config: CompareConfig | SweepConfig) -> None:
    """Raises :class:`UserError` if another run has made a part of what shall be timed."""
    storage = Storage.at(config.storage)
    if storage.exists(f"{config.name}/config.yaml"):  # this run itself has begun, and continues
        return
    if begun := [each for each in share_of(plan_of(config), storage).expected.values() if each.missing < len(each.stage.units)]:
        raise UserError(
            f"'{storage.uri}' holds artifacts of another run ({begun[0].stage.title}), whose times would be taken for those of "
            "this one; give an empty storage=…"
        )


def _minutes(config: CompareConfig) -> Minutes:
    """The times of a run, which are stored when it ends: later, other runs may add to its artifacts."""
    storage, path = Storage.at(config.storage), f"{config.name}/minutes.json"
    if (found := storage.read_json(path)) is None:
        found = minutes_of(make_comparison(config), storage)
        storage.write_json(path, found)
    return found


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


def run_words(words: Sequence[str], small: bool = False, dry_run: bool = False) -> None:
    """``ims3 reproduce``: the name of a table or figure and overrides for all of its runs; without words, print the names."""
    if not words:
        if small or dry_run:
            raise UserError("name the table or figure, as in ims3 reproduce table-4 --dry-run; ims3 reproduce lists them")
        print(described_names())
        return
    reproduction = read_reproduction(words[0], words[1:], small)
    if dry_run:
        print(described(reproduction), flush=True)
        check_runs(reproduction)
    else:
        run_reproduction(reproduction)
