"""Damaged storage: what is lost or altered is made again by the same command, or named in one line; never used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ims3_ray import RunConfig, UserError, distill
from ims3_ray.commands.artifacts import ArtifactsConfig
from ims3_ray.commands.artifacts import run as artifacts
from ims3_ray.errors import IncompletePool
from tests.ray.conftest import Run, copy_of


def finished(config: RunConfig) -> dict[str, Any]:
    return json.loads((Path(config.storage) / config.name / "results.json").read_text())


def artifact(config: RunConfig, kind: str, title: str) -> Path:
    """Folder of the artifact of a stage of a finished run."""
    (key,) = {row["key"] for row in finished(config)["stages"] if row["stage"] == kind and title in row["title"]}
    return Path(config.storage) / "artifacts" / kind / key


def first_shard(folder: Path) -> Path:
    return sorted(file for file in (folder / "shards").iterdir() if file.suffix != ".json")[0]


def flip(file: Path) -> None:
    """Change forty bytes in the middle of a file, as a failing disk does."""
    data = bytearray(file.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 40] = bytes(255 - byte for byte in data[middle : middle + 40])
    file.write_bytes(data)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def again(config: RunConfig) -> dict[str, Any]:
    """Results of the same command after its results were deleted, so that it has to read what it used."""
    (Path(config.storage) / config.name / "results.json").unlink(missing_ok=True)
    return distill(config).results


def contents(results: dict[str, Any]) -> dict[str, str]:
    return {name: found["content"] for name, found in results["sets"].items()}


def test_damaged_shards_of_what_is_published_are_made_again(
    tiny_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):  # fmt: skip
    """One shard is altered, one is cut short, two are deleted."""
    config = copy_of(tiny_run, tmp_path)
    places = [("select", "IMS3"), ("export", "export"), ("select", "Random real"), ("evaluate", "DiT + S3")]
    shards = [first_shard(artifact(config, kind, title)) for kind, title in places]
    whole = [shard.read_bytes() for shard in shards]
    damages: list[Callable[[Path], None]] = [flip, truncate, Path.unlink, Path.unlink]
    for shard, damage in zip(shards, damages, strict=True):
        damage(shard)
    assert contents(again(config)) == contents(tiny_run.result.results)
    assert [shard.read_bytes() for shard in shards] == whole
    said = capsys.readouterr().out
    assert f"note: {shards[0]} is damaged" in said
    assert "select (Random real): class-0000 is no longer in the storage and is made again" in said
    assert (shards[0].parent / f"{shards[0].name}.damaged").is_file()
    artifacts(ArtifactsConfig(action="verify", storage=str(tmp_path)))


@pytest.mark.slow
def test_altered_shards_that_a_later_stage_needs_are_made_again(tiny_run: Run, tmp_path: Path):
    """The selection is new (another alpha), so it reads embeddings and candidates again."""
    config = copy_of(tiny_run, tmp_path)
    shards = [first_shard(artifact(config, kind, "fine-tuned")) for kind in ("embed", "generate")]
    whole = [shard.read_bytes() for shard in shards]
    for shard in shards:
        flip(shard)
    other = config.model_copy(
        update={"name": "other", "selection": config.selection.model_copy(update={"alpha": 0.9, "beta": 0.1})}
    )
    for _ in range(2):
        try:
            distill(other)
            break
        except IncompletePool as error:
            assert "the same command" in str(error)  # noqa: PT017
    else:
        pytest.fail("the same command did not repair it")
    assert finished(other)["sets"]["dit"]["content"] == finished(config)["sets"]["dit"]["content"]
    assert [shard.read_bytes() for shard in shards] == whole


@pytest.mark.slow
def test_altered_real_images_are_decoded_again(tiny_run: Run, tmp_path: Path):
    config = copy_of(tiny_run, tmp_path)
    shards = sorted((artifact(config, "encode", "train") / "shards").glob("*.safetensors"))
    whole = [shard.read_bytes() for shard in shards]
    for shard in shards:
        flip(shard)
    shutil.rmtree(tmp_path / "artifacts" / "select")
    for _ in shards:  # a command repairs what it comes across
        try:
            assert contents(again(config)) == contents(tiny_run.result.results)
            break
        except UserError as error:
            assert "the same command makes it again" in str(error)  # noqa: PT017
    read = [shard.read_bytes() == before for shard, before in zip(shards, whole, strict=True)]
    assert any(read)


def test_an_artifact_that_was_deleted_is_made_again(tiny_run: Run, tmp_path: Path):
    """Notes of the pool's units lie beside its images; they do not stand for embeddings that are gone."""
    config = copy_of(tiny_run, tmp_path)
    shutil.rmtree(tmp_path / "artifacts" / "embed")
    shutil.rmtree(tmp_path / "artifacts" / "select")
    results = again(config)
    assert contents(results) == contents(tiny_run.result.results)
    artifacts(ArtifactsConfig(action="verify", storage=str(tmp_path)))


