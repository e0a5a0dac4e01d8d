"""The committed evaluation of one model: which tasks dense attention can do, then every recipe on those.

    python benchmarks/eval_run.py --model smollm2 --lengths 2048,4096,8192 --out FOLDER [--minutes 9]
    python benchmarks/eval_run.py --out FOLDER --join PART PART

Part "cost" times recipes in turns (nothing else may run then), "streams" measures running text, "tasks" asks questions:
dense answers a few samples of every task; tasks it does at 60 % or more get all recipes and all samples, under the protocol
"seen" and, for recipes with a cache policy, "unseen". Tasks and lengths can go to processes of their own and be joined (no
more than two or three on a GPU: each wait takes a time slice). A folder can be resumed; when the time is over what is there
stays. `foveate frontier --out FOLDER --summary FILE` makes the tables.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from foveate.errors import FoveateError
from foveate.evals import cells
from foveate.evals.results import COUNTS, Results, join
from foveate.evals.runner import run
from foveate.evals.suites import SUITES, tasks_of
from foveate.evals.text import Source
from foveate.measure import DEFAULT_RECIPES
from foveate.models import load
from foveate.recipe import Recipe

RECIPES = (*DEFAULT_RECIPES, "expected_attention@8k")


class TimeOver(Exception):
    pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--recipes", default=";".join(RECIPES))
    parser.add_argument("--lengths", default="2048,4096,8192")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", default="cost,streams,tasks")
    parser.add_argument("--tasks", help="only these, separated by commas")
    parser.add_argument("--protocols", default="seen,unseen", help="of the tasks")
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--screen", type=int, default=20, help="samples of the first look at what dense can do")
    parser.add_argument("--looks", type=int, default=1, help="samples of a cell that are watched alone, slowly")
    parser.add_argument("--rounds", type=int, default=3, help="of the cost")
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tokens", type=int, default=400_000, help="tokens of a batch")
    parser.add_argument(
        "--every", action="store_true", help="also tasks that dense fails: those of longer texts than it reads"
    )
    parser.add_argument("--beyond", action="store_true", help="lengths beyond the model's positions")
    parser.add_argument("--join", nargs="*", type=Path, help="gather these folders into --out and stop")
    args = parser.parse_args()
    if args.join is not None:
        print(f"{len(join(args.out, args.join).records)} records in {args.out}")
        return
    source, began = Source.of(), time.monotonic()
    model, tokenizer = load(args.model, device=args.device, dtype=args.dtype, say=print)
    every = [t for s in SUITES for t in tasks_of(s) if t.needs(source) is None]
    # with the suite in front: "needle" alone is a suite of three tasks
    wanted = [f"{t.suite}/{t.name}" for t in every if args.tasks is None or t.name in args.tasks.split(",")]
    recipes = [r for r in args.recipes.split(";") if r]
    parts, protocols = args.parts.split(","), args.protocols.split(",")
    shown = ""

    def progress(what: str, share: float) -> None:
        nonlocal shown
        if time.monotonic() - began > 60 * args.minutes:
            raise TimeOver
        if what != shown:
            print(f"{time.monotonic() - began:7.1f} s  {what}", flush=True)
            shown = what

    def go(length: int, suites: list[str], recipes: list[str], samples: int, **options: object) -> None:
        batch = max(1, min(100, args.tokens // length))
        some: dict = dict(rounds=0, looks=args.looks, beyond=args.beyond) | options
        try:
            run(model, tokenizer, out=args.out, name=Path(args.model).name, source=source, recipes=recipes, suites=suites,
                lengths=[length], samples=samples, batch=batch, progress=progress, say=print, **some)  # fmt: skip
        except FoveateError as err:  # one task's trouble must not cost the others
            print(f"{length}: {err}", file=sys.stderr, flush=True)

    def tasks(length: int) -> None:
        for task in wanted:
            go(length, [task], ["dense"], args.screen)
        good = [
            f"{c.suite}/{c.task}" for c in cells(Results.load(args.out))
            if c.length == length and c.recipe == "dense" and c.protocol == "seen" and c.mean >= COUNTS
        ]  # fmt: skip
        if args.every:
            good = wanted
        print(f"{length}: dense does {', '.join(good) or 'nothing'}", flush=True)
        evicting = ["dense", *(r for r in recipes if Recipe.of(r).evicts)]
        for task in (t for t in wanted if t in good):
            if "seen" in protocols:
                go(length, [task], recipes, args.samples)
            if "unseen" in protocols:
                go(length, [task], evicting, args.samples, protocols=["unseen"])

    try:
        for length in (int(n) for n in args.lengths.split(",")):
            if "cost" in parts:
                go(length, ["infinite/passkey"], recipes, 1, rounds=args.rounds, looks=0)
            if "streams" in parts:
                go(length, ["perplexity", "agreement"], recipes, args.samples)
            if "tasks" in parts:
                tasks(length)
    except TimeOver:
        print("the time is over; the rest is not measured", flush=True)


if __name__ == "__main__":
    main()
