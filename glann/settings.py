"""Settings declared once: default, range, choices and help stand beside the field's name.

A class of settings is a plain dataclass whose fields are made by `setting`.  Its constructor only
stores; `check` validates, so that recipes, the command line and Python all get the same errors.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from glann.errors import GlannError


def setting(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: tuple[str, ...] = (),
    kind: str = "",
) -> Any:
    """A dataclass field with its help and limits (both inclusive).

    `kind` is for a type that has to be read from text in its own way, see `glann.recipes`.
    """
    metadata = {
        "help": help,
        "minimum": minimum,
        "maximum": maximum,
        "choices": choices,
        "kind": kind,
    }
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def nearest_name(name: str, names: Iterable[str]) -> str:
    """A hint for a misspelt name: the nearest valid one, or else all of them."""
    names = sorted(names)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else f"valid: {', '.join(names)}"


def _matches(value: Any, annotation: Any) -> bool:
    origin = typing.get_origin(annotation)
    if origin in (types.UnionType, typing.Union):
        return any(_matches(value, part) for part in typing.get_args(annotation))
    if origin is list:
        (item,) = typing.get_args(annotation)
        return isinstance(value, list) and all(_matches(v, item) for v in value)
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation is type(None):
        return value is None
    return isinstance(value, annotation)


def type_name(annotation: Any) -> str:
    """How a message names a type: 'int', 'float or bool', 'list of int'."""
    origin = typing.get_origin(annotation)
    if origin in (types.UnionType, typing.Union):
        parts = [p for p in typing.get_args(annotation) if p is not type(None)]
        return " or ".join(type_name(part) for part in parts)
    if origin is list:
        return f"list of {type_name(typing.get_args(annotation)[0])}"
    return "text" if annotation is str else str(annotation.__name__)


def check(settings: Any, section: str = "") -> None:
    """Raise GlannError, naming the setting, if any field has a wrong type, range or choice.

    `section` is put before the field's name, as in a recipe: `glo.epochs`.  What a class can't say
    of single fields its method `check_together` raises.
    """
    annotations = typing.get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        if field.metadata:
            name = f"{section}.{field.name}" if section else field.name
            check_value(name, getattr(settings, field.name), annotations[field.name], field)
    if hasattr(settings, "check_together"):
        settings.check_together()


def check_value(name: str, value: Any, annotation: Any, field: dataclasses.Field[Any]) -> None:
    """Raise GlannError if `value` is not one that `field` takes."""
    limits = field.metadata
    if not _matches(value, annotation):
        raise GlannError(
            f"{name} = {value!r} is of type {type_name(type(value))}; "
            f"wanted {type_name(annotation)} ({limits['help']})"
        )
    for item in value if isinstance(value, list) else [value]:
        _check_limits(name, item, limits)


def _check_limits(name: str, value: Any, limits: Mapping[str, Any]) -> None:
    if limits["choices"] and value is not None and value not in limits["choices"]:
        hint = nearest_name(str(value), limits["choices"])
        raise GlannError(f"{name} = {value!r} is not one of the choices; {hint}")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    low = -math.inf if limits["minimum"] is None else limits["minimum"]
    high = math.inf if limits["maximum"] is None else limits["maximum"]
    if not low <= value <= high or value in (math.inf, -math.inf):  # not isfinite: huge ints
        wanted = f"{low} to {high}" if high < math.inf else f"at least {low}"
        if low == -math.inf:
            wanted = f"at most {high}" if high < math.inf else "a finite number"
        raise GlannError(f"{name} = {value!r} is out of range; wanted {wanted} ({limits['help']})")


def as_dict(settings: Any) -> dict[str, Any]:
    """The settings by name, without what was learned."""
    return {
        field.name: getattr(settings, field.name)
        for field in dataclasses.fields(settings)
        if field.metadata
    }
