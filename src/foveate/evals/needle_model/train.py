"""Trains the needle model: `python -m foveate.evals.needle_model.train --out DIR --minutes 7 --seed 0`.

Made for one GPU and a wall clock: lengths from 64 to 64K tokens (`ladder`), texts from worker processes (`stream`), the
loss on answers and on some of the rest. When the time is over, or on SIGTERM, the weights are saved and the real tasks
checked. Nothing is downloaded; the word lists must be those of wonderwords, because the tokenizer is made of them.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...errors import ConfigError
from ...models import pick_device
from ..text import Source
from .artefact import load, save, write_readme
from .check import PLAN, Cases, check
from .ladder import RUNGS, Ladder
from .model import Shape, loss_and_hits
from .stream import Stream, loader
from .tokenizer import build

Say = Callable[[str], None]
MUON, GAINS = 2.0, 0.1  # learning rates of Muon and of the norms' gains, in units of that of the embeddings


@dataclass(frozen=True)
class Recipe:
    """All that shapes a run besides seed and time.

    Attributes:
        shape: of the model. rungs: the curriculum. tokens: of a batch. rate: peak learning rate of AdamW.
        warm: steps up to it. muon: orthogonalised updates for the matrices of the layers. hold: share of the time
            after which the rate falls. decay: weight decay. plan: the closing check. check_seconds: its time, beyond
            the minutes. tick: seconds between log lines. start: a folder of weights to go on from, or None.
    """

    shape: Shape = field(default_factory=Shape)
    rungs: tuple[tuple[int, float], ...] = RUNGS
    tokens: int = 131072
    rate: float = 3e-3
    warm: int = 100
    muon: bool = True
    hold: float = 0.55
    decay: float = 0.01
    plan: tuple[tuple[str, int, int], ...] = PLAN
    check_seconds: float = 60.0
    tick: float = 10.0
    start: Path | None = None


def train(
    out: Path,
    minutes: float = 7.0,
    seed: int = 0,
    device: str = "auto",
    say: Say = print,
    *,
    recipe: Recipe | None = None,
    source: Source | None = None,
    workers: int | None = None,
) -> dict[str, Any]:
    """Train, save to the folder `out` (weights in bf16, tokenizer, README.md, log.jsonl), check; the summary as a dict.

    Args:
        minutes: of training, start-up included; the closing check takes up to `recipe.check_seconds` more.
        device: "auto", "cpu", "cuda", ... say: called with each log line.
        source: word lists and prose; the installed ones by default. workers: processes that make texts; one less than
            there are cores by default.

    Raises:
        ConfigError: no time, the package wonderwords is missing, no such device, a start that does not fit.
    """
    began, recipe, out = time.monotonic(), recipe or Recipe(), Path(out)
    if not minutes > 0:
        raise ConfigError(f"minutes: expected more than 0, got {minutes}")
    source = _checked(source or Source.of())
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # workers are forked
    workers = max(0, (os.cpu_count() or 2) - 2) if workers is None else workers
    builders = min(4, workers // 3)
    torch.manual_seed(seed)
    tokenizer = build(source)
    stream = Stream(tokenizer, source, seed, recipe.tokens, tuple(n for n, _ in recipe.rungs))
    cases = Cases(recipe.plan, tokenizer, source, seed, builders)
    batches = loader(stream, workers - builders)  # before the GPU is touched
    where = pick_device(device)
    model = load(recipe.start, tokenizer) if recipe.start else recipe.shape.model(tokenizer)
    model = model.float().to(where).train()
    size = sum(p.numel() for p in model.parameters())
    say(f"needle model: {size:,} parameters, {len(tokenizer)} tokens, {where}, {workers - builders} workers, {source.name}")
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "log.jsonl", "w", encoding="utf-8") as log, _stoppable() as stop:
        run = _Run(model, recipe, stream, minutes * 60, began, log, say, lambda: save(model, tokenizer, out))
        try:
            run.go(batches, stop)
        except RuntimeError:
            if not stop:  # a SIGTERM to the whole group ends the workers too, which the loader takes for a failure
                raise
        save(model, tokenizer, out)
        rows: list[dict[str, Any]] = []
        if not stop:
            reasons = cases.errors()
            for reason in reasons:
                say(f"check: some samples could not be built: {reason}")
            rows = check(copy.deepcopy(model).to(torch.bfloat16).eval(), tokenizer, cases, recipe.check_seconds, say)
        cases.close()
        summary = {
            "seed": seed,
            "minutes": minutes,
            "device": torch.cuda.get_device_name(where) if where.type == "cuda" else str(where),
            "torch": torch.__version__,
            "source": source.name,
            "parameters": size,
            "shape": recipe.shape.told(),
            "muon": recipe.muon,
            "rate": recipe.rate,
            "start": recipe.start is not None,
            **run.told(),
            "check": rows,
            "stopped": bool(stop),
            "seconds": round(time.monotonic() - began, 1),
        }
        log.write(json.dumps(summary) + "\n")
    write_readme(out, summary)
    say(f"saved to {out.name}/ after {summary['seconds']} s")
    return summary


def _checked(source: Source) -> Source:
    if "pseudo" in source.name:
        raise ConfigError(f"source: the tokenizer is made of the word lists of wonderwords and essays, got {source.name}")
    return source


class _Run:
    """The loop: one model, one optimizer, one clock."""

    def __init__(
        self,
        model: Any,
        recipe: Recipe,
        stream: Stream,
        seconds: float,
        began: float,
        log: Any,
        say: Say,
        keep: Callable[[], None],
    ) -> None:
        self.model, self.recipe, self.stream, self.seconds, self.began = model, recipe, stream, seconds, began
        self.log, self.say, self.keep = log, say, keep
        self.device = next(model.parameters()).device
        self.optimizers = _optimizers(model, recipe, self.device)
        self.ladder = Ladder(recipe.rungs)
        self.step = self.seen = self.skipped = 0
        self.losses: list[float] = []
        self.best: tuple[int, float, dict[str, Any]] | None = None

    def share(self) -> float:
        return (time.monotonic() - self.began) / self.seconds

    def go(self, batches: Iterator[dict[str, torch.Tensor]], stop: list[int]) -> None:
        tick = kept = time.monotonic()
        waited, since = 0.0, []  # type: float, list[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]
        while self.share() < 1 and not stop:
            asked = time.monotonic()
            batch = next(batches)
            waited += time.monotonic() - asked
            since.append(self._step(batch))
            if len(since) == 10 or time.monotonic() - tick > self.recipe.tick:
                self._count(since)
                since = []
                if self.ladder.move(self.share()):
                    self.say(f"{self.ladder.moves[-1]}; next {self.ladder.length}")
                    self.stream.length[0] = self.ladder.length
            if (now := time.monotonic()) - tick > self.recipe.tick:
                self._tell(waited / (now - tick))
                self._remember()
                waited, tick = 0.0, now
                if now - kept > 60:
                    self.keep()
                    kept = now
        self._count(since)
        self._tell(0.0)
        length = self.ladder.length
        if self.best and self.best[0] == length and self.ladder.solved(length) < self.best[1] - 0.03:
            self.say(f"the last weights are worse than earlier ones at {length}; going back to those")
            self.model.load_state_dict(self.best[2])

    def _step(self, batch: dict[str, torch.Tensor]) -> tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]:
        moved = {k: v.to(self.device, non_blocking=True) for k, v in batch.items()}
        moved = {k: v if v.is_floating_point() else v.long() for k, v in moved.items()}
        cuda = self.device.type == "cuda"
        with torch.autocast("cuda", torch.bfloat16) if cuda else nullcontext():
            loss, answers, hits = loss_and_hits(self.model, moved)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if torch.isfinite(norm):
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = self.rate() * group["scale"]
                optimizer.step()
        else:
            self.skipped += 1
        self.model.zero_grad(set_to_none=True)
        self.step += 1
        self.seen += batch["ids"].numel()
        return batch["ids"].shape[1], loss.detach(), answers, hits

    def rate(self) -> float:
        """Up in `warm` steps, level until `hold`, then a half cosine down to 3 % at the end of the time."""
        r = self.recipe
        late = min(1.0, max(0.0, (self.share() - r.hold) / (1 - r.hold)))
        return r.rate * min(1.0, (self.step + 1) / r.warm) * (0.03 + 0.97 * (1 + math.cos(math.pi * late)) / 2)

    def _count(self, since: list[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]) -> None:
        for length, loss, answers, hits in since:
            self.losses.append(float(loss))
            self.ladder.saw(length, answers.tolist(), hits.tolist())

    def _tell(self, wait: float) -> None:
        length, recent = self.ladder.length, self.losses[-50:]
        row = {
            "seconds": round(time.monotonic() - self.began, 1),
            "step": self.step,
            "tokens": self.seen,
            "length": length,
            "loss": round(sum(recent) / max(1, len(recent)), 4),
            "rate": round(self.rate(), 6),
            "wait": round(wait, 3),
            "skipped": self.skipped,
            "accuracy": {str(n): {k: round(a, 4) for k, a in self.ladder.accuracy(n).items()} for n, _ in self.recipe.rungs},
        }
        self.log.write(json.dumps(row) + "\n")
        self.log.flush()
        accuracy = " ".join(f"{k} {100 * a:.0f}" for k, a in self.ladder.accuracy(length).items())
        self.say(
            f"{row['seconds']:6.1f} s, step {self.step}, {self.seen / 1e6:.0f}M tokens, length {length}, "
            f"loss {row['loss']:.3f}, rate {self.rate():.1e}, waiting {wait:.0%} | {accuracy}"
        )

    def _remember(self) -> None:
        length, solved = self.ladder.length, self.ladder.solved(self.ladder.length)
        if self.best is None or length > self.best[0] or solved >= self.best[1]:
            self.best = (length, solved, {k: v.detach().clone() for k, v in self.model.state_dict().items()})

    def told(self) -> dict[str, Any]:
        return {
            "steps": self.step,
            "tokens": self.seen,
            "skipped": self.skipped,
            "first_loss": round(sum(self.losses[:10]) / max(1, len(self.losses[:10])), 4),
            "loss": round(sum(self.losses[-50:]) / max(1, len(self.losses[-50:])), 4),
            "moves": self.ladder.moves,
            "accuracy": {str(n): self.ladder.accuracy(n) for n, _ in self.recipe.rungs},
        }


def _optimizers(model: Any, recipe: Recipe, device: torch.device) -> list[torch.optim.Optimizer]:
    """AdamW (Loshchilov and Hutter 2019); with `muon`, Muon (Jordan et al. 2024) for the layers' matrices.

    Each group has its "scale", in units of the rate.
    """
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    table = model.model.embed_tokens.weight
    others = [p for name, p in model.named_parameters() if p.ndim != 2 and p is not table]
    adam: dict[str, Any] = {"lr": recipe.rate, "betas": (0.9, 0.98), "fused": device.type == "cuda"}
    groups: list[dict[str, Any]] = [
        {"params": others, "weight_decay": 0.0, "scale": GAINS},
        {"params": [table], "weight_decay": 0.0, "scale": 1.0},
    ]
    if not recipe.muon:
        return [torch.optim.AdamW([{"params": matrices, "weight_decay": recipe.decay, "scale": 1.0}, *groups], **adam)]
    first = torch.optim.Muon(
        [{"params": matrices, "scale": MUON}], lr=recipe.rate, weight_decay=recipe.decay, adjust_lr_fn="match_rms_adamw"
    )
    return [first, torch.optim.AdamW(groups, **adam)]


@contextmanager
def _stoppable() -> Iterator[list[int]]:
    """A list that SIGTERM fills (where signals may be caught: the main thread)."""
    stop: list[int] = []
    try:
        before = signal.signal(signal.SIGTERM, lambda number, frame: stop.append(number))
    except ValueError:
        yield stop
        return
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


def main() -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(description="Train the needle model.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=7.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--start", type=Path, help="folder of weights to go on from")
    parser.add_argument("--muon", action=argparse.BooleanOptionalAction, default=Recipe.muon)
    parser.add_argument("--rate", type=float, default=Recipe.rate)
    parser.add_argument("--tokens", type=int, default=Recipe.tokens, help="of a batch")
    parser.add_argument(
        "--lengths", default="", help="only these lengths of the curriculum, as in 512,2048: to try settings"
    )
    parser.add_argument("--check-seconds", type=float, default=Recipe.check_seconds)
    parser.add_argument("--workers", type=int)
    for name in ("layers", "heads", "kv_heads", "head_dim", "hidden", "inner"):
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=getattr(Shape, name))
    args = parser.parse_args()
    shape = Shape(args.hidden, args.layers, args.heads, args.kv_heads, args.head_dim, args.inner)
    wanted = [int(n) for n in args.lengths.split(",") if n]
    recipe = Recipe(
        shape=shape,
        rungs=tuple(rung for rung in RUNGS if not wanted or rung[0] in wanted) or RUNGS,
        muon=args.muon,
        rate=args.rate,
        tokens=args.tokens,
        check_seconds=args.check_seconds,
        start=args.start,
    )
    say = lambda line: print(line, flush=True)  # noqa: E731
    train(args.out, args.minutes, args.seed, args.device, say, recipe=recipe, workers=args.workers)


if __name__ == "__main__":
    main()
