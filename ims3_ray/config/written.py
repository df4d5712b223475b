"""Values as a user has written them: YAML reads ``1``, ``yes`` and ``2026-01-02`` as a number, a truth value and a date, but a
key that takes text takes them as text."""

from __future__ import annotations

import re
import types
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from ims3_ray.errors import UserError

NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
"""Numbers such as 1e-3, which YAML 1.1 reads as text."""


@dataclass(frozen=True)
class Written:
    """A value that was written without quotes and that YAML does not read as text."""

    value: Any
    text: str
    error: str = ""
    """Message for a key that does not take text, if the text is no YAML."""
    nothing_there: bool = False
    """Whether it is null on the command line, for a key to which the files give no value."""

    def plain(self) -> Any:
        """The value as YAML reads it. Raises :class:`UserError` for text that is no YAML."""
        if self.error:
            raise UserError(self.error)
        return self.value


class Loader(yaml.SafeLoader):
    """Reads YAML like PyYAML's safe loader, but gives :class:`Written` for values that are not text."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        value = super().construct_object(node, deep)
        if isinstance(node, yaml.ScalarNode) and node.style is None:
            return as_written(value, node.value)
        return value

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        for number, key in enumerate(keys):
            if any(key.value == other.value for other in keys[:number]):
                raise UserError(f"line {key.start_mark.line + 1}: '{key.value}' stands twice; join the two")
        if node.flow_style:
            for key, value in node.value:
                if ":" in key.value and value.value == "" and value.style is None:
                    raise UserError(f"'{key.value}' has no value; write a space after its colon")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        found = super().construct_mapping(node, deep)
        return {_plain_key(key): value for key, value in found.items()}


def _plain_key(key: Any) -> Any:
    """A key as it was written, but a whole number as a number, since some tables have numbers as keys."""
    if not isinstance(key, Written):
        return key
    return key.value if isinstance(key.value, int) and str(key.value) == key.text else key.text


def as_written(value: Any, text: str) -> Any:
    """``value``, or a :class:`Written` if it is not text or looks like a number."""
    if isinstance(value, str):
        return Written(float(value), text) if NUMBER.fullmatch(value) else value
    return Written(value, text)


def read_override(override: str, text: str) -> Any:
    """The value of ``key=text`` on the command line. A text that begins with a bracket, a brace or a quote is YAML; any other
    is a single value, in which ``: `` has no special meaning, and ``#`` begins a comment only for keys that take no text."""
    text = text.strip()
    if not text:
        raise UserError(f"override '{override}' has no value; write null for none, or '' for an empty text")
    try:
        if text[:1] in ("[", "{", '"', "'"):
            return yaml.load(text, Loader)
        loader, single = Loader(""), re.split(r"\s#", text)[0].strip()
        value = loader.construct_object(yaml.ScalarNode(loader.resolve(yaml.ScalarNode, single, (True, False)), single))
        return Written(value.value, text) if isinstance(value, Written) else text
    except UserError as error:
        raise UserError(f"override '{override}': {error}") from error
    except (yaml.YAMLError, ValueError):
        return Written(None, text, f"override '{override}' has a value that is not YAML; quote it")


def typed(kind: Any, value: Any) -> Any:
    """``value`` with every :class:`Written` in it as the annotation ``kind`` of its key takes it: as text, or as YAML reads
    it."""
    if get_origin(kind) is Annotated:
        return typed(get_args(kind)[0], value)
    kinds = _members(kind)
    if isinstance(value, Written):
        return value.text if _takes_text(kinds, value) else value.plain()
    if isinstance(value, Mapping):
        return {_key(kinds, key): typed(_below(kinds, key), inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        inside = [kind for kind in kinds if _is_sequence(kind)]
        element = next((arg for arg in get_args(inside[0]) if arg is not Ellipsis), Any) if inside else Any
        return [typed(element, inner) for inner in value]
    return value


def _members(kind: Any) -> list[Any]:
    """The annotations of which a value has to meet one, without what ``Annotated`` adds to them."""
    members = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    return [get_args(member)[0] if get_origin(member) is Annotated else member for member in members]


def _takes_text(kinds: Sequence[Any], value: Written) -> bool:
    """Whether a key of one of these ``kinds`` takes what was written as text: it takes text, and not the value as it is."""
    if value.value is None and not value.error and type(None) in kinds:
        return False
    if any(kind in (int, float, bool) for kind in kinds):
        return False
    literals = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    if literals:
        return value.value not in literals
    return str in kinds


def _is_sequence(kind: Any) -> bool:
    return get_origin(kind) in (list, tuple, set, frozenset) or kind in (list, tuple)


def _key(kinds: Sequence[Any], key: Any) -> Any:
    """The key of a mapping, as text where its keys are text."""
    names = [get_args(kind)[0] for kind in kinds if get_origin(kind) in (dict, Mapping)]
    if names and not isinstance(key, str) and all(str in _members(name) for name in names):
        return str(key)
    return key


def _below(kinds: Sequence[Any], key: Any) -> Any:
    """The annotation of the value under ``key`` in a mapping of one of these ``kinds``."""
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, BaseModel) and key in kind.model_fields:
            return kind.model_fields[key].annotation
        if get_origin(kind) in (dict, Mapping):
            return get_args(kind)[1]
    return Any
