"""Run recipes side by side on one prompt: speed, memory, what was computed, and how far the answers agree with dense.

Three passes a recipe: a warm-up on the head of the prompt (compilation, first touch of memory), the timed pass (prefill
and greedy decode, watched only by a stop watch), and a diagnostic pass (pairs, attention mass, and the next-token
distributions under teacher forcing on dense's own tokens). Dense runs first, through the same caches, in the same run;
a recipe that only decodes differently starts its diagnosis from a fork of dense's cache.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .diagnosis import Diagnosis, Picture
from .errors import ConfigError, FoveateError
from .facts import facts
from .layout import Layout, Parts
from .methods.base import AttnInput, Method
from .payoff import pay_off
from .prompts import Prompt, check_fits
from .recipe import Recipe

_LOG = logging.getLogger("foveate")
WARM_TOKENS = 1280  # enough for every preset to drop something, a small part of the time of a long prompt
WARM_STEPS = 2
BUSY = 0.7  # a prefill that gets less than this share of its threads' time is not to be compared
BUSY_NOTE = "other work was running"
STEP_WEIGHT = 40  # a decode step takes about as long as this many tokens of a prefill
DEFAULT_RECIPES = (
    "dense",
    "streaming_llm@8k",
    "minference@8k",
    "flexprefill@8k",
    "quest@8k",
    "snapkv@8k",
    "flexprefill@8k+quest@8k+cache=snapkv@8k",
)
Progress = Callable[[str, float], None]  # what is running, share of the whole done (0 to 1)


@dataclass(frozen=True)
class Row:
    """One recipe. Times in seconds, sizes in bytes, shares and densities from 0 to 1; None: not measured.

    Attributes:
        recipe, settings: its text, and every hyperparameter. notes: sentences for the reader. error: why it did not run.
        first_token, first_token_cpu: prefill to first token, wall and CPU time of the process.
        tokens_per_second: 1 / median decode step. first_step: the step in which a cache policy drops entries.
        prefill_density, decode_density: pairs selected / visible. prefill_computed, decode_computed: the same for what
            the kernel computes; in decode, entries read / tokens seen. estimator, decode_estimator: share of the time
            spent planning. kv_bytes: allocated by the cache after the run.
        same_tokens: positions, of `tokens`, at which the most likely next token is dense's, given dense's text so far.
        same_greedy: leading tokens of the free answer that equal dense's. kl, kl_max: KL(dense || recipe) of the
            next-token distributions in nats, mean and largest. mass, decode_mass: attention mass kept.
        answer: decoded up to the end of text. answered: it holds the fact (None: no known fact).
        head_density, head_mass: `[layers][heads]` of prefill. pictures: selected heads.
    """

    recipe: str
    settings: str
    notes: list[str] = field(default_factory=list)
    error: str | None = None
    first_token: float | None = None
    first_token_cpu: float | None = None
    tokens_per_second: float | None = None
    first_step: float | None = None
    prefill_density: float | None = None
    prefill_computed: float | None = None
    decode_density: float | None = None
    decode_computed: float | None = None
    estimator: float | None = None
    decode_estimator: float | None = None
    kv_bytes: int | None = None
    same_tokens: int | None = None
    same_greedy: int | None = None
    tokens: int = 0
    kl: float | None = None
    kl_max: float | None = None
    mass: float | None = None
    decode_mass: float | None = None
    answer: str = ""
    answered: bool | None = None
    backends: list[str] = field(default_factory=list)
    head_density: list[list[float]] = field(default_factory=list)
    head_mass: list[list[float]] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)


@dataclass(frozen=True)
class Comparison:
    """Rows of one run, dense first, and the facts needed to judge and repeat it."""

    facts: dict[str, Any]
    rows: list[Row]

    @property
    def dense(self) -> Row:
        return self.rows[0]

    @property
    def busy(self) -> bool:
        """Other work took the cores while a recipe was timed: no order of speed is certain."""
        return any(note.startswith(BUSY_NOTE) for row in self.rows for note in row.notes)

    def to_json(self) -> str:
        """Every figure of the run as JSON, and `busy`, but for the pictures (they are in the report)."""
        rows = [dataclasses.asdict(dataclasses.replace(row, pictures=[])) for row in self.rows]
        for row in rows:
            del row["pictures"]
        return json.dumps({"facts": self.facts, "busy": self.busy, "rows": rows}, indent=1, allow_nan=False) + "\n"


def compare(
    model: Any,
    tokenizer: Any,
    prompt: Prompt,
    recipes: Sequence[Recipe | Method | str] = DEFAULT_RECIPES,
    *,
    new_tokens: int = 32,
    backend: str | None = None,
    progress: Progress | None = None,
    seed: int = 0,
    name: str = "",
) -> Comparison:
    """Measure recipes on one prompt (batch 1, greedy). Dense is added in front if it is not among them.

    Generation does not stop at the end of text, so that every recipe takes the same number of steps; answers are cut
    there. Length gates are off; a row says when the prompt is below a method's own. A recipe that fails has `error`
    set and the others still run.

    Raises:
        ConfigError: unknown recipes, a prompt that does not fit the model, fewer than 2 new tokens.
    """
    if new_tokens < 2:
        raise ConfigError(f"new_tokens: expected at least 2 (a decode step is timed), got {new_tokens}")
    config = model.get_decoder().config
    check_fits(prompt, getattr(config, "max_position_embeddings", None), new_tokens)
    todo = [r for r in _distinct([Recipe.of(r) for r in recipes]) if any(m.id != "dense" for m in r.methods)]
    bench = _Bench(model, tokenizer, prompt, new_tokens, backend, seed, progress, 1 + len(todo))
    rows = [bench.row(_DENSE)]
    if rows[0].error is not None:
        raise ConfigError(f"dense attention itself does not run here: {rows[0].error}")
    rows += [bench.row(r) for r in todo]
    return Comparison(facts(model, prompt, new_tokens, backend, seed, name), rows)


_DENSE = Recipe.of("dense")


def _distinct(recipes: list[Recipe]) -> list[Recipe]:
    return list({r.describe(): r for r in reversed(recipes)}.values())[::-1]


# ---------------------------------------------------------------------- one run after the other
class StopWatch:
    """The meter of the timed pass: adds up planning time and counts layer calls, nothing else."""

    def __init__(self, tick: Callable[[str], None]):
        self.tick, self.seconds = tick, {"prefill": 0.0, "decode": 0.0}

    def planned(self, x: AttnInput, plan: Layout | Parts, seconds: float) -> None:
        self.seconds[x.phase] += seconds

    def attended(self, x: AttnInput, plan: Layout | Parts, out: Tensor) -> None:
        self.tick(x.phase)


class _Watched(Diagnosis):
    """A diagnosis that also reports progress."""

    tick: Callable[[str], None]

    def attended(self, x: AttnInput, plan: Layout | Parts, out: Tensor) -> None:
        super().attended(x, plan, out)
        self.tick(x.phase)


class _Bench:
    def __init__(self, model, tokenizer, prompt, new_tokens, backend, seed, progress, recipes):  # type: ignore[no-untyped-def]
        self.model, self.tokenizer, self.prompt = model, tokenizer, prompt
        self.new_tokens, self.backend, self.seed, self.progress = new_tokens, backend, seed, progress
        self.device = next(model.parameters()).device
        self.ids = prompt.ids.to(self.device)
        config = model.get_decoder().config
        self.layers, self.all_heads = config.num_hidden_layers, config.num_attention_heads
        self.ends = end_tokens(model, tokenizer)
        self.tokens: list[int] = []  # dense's answer
        self.logits: Tensor | None = None  # dense's next-token logits `[new_tokens, vocabulary]`
        self.prefilled: Any = None  # dense's cache after the prompt
        self.first: Row | None = None  # dense's row
        warm = min(prompt.tokens, WARM_TOKENS)
        per_pass = prompt.tokens + STEP_WEIGHT * (new_tokens - 1)
        self.total = float(recipes * self.layers * (warm + WARM_STEPS * STEP_WEIGHT + 2 * per_pass))
        self.done, self.base, self.share = 0.0, 0.0, self.total / recipes
        self.what = ""

    # ------------------------------------------------------------------ one recipe
    def row(self, recipe: Recipe) -> Row:
        from .adapters.transformers import use

        self.base = self.done
        made = Row(str(recipe), recipe.describe(), tokens=self.new_tokens)
        try:
            graphs = self.device.type == "cuda"
            with use(self.model, recipe, backend=self.backend, graphs=graphs) as handle, torch.no_grad():
                row = self._measure(recipe, handle, made)
        except FoveateError as err:
            row = dataclasses.replace(made, error=" ".join(str(err).split()))
        except Exception as err:  # one method's fault must not lose the other rows; --debug shows the traceback
            _LOG.debug("recipe %s failed", recipe, exc_info=True)
            row = dataclasses.replace(made, error=f"{type(err).__name__}: {' '.join(str(err).split())[:300]}")
        self.done = self.base + self.share
        self._report()
        return row

    def _measure(self, recipe: Recipe, handle: Any, made: Row) -> Row:
        self.what = f"{recipe}: warm-up"
        warm = self.ids[:, :WARM_TOKENS]
        handle.meter = StopWatch(self._ticker(warm.shape[1]))
        self._generate(warm, WARM_STEPS + 1, handle)

        self.what = f"{recipe}: timed"
        watch = handle.meter = StopWatch(self._ticker(self.prompt.tokens))
        tokens, seconds, cpu, cache = self._generate(self.ids, self.new_tokens, handle)
        steps = seconds[1:]
        kv_bytes = int(cache.nbytes)
        del cache

        self.what = f"{recipe}: diagnosis"
        watched = _Watched(recipe, self.backend, self._heads(), self.seed)
        watched.tick = self._ticker(self.prompt.tokens)
        handle.meter = watched
        if not self.tokens:
            self.tokens = tokens
        ready = self.prefilled if recipe.prefill in (None, _DENSE.prefill) and not (recipe.cache or recipe.heads) else None
        logits = self._forced(self.ids, self.tokens, ready)
        if self.logits is None:
            self.logits = logits
        kl = _kl(self.logits, logits)
        density, mass = watched.head_maps()
        if ready is not None:  # the prompt was not read again
            self.done += self.layers * self.prompt.tokens
        on_host = self.device.type == "cpu"  # elsewhere the clock around `plan` sees only launches
        row = dataclasses.replace(
            made,
            notes=_notes(recipe, handle.notes, self.prompt.tokens, steps, self.device) + _busy(self.device, seconds[0], cpu),
            first_token=seconds[0],
            first_token_cpu=cpu,
            tokens_per_second=1.0 / statistics.median(steps),
            first_step=steps[0],
            prefill_density=watched.named["prefill"].value,
            prefill_computed=watched.computed["prefill"].value,
            decode_density=watched.named["decode"].value,
            decode_computed=watched.computed["decode"].value,
            estimator=watch.seconds["prefill"] / seconds[0] if on_host else None,
            decode_estimator=watch.seconds["decode"] / sum(steps) if on_host else None,
            kv_bytes=kv_bytes,
            same_tokens=int((logits.argmax(-1).cpu() == torch.tensor(self.tokens)).sum()),
            same_greedy=_common(tokens, self.tokens),
            kl=_number(kl.mean()),
            kl_max=_number(kl.max()),
            mass=watched.mass_kept("prefill"),
            decode_mass=watched.mass_kept("decode"),
            answer=(answer := self._text(tokens)),
            answered=self.prompt.answered(answer),
            backends=list(watched.backends),
            head_density=density,
            head_mass=mass,
            pictures=watched.pictures,
        )
        if ready is not None and self.first is not None:  # its prefill is dense's
            shared = ("prefill_density", "prefill_computed", "mass", "head_density", "head_mass", "pictures")
            row = dataclasses.replace(
                row,
                backends=list(dict.fromkeys([*self.first.backends, *row.backends])),
                **{name: getattr(self.first, name) for name in shared},
            )
        self.first = self.first or row
        return row

    # ------------------------------------------------------------------ the model
    def _forward(self, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """(logits of the last token `[vocabulary]`, cache); `logits_to_keep` spares the table of all rows."""
        out = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[0, -1], out.past_key_values

    def _generate(self, ids: Tensor, count: int, handle: Any) -> tuple[list[int], list[float], float, Any]:
        """Greedy: (tokens, seconds of each, CPU seconds of the first, cache)."""
        tokens: list[int] = []
        seconds: list[float] = []
        cache, cpu = None, 0.0
        while len(tokens) < count:
            self._sync()
            began, began_cpu = time.perf_counter(), time.process_time()
            logits, cache = self._forward(ids, cache)
            ids = logits.argmax().view(1, 1)
            tokens.append(int(ids))  # waits for the device
            seconds.append(time.perf_counter() - began)
            cpu = cpu or time.process_time() - began_cpu
            if self.device.type == "cuda":
                handle.meter = None  # steps that are watched are not captured
                self.done += self.layers * STEP_WEIGHT * (len(tokens) > 1)
        return tokens, seconds, cpu, cache

    def _forced(self, ids: Tensor, tokens: list[int], ready: Any) -> Tensor:
        """Logits fp32 `[len(tokens), vocabulary]` before each token, given the prompt and the tokens before it.

        `ready`: dense's cache after the prompt, for recipes whose prefill is dense; None: read the prompt.
        """
        out, cache = [], None
        for i, token in enumerate(tokens):
            if i == 0 and ready is not None and self.logits is not None:
                logits, cache = self.logits[0], ready.fork()
            else:
                logits, cache = self._forward(ids, cache)
            if self.prefilled is None:
                self.prefilled = cache.fork()
            out.append(logits.float())
            ids = torch.tensor([[token]], device=self.device)
        return torch.stack(out)

    def _sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _text(self, tokens: list[int]) -> str:
        cut = next((i for i, t in enumerate(tokens) if t in self.ends), len(tokens))
        return str(self.tokenizer.decode(tokens[:cut], skip_special_tokens=True)).strip()

    def _heads(self) -> tuple[tuple[int, int], ...]:
        """A few layers and heads to draw, spread evenly."""
        layers = sorted({round(i * (self.layers - 1) / 3) for i in range(4)})
        heads = sorted({0, self.all_heads // 2, self.all_heads - 1})
        return tuple((layer, head) for layer in layers for head in heads)

    # ------------------------------------------------------------------ progress
    def _ticker(self, tokens: int) -> Callable[[str], None]:
        def tick(phase: str) -> None:
            self.done += tokens if phase == "prefill" else STEP_WEIGHT
            self._report()

        return tick

    def _report(self) -> None:
        if self.progress is not None:
            self.progress(self.what, min(1.0, self.done / self.total))


# ---------------------------------------------------------------------- small sums
def _kl(reference: Tensor, other: Tensor) -> Tensor:
    """KL(reference || other) of each row's softmax, nats."""
    p, q = reference.float().log_softmax(-1), other.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).clamp(min=0.0)


