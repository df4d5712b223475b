"""What MLflow is told, against its own database; the server that goes away is in tests/e2e/test_sweep.py."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from ims3_ray.config import RunConfig
from ims3_ray.errors import UserError
from ims3_ray.io.storage import Storage
from ims3_ray.tracking import PARENT, Tracker, slug, slugs, tracking_uri


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    return Storage.at(str(tmp_path_factory.mktemp("tracking")))


@pytest.fixture(scope="module")
def client(storage: Storage) -> MlflowClient:
    tracker = Tracker(RunConfig(name="run"), storage)
    tracker.metrics({"a": 1.0, "b": 2.0}, step=3)
    tracker.losses([{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.4, "images_per_s": 7.0}])
    tracker.child("one", {"alpha": 0.4}, {"accuracy": 71.0}, {"curve": [(1, 10.0), (5, 50.0)]})
    tracker.child("two", {"alpha": 0.5}, {}, {}, failed="it diverged")
    tracker.file("note.txt", b"hello")
    tracker.finish("FINISHED")
    assert tracker.complete
    return MlflowClient(tracking_uri(RunConfig(name="run"), storage))


def run_id(storage: Storage, name: str = "run") -> str:
    return storage.read(f"{name}/mlflow_run_id").decode()


def children(client: MlflowClient, storage: Storage) -> dict[str, Any]:
    run = client.get_run(run_id(storage))
    found = client.search_runs([run.info.experiment_id], f"tags.`{PARENT}` = '{run.info.run_id}'")
    assert len({run.info.run_name for run in found}) == len(found)
    return {run.info.run_name: run for run in found}


def test_all_that_is_told_is_there_when_it_has_finished(client: MlflowClient, storage: Storage):
    run = client.get_run(run_id(storage))
    assert run.info.status == "FINISHED"
    assert run.data.params["selection.alpha"] == "0.4"
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "a")] == [(3, 1.0)]
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")] == [(1, 0.5), (2, 0.4)]
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "images_per_s")] == [(2, 7.0)]
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["note.txt"]
    one = children(client, storage)["one"]
    assert (one.info.status, one.data.params, one.data.metrics["accuracy"]) == ("FINISHED", {"alpha": "0.4"}, 71.0)
    assert [(m.step, m.value) for m in client.get_metric_history(one.info.run_id, "curve")] == [(1, 10.0), (5, 50.0)]
    two = children(client, storage)["two"]
    assert (two.info.status, two.data.tags["error"]) == ("FAILED", "it diverged")


def test_an_interrupted_run_goes_on_and_is_told_nothing_twice(client: MlflowClient, storage: Storage):
    before = children(client, storage)
    tracker = Tracker(RunConfig(name="run"), storage)
    tracker.losses([{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.4}, {"step": 3, "loss": 0.3}])
    tracker.child("one", {"alpha": 0.4}, {"accuracy": 71.0}, {})
    tracker.child("two", {"alpha": 0.5}, {"accuracy": 60.0}, {})  # tried again, and it went well
    tracker.child("gone", {}, {}, {}, failed="for now")
    tracker.forget_failure("gone")
    tracker.forget_failure("never there")
    assert tracker.client.get_run(run_id(storage)).info.status == "RUNNING"
    tracker.finish("FAILED")
    run = client.get_run(run_id(storage))
    assert run.info.status == "FAILED"
    assert [m.step for m in client.get_metric_history(run.info.run_id, "loss")] == [1, 2, 3]
    after = children(client, storage)
    assert after["one"].info.run_id == before["one"].info.run_id
    assert (after["two"].info.status, after["two"].data.metrics) == ("FINISHED", {"accuracy": 60.0})
    assert set(after) == {"one", "two"}


def test_what_other_stages_have_made_is_logged_to_a_new_run(client: MlflowClient, storage: Storage):
    config, found = RunConfig(name="changed", tracking={"uri": tracking_uri(RunConfig(name="run"), storage)}), []
    for keys, loss in ((["a", "b"], 0.5), (["a", "b"], 0.5), (["a", "c"], 0.7)):  # the last: its images have changed
        tracker = Tracker(config, storage, keys)
        tracker.losses([{"step": 1, "loss": loss}])
        tracker.finish("FINISHED")
        found.append(run_id(storage, "changed"))
    assert found[0] == found[1] != found[2]
    for run, loss in zip(found[1:], (0.5, 0.7), strict=True):
        assert [(m.step, m.value) for m in client.get_metric_history(run, "loss")] == [(1, loss)]


def test_a_database_that_was_lost_is_told_everything_in_a_new_run(client: MlflowClient, storage: Storage):
    storage.write("other/mlflow_run_id", b"0" * 32)
    tracker = Tracker(RunConfig(name="other", tracking={"uri": tracking_uri(RunConfig(name="run"), storage)}), storage)
    tracker.metrics({"a": 1.0})
    tracker.finish("FINISHED")
    assert tracker.complete
    assert client.get_run(run_id(storage, "other")).data.metrics == {"a": 1.0}


def test_what_the_server_refuses_is_said_once_and_the_rest_is_told(
    client: MlflowClient, storage: Storage, capsys: pytest.CaptureFixture[str]
):  # fmt: skip
    tracker = Tracker(RunConfig(name="run"), storage)
    for _ in range(2):
        tracker.metrics({"no such: name?": 1.0})
    tracker.metrics({"after": 1.0})
    tracker.finish("FINISHED")
    assert not tracker.complete
    said = capsys.readouterr().out
    assert said.count("refuses an entry") == 1
    assert "has not taken everything; nothing is lost" in said
    assert client.get_run(run_id(storage)).data.metrics["after"] == 1.0


def test_a_server_that_does_not_answer_a_new_run_is_an_error_of_one_line(tmp_path: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(UserError, match=r"^MLflow at 'http://127.*' does not take the run \(.*\); check tracking.uri$"):
        Tracker(RunConfig(tracking={"uri": uri}), Storage.at(str(tmp_path)))


def test_titles_that_would_have_one_name_have_different_ones():
    assert slugs(["mine v1", "mine-v1", "mine"]) == ["mine_v1", "mine_v1-1", "mine"]


def test_titles_become_names_that_mlflow_takes():
    assert slug("generate (DiT + S3), 2 steps") == "generate_DiT_and_S3_2_steps"
