"""The kinds of task by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TypeAlias

from fedgraft_client.tasks.task import Task
from fedgraft_common.errors import DataError
from fedgraft_common.task_spec import TaskSpec

Builder: TypeAlias = Callable[[TaskSpec, Mapping[str, float] | None], Task]
_BUILDERS: dict[str, Builder] = {}


def register(kind: str, builder: Builder) -> None:
    """Makes a kind of task known.

    Raises:
        ValueError: there is one of that name.
    """
    if kind in _BUILDERS:
        raise ValueError(f"two tasks are called {kind}")
    _BUILDERS[kind] = builder


def known_tasks() -> tuple[str, ...]:
    """Names of the kinds, in the order they were registered."""
    return tuple(_BUILDERS)


def build_task(
    spec: TaskSpec, weights: Mapping[str, float] | None = None, where: str = "task"
) -> Task:
    """The task that a site file or a plan describes; the same object for the same description.

    Args:
        spec: as configured.
        weights: the plan's weight of each class by name; others count 1.
        where: whose it is, for errors.

    Raises:
        DataError: no such kind, or something in it does not fit that kind.
    """
    if spec.kind not in _BUILDERS:
        raise DataError(f"{where}: kind", spec.kind, ", ".join(_BUILDERS), "Choose one of these.")
    try:
        return _built(spec, tuple(sorted((weights or {}).items())))
    except DataError as error:
        field = error.field.replace("task", where, 1)
        raise DataError(field, error.value, error.allowed, error.action) from None


@lru_cache(maxsize=256)
def _built(spec: TaskSpec, weights: tuple[tuple[str, float], ...]) -> Task:
    return _BUILDERS[spec.kind](spec, dict(weights))
