"""What all jobs share: arguments, one-line errors, exit codes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from ims3_ray.config import PretrainConfig, WorkConfig
from ims3_ray.errors import IncompletePool, UserError
from ims3_ray.loading import Tree, load_config


def main(
    doc: str,
    tree: type[Tree],
    run: Callable[[Tree], None],
    plan: Callable[[Tree], str] | None = None,
    arguments: list[str] | None = None,
) -> int:
    """Parse, load the config, call ``run`` (or print ``plan`` for ``--dry-run``).

    Exit codes: 0 done, 1 work that failed on every attempt (one line on stderr), 2 the user can put something right (one
    line), 130 interrupted; anything else that goes wrong is a traceback and 1.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config values, e.g. selection.alpha=0.4")
    parser.add_argument(
        "--config", metavar="FILE", action="append", help="YAML config (may name others under 'extends'); several add up"
    )
    if plan is not None:
        parser.add_argument("--dry-run", action="store_true", help="print the plan and stop: nothing is computed or written")
    args = parser.parse_intermixed_args(arguments)
    try:
        config = load_config(tree, args.config, args.overrides)
        if plan is not None and args.dry_run:
            print(plan(config))
        else:
            _run(run, config)
    except (UserError, IncompletePool) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    return 0


def _run(run: Callable[[Tree], None], config: Tree) -> None:
    """Where there is room for it, if it is work for a cluster; benchmarks run where Ray is not installed, too."""
    if not isinstance(config, WorkConfig | PretrainConfig):
        run(config)
        return
    from ims3_ray.driver import run_off_the_head

    run_off_the_head(run, config)
