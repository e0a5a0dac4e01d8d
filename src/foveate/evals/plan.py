"""What an evaluation will run, checked before anything does: recipes, tasks, lengths, protocols."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError
from ..methods.base import Method
from ..recipe import Recipe
from . import suites as catalogue
from .protocols import CHUNK, check_protocols
from .task import Sample, Task, make
from .text import Source


@dataclass(frozen=True)
class Plan:
    """What to run. See `runner.run`."""

    recipes: list[Recipe]
    tasks: list[Task]
    streams: list[str]
    lengths: list[int]
    samples: int
    protocols: list[str]
    seed: int = 0
    batch: int | None = None
    chunk: int = CHUNK
    backend: str | None = None
    looks: int = 2
    rounds: int = 3
    steps: int = 64
    longppl: bool = False
    notes: list[str] = field(default_factory=list)


def make_plan(
    model: Any,
    tokenizer: Any,
    recipes: Sequence[Recipe | Method | str],
    names: Sequence[str],
    lengths: Sequence[int],
    samples: int,
    protocols: Sequence[str],
    source: Source,
    beyond: bool,
    options: dict[str, Any],
) -> Plan:
    if samples < 1:
        raise ConfigError(f"samples: expected at least 1, got {samples}")
    for option, least in (("looks", 0), ("rounds", 0), ("steps", 1), ("chunk", 1)):
        if options[option] < least:
            raise ConfigError(f"{option}: expected at least {least}, got {options[option]}")
    if options["batch"] is not None and options["batch"] < 1:
        raise ConfigError(f"batch: expected at least 1, got {options['batch']}")
    check_protocols(protocols)
    dense = Recipe.of("dense")
    parsed = {r.describe(): r for r in [dense, *(Recipe.of(r) for r in recipes)]}
    parsed[dense.describe()] = dense
    tasks, streams, notes = _available(names, source)
    limit = getattr(model.get_decoder().config, "max_position_embeddings", None)
    for length in lengths:
        if length < 1:
            raise ConfigError(f"lengths: expected whole numbers above 0, got {length}")
        if limit is not None and length > limit and not beyond:
            raise ConfigError(
                f"lengths: {length} is beyond the model's {limit} positions (beyond=True, --beyond measure it)"
            )
    if not lengths:
        raise ConfigError("lengths: expected at least one, got none")
    own = {name.rpartition("/")[2] for name in names}
    for task in list(tasks):  # a task that cannot be made must not cost hours of others
        try:
            sample, _ = make(task, tokenizer, min(lengths), 0, options["seed"], source)
        except ConfigError as err:
            if task.name in own or len(tasks) == 1:
                raise
            notes.append(f"{task.name} is left out: {err}")
            tasks.remove(task)
        else:
            _spelt(tokenizer, task, sample)
    for recipe in parsed.values():
        if recipe.decode_only and streams:
            notes.append(
                f"{recipe}: acts in decode only; its figures under the protocol prefill are those of dense attention"
            )
    return Plan(
        recipes=list(parsed.values()),
        tasks=tasks,
        streams=streams,
        lengths=list(dict.fromkeys(lengths)),
        samples=samples,
        protocols=list(dict.fromkeys(protocols)),
        notes=notes,
        **options,
    )


def _available(names: Sequence[str], source: Source) -> tuple[list[Task], list[str], list[str]]:
    """Tasks, streams, and a note for each task left out. A task asked for by its own name must be there."""
    tasks, streams = catalogue.choose(names)
    own = {name.rpartition("/")[2] for name in names}
    notes, kept = [], []
    for task in tasks:
        why = task.needs(source)
        if why is not None and task.name in own:
            raise ConfigError(f"task {task.name}: {why}")
        if why is not None:
            notes.append(f"{task.name} is left out: {why}")
        else:
            kept.append(task)
    return kept, streams, notes


def _spelt(tokenizer: Any, task: Task, sample: Sample) -> None:
    for answer in sample.answers:
        back = tokenizer.decode(tokenizer(answer, add_special_tokens=False)["input_ids"])
        if "".join(back.split()).lower() != "".join(answer.split()).lower():
            raise ConfigError(f"tokenizer: cannot spell the answers of {task.name}: {answer!r} comes back as {back!r}")
