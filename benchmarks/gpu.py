"""Measures on one GPU what only a GPU can show, and trains generators with all the time that is left.

    python benchmarks/gpu.py OUT                                    ten minutes, with the data embedded in the package
    python benchmarks/gpu.py OUT --data FOLDER --minutes 10         also FOLDER/cifar10-train.parquet, cifar10-test.parquet
    python benchmarks/gpu.py OUT --only machine,tests               some of the steps
    python benchmarks/gpu.py --needs --data FOLDER                  what to copy to a bare machine, and how large it is
    python benchmarks/gpu.py --report OUT                           writes what OUT holds into docs/gpu.md

Each step has a process and a time limit of its own. Its results are written to OUT/results.json at once, so that a step that
fails or is stopped does not affect other results. A second call with the same OUT runs the steps that failed, were stopped or
did not run, and those that --only names; training continues from the weights in OUT. OUT holds at most 8 files of at most
16 MB. Without a GPU the same steps run with small models, as a rehearsal.

Needs PyTorch, torchvision, timm, numpy, pillow, pyarrow, safetensors, pyyaml and pytest; pydantic for all steps but `machine`,
diffusers for the autoencoder, DeepSpeed for one row. Steps report what is missing and leave out the measurements that need it.
Ray and MLflow are not used.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TABLE_S = 2.0
"""Seconds reserved for printing the table at the end."""
MARGIN, MOST_MARGIN_S = 0.1, 8.0
"""A step is asked to finish this share of its time limit, but at most this many seconds, before it is killed."""
SHORTEST_S = 2.5
"""Shortest time limit of a step in seconds; a step with less time is not started."""
LOG_BYTES = 2**20
"""Largest size of the log in bytes; of a longer log only the end is kept."""


@dataclass(frozen=True)
class Step:
    name: str
    share: float
    """Largest share of the whole time that the step may take. The last step also gets the time that the others did not use."""
    modules: tuple[str, ...] = ("pydantic", "timm", "pyarrow", "safetensors", "yaml", "PIL", "numpy")
    """Modules that the step needs besides PyTorch."""


STEPS = (
    Step("machine", 0.05, ("numpy",)),
    Step("tests", 0.16, (*Step.modules, "pytest")),
    Step("sampling", 0.19),
    Step("finetune", 0.12),
    Step("students", 0.08),
    Step("training", 0.40),
)
"""The steps in order of importance, in which they run."""

WHEELS = {
    "pydantic": ("all steps but `machine`", ("pydantic", "pydantic-core", "annotated-types", "typing-inspection")),
    "timm": ("the encoder and the students", ("timm",)),
    "diffusers": ("the autoencoder, in `tests` and `sampling`", ("diffusers", "importlib-metadata", "zipp")),
    "deepspeed": ("one row of `finetune`; built here with DS_BUILD_OPS=0", ("deepspeed", "hjson")),
}
"""Module → what needs it, and the wheels to copy to a machine that has little besides PyTorch."""


class Results:
    """The file ``OUT/results.json``, which is replaced atomically with every change."""

    def __init__(self, out: Path) -> None:
        self.path, self.lock = out / "results.json", threading.Lock()
        self.values: dict[str, Any] = json.loads(self.path.read_text()) if self.path.is_file() else {"steps": {}}

    def step(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.values["steps"].get(name, {})
        return found

    def change(self, name: str, **values: Any) -> None:
        """Set values of a step; the value ``row`` is appended to its rows."""
        with self.lock:
            step = self.values["steps"].setdefault(name, {"rows": []})
            if (row := values.pop("row", None)) is not None:
                step["rows"].append(row)
            step.update(values)
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps(self.values, indent=1))
            os.replace(partial, self.path)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, metavar="OUT", help="folder for the results")
    parser.add_argument("--minutes", type=float, default=10.0, help="time limit of the whole run in minutes (default 10)")
    parser.add_argument("--only", metavar="NAMES", help=f"some of {', '.join(step.name for step in STEPS)}")
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", help="holds NAME-train.parquet and NAME-test.parquet of data sets"
    )
    parser.add_argument("--needs", action="store_true", help="say what a bare machine needs, and stop")
    parser.add_argument("--report", type=Path, metavar="OUT", help="write what OUT holds into a page, and stop")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/gpu.md", help="the page of --report (docs/gpu.md)")
    args = parser.parse_args(arguments)
    if args.needs:
        print(needs(args.data))
        return 0
    if args.report is not None:
        from gpu_report import write_page

        return write_page(args.report, args.page)
    names = args.only.split(",") if args.only else [step.name for step in STEPS]
    if unknown := set(names) - {step.name for step in STEPS}:
        parser.error(f"there is no step '{min(unknown)}'; choose from {', '.join(step.name for step in STEPS)}")
    if args.out is None:
        parser.error("give OUT, the folder for the results")
    if args.minutes <= 0:
        parser.error(f"--minutes must be above 0, not {args.minutes:g}")
    if args.data is not None and (problem := wrong_with(args.data)):
        parser.error(f"--data: {problem}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running step is ended too
    args.out.mkdir(parents=True, exist_ok=True)
    return measure(args.out.resolve(), args.data and args.data.resolve(), args.minutes * 60, names, again=bool(args.only))


def wrong_with(data: Path) -> str | None:
    """One line that describes what is wrong with a folder of data sets; None if nothing is."""
    if not data.is_dir():
        return f"'{data}' is no folder"
    missing = [f"cifar10-{split}.parquet" for split in ("train", "test") if not (data / f"cifar10-{split}.parquet").is_file()]
    if len(missing) == 1 or (missing and not (data / "fashion-mnist-train.parquet").is_file()):
        return f"'{data}' has no {missing[0]}"
    return None


def measure(out: Path, data: Path | None, seconds: float, names: Sequence[str], again: bool) -> int:
    """Run the steps; return 0 if none failed, else 1. A step that ran out of time has not failed: its results are kept."""
    end, results = time.monotonic() + seconds - TABLE_S, Results(out)
    remove_partial_files(out)
    # Training continues; any other finished step is not repeated unless --only names it.
    finished = {step.name for step in STEPS if results.step(step.name).get("state") == "done"} - {"training"}
    steps = [step for step in STEPS if step.name in names and (again or step.name not in finished)]
    lacking = {step.name: [m for m in step.modules if importlib.util.find_spec(m) is None] for step in steps}
    possible = [step for step in steps if not lacking[step.name]]
    for step in steps:
        left = end - time.monotonic()
        limit = left if [step] == possible[-1:] else min(left, seconds * step.share / sum(s.share for s in possible or steps))
        if missing := lacking[step.name]:
            results.change(step.name, state="not run", error=f"needs {', '.join(missing)}; see --needs", seconds=0.0)
        elif limit < SHORTEST_S:
            results.change(step.name, state="not run", error="no time was left", seconds=0.0)
        else:
            run_step(step, out, data, limit, results)
            remove_partial_files(out)
        found = results.step(step.name)
        print(f"{step.name}: {found['state']}, {found['seconds']:.0f} s {found.get('error', '')}".rstrip(), flush=True)
    from gpu_report import tables

    print(tables(results.values))
    return int(any(results.step(step.name)["state"] == "failed" for step in steps))


def remove_partial_files(out: Path) -> None:
    """Remove files that a process had not finished writing when it was killed."""
    for partial in out.glob("*.partial"):
        partial.unlink()


def run_step(step: Step, out: Path, data: Path | None, limit: float, results: Results) -> None:
    """Run one step in a process group of its own, which is killed at the limit. Its rows come over a pipe as lines of JSON."""
    before = results.step(step.name).get("rows", []) if step.name == "training" else []
    began, log = time.monotonic(), out / "log.txt"
    end = began + limit - min(limit * MARGIN, MOST_MARGIN_S)  # the step's process reads the same monotonic clock
    command = [sys.executable, str(HERE / "gpu_steps.py"), step.name, str(out), str(data or ""), f"{end:.1f}"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with log.open("ab") as errors:
        errors.write(f"== {step.name}\n".encode())
        errors.flush()
        start = errors.tell()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment, process_group=0)
        results.change(step.name, state="running", pid=process.pid, rows=list(before), error="", limit=round(limit, 1))
        assert process.stdout is not None
        reader = threading.Thread(target=take_rows, args=(process.stdout, step.name, results), daemon=True)
        reader.start()
        late = False
        try:
            process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            end_group(process)
        reader.join(timeout=5)
    code = process.returncode
    state = "done" if code == 0 else "out of time" if late else "failed"
    error = f"killed by signal {-code}" if code < 0 else last_line(log, start) or f"exit code {code}"
    results.change(step.name, state=state, error=error if state == "failed" else "", seconds=round(time.monotonic() - began, 1))
    if log.stat().st_size > LOG_BYTES:
        log.write_bytes(log.read_bytes()[-LOG_BYTES:])


def take_rows(stream: Any, name: str, results: Results) -> None:
    for line in stream:
        try:
            row = json.loads(line)
        except ValueError:
            continue  # the line was cut off when the process ended
        if "on" in row:
            results.change(name, **row)  # the device and the versions that the step uses
        else:
            results.change(name, row=row)


def end_group(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_line(log: Path, start: int) -> str:
    lines = log.read_bytes()[start:].decode(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else ""


def needs(data: Path | None) -> str:
    """What must be copied to a machine that has PyTorch but not Ray, with sizes in MB."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        files = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        files = [file for folder in ("ims3_ray", "benchmarks", "configs", "tests") for file in (ROOT / folder).rglob("*.*")]
    sizes = {"the repository": sum(file.stat().st_size for file in files if file.is_file())}
    if data is not None:
        sizes[f"{data}/*.parquet"] = sum(file.stat().st_size for file in data.glob("*.parquet"))
    lines = [f"{size / 1e6:6.1f} MB  {what}" for what, size in sizes.items()]
    lines += [f"{sum(sizes.values()) / 1e6:6.1f} MB  together, without the wheels below", ""]
    for module, (why, wheels) in WHEELS.items():
        here = "is here" if importlib.util.find_spec(module) else "is missing here"
        lines.append(f"{module} {here}. Wanted by {why}. Wheels: {' '.join(wheels)}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
