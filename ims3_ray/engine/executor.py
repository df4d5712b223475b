"""Runs the incomplete stages of a plan in batches, each stage after its inputs. Does not depend on the kinds of stage."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from ims3_ray.engine.lease import announce
from ims3_ray.engine.stage import Context, Stage
from ims3_ray.errors import Damaged
from ims3_ray.io.files import concurrently
from ims3_ray.io.storage import Storage
from ims3_ray.progress import following
from ims3_ray.tracking import slug


def arranged(stages: Sequence[Stage]) -> list[Stage]:
    """The stages in the order in which they run if none of them is complete."""
    for stage in stages:
        stage.settle()
    waiting, found = list(stages), list[Stage]()
    while waiting:
        batch = next_batch(waiting)
        found += batch
        waiting = [stage for stage in waiting if stage not in batch]
    return found


def next_batch(waiting: Sequence[Stage]) -> list[Stage]:
    """The ``waiting`` stages that run next: stages of one batch whose inputs are complete or are made in the same batch.

    A batch of which every waiting stage can run is preferred, so that few batches are needed; among these one that is made
    for all arms, since arms look at what it makes. Stages with ``runs_last`` are chosen only when no other stage can run.
    """
    batches: dict[Hashable, list[Stage]] = {}
    for stage in waiting:
        batches.setdefault(stage.batch, []).append(stage)
    pending = set(waiting)
    able = {name: runnable(members, pending) for name, members in batches.items()}
    early = {name: members for name, members in able.items() if members and not members[0].runs_last}
    chosen = early or {name: members for name, members in able.items() if members}
    assert chosen, f"no stage can run of {[stage.title for stage in waiting]}"
    whole = [members for name, members in chosen.items() if len(members) == len(batches[name])]
    whole.sort(key=lambda members: members[0].belongs_to_arm)
    return whole[0] if whole else next(iter(chosen.values()))


def runnable(members: Sequence[Stage], pending: set[Stage]) -> list[Stage]:
    """The ``members`` of a batch that can run, each after its inputs. ``pending`` are all stages that are not complete."""
    found = list[Stage]()
    while True:
        more = [
            stage
            for stage in members
            if stage not in found and all(one in found or one not in pending for one in (*stage.inputs.values(), *stage.after))
        ]
        if not more:
            return found
        found += more


REPAIRS = 3
"""Number of times that damaged files are made again before a command gives up."""


def repairing(storage: Storage, work: Callable[[], None]) -> None:
    """Do ``work``, again after each file that it finds to be damaged: such a file then counts as missing."""
    for attempt in range(REPAIRS + 1):
        try:
            work()
            return
        except Damaged as error:
            storage.look_again()
            if attempt == REPAIRS:
                raise
            print(f"note: {error}", flush=True)


def run_stages(context: Context, stages: Sequence[Stage]) -> None:
    """Run every stage that is not complete. What is found to be damaged meanwhile is made again."""
    with following(context.course):
        repairing(context.storage, lambda: _run_missing(context, stages))


def _run_missing(context: Context, stages: Sequence[Stage]) -> None:
    storage = context.storage
    forget_lost(context, stages)
    waiting = [stage for stage in stages if stage.missing(storage)]
    _completed(context, [stage for stage in stages if stage not in waiting])
    held = []  # keeps the receivers alive, and with them their actors
    while waiting:
        batch = next_batch(waiting)
        for stage in batch:
            stage.look_again(storage)  # another job may have made it meanwhile
        running = [stage for stage in batch if stage.missing(storage)]
        waiting = [stage for stage in waiting if stage not in batch]
        if running:
            for stage in running:
                announce(stage.artifact(storage), context.config.name, stage.title)
            context.course.begin(running)
            context.listeners = {}
            for kind in dict.fromkeys(type(stage) for stage in waiting):
                heard = kind.listen(context, [stage for stage in waiting if type(stage) is kind], running)
                for stage, receivers in heard.items():
                    context.listeners.setdefault(stage, []).extend(receivers)
            held.append(context.listeners)
            type(running[0]).run_all(context, running)
            _check_made(storage, running)
        _completed(context, batch)


def _check_made(storage: Storage, stages: Sequence[Stage]) -> None:
    """Raises :class:`Damaged` if the manifest of a stage that has run lacks units: another job, which makes the same artifact,
    has replaced it at the same time."""
    for stage in stages:
        stage.look_again(storage)
        if lost := stage.missing(storage):
            raise Damaged(f"{stage.title}: another job has replaced the record of {lost[0]}; it is looked up again")


def forget_lost(context: Context, stages: Sequence[Stage]) -> None:
    """Look for committed shards that are no longer there, so that the stages make them again, and print which."""
    lost = dict(zip(stages, concurrently(lambda stage: stage.forget_lost(context.storage), stages), strict=True))
    for stage, units in lost.items():
        if units:
            more = f" and {len(units) - 1} more" if len(units) > 1 else ""
            print(f"note: {stage.title}: {units[0]}{more} is no longer in the storage and is made again", flush=True)
    if any(lost.values()):
        for stage in stages:
            stage.forget_key()


def _completed(context: Context, stages: Sequence[Stage]) -> None:
    concurrently(lambda stage: stage.artifact(context.storage).used_by(context.config.name), stages)
    for stage in stages:
        stage.check(context)
        context.tracker.metrics(stage_metrics(stage, context))


def stage_metrics(stage: Stage, context: Context) -> dict[str, float]:
    """Seconds and images/s of a complete stage under names that MLflow accepts."""
    manifest = stage.manifest(context.storage) or {}
    images, seconds = sum(entry.get("images", 0) for entry in manifest["units"].values()), manifest["seconds"]
    label = slug(stage.title)
    rate = {f"images_per_s/{label}": images / seconds} if seconds and images else {}
    return {f"seconds/{label}": seconds, **rate}
