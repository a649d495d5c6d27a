"""The base of every config: frozen, strict, and clear about what is wrong with a value."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError


class Schema(BaseModel):
    """A frozen, checked config.

    Raises ValueError for an unknown field or a value out of range, naming field, value and what is allowed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, ser_json_inf_nan="constants")

    field_noun: ClassVar[str] = "field"
    """What messages call a field."""

    def __init__(self, *unnamed, **values):
        if unnamed:
            name, known = getattr(self, "name", "") or type(self).__name__, ", ".join(type(self).model_fields)
            raise ValueError(f"{name}: {unnamed[0]!r} without a name: {self.field_noun}s are named, {known}")
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ValueError(explain(type(self), error)) from None


def explain(cls: type[Schema], error: ValidationError) -> str:
    """One clause per wrong field: its name, its value and what is allowed."""
    clauses = []
    for problem in error.errors():
        field = ".".join(map(str, problem["loc"]))
        value = problem["input"]
        if problem["type"] == "extra_forbidden":
            near, known = closest(field, cls.model_fields), ", ".join(cls.model_fields)
            clauses.append(f"unknown {cls.field_noun} {field}={value!r}{near}; {cls.field_noun}s are {known}")
        elif problem["type"] == "value_error":
            clauses.append(str(problem["ctx"]["error"]))
        elif problem["type"] == "missing":
            clauses.append(f"{field} is missing")
        else:
            clauses.append(f"{field}={value!r}: {problem['msg'].replace('Input should', 'must')}")
    return f"{getattr(cls, 'name', '') or cls.__name__}: " + "; ".join(clauses)


def closest(name: str, known: Iterable[str]) -> str:
    """Text " (closest: a, b)" for an error message, or nothing when no known name is near."""
    near = difflib.get_close_matches(str(name), list(known), n=3, cutoff=0.5)
    return f" (closest: {', '.join(near)})" if near else ""
