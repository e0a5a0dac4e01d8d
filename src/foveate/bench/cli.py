"""The command `foveate bench breakeven`."""

from __future__ import annotations

import json
import math
from typing import Annotated

import typer

from ..errors import ConfigError
from ..options import Debug, Device, Dtype, Many, One, lengths_of, names_of, recipes_of

JsonFile = Annotated[
    str | None,
    typer.Option("--json", help="Write rows to this file as they are measured, and go on with those it has (-: print)."),
]


def register(bench: typer.Typer) -> None:
    """Add the command to the group."""
    bench.command("breakeven")(breakeven)


def breakeven(
    recipe: One = None,
    recipes: Many = None,
    lengths: Annotated[str | None, typer.Option(help="Tokens, separated by commas.")] = None,
    heads: Annotated[str, typer.Option(help="Query heads and kv heads.")] = "32,8",
    dim: Annotated[int, typer.Option(help="Head dimension.")] = 128,
    layers: Annotated[int, typer.Option(help="Attention layers of a decode step.")] = 32,
    phases: Annotated[str, typer.Option(help="prefill, decode, or both.")] = "prefill,decode",
    rounds: Annotated[int, typer.Option(help="Rounds with dense attention, at least.", min=1)] = 3,
    seconds: Annotated[float, typer.Option(help="Seconds after which nothing further begins.")] = math.inf,
    keep: Annotated[bool, typer.Option(help="Let the length gates (--gate) of this machine use the result.")] = True,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json_file: JsonFile = None,
    debug: Debug = False,
) -> None:
    """Find the length from which each recipe is faster than dense attention here; gates use it.

    Methods for prefill are timed on one layer's prompt, methods for decode on the attention steps of all layers.
    """
    from .. import payoff
    from ..models import pick_device, pick_dtype
    from ..report.console import progress, stderr
    from . import breakeven as work

    asked, where = recipes_of(recipe, recipes), pick_device(device)
    try:
        h, g = (int(n) for n in heads.split(","))
    except ValueError:
        raise ConfigError(f"heads: expected query heads and kv heads such as 32,8, got {heads!r}") from None
    shape = work.Shape(h, g, dim, pick_dtype(dtype, where), layers)
    file = None if json_file == "-" else json_file
    if keep:
        payoff.read(payoff.own_file())  # what cannot be read should not cost a measurement
    out = stderr()
    with progress(out) as tick:
        result = work.run(
            asked or work.RECIPES, lengths=lengths_of(lengths), shape=shape, phases=names_of(phases) or (),
            rounds=rounds, device=where, seconds=seconds, json=file, progress=tick,
        )  # fmt: skip
    print(json.dumps(result, indent=1, allow_nan=False) if json_file == "-" else work.table(result))
    if keep and result["rows"]:
        path = payoff.remember(work.entries(result))
        out.print(f"gates use it from now on: {path}", highlight=False, soft_wrap=True)
    if result["notes"] and not result["rows"]:
        raise typer.Exit(1)
