"""Components: exchangeable parts of a run that a config selects by name. Each has a file of its own, with its settings.

A component is a class with a ``name`` and, if it has settings, a ``Config``. A registry finds the components of this package
by importing their files, and others when a plugin is loaded (:mod:`ims3_ray.plugins`). ``docs/extending.md`` has an example of
each kind.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from ims3_ray.errors import UserError, not_there


class Section(BaseModel):
    """Base of every part of a config: unknown keys are errors, and values do not change after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )
    replaced: ClassVar[Mapping[str, str]] = {}
    """Options that have no effect in the config of this kind of job → the option in their place, or an empty text."""


class NoSettings(Section):
    """The settings of a component that has none."""


T = TypeVar("T")
C = TypeVar("C", bound=Section)


class Registry(Mapping[str, T]):
    """The components of one kind, by name. The modules of ``package`` are imported on first access."""

    def __init__(self, what: str, package: str) -> None:
        self.what, self.package = what, package
        self._found: dict[str, T] = {}
        self._looked = False

    def add(self, name: str, component: T) -> None:
        """Register a component. Raises :class:`UserError` if another one has the same name."""
        there = self._found.get(name)
        if there is not None and _place(there) != _place(component):
            raise UserError(f"there are two of the name '{name}' for {self.what}; call the one of the plugin otherwise")
        self._found[name] = component

    def __getitem__(self, name: str) -> T:
        """Raises :class:`UserError` with the known names if there is no component ``name``."""
        self._look()
        if name not in self._found:
            raise UserError(self.unknown(name))
        return self._found[name]

    def __contains__(self, name: object) -> bool:
        self._look()
        return name in self._found

    def __iter__(self) -> Iterator[str]:
        self._look()
        return iter(sorted(self._found))

    def __len__(self) -> int:
        self._look()
        return len(self._found)

    def checked(self, name: str) -> str:
        """``name`` if it is here; ``ValueError`` naming what there is otherwise, for the validators of configs."""
        if name not in self:
            raise ValueError(self.unknown(name))
        return name

    def unknown(self, name: str) -> str:
        """Error message for a name that is not registered."""
        return not_there(self.what, name, self)

    def _look(self) -> None:
        if self._looked:
            return
        self._looked = True
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")


def _place(component: Any) -> tuple[str, str]:
    return component.__module__, component.__qualname__


class Component:
    """Base of the classes that a registry holds. A subclass with a ``name`` is added to the registry of its base."""

    name: ClassVar[str] = ""
    """Name by which a config selects the component."""
    Config: ClassVar[type[Section]] = NoSettings
    """Class of the component's settings, each of which has a default."""
    registry: ClassVar[Registry[Any]]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if cls.__dict__.get("name"):
            cls.registry.add(cls.name, cls)


def check_known(component: type[Component], attribute: str, known: Any) -> None:
    """Raises :class:`UserError` if ``component`` names something under ``attribute`` that the ``Literal`` type ``known`` has
    not."""
    if unknown := sorted(set(getattr(component, attribute)) - set(get_args(known))):
        raise UserError(
            f"{component.__qualname__}.{attribute} has '{unknown[0]}'; it may have {', '.join(map(repr, get_args(known)))}"
        )


class Components(Section):
    """A section that holds, beside its own fields, the settings of each component of :attr:`registries` under its name."""

    model_config = ConfigDict(extra="allow")

    registries: ClassVar[tuple[Registry[Any], ...]] = ()

    @classmethod
    def sections(cls) -> dict[str, type[Section]]:
        """Name → class of settings, for each component that has settings."""
        return {
            name: component.Config
            for registry in cls.registries
            for name, component in registry.items()
            if component.Config.model_fields and name not in cls.model_fields and not issubclass(cls, component.Config)
        }

    @model_validator(mode="before")
    @classmethod
    def _with_sections(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        sections = cls.sections()
        for key in values:
            if key not in sections and key not in cls.model_fields:
                raise nested_error("extra_forbidden", "Extra inputs are not permitted", (str(key),), values[key])
        return {**values, **{name: _validated(name, section, values.get(name, {})) for name, section in sections.items()}}

    def of(self, component: type[Component]) -> Any:
        """The settings of a component: an instance of its ``Config``."""
        if isinstance(self, component.Config):  # its settings are fields of this very section
            return component.Config.model_validate({name: getattr(self, name) for name in component.Config.model_fields})
        return getattr(self, component.name, None) or component.Config()


def _validated(name: str, section: type[Section], value: Any) -> Section:
    try:
        return section.model_validate(value)
    except ValidationError as error:
        kind, message, location, given = first_error(error)
        raise nested_error(kind, message, (name, *location), given) from error


def nested_error(kind: str, message: str, location: tuple[str, ...], given: Any) -> PydanticCustomError:
    """An error in a part of a config that is validated by itself; :func:`first_error` gives its place within the whole."""
    return PydanticCustomError("nested", "{message}", {"kind": kind, "message": message, "location": location, "given": given})


def first_error(error: ValidationError) -> tuple[str, str, tuple[str, ...], Any]:
    """The first of the errors: pydantic's name for its kind, its message, its place in the tree, and the value given."""
    first = error.errors()[0]
    location, message = tuple(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
    if first["type"] == "nested":
        inner = first["ctx"]
        return inner["kind"], inner["message"], (*location, *inner["location"]), inner["given"]
    return first["type"], message, location, first.get("input")


def without_unknown_components(section: type[BaseModel], plain: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values of a config without the settings of components that are not registered, such as those of a plugin that
    is no longer named: nothing uses them."""
    found = {}
    for key, value in plain.items():
        field = section.model_fields.get(key)
        inner = field.annotation if field is not None else None
        if isinstance(value, Mapping) and isinstance(inner, type) and issubclass(inner, BaseModel):
            found[key] = without_unknown_components(inner, value)
        elif field is not None or not (issubclass(section, Components) and isinstance(value, Mapping)):
            found[key] = value
        elif key in section.sections():
            found[key] = dict(value)
    return found


def defaults_of(section: type[BaseModel]) -> dict[str, Any]:
    """Field → default, for the fields that have one and for the sections of components."""
    found = {
        name: field.get_default(call_default_factory=True)
        for name, field in section.model_fields.items()
        if not field.is_required()
    }
    return found | sections_of(section)


def sections_of(section: type[BaseModel]) -> dict[str, Section]:
    """The default settings of each component that has a section in ``section``."""
    more = section.sections() if issubclass(section, Components) else {}
    return {name: config() for name, config in more.items()}


def descriptions_of(section: BaseModel) -> dict[str, str]:
    """Field → its description, which is empty for the sections of components."""
    own = {name: " ".join((field.description or "").split()) for name, field in type(section).model_fields.items()}
    return own | dict.fromkeys(section.model_extra or {}, "")
