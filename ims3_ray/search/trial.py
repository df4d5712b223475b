"""One trial of a search: fine-tune, generate the pool, select by every inner setting, score each distinct selection once."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import ray

from ims3_ray.cluster.joining import here, results
from ims3_ray.config import SweepConfig
from ims3_ray.config.sweep import Settings, title_of, trial_title
from ims3_ray.engine.executor import arranged, run_stages
from ims3_ray.engine.planner import Planner
from ims3_ray.engine.stage import Context, Stage
from ims3_ray.errors import UserError
from ims3_ray.io.storage import Storage
from ims3_ray.plan.arms import chosen_of, set_of
from ims3_ray.plan.sweep import Question, Trial, before, make_trial
from ims3_ray.report.results import stage_row
from ims3_ray.search.records import Record, error_path, objective_of, read_records, record_path, settings_path
from ims3_ray.selection import SubgroupSelector
from ims3_ray.selection.grid import Weighed
from ims3_ray.stages.evaluate import plan_rows
from ims3_ray.stages.s3 import S3Selector
from ims3_ray.stages.select import Select, chosen_by, commit_chosen, parts_of
from ims3_ray.tracking import Untracked

MOST_MAKERS = 100
"""Total number of actors that are started for shared stages. If one dies after that, its error is raised."""
Groups = tuple[int, ...]
"""Index of the chosen subgroup of each class."""
Choice = tuple[int, Question]
"""Position of the first inner setting that leads to a selection, and the question that this setting belongs to."""


@dataclass(frozen=True)
class Shared:
    """The arguments of all trials."""

    config: SweepConfig
    storage: Storage
    fingerprints: dict[str, str]
    """Fingerprints of the data, which are computed once for all trials."""
    shared_stages: bool
    """Whether several trials may need the same stage, of a kind that only one of them may make."""
    students: int
    """Largest number of students that a trial trains at a time. More than its share of the cluster can hold would delay the
    students of other trials."""


class TrialBoard:
    """An actor beside the driver that starts the actors of the trials and keeps their messages until the driver reads them."""

    def __init__(self, shared: Shared) -> None:
        self.shared = shared
        self.makers: dict[str, tuple[int, Any]] = {}
        """Key of a stage → the number (in the order in which actors were started) and the handle of the actor that makes it."""
        self.started = 0
        self.lines: list[str] = []

    def start(self) -> Any:
        """Start a :class:`TrialActor`, which ends when no handle of it is left."""
        return on_this_node(TrialActor).remote(self.shared, ray.get_runtime_context().current_actor)

    def maker(self, key: str, dead: int = 0) -> tuple[int, Any]:
        """Number and handle of the actor that makes the stage with this key for all trials. A new actor is started if there is
        none, or if it is number ``dead``."""
        if key not in self.makers or self.makers[key][0] == dead:
            self.started += 1
            self.makers[key] = (self.started, self.start())
        return self.makers[key]

    def made(self, key: str) -> None:
        """Let go of the actor that has made the stage with this key: it ends when no trial waits for it any more."""
        self.makers.pop(key, None)

    def report(self, line: str) -> None:
        self.lines.append(line)

    def read(self) -> list[str]:
        """The messages since the last call."""
        lines, self.lines = self.lines, []
        return lines


class TrialActor:
    """Runs the draws of a trial one after another. If the actor dies, all that is committed is kept."""

    def __init__(self, shared: Shared, board: Any) -> None:
        self.shared, self.board = shared, board
        self.config, self.storage = shared.config, shared.storage
        self.planner = Planner(shared.config, shared.config.selection.images_per_class)
        self.planner.data.fingerprints = shared.fingerprints

    def run(self, settings: Settings, draw: int) -> float:
        """Run a draw, and store its record or its error; returns the objective over the draws up to this one."""
        self.storage.write_json(settings_path(self.config, settings), settings)
        if self.storage.exists(earlier := error_path(self.config, settings)):
            self.storage.delete_file(earlier)
        try:
            self.record(settings, draw)
        except Exception as error:
            self.storage.write(error_path(self.config, settings), _reason(error).encode())
            raise
        draws = self.config.draws[: self.config.draws.index(draw) + 1]
        return objective_of(self.config, read_records(self.config, self.storage, settings, draws))

    def make(self, settings: Settings, draw: int, key: str) -> None:
        """Make a single stage of a trial, the one with this key."""
        trial = make_trial(self.config, self.planner, settings, draw)
        stages = [stage for stage in trial.stages if stage.key(self.storage) == key]
        run_stages(Context(self.config, self.storage, self.planner.classes, Untracked()), stages)

    def _wait_for_maker(self, settings: Settings, draw: int, stage: Stage) -> None:
        """Wait until the actor that makes this shared stage for all trials has made it; later trials find it complete."""
        dead, key = 0, stage.key(self.storage)
        while True:
            dead, maker = ray.get(self.board.maker.remote(key, dead))
            try:
                results(maker.make.remote(settings, draw, key))
                self.board.made.remote(key)
                stage.look_again(self.storage)
                return
            except ray.exceptions.ActorDiedError:
                if dead > MOST_MAKERS:
                    raise

    def record(self, settings: Settings, draw: int) -> Record:
        """The record of a draw, from storage if it has one for the same data, weights and code; otherwise the draw is run."""
        config, storage = self.config, self.storage
        trial = make_trial(config, self.planner, settings, draw)
        path, keys = record_path(config, settings, draw), trial.keys(storage)
        record: Record | None = storage.read_json(path)
        if record is not None and record["keys"] == keys:
            return record
        context = Context(config, storage, self.planner.classes, Untracked(), most_tasks=self.shared.students)
        if missing := [stage.title for stage in trial.stages if stage.belongs_to_arm and stage.missing(storage)]:
            self._say(trial, ", ".join(missing))
        if self.shared.shared_stages:
            for stage in [stage for stage in trial.stages if stage.exclusive and stage.missing(storage)]:
                self._wait_for_maker(settings, draw, stage)
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
        own = [stage for stage in trial.stages if stage.belongs_to_arm]
        stages = [stage_row(stage, storage) for stage in [*own, *evaluated]]
        record = {
            "settings": settings, "draw": draw, "keys": keys, "selections": selections, "points": points, "stages": stages,
        }  # fmt: skip
        storage.write_json(path, record)
        return record

    def _say(self, trial: Trial, what: str) -> None:
        draw = f", draw {trial.draw}" if len(self.config.draws) > 1 else ""
        self.board.report.remote(f"{trial_title(trial.settings)}{draw}: {what}")

    def _selectors(self, context: Context, trial: Trial) -> dict[Stage, S3Selector]:
        """The S3 selectors of the judge and of each question. They are plain objects in this actor, since no other process
        needs them."""
        found: dict[Stage, S3Selector] = {}
        for stage in {trial.judge, *(question.stage for question in trial.questions)}:
            assert isinstance(stage, Select)
            found[stage] = S3Selector(parts_of(context, stage), cast(SubgroupSelector, stage.selector))
            if lost := found[stage].missing():
                raise UserError(f"{stage.title}: {len(lost)} embedding shards are gone from the storage, e.g. {lost[0][1]}")
        return found

    def _look(self, trial: Trial, selectors: Mapping[Stage, S3Selector]) -> tuple[list[dict[str, Any]], dict[Groups, Choice]]:
        """The points, and the distinct selections with the first point that leads to each."""
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
        if search.by == "both" and trial.draw != self.config.draws[0]:  # all draws evaluate the same points
            (first,) = read_records(self.config, self.storage, trial.settings, self.config.draws[:1])
            chosen = [point["selection"] for point in first["points"]]
            known = [chosen.index(number) for number, found in enumerate(first["selections"]) if found["rows"]]
            return sorted({points[position]["selection"] for position in known})
        return sorted(order[: {"accuracy": len(order), "s3": 0, "both": search.screened}[search.by]])

    def _commit(
        self, context: Context, trial: Trial, selectors: Mapping[Stage, S3Selector], chosen: Mapping[int, Choice]
    ) -> dict[int, Stage]:  # fmt: skip
        """Make the sets of images of ``chosen``, as a distillation with those settings would; returns their stages."""
        arm, sets = self.config.arms[self.config.arm], {}
        for number, (position, question) in chosen.items():
            title = title_of({**trial.settings, **trial.inner[position]})
            images = set_of(self.planner, f"{self.config.arm} {title}", title, arm, trial.configs[position])
            selected = chosen_of(images)
            assert isinstance(selected, Select)
            if selected.missing(self.storage):
                began, selector = time.monotonic(), selectors[question.stage]
                selection = selector.select(trial.weighing(position))
                assert selection is not None
                commit_chosen(context, selected, *chosen_by(selection, selector.parts["candidates"]), began)
            sets[number] = images
        run_stages(context, arranged([*before(sets.values()), *dict.fromkeys(sets.values())]))
        return sets

    def _evaluate(
        self, context: Context, trial: Trial, sets: Mapping[int, Stage]
    ) -> tuple[dict[int, dict[str, Any]], list[Stage]]:  # fmt: skip
        """Train and test students; returns the hash and accuracies of each set, and the stages that trained the students."""
        k, title = self.config.selection.images_per_class, title_of(trial.settings)
        rows = {
            number: plan_rows(self.planner, f"{title}, selection {number}", images, k) for number, images in sets.items()
        }  # fmt: skip
        stages: list[Stage] = [stage for found in rows.values() for stage in found.values()]
        run_stages(context, arranged([*before(stages), *stages]))
        found = {}
        for number, images in sets.items():
            manifest = images.manifest(self.storage) or {}
            accuracies = {row: self._accuracies(stage) for row, stage in rows[number].items()}
            found[number] = {"content": manifest["content"], "rows": accuracies}
        return found, stages

    def _accuracies(self, stage: Stage) -> dict[str, list[float]]:
        """Accuracies of a row's students. The search decides by ``held_out``: the accuracy of the final weights on held-out
        training images."""
        units = (stage.manifest(self.storage) or {})["units"]
        students = [units[unit] for unit in stage.units]
        found = {kind: [s[kind] for s in students] for kind in ("last", "best", "val") if students[0][kind] is not None}
        if students[0]["val"] is not None:
            found["held_out"] = [s["curve"][-1]["val"] for s in students]
        return found


def _score(trial: Trial, proximity: float, repulsion: float) -> float:
    """Eq. 10 per class with the opposite sign, by the run's own α and β (scaled to the sum 1): higher is better."""
    s = trial.judge.run_config.selection
    return (s.beta * repulsion - s.alpha * proximity) / (s.alpha + s.beta)


def on_this_node(actor: Any) -> Any:
    """An actor class that reserves no resources and runs on this node, outside of what Tune has reserved for a trial."""
    return ray.remote(actor).options(num_cpus=0, scheduling_strategy=here())


def _reason(error: Exception) -> str:
    """The last line of an error's message, without the name of the error's class."""
    last = (str(error).strip() or type(error).__name__).splitlines()[-1]
    return re.sub(r"^(\w+\.)*\w+(Error|Pool): ", "", last)
