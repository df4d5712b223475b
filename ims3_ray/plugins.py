"""Components from outside the package: files and modules that a config names under ``plugins``.

Loading a plugin means importing it, which adds its components to their registries. A file is imported as a module of the
package :data:`PACKAGE`. Ray's workers load the same sources when they start (:func:`runtime_env`), on every node.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import importlib
import json
import os
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from ims3_ray.errors import UserError

PACKAGE = "ims3_plugins"
"""Package of the plugins that are files: ``my_method.py`` becomes ``ims3_plugins.my_method``."""
VARIABLE = "IMS3_PLUGINS"
"""Environment variable that passes the sources to workers."""

_sources: dict[str, str] = {}
"""Module → its source, for the plugins that are loaded in this process."""


def load(names: Iterable[str]) -> None:
    """Import each plugin: a path that ends in ``.py``, or a module. Raises :class:`UserError` for one that fails."""
    for name in names:
        if not name.endswith(".py"):
            _import(name)
            continue
        path = Path(name).expanduser()
        if not path.is_file():
            raise UserError(f"plugin '{name}' does not exist; give the path of a Python file or the name of a module")
        if not path.stem.isidentifier():
            raise UserError(f"plugin '{name}' is no module, since '{path.stem}' is no name in Python; rename the file")
        _define(f"{PACKAGE}.{path.stem}", path.read_text("utf-8"), str(path))


def source_hash(component: Any) -> str | None:
    """16 hex digits of the hash of the source that defines a component (a class or function) of a plugin, and of the sources of
    other plugins that it imports; None for a component of this package."""
    name = getattr(component, "__module__", "")
    if name not in _sources:
        return None
    sources = [_sources[name], *(_sources[other] for other in sorted(_used_by({name}) - {name}))]
    return hashlib.sha256("".join(sources).encode()).hexdigest()[:16]


def _used_by(names: set[str]) -> set[str]:
    """The plugins ``names`` and those that they import, and that these import."""
    found = set(names)
    for name in names:
        for node in ast.walk(ast.parse(_sources[name])):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                above = ".".join(name.split(".")[: -node.level]) if node.level else ""
                module = ".".join(filter(None, [above, node.module]))
                found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    found &= _sources.keys()
    return found if found == names else _used_by(found)


def hashes(*components: Any) -> dict[str, dict[str, str]]:
    """Parameters that a key holds in addition for those of ``components`` that come from plugins; empty if none does."""
    hashed = ((component, source_hash(component)) for component in components)
    found = {f"{c.__module__}.{c.__qualname__}": digest for c, digest in hashed if digest is not None}
    return {"plugins": found} if found else {}


def runtime_env() -> dict[str, Any]:
    """Entries of the ``runtime_env`` argument of ``ray.init`` that make Ray's workers load the plugins of this process."""
    if not _sources:
        return {}
    packed = base64.b64encode(zlib.compress(json.dumps(_sources).encode(), 9)).decode()
    return {"env_vars": {VARIABLE: packed}, "worker_process_setup_hook": f"{__name__}.load_in_worker"}


def known_to_workers() -> bool:
    """Whether the workers of the running Ray job were given the plugins of this process."""
    if not _sources:
        return True
    import ray

    given = ray.get_runtime_context().runtime_env.get("env_vars", {})
    return bool(given.get(VARIABLE) == runtime_env()["env_vars"][VARIABLE])


def load_in_worker() -> None:
    """Load the plugins that :func:`runtime_env` has packed."""
    if packed := os.environ.get(VARIABLE):
        for module, source in json.loads(zlib.decompress(base64.b64decode(packed))).items():
            _define(module, source, f"<plugin {module}>")


def _import(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise UserError(f"plugin '{name}' cannot be imported ({type(error).__name__}: {error}); correct it") from error
    if hasattr(module, "__path__") or module.__file__ is None:
        raise UserError(f"plugin '{name}' is a package; name the modules in it that have components, as in {name}.MODULE")
    source = Path(module.__file__).read_text("utf-8")
    if _sources.setdefault(name, source) != source:
        raise UserError(f"plugin '{name}' has changed since this process imported it; begin a new process")


def _define(name: str, source: str, origin: str) -> None:
    """Import ``source`` as module ``name``, once."""
    if _sources.get(name) == source:
        return
    if name in _sources:
        raise UserError(f"there are two plugins called '{name.rpartition('.')[2]}'; rename one of the files")
    package, _, stem = name.rpartition(".")
    _make_packages(package)
    module = sys.modules[name] = ModuleType(name)
    module.__file__, module.__package__ = origin, package
    try:
        _register_source(origin, source)
        exec(compile(source, origin, "exec"), module.__dict__)
    except UserError:
        del sys.modules[name]
        raise
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        where = error.__traceback__.tb_next if error.__traceback__ else None
        line = f", line {where.tb_lineno}" if where else ""
        raise UserError(
            f"plugin '{origin}' fails when it is loaded{line} ({type(error).__name__}: {error}); correct it"
        ) from error
    if package:
        setattr(sys.modules[package], stem, module)
    _sources[name] = source


def _make_packages(name: str) -> None:
    """Have the packages above a module in ``sys.modules``, empty ones where this node does not have them."""
    if not name or name in sys.modules:
        return
    above, _, stem = name.rpartition(".")
    _make_packages(above)
    try:
        importlib.import_module(name)
    except ImportError:
        package = sys.modules[name] = ModuleType(name, "The package of a plugin.")
        package.__path__ = []
        if above:
            setattr(sys.modules[above], stem, package)


def _register_source(origin: str, source: str) -> None:
    """Register a plugin's source so that tracebacks show its lines and the docstrings under its settings are found."""
    import linecache

    linecache.cache[origin] = (len(source), None, source.splitlines(keepends=True), origin)