def _number(t: Tensor) -> float | None:
    return float(t) if math.isfinite(float(t)) else None  # JSON has no NaN


def _common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end a text, as the model's generation settings and the tokenizer name them."""
    found: set[int] = set()
    for owner in (getattr(model, "generation_config", None), tokenizer):
        value = getattr(owner, "eos_token_id", None)
        found |= set(value) if isinstance(value, (list, tuple)) else set() if value is None else {int(value)}
    return found


def _notes(recipe: Recipe, said: list[str], tokens: int, steps: list[float], device: torch.device) -> list[str]:
    notes = list(said)
    for method in recipe.methods:
        gate = pay_off(method, "prefill" if method is recipe.prefill else "decode", device)  # as gates see it
        if tokens < gate.length:
            notes.append(f"{method.id}: {tokens:,} tokens are below its pay-off length of {gate.length:,}; run anyway")
    if recipe.evicts and len(steps) > 1:
        extra = steps[0] - statistics.median(steps[1:])
        notes.append(f"the first decode step compresses the cache, once: {1000 * max(0.0, extra):.0f} ms longer")
    return notes


def _busy(device: torch.device, wall: float, cpu: float) -> list[str]:
    """A warning when others took the cores during the timed prefill."""
    share = cpu / (wall * torch.get_num_threads())
    if device.type != "cpu" or wall < 1.0 or share > BUSY:
        return []
    return [f"{BUSY_NOTE}: this process got {share:.0%} of its {torch.get_num_threads()} cores; speeds mislead"]
