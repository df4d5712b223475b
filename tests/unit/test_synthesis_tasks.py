"""What becomes of the parts of a set, and of tasks that fail."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import ray
import torch

from ims3_ray.engine import tasks
from ims3_ray.engine.sets import write_class
from ims3_ray.errors import Damaged, IncompletePool, UserError
from ims3_ray.io.artifacts import Artifact
from ims3_ray.io.storage import Storage
from ims3_ray.stages.synthesise import check_made, gather_parts
from ims3_ray.synthesis.base import Given

MEMBERS = [("class-0000", [("part-00000", 0), ("part-00001", 1)]), ("class-0001", [("part-00001", 0)])]


def test_parts_are_compared_with_their_hashes_when_they_are_gathered(tmp_path: Path):
    made = Artifact(Storage.at(str(tmp_path)), "synthesise", "0123456789abcdef")
    pixels = torch.arange(4, dtype=torch.uint8).reshape(4, 1, 1, 1).expand(4, 1, 2, 2)
    digests = {
        name: write_class(made, name, part, indices=torch.arange(2))["sha256"]
        for name, part in zip(("part-00000", "part-00001"), pixels.split(2), strict=True)
    }
    entries = gather_parts((made, digests), MEMBERS)
    assert [entry["images"] for entry in entries] == [2, 1]
    shard = Path(made.address, "shards", "part-00001.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x07")
    with pytest.raises(Damaged, match=r"part-00001\.safetensors is damaged: .* the same command makes it again"):
        gather_parts((made, digests), MEMBERS)
    assert not shard.exists()


@pytest.mark.parametrize(
    ("error", "raised", "says"),
    [
        (UserError("lower lr"), UserError, r"synthesise \(DM\): lower lr"),
        (Damaged("a shard is damaged"), Damaged, "^a shard is damaged"),
        (ray.exceptions.WorkerCrashedError(), IncompletePool, r"synthesise \(DM\): WorkerCrashedError: .*the same command"),
        (IncompletePool("it failed on every attempt"), IncompletePool, r"^it failed on every attempt$"),
        (ray.exceptions.OutOfMemoryError("no memory"), IncompletePool, r"synthesise \(DM\): OutOfMemoryError: no memory"),
    ],
)
def test_the_error_of_a_task_is_one_line_that_names_its_stage(
    error: Exception, raised: type[Exception], says: str, monkeypatch: pytest.MonkeyPatch
):
    def fail(task: object) -> None:
        raise error

    monkeypatch.setattr(tasks, "results", fail)
    with pytest.raises(raised, match=says) as found:
        tasks.result_of(None, "synthesise (DM)")
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(("error", "ended"), [(Damaged("a shard is damaged"), ["b", "c"]), (UserError("lower lr"), [])])
def test_tasks_end_before_the_same_work_begins_anew(error: Exception, ended: list[str], monkeypatch: pytest.MonkeyPatch):
    cancelled: list[str] = []
    monkeypatch.setattr(tasks.ray, "cancel", cancelled.append)
    monkeypatch.setattr(tasks.ray, "wait", lambda left, **_: (left, []))
    running = {"a": 1, "b": 2, "c": 3}

    def work() -> None:
        with tasks.ended_if_damaged(running):
            running.pop("a")
            raise error

    with pytest.raises(type(error)):
        work()
    assert cancelled == ended


def test_a_tensor_that_no_set_has_is_named():
    given = cast(Given, SimpleNamespace(num_classes=3))
    made = {"pixels": torch.zeros(2, 1, 4, 4, dtype=torch.uint8), "masks": torch.zeros(2)}
    with pytest.raises(UserError, match=r"'mine' gives masks, which no set has; correct its make\(\)"):
        check_made("mine", made, given, 2, (1, 4, 4))
