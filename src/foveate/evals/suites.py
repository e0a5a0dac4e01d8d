"""Every suite by name, and which of its tasks a name asks for. A module of a suite has `TASKS: tuple[Task, ...]`."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from ..errors import ConfigError, nearest
from .task import Task

SUITES = {
    "ruler": "foveate.evals.ruler",
    "synth": "foveate.evals.ruler.synth",
    "needle": "foveate.evals.needle",
    "threads": "foveate.evals.threads",
    "infinite": "foveate.evals.infinite",
    "mqar": "foveate.evals.mqar",
}
STREAMS = ("perplexity", "agreement")  # measured on running text, see stream.py


def tasks_of(suite: str) -> tuple[Task, ...]:
    """All tasks of a suite. ConfigError for an unknown one."""
    if suite not in SUITES:
        known = (*SUITES, *STREAMS)
        raise ConfigError(f"suites: unknown {suite!r}{nearest(suite, known)}; known: {', '.join(known)}")
    return tuple(importlib.import_module(SUITES[suite]).TASKS)


def choose(names: Sequence[str]) -> tuple[list[Task], list[str]]:
    """(tasks, streams) that these names ask for: a suite, a stream, or one task ("ruler/vt", or "vt" where it is clear).

    Raises:
        ConfigError: an unknown name, with the nearest known one.
    """
    tasks: dict[str, Task] = {}
    streams: dict[str, None] = {}
    for name in names:
        suite, slash, one = name.partition("/")
        if name in STREAMS:
            streams[name] = None
        elif name in SUITES:
            tasks.update({t.name: t for t in tasks_of(name)})
        elif slash:
            tasks.update({t.name: t for t in [_one(one, tasks_of(suite), suite)]})
        else:
            every = [t for s in SUITES for t in tasks_of(s)]
            found = next((t for t in every if t.name == name), None)
            if found is None:
                known = [*SUITES, *STREAMS, *(t.name for t in every)]
                raise ConfigError(f"suites: unknown {name!r}{nearest(name, known)}; known: {', '.join([*SUITES, *STREAMS])}")
            tasks[found.name] = found
    if not tasks and not streams:
        raise ConfigError("suites: expected at least one suite or task, got none")
    return list(tasks.values()), list(streams)


def _one(name: str, tasks: Sequence[Task], suite: str) -> Task:
    for task in tasks:
        if task.name == name:
            return task
    names = [t.name for t in tasks]
    raise ConfigError(f"suites: {suite} has no task {name!r}{nearest(name, names)}; known: {', '.join(names)}")
