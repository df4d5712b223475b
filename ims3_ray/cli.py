"""The command line: ``ims3 NAME …``, and ``python jobs/NAME.py …``, which does the same.

A command takes YAML files and ``key=value`` words. Its help and the error for a misspelt key need no other part of this
package, so that both appear at once; the config and the work are imported after that.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from ims3_ray.commands.table import COMMANDS, DRY_RUN, Command, named
from ims3_ray.config.files import config_names, read_values
from ims3_ray.config.keys import check_keys, described_keys
from ims3_ray.ending import guarded
from ims3_ray.errors import UserError
from ims3_ray.provenance import record_command, version

if TYPE_CHECKING:
    from ims3_ray.config.loading import Tree

PROGRAM = "ims3"
Work = Callable[[], None]
"""What is left to do after the words of a command are understood."""


def ims3(arguments: Sequence[str] | None = None) -> int:
    """The program ``ims3``. Returns the exit code (:func:`~ims3_ray.ending.guarded`)."""
    return _invoked(program(), PROGRAM, arguments)


def job(name: str) -> int:
    """The script ``jobs/NAME.py``, which does what ``ims3 NAME`` does. Returns the exit code."""
    return _invoked(command_of(name, COMMANDS[name]), f"python jobs/{name}.py", None)


def main(
    doc: str,
    tree: type[Tree],
    run: Callable[[Tree], None],
    arguments: Sequence[str] | None = None,
) -> int:
    """A script of its own, such as a benchmark: parse its arguments, load the config ``tree``, call ``run``. Returns the exit
    code."""
    script = Path(sys.argv[0])
    name = f"python {script.parent.name}/{script.name}"
    return _invoked(command_of(script.stem, Command("", doc, tree, run), name), name, arguments)


def program() -> click.Group:
    """The program ``ims3`` with all its commands."""
    group = click.Group(
        PROGRAM, context_settings=SETTINGS, help="Dataset distillation with IMS3, and with what it is compared."
    )
    click.version_option(version(), prog_name="ims3-ray")(group)
    for name, command in COMMANDS.items():
        group.add_command(command_of(name, command))
    return group


SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 120}


def command_of(name: str, command: Command, recorded: str = "") -> click.Command:
    """What click knows of a command. Invoked, it returns the :data:`Work` that its words ask for. ``recorded`` is what results
    call it; ``ims3 NAME`` by default."""
    program = recorded.split() or [PROGRAM, name]
    files = click.Option(
        ["--config"], multiple=True, metavar="FILE", shell_complete=_complete_config,
        help="YAML config, by path or by its name in configs/ (such as demo); several add up",
    )  # fmt: skip
    words = click.Argument(["words"], nargs=-1, metavar="[key=value]...", shell_complete=_complete_key)
    flags = [click.Option([f"--{flag}"], is_flag=True, help=text) for flag, text in command.flags.items()]
    if command.plan is not None:
        flags.append(click.Option(["--dry-run"], is_flag=True, help=DRY_RUN))
    return _Described(
        name, short_help=command.title, context_settings=SETTINGS, help=command.text,
        params=[words, *([] if command.takes_words_alone else [files]), *flags], command=command,
        callback=lambda **given: _understood(program, command, **given),
    )  # fmt: skip


def _understood(
    program: Sequence[str], command: Command, words: Sequence[str], config: Sequence[str] = (), **flags: bool
) -> Work:
    """The work that the words of a command ask for."""

    def work() -> None:
        if command.takes_words_alone:
            given = [f"--{flag.replace('_', '-')}" for flag, is_set in flags.items() if is_set]
            record_command([*program, *given, *words])
            named(command.run)(list(words), **flags)
            return
        overrides = _with_keys(command, words)
        values = read_values(config, overrides)
        names = [part for file in config for part in ("--config", Path(file).name if Path(file).is_file() else file)]
        record_command([*program, *names, *words])
        if isinstance(command.tree, str):
            check_keys(command.tree.partition(":")[2], values)
        from ims3_ray.config.loading import build, check_effect

        tree: Any = named(command.tree)
        check_effect(tree, overrides)
        built: Any = build(tree, values)
        if flags.get("dry_run"):
            for text in named(command.plan)(built):
                print(text, flush=True)
        else:
            _run(named(command.run), built)

    return work


def _with_keys(command: Command, words: Sequence[str]) -> list[str]:
    """The words with the keys that those without one stand for, by their order."""
    given = {word.partition("=")[0] for word in words if "=" in word}
    keys = (key for key in command.positions if key not in given)
    return [word if "=" in word or (key := next(keys, None)) is None else f"{key}={word}" for word in words]


def _invoked(command: click.Command, name: str, arguments: Sequence[str] | None) -> int:
    """Parse the arguments (by default those of this process) and do the work. Returns the exit code."""

    def work() -> None:
        try:
            found = command.main(arguments, prog_name=name, standalone_mode=False)
        except click.exceptions.NoArgsIsHelpError as error:
            print(error.format_message())
            return
        except click.Abort as error:  # click's name for Ctrl-C
            raise KeyboardInterrupt from error
        except click.ClickException as error:
            message = " ".join(error.format_message().split()).rstrip(".").replace(". Did you mean", "; did you mean")
            context = error.ctx if isinstance(error, click.UsageError) else None
            place = context.command_path if context else " ".join([name, *_command_in(command, arguments)])
            see = " See" if message.endswith("?") else "; see"
            raise UserError(f"{message[:1].lower()}{message[1:]}{see} {place} --help") from error
        if callable(found):  # help and completion leave nothing to do
            found()

    return guarded(work)


def _command_in(command: click.Command, arguments: Sequence[str] | None) -> list[str]:
    """The name of the command of a program that the arguments begin with; nothing for a script, which is a command itself."""
    first = list(sys.argv[1:] if arguments is None else arguments)[:1]
    return first if isinstance(command, click.Group) and command.commands.keys() >= set(first) else []


class _Described(click.Command):
    """A command whose help ends with all its keys, by section, with default and meaning."""

    def __init__(self, *arguments: Any, command: Command, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.command = command

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write("\n" + self.command.text.strip() + "\n")  # its lines are laid out already

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for key, default, meaning in keys_of(self.command):
            section, dot, _ = key.partition(".")
            sections.setdefault(section if dot else "", []).append((f"{key}={default}", meaning.replace("`", "")))
        for section, rows in sections.items():
            with formatter.section(f"Keys of {section}" if section else "Keys, with their defaults"):
                formatter.write_dl(rows, col_max=32)


def keys_of(command: Command) -> Iterable[tuple[str, str, str]]:
    """Key, default and meaning of every setting that a command takes."""
    if command.tree is None:
        return ()
    if isinstance(command.tree, str) and (known := described_keys(command.tree.partition(":")[2])):
        return known
    from ims3_ray.config.rows import options_of  # a class that is not on record

    return options_of(named(command.tree))


def _complete_config(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The names of configs for the shell, which completes files itself."""
    names = [CompletionItem(name) for name in config_names() if name.startswith(incomplete)]
    return [*names, CompletionItem(incomplete, type="file")]


def _complete_key(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The keys, and the words that a command takes, for the shell."""
    described = ctx.command
    if not isinstance(described, _Described) or "=" in incomplete:
        return []
    command = described.command
    found = [CompletionItem(f"{key}=", help=meaning) for key, _, meaning in keys_of(command)]
    found += [CompletionItem(word) for offered in command.positions.values() for word in offered]
    return [item for item in found if item.value.startswith(incomplete)]


def _run(run: Callable[[Any], None], config: Any) -> None:
    """Call ``run(config)``. Work for a cluster runs on a node that has CPUs for it; anything else, such as a benchmark, runs
    here and needs no Ray."""
    from ims3_ray.config import PretrainConfig, WorkConfig

    if not isinstance(config, WorkConfig | PretrainConfig):
        run(config)
        return
    from ims3_ray.cluster.off_head import run_off_the_head

    run_off_the_head(run, config)
