"""The registry: every architecture by name, found lazily, created with checked options.

A built-in lives in `architectures/<name>.py`; the file is imported when its name is first asked for. Outside
packages register through the entry-point group `zoology.architectures` (entry-point name = architecture
name, value = the module that registers it), and a single file through `load_file`.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import importlib.util
import inspect
import pkgutil
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from architectures.mixer import SequenceMixer
from architectures.user_files import run_file

# Files of this folder that hold shared parts, not architectures.
SHARED_MODULES = frozenset(
    {"mixer", "registry", "backends", "parity", "layers", "feature_maps", "fla", "mamba_ssm", "user_files"}
)
ENTRY_POINT_GROUP = "zoology.architectures"


class Entry(NamedTuple):
    """One registered architecture: its class, its paper and where it was registered (`file:line`)."""

    name: str
    cls: type[SequenceMixer]
    paper: str
    where: str


_entries: dict[str, Entry] = {}


def register(name: str, *, paper: str) -> Callable[[type[SequenceMixer]], type[SequenceMixer]]:
    """Class decorator: make a `SequenceMixer` available as `create(name, ...)`.

    `paper` names the source, e.g. "arXiv:2402.18668". Raises ValueError if the name is taken, naming both places,
    and TypeError if the class is not a SequenceMixer.
    """

    def decorate(cls: type[SequenceMixer]) -> type[SequenceMixer]:
        if not (inspect.isclass(cls) and issubclass(cls, SequenceMixer)):
            raise TypeError(f"@register({name!r}) decorates {cls!r}, which is not a subclass of SequenceMixer")
        where = f"{inspect.getsourcefile(cls)}:{inspect.getsourcelines(cls)[1]}"
        taken = _entries.get(name)
        if taken is not None and taken.where != where:
            raise ValueError(f"architecture {name!r} is registered twice: at {taken.where} and at {where}")
        if taken is None and name in _builtin_names() and cls.__module__ != f"architectures.{name}":
            raise ValueError(
                f"architecture {name!r} is registered twice: at {Path(__file__).parent / (name + '.py')} and at {where}"
            )
        _entries[name] = Entry(name, cls, paper, where)
        return cls

    return decorate


def names() -> list[str]:
    """All architecture names, sorted: built-ins, entry points, and files loaded by hand."""
    return sorted({*_builtin_names(), *_entry_points(), *_entries})


def added_names() -> list[str]:
    """The names that are no built-ins, sorted: entry points of installed packages and files loaded by hand."""
    return sorted({*_entry_points(), *_entries} - _builtin_names())


def get(name: str) -> Entry:
    """The registered entry; raises ValueError with the closest names if there is none."""
    if name not in _entries:
        if name in _builtin_names():
            importlib.import_module(f"architectures.{name}")
        elif name in _entry_points():
            _entry_points()[name].load()
        else:
            raise ValueError(
                f"unknown architecture {name!r}: {_closest(name, names())}; "
                "one of your own is known once its file is loaded: --architectures FILE, or load_file(FILE)"
            )
        if name not in _entries:
            raise ValueError(f"the module of architecture {name!r} was imported but does not @register({name!r})")
    return _entries[name]


def create(name: str, d_model: int, **options: Any) -> SequenceMixer:
    """Build the architecture `name` at width `d_model`; options not given take defaults that fit the width.

    Raises ValueError for an unknown name (with the closest ones), an unknown option, or an option of the wrong
    type (with the options and types there are), and whatever the architecture itself refuses.
    """
    cls = get(name).cls
    check_options(name, {"d_model": d_model, **options})
    return cls(d_model=d_model, **options)


def check_options(name: str, values: dict[str, Any]) -> None:
    """Raise ValueError if `values` holds an option that architecture `name` lacks, or one of the wrong type."""
    known = options(name)
    for key, value in values.items():
        if key not in known:
            listed = ", ".join(f"{k}: {o.type_name}" for k, o in known.items())
            raise ValueError(f"architecture {name!r} has no option {key!r}; its options are {listed}")
        if not _matches(value, known[key].annotation):
            raise ValueError(
                f"architecture {name!r}: option {key}={value!r} is of type {type(value).__name__}, "
                f"expected {known[key].type_name}"
            )


class Option(NamedTuple):
    """One constructor option: its annotation, the annotation as text, and its default (`...` if required)."""

    annotation: Any
    type_name: str
    default: Any


def options(name: str) -> dict[str, Option]:
    """The constructor options of an architecture, d_model first."""
    init = get(name).cls.__init__
    hints = typing.get_type_hints(init)
    found = {}
    for key, parameter in inspect.signature(init).parameters.items():
        if key == "self" or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        annotation = hints.get(key, Any)
        type_name = annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")
        default = ... if parameter.default is parameter.empty else parameter.default
        found[key] = Option(annotation, type_name, default)
    return found


class Description(NamedTuple):
    """What `describe` tells: see there. As text it is a few lines to read."""

    name: str
    paper: str
    summary: str
    options: dict[str, Option]
    state: dict[str, int]
    backends: tuple[str, ...]
    d_model: int
    seq_len: int

    def __str__(self) -> str:
        said = (
            f"{key}: {o.type_name}" + ("" if o.default is ... else f" = {o.default!r}")
            for key, o in self.options.items()
        )
        fields = " + ".join(f"{field} {number:,}" for field, number in self.state.items() if number)
        lines = {
            f"{self.name} ({self.paper})": self.summary,
            "options": ", ".join(said),
            f"state at d_model {self.d_model}, length {self.seq_len:,}": f"{sum(self.state.values()):,} = {fields}",
            "backends, fastest first": ", ".join(self.backends),
        }
        return "\n".join(f"{title}: {text}" for title, text in lines.items())


def describe(name: str, *, d_model: int = 64, seq_len: int = 1024) -> Description:
    """Paper, one-line summary, options with defaults, state elements by field at `seq_len`, and backends."""
    entry = get(name)
    summary = (inspect.getdoc(entry.cls) or "").split("\n\n")[0].replace("\n", " ")
    mixer = create(name, d_model=d_model)
    state = mixer.state_fields(seq_len)
    return Description(name, entry.paper, summary, options(name), state, mixer.backends, d_model, seq_len)


def load_file(path: str | Path) -> list[str]:
    """Import a user's Python file and return the names of the architectures it registered.

    Raises ValueError if the file is missing, fails to import or registers nothing.
    """
    path = Path(path).resolve()
    before = set(_entries)
    run_file(path, "architectures")
    added = sorted(name for name, entry in _entries.items() if entry.where.rpartition(":")[0] == str(path))
    if not added:
        raise ValueError(f"architectures file {path} registers nothing: decorate a class with @register(name)")
    return sorted({*added, *(set(_entries) - before)} - _builtin_names())  # those it imports are not its own


def _builtin_names() -> set[str]:
    folder = str(Path(__file__).parent)
    return {m.name for m in pkgutil.iter_modules([folder]) if not m.ispkg} - SHARED_MODULES


def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    return {point.name: point for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)}


def _closest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    listed = f"there are {', '.join(known)}"
    return f"did you mean {' or '.join(repr(c) for c in close)}? ({listed})" if close else listed


def _matches(value: Any, annotation: Any) -> bool:
    if annotation is Any:
        return True
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, choice) for choice in typing.get_args(annotation))
    if origin is typing.Literal:
        return value in typing.get_args(annotation)
    if origin is not None:
        return isinstance(value, origin)
    if annotation in (None, type(None)):
        return value is None
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, annotation) if isinstance(annotation, type) else True
