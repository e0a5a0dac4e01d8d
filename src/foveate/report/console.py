"""Where text goes: results to stdout, progress and remarks to stderr, so that a pipe gets results alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console


def stdout() -> Console:
    """Stdout; wide when it is a pipe, so that no table is folded into a file."""
    return Console() if sys.stdout.isatty() else Console(width=180)


def stderr() -> Console:
    """Stderr."""
    return Console(stderr=True)


@contextmanager
def progress(out: Console) -> Iterator[Callable[[str, float], None]]:
    """A bar with the time left on stderr; nothing moves where stderr is a file."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    parts = (TextColumn("{task.description}"), BarColumn(bar_width=30), TaskProgressColumn(), TimeElapsedColumn(),
             TextColumn("left"), TimeRemainingColumn())  # fmt: skip
    with Progress(*parts, console=out, refresh_per_second=3, speed_estimate_period=120, transient=True) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda what, share: bar.update(task, description=what, completed=share)
