"""What Ray Tune runs: a process that waits for a trial and reports. There is one for each, so it imports next to nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray import tune

DEATHS = 3
"""Times that a trial's actor is started again."""


def wait_for_trial(chosen: dict[str, Any], desk: Any, draws: Sequence[int]) -> None:
    """Have the draws of a setting made one after another; report the objective over those so far after each."""
    settings = settings_of(chosen)
    for number, draw in enumerate(draws, start=1):
        tune.report({"objective": _objective(desk, settings, draw), "draws": number})


def settings_of(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The outer setting that Tune gave a trial."""
    return dict(chosen.get("settings", chosen))


def _objective(desk: Any, settings: dict[str, Any], draw: int) -> float:
    deaths = 0
    while True:
        dead = False
        trials = ray.get(desk.enter.remote(settings, draw))
        try:
            return float(ray.get(trials.run.remote(settings, draw)))
        except ray.exceptions.RayActorError:
            dead, deaths = True, deaths + 1
            if deaths > DEATHS:
                raise
        finally:
            desk.leave.remote(settings, draw, dead)
