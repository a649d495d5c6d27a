"""Tasks by name, so that a config written as JSON can say which one it means."""

import inspect
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

from pydantic import PlainSerializer, PlainValidator

from architectures.user_files import run_file

from ..schema import closest
from .base import IGNORE_INDEX, Task

_TASKS: dict[str, type[Task]] = {}
ENTRY_POINTS = "zoology.tasks"


def register(name: str, *, source: str | None = None) -> Callable[[type[Task]], type[Task]]:
    """Class decorator that names a task. `source` (paper, section) may also be an attribute of the class.

    Raises ValueError when another class has the name already, naming both places, or for an option `name`.
    """

    def decorate(cls: type[Task]) -> type[Task]:
        if not (isinstance(cls, type) and issubclass(cls, Task)):
            raise ValueError(f"register({name!r}): {cls!r} must be a subclass of zoology.tasks.Task")
        if "name" in cls.model_fields:
            raise ValueError(
                f"register({name!r}): {cls.__name__} has an option 'name', which is kept for the task's own"
            )
        known = _TASKS.get(name)
        # A file that is run and then imported defines its classes twice; that is one task, not two.
        if known is not None and _place(known) != _place(cls):
            raise ValueError(f"register({name!r}): defined in {_place(known)} and again in {_place(cls)}")
        cls.name = name
        if source is not None:
            cls.source = source
        _TASKS[name] = cls
        return cls

    return decorate


def names() -> list[str]:
    """Names of all registered tasks, and of those that installed packages offer, sorted."""
    return sorted({*_TASKS, *(entry.name for entry in entry_points(group=ENTRY_POINTS))})


def get(name: str) -> type[Task]:
    """The class of a task.

    Raises ValueError for an unknown name, with the closest ones, and for an entry point of a package that cannot be
    loaded or does not register its name.
    """
    if name in _TASKS:
        return _TASKS[name]
    for entry in entry_points(group=ENTRY_POINTS):
        if entry.name == name:
            try:
                entry.load()
            except Exception as error:
                raise ValueError(f"task {name!r} ({entry.value}): {type(error).__name__}: {error}") from error
            if name not in _TASKS:
                raise ValueError(f"task {name!r}: {entry.value} does not register it")
            return _TASKS[name]
    raise ValueError(f"unknown task {name!r}{closest(name, names())}; tasks are {', '.join(names())}")


def create(name: str, **options) -> Task:
    """The task `name` with these options. Raises ValueError for an unknown name or a wrong option."""
    return get(name)(**options)


def load_file(path: str | Path) -> list[str]:
    """Run a user's Python file and return the names of the tasks it registered.

    Raises ValueError if the file is missing, fails or registers nothing.
    """
    module = run_file(path, "tasks")
    added = sorted(name for name, cls in _TASKS.items() if cls.__module__ == module.__name__)
    if not added:
        raise ValueError(f"tasks file {module.__file__} registers nothing: decorate a class with @register(name)")
    return added


def from_config(config: Mapping[str, Any] | Task) -> Task:
    """The task of a JSON config `{"name": "mqar", **options}`; a Task is returned as it is."""
    if isinstance(config, Task):
        return config
    if not isinstance(config, Mapping) or "name" not in config:
        raise ValueError(f"task={config!r}: must be a Task or a mapping with a 'name', one of {', '.join(names())}")
    return create(**config)


AnyTask = Annotated[Task, PlainValidator(from_config), PlainSerializer(Task.config)]
"""A pydantic field that holds any registered task and reads and writes it as JSON."""


def describe(name: str) -> dict[str, Any]:
    """What the task table says of a task.

    Keys: name, definition (first paragraph of the docstring), details (the rest), example (its text),
    required_bits (the rule), default_bits (its value for default options; None if an option has no default),
    options (name to default) and source.
    """
    cls = get(name)
    definition, _, details = inspect.cleandoc(cls.__doc__ or "").partition("\n\n")
    options = {
        field: None if info.is_required() else info.get_default(call_default_factory=True)
        for field, info in cls.model_fields.items()
    }
    complete = not any(info.is_required() for info in cls.model_fields.values())
    return {
        "name": name,
        "definition": " ".join(definition.split()),
        "details": details,
        "example": format_example(cls(**cls.example)) if cls.example or complete else "",
        "required_bits": " ".join(inspect.cleandoc(cls.required_bits.__doc__ or "").partition("\n\n")[0].split()),
        "default_bits": cls().required_bits() if complete else None,
        "options": {key: value.config() if isinstance(value, Task) else value for key, value in options.items()},
        "source": cls.source,
    }


def format_example(task: Task, seed: int = 0, limit: int = 48) -> str:
    """The first example on one line: a scored token is written `token>label`; at most `limit` tokens."""
    inputs, labels = (row[0].tolist() for row in task.sample(1, seed))
    tokens = [str(x) if y == IGNORE_INDEX else f"{x}>{y}" for x, y in zip(inputs[:limit], labels[:limit])]
    return " ".join(tokens) + (" ..." if len(inputs) > limit else "")


def _place(cls: type) -> str:
    """File and name of a class, for messages."""
    try:
        return f"{inspect.getsourcefile(cls)}:{cls.__qualname__}"
    except (OSError, TypeError):
        return f"{cls.__module__}:{cls.__qualname__}"
