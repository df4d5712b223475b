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
    settings, deaths, actor = settings_of(chosen), 0, None
    for number, draw in enumerate(draws, start=1):
        while True:
            try:
                actor = actor or ray.get(desk.start.remote())
                objective = float(ray.get(actor.run.remote(settings, draw)))
                break
            except ray.exceptions.ActorDiedError:
                actor, deaths = None, deaths + 1
                if deaths > DEATHS:
                    raise
        tune.report({"objective": objective, "draws": number})


def settings_of(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The outer setting that Tune gave a trial."""
    return dict(chosen.get("settings", chosen))
