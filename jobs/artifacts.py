"""List, verify, repair or prune the artifacts that all runs of a storage share.

python jobs/artifacts.py list storage=runs          every artifact: size, age, and the runs that use it
python jobs/artifacts.py verify storage=runs        compares every shard with its SHA-256; exit code 1 if one differs
python jobs/artifacts.py repair storage=runs        lets damaged and lost units count as missing
python jobs/artifacts.py prune storage=runs         deletes artifacts that no run uses (dry_run=true only shows them)
"""

from __future__ import annotations

import sys

from ims3_ray.cli import main
from ims3_ray.commands.artifacts import ArtifactsConfig, run

ACTIONS = ("list", "verify", "repair", "prune")

if __name__ == "__main__":
    arguments = [f"action={argument}" if argument in ACTIONS else argument for argument in sys.argv[1:]]
    sys.exit(main(__doc__ or "", ArtifactsConfig, run, arguments=arguments))
