"""Make a table or a figure of the paper, and print it beside the printed figures.

    python jobs/reproduce.py                                       which tables and figures there are
    python jobs/reproduce.py table-4 --dry-run                     what it takes: fine-tunes, pools, students, hours, money
    python jobs/reproduce.py table-4 data.path=/data/imagenet      make it (published weights, GPUs)
    python jobs/reproduce.py table-4 --small                       the same runs on stand-ins: minutes of two cores

Overrides such as storage=s3://bucket/runs apply to all runs of the table. Tables share the artifacts of one storage, so a
second table costs only what is new. Each run has a folder and a report of its own; {storage}/paper/NAME/table.md has all
accuracies beside the printed ones. After an interruption the same command continues where it stopped.
"""

from __future__ import annotations

import argparse
import sys

from ims3_ray.cli import guarded


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", metavar="NAME", help="table-1 … table-13, figure-1 … figure-9")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config values for all runs, e.g. storage=s3://…")
    parser.add_argument("--small", action="store_true", help="stand-ins in place of data, weights and GPUs")
    parser.add_argument("--dry-run", action="store_true", help="print what it takes and stop: nothing is computed or written")
    args = parser.parse_intermixed_args()

    def work() -> None:
        from ims3_ray.commands.reproduce import run_reproduction
        from ims3_ray.config.paper import described_names, read_reproduction
        from ims3_ray.plan.reproduction import described
        from ims3_ray.provenance import record_command

        if args.name is None:
            print(described_names())
            return
        record_command(["jobs/reproduce.py", args.name, *(["--small"] if args.small else []), *args.overrides])
        reproduction = read_reproduction(args.name, args.overrides, args.small)
        if args.dry_run:
            print(described(reproduction))
        else:
            run_reproduction(reproduction)

    return guarded(work)


if __name__ == "__main__":
    sys.exit(main())
