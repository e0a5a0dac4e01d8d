"""Run recipes through suites on one model: every finished sample is on disk, a second start goes on where it stopped."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import __version__
from ..adapters.capability import fingerprint
from ..adapters.transformers import use
from ..bench.results import commit
from ..doctor import device_name, versions
from ..errors import FoveateError
from ..measure import DEFAULT_RECIPES, Progress
from ..methods.base import Method
from ..recipe import Recipe
from . import agreement, stream
from .cost import STEPS, cost
from .look import look
from .plan import Plan, make_plan
from .protocols import CHUNK, Answer, ask
from .results import Record, Results, Store
from .task import Encoded, Sample, Task, make
from .text import Source

SUITES = ("ruler", "needle", "threads", "infinite", "mqar", "perplexity", "agreement")
STEP_WEIGHT = 40  # a decode step takes about as long as this many tokens of a prefill


def run(
    model: Any,
    tokenizer: Any,
    *,
    out: str | Path,
    recipes: Sequence[Recipe | Method | str] = DEFAULT_RECIPES,
    suites: Sequence[str] = SUITES,
    lengths: Sequence[int] = (4096,),
    samples: int = 100,
    protocols: Sequence[str] = ("seen",),
    seed: int = 0,
    name: str = "",
    source: Source | None = None,
    batch: int | None = None,
    chunk: int = CHUNK,
    backend: str | None = None,
    looks: int = 2,
    rounds: int = 3,
    steps: int = 64,
    longppl: bool = False,
    beyond: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Results:
    """Evaluate recipes on a model and return all records of the folder `out`.

    Args:
        model, tokenizer: a transformers causal language model and its fast tokenizer.
        out: folder of results; records found there are not computed again. ResultsError if they are another run's.
        recipes: dense is added in front, every other recipe is judged against it on the same samples.
        suites: suites, streams ("perplexity", "agreement") or single tasks ("ruler/vt").
        lengths: tokens of prompt and answer together. samples: of each task (streams and cost take a tenth).
        protocols: how samples are put, see `protocols`. source: filler text. batch: samples at once (None: by length).
        looks: samples of each cell that are watched for density, attention mass and needle hits (slower, batch 1).
        rounds: rounds of the cost measurement, 0 for none. steps: decode steps of the streams. longppl: key tokens too.
        beyond: allow lengths beyond the model's positions.
        progress: called with (what runs, share of the whole done). say: called with sentences for the user.

    Raises:
        ConfigError: unknown recipes, suites or protocols; no samples; lengths beyond the model or too short for a task.
    """
    source = source or Source.of()
    plan = make_plan(model, tokenizer, recipes, suites, lengths, samples, protocols, source, beyond, dict(
        seed=seed, batch=batch, chunk=chunk, backend=backend, looks=looks, rounds=rounds, steps=steps, longppl=longppl
    ))  # fmt: skip
    for note in plan.notes:
        say(note)
    with Store(out, _facts(model, tokenizer, source, seed, name)) as store:
        _Runner(model, tokenizer, plan, source, store, progress, say).everything()
        return store.results()


def _facts(model: Any, tokenizer: Any, source: Source, seed: int, name: str) -> dict[str, Any]:
    config = model.get_decoder().config
    weight = next(model.parameters())
    return {
        "model": name or str(getattr(config, "_name_or_path", "")) or type(model).__name__,
        "config": fingerprint(model),
        "weights": _weights(model),
        "tokenizer": _tokenizer(tokenizer),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": weight.device.type,
        "text": source.name,
        "seed": seed,
        "foveate": __version__,
        # for the record; these may differ between the runs of a folder
        "parameters": sum(p.numel() for p in model.parameters()),
        "positions": getattr(config, "max_position_embeddings", None),
        "hardware": device_name(weight.device),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _weights(model: Any) -> str:
    """A digest of names, shapes and a few values of every parameter."""
    digest = hashlib.sha256()
    for key, p in sorted(model.named_parameters()):
        some = p.detach().flatten()[:: max(1, p.numel() // 16)][:16].float().cpu()
        digest.update(f"{key}{tuple(p.shape)}{[round(x, 4) for x in some.tolist()]}".encode())
    return digest.hexdigest()[:16]


def _tokenizer(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else type(tokenizer).__name__
    return hashlib.sha256((text + str(getattr(tokenizer, "chat_template", None))).encode()).hexdigest()[:16]


# ---------------------------------------------------------------------- the run
class _Runner:
    def __init__(
        self, model: Any, tokenizer: Any, plan: Plan, source: Source, store: Store, progress: Progress | None,
        say: Callable[[str], None],
    ):  # fmt: skip
        self.model, self.tokenizer, self.plan, self.source, self.store = model, tokenizer, plan, source, store
        self.progress, self.say = progress, say
        self.device = next(model.parameters()).device
        self.few = max(1, plan.samples // 10)  # samples of streams
        self.what, self.who = "", "dense"  # for progress; the recipe at work
        self.done = 0.0
        self.told: dict[str, None] = {}
        self.prose: tuple[int, stream.Documents] | None = None
        self.total = max(1.0, sum(weight for _, weight in self._todo()))

    def everything(self) -> None:
        for work, weight in self._todo():
            before = self.done
            try:
                work()
            except FoveateError as err:  # one recipe's refusal must not lose the others
                self._tell([f"{self.who}: {err}"])
            self.done = before + weight
            self._report()

    def _todo(self) -> Iterator[tuple[Callable[[], None], float]]:
        """Pieces of work that are not on disk yet, with their weight in tokens."""
        for length in self.plan.lengths:
            if self.plan.rounds:
                yield from self._cost_work(length)
            if self.plan.streams:
                yield from self._stream_work(length)
            for task in self.plan.tasks:
                for protocol in self.plan.protocols:
                    yield from self._task_work(task, length, protocol)

    # ------------------------------------------------------------------ tasks
    def _task_work(self, task: Task, length: int, protocol: str) -> Iterator[tuple[Callable[[], None], float]]:
        made: dict[int, tuple[Sample, Encoded]] = {}

        def sample(index: int) -> tuple[Sample, Encoded]:
            if index not in made:
                made[index] = make(task, self.tokenizer, length, index, self.plan.seed, self.source)
            return made[index]

        if protocol == "turns" and not sample(0)[0].turns:
            return
        each = length + STEP_WEIGHT * 32
        for recipe in self.plan.recipes:
            settings = recipe.describe()
            missing = [i for i in range(self.plan.samples) if (settings, task.name, length, protocol, i) not in self.store]
            for indices in self._batches(missing, length, protocol):

                def work(recipe: Recipe = recipe, indices: list[int] = indices) -> None:
                    self.who = str(recipe)
                    self.what = f"{length:,} {task.name} {protocol} {recipe} {indices[0] + 1}/{self.plan.samples}"
                    self._ask(task, recipe, length, protocol, [(i, sample(i)) for i in indices])

                yield work, float(each * len(indices))

    def _batches(self, missing: list[int], length: int, protocol: str) -> Iterator[list[int]]:
        """Samples asked together; those that are watched, and those with turns, come alone."""
        size = self.plan.batch or max(1, (262144 if self.device.type == "cuda" else 16384) // length)
        alone = [i for i in missing if i < self.plan.looks or protocol == "turns"]
        rest = sorted(set(missing) - set(alone))
        yield from ([i] for i in alone)
        yield from (rest[i : i + size] for i in range(0, len(rest), size))

    def _ask(
        self, task: Task, recipe: Recipe, length: int, protocol: str, batch: list[tuple[int, tuple[Sample, Encoded]]]
    ) -> None:
        watched = len(batch) == 1 and batch[0][0] < self.plan.looks
        meter = look(recipe, batch[0][1][1], protocol, self.plan.backend, self.plan.seed) if watched else None
        with self._under(recipe) as handle:
            handle.meter = meter
            pairs = [pair for _, pair in batch]
            tick = self._ticker(len(batch))
            answers = ask(self.model, self.tokenizer, pairs, task.metric, protocol, chunk=self.plan.chunk, tick=tick)
        for (index, (sample, encoded)), answer in zip(batch, answers, strict=True):
            values = {"score": answer.score, **(meter.values() if meter is not None else {})}
            self._add(recipe, task.suite, task.name, length, protocol, index, encoded.tokens, values, answer, sample)

    # ------------------------------------------------------------------ streams and cost
    def _stream_work(self, length: int) -> Iterator[tuple[Callable[[], None], float]]:
        for index in range(self.few):
            missing = [r for r in self.plan.recipes if self._stream_keys(r, length, index) - set(self.store.records)]
            if not missing:
                continue

            def work(index: int = index, missing: list[Recipe] = missing) -> None:
                self.what = f"{length:,} prose, dense {index + 1}/{self.few}"
                ids = self._document(length, index)
                tick = self._ticker(1)
                options: dict[str, Any] = dict(steps=self.plan.steps, longppl=self.plan.longppl, backend=self.plan.backend)
                base = stream.reference(self.model, ids, tick=tick, **options)
                self._tell(base.notes)
                for recipe in missing:
                    self.who = str(recipe)
                    self.what = f"{length:,} prose, {recipe} {index + 1}/{self.few}"
                    self._report()
                    self._stream(recipe, length, index, ids, base)

            yield work, float((length + STEP_WEIGHT * self.plan.steps) * 2 * (1 + len(missing)))

    def _stream_keys(self, recipe: Recipe, length: int, index: int) -> set[tuple[str, str, int, str, int]]:
        settings = recipe.describe()
        return {(settings, name, length, p, index) for name in self.plan.streams for p in ("prefill", "decode")}

    def _stream(self, recipe: Recipe, length: int, index: int, ids: Tensor, base: stream.Reference) -> None:
        options: dict[str, Any] = dict(steps=self.plan.steps, backend=self.plan.backend, seed=self.plan.seed)
        found = agreement.measure(self.model, recipe, ids, base, tick=self._ticker(1), **options)
        for protocol, measured in found.items():
            self._tell(measured.notes)
            for name in self.plan.streams:
                if (recipe.describe(), name, length, protocol, index) not in self.store:
                    self._add(recipe, name, name, length, protocol, index, length, getattr(measured, name))

    def _cost_work(self, length: int) -> Iterator[tuple[Callable[[], None], float]]:
        for index in range(self.plan.rounds):
            order = self.plan.recipes if index % 2 == 0 else self.plan.recipes[::-1]
            for recipe in order:
                if (recipe.describe(), "cost", length, "seen", index) in self.store:
                    continue

                def work(recipe: Recipe = recipe, index: int = index) -> None:
                    self.who = str(recipe)
                    self.what = f"{length:,} cost {recipe} {index + 1}/{self.plan.rounds}"
                    size = length - STEPS - 1
                    ids = self._document(size, 0)
                    options: dict[str, Any] = dict(backend=self.plan.backend, seed=self.plan.seed, tick=self._ticker(1))
                    values = cost(self.model, recipe, ids, watch=index == 0, **options)
                    self._add(recipe, "cost", "cost", length, "seen", index, size, values)

                yield work, float((length + STEP_WEIGHT * STEPS) * (2 if index == 0 else 1))

    # ------------------------------------------------------------------ small things
    def _document(self, length: int, index: int) -> Tensor:
        if self.prose is None or self.prose[0] != length:
            made = stream.documents(self.tokenizer, self.source, length, self.few, self.plan.seed)
            self._tell(made.notes)
            self.prose = length, made
        return self.prose[1][index].to(self.device)

    def _tell(self, notes: Sequence[str]) -> None:
        """Say each sentence once."""
        for note in notes:
            if note not in self.told:
                self.say(note)
            self.told[note] = None

    def _under(self, recipe: Recipe) -> Any:
        return use(self.model, recipe, backend=self.plan.backend, graphs=self.model.device.type == "cuda")

    def _add(
        self, recipe: Recipe, suite: str, task: str, length: int, protocol: str, index: int, tokens: int,
        values: dict[str, float], answer: Answer | None = None, sample: Sample | None = None,
    ) -> None:  # fmt: skip
        record = Record(
            recipe=str(recipe),
            settings=recipe.describe(),
            suite=suite,
            task=task,
            length=length,
            protocol=protocol,
            index=index,
            tokens=tokens,
            values=values,
            text="\n---\n".join(answer.texts) if answer is not None else "",
            answers=sample.answers if sample is not None else (),
            meta=sample.meta if sample is not None else {},
        )
        self.store.add(record)

    def _ticker(self, rows: int) -> Callable[[int], None]:
        def tick(tokens: int) -> None:
            self.done += rows * (tokens if tokens > 1 else STEP_WEIGHT)
            self._report()

        return tick

    def _report(self) -> None:
        if self.progress is not None:
            self.progress(self.what, min(1.0, self.done / self.total))
