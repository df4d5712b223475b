"""Weights through jobs/convert.py: there and back, an adapter merged on the way."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from ims3_ray.io.artifacts import file_hash
from ims3_ray.models.difffit import add_difffit
from ims3_ray.models.dit_files import open_dit
from ims3_ray.models.generator import generator_path, load_generator
from ims3_ray.models.generators.dit import DiTGenerator
from tests.conftest import CLASSES, adapter_of
from tests.e2e.conftest import ROOT, environment


def convert(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "jobs/convert.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)


def test_an_adapter_is_merged_into_a_pipeline_that_keeps_its_class_names(tiny_world: Path, tmp_path: Path):
    tuned = load_generator(tiny_world / "dit.safetensors")
    add_difffit(tuned, scaled_blocks=1)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.full_like(parameter, 0.1))
    save_file(adapter_of(tuned), tmp_path / "adapter.safetensors")
    out = tmp_path / "pipeline"
    done = convert(f"generator={tiny_world / 'dit.safetensors'}", f"adapter={tmp_path / 'adapter.safetensors'}", f"out={out}")
    assert done.returncode == 0, done.stderr
    assert "3 class names" in done.stdout
    path = generator_path(str(out))
    assert open_dit(path).classes == CLASSES
    inputs = (torch.randn(2, 1, 8, 8), torch.tensor([5, 900]), torch.tensor([0, 3]))
    with torch.no_grad():
        torch.testing.assert_close(load_generator(path)(*inputs), tuned(*inputs), rtol=1e-4, atol=1e-5)
    assert convert(f"generator={out}", f"out={out}").returncode == 2
    other = convert(f"generator={out}", f"adapter={tiny_world / 'phi.safetensors'}", f"out={tmp_path / 'no.safetensors'}")
    assert other.returncode == 2
    assert "is no adapter of" in other.stderr
    assert not (tmp_path / "no.safetensors").exists()


def test_names_are_given_to_weights_that_have_none(tiny_world: Path, tmp_path: Path):
    (tmp_path / "names.txt").write_text("one\ntwo\nthree\n")
    named = tmp_path / "named.safetensors"
    done = convert(f"generator={tiny_world / 'dit.safetensors'}", f"classes={tmp_path / 'names.txt'}", f"out={named}")
    assert done.returncode == 0, done.stderr
    assert open_dit(named).classes == ("one", "two", "three")
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    refused = convert(f"generator={named}", f"classes={tmp_path / 'names.txt'}", f"out={tmp_path / 'no.safetensors'}")
    assert (refused.returncode, refused.stderr) == (2, "error: 2 class names for a generator of 3 classes\n")
    assert not (tmp_path / "no.safetensors").exists()


def test_adopted_classes_become_classes_of_the_converted_generator(tiny_world: Path, tmp_path: Path):
    path = tiny_world / "dit.safetensors"
    adopting = DiTGenerator(open_dit(path)).adopting(["fourth"], {"fourth": CLASSES[0]})
    tuned = adopting.load()
    trained = adopting.choose_trained(tuned, "difffit", 1, 1)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if name in trained:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adopted = {name: parameter.detach() for name, parameter in tuned.named_parameters() if name in trained}
    metadata = {"adapter": json.dumps({"added": ["fourth"]})}
    save_file(adopted, tmp_path / "adopted.safetensors", metadata=metadata)
    bias = {"final_layer.linear.bias": adopted["final_layer.linear.bias"] + 1}
    digest = hashlib.sha256((tmp_path / "adopted.safetensors").read_bytes()).hexdigest()
    further = {"adapter": json.dumps({"added": ["fourth"], "adopted": digest, "generator": file_hash(path)})}
    save_file(bias, tmp_path / "further.safetensors", metadata=further)
    out = tmp_path / "own.safetensors"
    both = f"adapter=[{tmp_path / 'adopted.safetensors'}, {tmp_path / 'further.safetensors'}]"
    done = convert(f"generator={path}", both, f"out={out}")
    assert done.returncode == 0, done.stderr
    assert "4 class names" in done.stdout
    generator = open_dit(out)
    assert generator.classes == (*CLASSES, "fourth")
    assert generator.config.null_label == 4
    z, t = torch.randn(5, 1, 8, 8), torch.tensor([1, 200, 400, 600, 999])
    with torch.no_grad():
        tuned.final_layer.linear.bias.add_(1)
        before = tuned(z, t, torch.tensor([0, 1, 2, 4, 3]))  # the known classes, the added one, and no class
        torch.testing.assert_close(load_generator(out)(z, t, torch.tensor([0, 1, 2, 3, 4])), before, rtol=1e-4, atol=1e-5)
    alone = convert(f"generator={path}", f"adapter={tmp_path / 'further.safetensors'}", f"out={tmp_path / 'no.safetensors'}")
    assert alone.returncode == 2
    assert "was trained after an adoption of classes; give the adapter of that adoption before it" in alone.stderr
    other = convert(f"generator={out}", f"adapter={tmp_path / 'further.safetensors'}", f"out={tmp_path / 'no.safetensors'}")
    assert other.returncode == 2
    assert "was trained from other weights than" in other.stderr
    assert not (tmp_path / "no.safetensors").exists()
