"""One trial of a search: fine-tune, draw the pool, look at every inner setting, score each distinct selection once."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from ims3_ray.artifacts import Storage
from ims3_ray.cluster import here, results
from ims3_ray.config import SweepConfig
from ims3_ray.config.sweep import Settings, title_of, trial_title
from ims3_ray.errors import UserError
from ims3_ray.pipeline import run_stages
from ims3_ray.plan.run import RunBuilder
from ims3_ray.plan.sweep import Question, Trial, generator_of, is_own, make_trial
from ims3_ray.results import stage_row
from ims3_ray.search.records import Record, error_path, objective_of, read_records, record_path, settings_path
from ims3_ray.selection.grid import Weighed
from ims3_ray.stages.base import Context, Stage
from ims3_ray.stages.evaluate import run_all
from ims3_ray.stages.s3 import S3Selector
from ims3_ray.stages.select import chosen_by, commit_chosen, parts_of
from ims3_ray.tracking import Untracked

MOST_TUNERS = 100
"""Actors that are started for fine-tunings in all, before one that dies is a failure."""
Groups = tuple[int, ...]
"""Chosen subgroup of each class."""
Choice = tuple[int, Question]
"""Position of the first point that chooses so, and the question that it answered."""


@dataclass(frozen=True)
class Shared:
    """What all trials are given."""

    config: SweepConfig
    storage: Storage
    fingerprints: dict[str, str]
    """Of the data, which is looked at once."""
    same_generator: bool
    """Whether several trials may fine-tune alike."""
    students: int
    """Of a trial at a time: what is beyond its share of the cluster would keep other trials from starting theirs."""


class Desk:
    """An actor beside the driver that starts those of the trials and keeps what they say until the driver asks."""

    def __init__(self, shared: Shared) -> None:
        self.shared = shared
        self.tuners: dict[str, tuple[int, Any]] = {}
        """What is fine-tuned → which actor does it: the how manieth, and the actor."""
        self.started = 0
        self.lines: list[str] = []

    def start(self) -> Any:
        """A :class:`TrialActor`. It ends when nobody holds it."""
        return on_this_node(TrialActor).remote(self.shared, ray.get_runtime_context().current_actor)

    def tuner(self, settings: Settings, draw: int, dead: int = 0) -> tuple[int, Any]:
        """Of all trials that fine-tune alike the one that does it, with its number; another one if that is ``dead``."""
        name = generator_of(settings, draw)
        if name not in self.tuners or self.tuners[name][0] == dead:
            self.started += 1
            self.tuners[name] = (self.started, self.start())
        return self.tuners[name]

    def say(self, line: str) -> None:
        self.lines.append(line)

    def read(self) -> list[str]:
        """What was said since the last time."""
        lines, self.lines = self.lines, []
        return lines


class TrialActor:
    """Runs the draws of a trial one after another. If it dies, nothing is lost that is committed."""

    def __init__(self, shared: Shared, desk: Any) -> None:
        self.shared, self.desk = shared, desk
        self.config, self.storage = shared.config, shared.storage
        self.builder = RunBuilder(shared.config, shared.config.selection.images_per_class)
        self.builder.fingerprints = shared.fingerprints

    def run(self, settings: Settings, draw: int) -> float:
        """The objective over the draws up to this one, whose record then lies on storage; so does an error."""
        self.storage.write(settings_path(self.config, settings), json.dumps(settings).encode())
        try:
            self.record(settings, draw)
        except Exception as error:
            self.storage.write(error_path(self.config, settings), _reason(error).encode())
            raise
        draws = self.config.draws[: self.config.draws.index(draw) + 1]
        return objective_of(self.config, read_records(self.config, self.storage, settings, draws))

    def finetune(self, settings: Settings, draw: int) -> None:
        """The fine-tuning of a trial alone."""
        trial = make_trial(self.config, self.builder, settings, draw)
        stages = [stage for stage in trial.stages if stage.kind == "finetune"]
        run_stages(Context(self.config, self.storage, self.builder.classes, Untracked()), stages)

    def _wait_for_tuner(self, settings: Settings, draw: int) -> None:
        """Trials that fine-tune alike leave it to one actor, which has it from the second time on."""
        dead = 0
        while True:
            dead, tuner = ray.get(self.desk.tuner.remote(settings, draw, dead))
            try:
                results(tuner.finetune.remote(settings, draw))
                return
            except ray.exceptions.ActorDiedError:
                if dead > MOST_TUNERS:
                    raise

    def record(self, settings: Settings, draw: int) -> Record:
        """What a draw found; at once if it is on storage and of the same data, weights and code."""
        config, storage = self.config, self.storage
        trial = make_trial(config, self.builder, settings, draw)
        path, keys = record_path(config, settings, draw), trial.keys(storage)
        if storage.exists(path):
            record: Record = json.loads(storage.read(path))
            if record["keys"] == keys:
                return record
        context = Context(config, storage, self.builder.classes, Untracked())
        if missing := [stage.title for stage in trial.stages if is_own(stage) and stage.missing(storage)]:
            self._say(trial, ", ".join(missing))
        if self.shared.same_generator and any(s.kind == "finetune" and s.missing(storage) for s in trial.stages):
            self._wait_for_tuner(settings, draw)
        run_stages(context, trial.stages)
        selectors = self._selectors(context, trial)
        points, chosen = self._look(trial, selectors)
        groups = list(chosen)
        scores = [_score(trial, *terms) for terms in selectors[trial.judge].terms(groups)]
        worth = self._worth(trial, scores, points)
        self._say(trial, f"{len(groups)} distinct selections for {len(points)} points, of which {len(worth)} are evaluated")
        sets = self._commit(context, trial, selectors, {number: chosen[groups[number]] for number in worth})
        accuracies, evaluated = self._evaluate(context, trial, sets)
        selections = [
            {"groups": groups[number], "score": score, **accuracies.get(number, {"content": None, "rows": {}})}
            for number, score in enumerate(scores)
        ]
        own = [stage for stage in trial.stages if is_own(stage)]
        stages = [stage_row(stage, storage) for stage in [*own, *evaluated]]
        record = {
            "settings": settings, "draw": draw, "keys": keys, "selections": selections, "points": points, "stages": stages,
        }  # fmt: skip
        storage.write(path, json.dumps(record).encode())
        return record

    def _say(self, trial: Trial, what: str) -> None:
        draw = f", draw {trial.draw}" if len(self.config.draws) > 1 else ""
        self.desk.say.remote(f"{trial_title(trial.settings)}{draw}: {what}")

    def _selectors(self, context: Context, trial: Trial) -> dict[Stage, S3Selector]:
        """Of each question, in this actor itself: they live for a moment and are asked by nobody else."""
        found = {}
        for stage in {trial.judge, *(question.stage for question in trial.questions)}:
            found[stage] = S3Selector(parts_of(context, stage), stage.run.selection)
            if lost := found[stage].missing():
                raise UserError(f"{stage.title}: {len(lost)} embedding shards are gone from the storage, e.g. {lost[0][1]}")
        return found

    def _look(self, trial: Trial, selectors: Mapping[Stage, S3Selector]) -> tuple[list[dict[str, Any]], dict[Groups, Choice]]:
        """The points, and the distinct selections with the first point that chooses so."""
        answers: dict[int, tuple[Weighed, Question]] = {}
        for question in trial.questions:
            weighings = [trial.weighing(position) for position in question.inner]
            for position, found in zip(question.inner, selectors[question.stage].grid(weighings), strict=True):
                answers[position] = (found, question)
        points, chosen = [], dict[Groups, Choice]()
        for position, settings in enumerate(trial.inner):
            found, question = answers[position]
            chosen.setdefault(found.groups, (position, question))
            points.append({
                "settings": settings, "selection": list(chosen).index(found.groups), "proximity": found.proximity,
                "repulsion": found.repulsion,
            })  # fmt: skip
        return points, chosen

    def _worth(self, trial: Trial, scores: Sequence[float], points: Sequence[dict[str, Any]]) -> list[int]:
        """Positions of the selections that students are trained on."""
        search, order = self.config.search, sorted(range(len(scores)), key=lambda i: -scores[i])
        if search.by == "both" and trial.draw != self.config.draws[0]:  # the same points in every draw
            (first,) = read_records(self.config, self.storage, trial.settings, self.config.draws[:1])
            chosen = [point["selection"] for point in first["points"]]
            known = [chosen.index(number) for number, found in enumerate(first["selections"]) if found["rows"]]
            return sorted({points[position]["selection"] for position in known})
        return sorted(order[: {"accuracy": len(order), "s3": 0, "both": search.screened}[search.by]])

    def _commit(
        self, context: Context, trial: Trial, selectors: Mapping[Stage, S3Selector], chosen: Mapping[int, Choice]
    ) -> dict[int, Stage]:  # fmt: skip
        """The sets of images, as a distillation with those settings would make them."""
        arm, sets, k = self.config.arms[self.config.arm], {}, self.config.selection.images_per_class
        for number, (position, question) in chosen.items():
            title = title_of({**trial.settings, **trial.inner[position]})
            images = self.builder.set_of(f"{self.config.arm} {title}", title, arm, trial.configs[position])
            selected = images.inputs["set"] if images.kind == "refine" else images
            if selected.missing(self.storage):
                began, selection = time.monotonic(), selectors[question.stage].select(trial.weighing(position))
                assert selection is not None
                commit_chosen(context, selected, *chosen_by(selection, k), began)
            sets[number] = images
        run_stages(context, [stage for stage in sets.values() if stage.kind == "refine"])
        return sets

    def _evaluate(
        self, context: Context, trial: Trial, sets: Mapping[int, Stage]
    ) -> tuple[dict[int, dict[str, Any]], list[Stage]]:  # fmt: skip
        """Hash and accuracies of each set, and the stages that trained its students."""
        k, title = self.config.selection.images_per_class, title_of(trial.settings)
        rows = {number: self.builder.evaluate(f"{title}, selection {number}", images, k) for number, images in sets.items()}
        stages = [stage for found in rows.values() for stage in found.values()]
        run_all(context, [stage for stage in stages if stage.missing(self.storage)], self.shared.students)
        found = {}
        for number, images in sets.items():
            manifest = images.manifest(self.storage) or {}
            accuracies = {row: self._accuracies(stage) for row, stage in rows[number].items()}
            found[number] = {"content": manifest["content"], "rows": accuracies}
        return found, stages

    def _accuracies(self, stage: Stage) -> dict[str, list[float]]:
        """Of a row's students: ``held_out`` is the accuracy of the final weights on held-out training images, which decides."""
        units = (stage.manifest(self.storage) or {})["units"]
        students = [units[unit] for unit in stage.units]
        found = {kind: [s[kind] for s in students] for kind in ("last", "best", "val") if students[0][kind] is not None}
        if students[0]["val"] is not None:
            found["held_out"] = [s["curve"][-1]["val"] for s in students]
        return found


def _score(trial: Trial, proximity: float, repulsion: float) -> float:
    """Eq. 10 per class with its sign turned, by the run's own weights: higher is better."""
    s = trial.judge.run.selection
    return (s.beta * repulsion - s.alpha * proximity) / (s.alpha + s.beta)


def on_this_node(actor: Any) -> Any:
    """An actor class that needs no resources and runs beside the driver, outside of what Tune has reserved for a trial."""
    return ray.remote(actor).options(num_cpus=0, scheduling_strategy=here())


def _reason(error: Exception) -> str:
    """The last line of what a trial died of, without the name of its class."""
    last = (str(error).strip() or type(error).__name__).splitlines()[-1]
    return re.sub(r"^(\w+\.)*\w+(Error|Pool): ", "", last)
