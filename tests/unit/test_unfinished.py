"""States of units that have begun, and the progress that is shown of them."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from ims3_ray.engine import unfinished
from ims3_ray.engine.unfinished import Shares, Unfinished
from ims3_ray.io.artifacts import Artifact
from ims3_ray.io.storage import Storage
from ims3_ray.progress import Progress


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return Artifact(Storage.at(str(tmp_path)), "synthesise", "0123456789abcdef")


def test_a_state_is_kept_until_its_unit_is_finished(artifact: Artifact):
    unit = Unfinished(artifact, "part-00000")
    assert unit.state() is None
    assert unit.done() == 0
    unit.save(b"first", 0.25)
    unit.save(b"second", 0.5)
    again = Unfinished(artifact, "part-00000")
    assert again.state() == b"second"
    assert again.done() == 0.5
    assert artifact.stems() == {}
    again.forget()
    assert artifact.shards() == set()
    again.forget()


def test_a_damaged_state_counts_as_none(artifact: Artifact, capsys: pytest.CaptureFixture[str]):
    unit = Unfinished(artifact, "part-00000")
    unit.save(b"a state", 0.5)
    path = Path(artifact.address, "shards", "part-00000.state")
    path.write_bytes(path.read_bytes()[:-1])
    assert unit.state() is None
    assert "the saved state of part-00000" in capsys.readouterr().out
    assert artifact.shards() == set()


def test_progress_counts_the_shares_of_units_that_have_begun(artifact: Artifact, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(unfinished, "LOG_EVERY_S", 0.0)
    monkeypatch.setattr("ims3_ray.progress.LOG_EVERY_S", 0.0)
    begun, stream = [Unfinished(artifact, "a"), Unfinished(artifact, "b")], io.StringIO()
    with Progress("synthesise", 3, "parts", stream) as progress:
        shares = Shares(progress)
        shares.look(begun)
        begun[0].save(b"", 0.5)
        begun[1].save(b"", 0.125)
        shares.look(begun)
        shares.look(begun)  # nothing has changed
        begun[0].forget()
        shares.finish(begun[:1])
        begun[1].save(b"", 0.75)
        shares.look(begun[1:])
    lines = stream.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines[1:-1]] == [
        "synthesise: 0.62/3 parts", "synthesise: 1.12/3 parts", "synthesise: 1.75/3 parts",
    ]  # fmt: skip


def test_units_that_cost_more_count_for_more(artifact: Artifact, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ims3_ray.progress.LOG_EVERY_S", 0.0)
    stream, units = io.StringIO(), [Unfinished(artifact, "long"), Unfinished(artifact, "short")]
    with Progress("synthesise", 100, "%", stream) as progress:
        shares = Shares(progress, {units[0]: 90.0, units[1]: 10.0}.__getitem__)
        shares.finish(units[:1])
    assert "synthesise: 90/100 %" in stream.getvalue()
