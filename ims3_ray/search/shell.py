"""The function that Ray Tune runs: it waits for a trial and reports the objective. Each trial has a process for it, so this
module imports next to nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray import tune

DEATHS = 3
"""Times that a trial's actor is restarted before the trial fails."""


def wait_for_trial(chosen: dict[str, Any], board: Any, draws: Sequence[int]) -> None:
    """Run the draws of a setting one after another; after each, report the objective over the draws so far."""
    settings, deaths, actor = settings_of(chosen), 0, None
    for number, draw in enumerate(draws, start=1):
        while True:
            try:
                actor = actor or ray.get(board.start.remote())
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