def test_damaged_manifests_and_notes_count_as_missing(
    tiny_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):  # fmt: skip
    config = copy_of(tiny_run, tmp_path)
    places = [("select", "IMS3"), ("generate", "fine-tuned"), ("embed", "pretrained")]
    manifests = [artifact(config, kind, title) / "manifest.json" for kind, title in places]
    notes = sorted((manifests[1].parent / "shards").glob("*.json"))
    for file in (*manifests, notes[0]):
        truncate(file)
    assert contents(again(config)) == contents(tiny_run.result.results)
    said = capsys.readouterr().out
    for manifest in manifests:
        assert f"note: {manifest} is damaged and counts as missing" in said
        assert json.loads(manifest.read_text())["units"]


def test_damaged_results_are_published_again(tiny_run: Run, tmp_path: Path):
    config = copy_of(tiny_run, tmp_path)
    truncate(tmp_path / config.name / "results.json")
    distill(config)
    assert finished(config)["sets"] == tiny_run.result.results["sets"]


def test_a_damaged_config_is_one_line(tiny_run: Run, tmp_path: Path):
    config = copy_of(tiny_run, tmp_path)
    for text in ("{[", "just text", ""):
        (tmp_path / config.name / "config.yaml").write_text(text)
        with pytest.raises(UserError, match=r"config\.yaml' is damaged.*delete the folder") as refused:
            distill(config)
        assert "\n" not in str(refused.value)
    shutil.rmtree(tmp_path / config.name)
    assert contents(distill(config).results) == contents(tiny_run.result.results)


def test_artifacts_are_listed_verified_repaired_and_pruned(
    tiny_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):  # fmt: skip
    config = copy_of(tiny_run, tmp_path)

    def said(action: str, **more: Any) -> str:
        artifacts(ArtifactsConfig.model_validate({"action": action, "storage": str(tmp_path), **more}))
        return capsys.readouterr().out

    count = len(list((tmp_path / "artifacts").glob("*/*")))
    listed = said("list").splitlines()
    assert len(listed) == count + 2
    assert all(line.endswith(config.name) for line in listed[1:-1])
    assert said("verify") == f"{count} artifacts are intact\n"
    assert said("prune", older_than_days=0).startswith("0 artifacts that no run uses")

    pool = artifact(config, "generate", "pretrained")
    shard = first_shard(pool)
    flip(shard)
    lost = first_shard(artifact(config, "embed", "pretrained"))
    lost.unlink()
    with pytest.raises(IncompletePool, match="2 units or manifests are damaged or lost"):
        said("verify")
    assert f"{pool}: {shard.stem} is damaged (shards/{shard.name})" in capsys.readouterr().out
    assert f"{pool}: 1 units count as missing" in said("repair")
    assert said("verify") == f"{count} artifacts are intact\n"
    assert contents(again(config)) == contents(tiny_run.result.results)
    assert shard.is_file()
    assert not lost.is_file() or lost.stat().st_size

    shutil.rmtree(tmp_path / config.name)
    assert f"{count} artifacts that no run uses" in said("prune", older_than_days=0, dry_run=True)
    assert len(list((tmp_path / "artifacts").glob("*/*"))) == count
    assert "0 artifacts that no run uses" in said("prune")  # all are younger than a week
    said("prune", older_than_days=0)
    assert not list((tmp_path / "artifacts").glob("*/*"))
