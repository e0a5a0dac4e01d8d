"""The loop of every calibration: prompts, the search's passes, a check on prompts it has not seen, a profile."""

from __future__ import annotations

import dataclasses
import importlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import profile as profiles
from ..adapters.capability import attention_layers, fingerprint, why_not
from ..errors import ConfigError, UnsupportedError
from ..methods.base import AttnInput, Method
from ..methods.search import Found, Search, Target, searchable
from ..profile import Profile
from ..recipe import Recipe
from . import capture
from .checkpoint import Checkpoint
from .generic import Bisect, Figures, Judge, _plain, decodes

Progress = Callable[[str, float], None]
Say = Callable[[str], None]
PROCEDURES = {"duo_attention": "foveate.calibrate.duo:learn"}  # what needs the whole model: Job -> Found
SHORT = {"duo": "duo_attention", "seer": "seerattention"}  # names people say
SAMPLES, HELD = 4, 2


@dataclass
class Job:
    """What a calibration was asked to do; all that a procedure gets.

    Attributes:
        samples: prompts of a search, or None for the procedure's own default. layers: chosen ones, or None for all.
        texts: prompts int64 `[1, N]` to search on. checkpoint: where to keep state. tick: (what runs, share of this
        stage done). say: sentences for the user.
    """

    model: Any
    tokenizer: Any
    method: Method
    target: Target
    length: int
    samples: int | None
    layers: tuple[int, ...] | None
    seed: int
    data: tuple[str, ...]
    backend: str | None
    texts: list[Tensor]
    checkpoint: Checkpoint
    tick: Progress
    say: Say


def run(
    model: Any,
    tokenizer: Any,
    method: Method | str,
    *,
    out: str | Path,
    target: Target | str = "recall=0.95",
    data: Sequence[str | Path] = (),
    length: int = 4096,
    samples: int | None = None,
    held: int = HELD,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    name: str = "",
    backend: str | None = None,
    progress: Progress | None = None,
    say: Say = lambda text: None,
) -> Profile:
    """Search a method's hyperparameters on a model and write what was found to the folder `out`.

    Args:
        model, tokenizer: a transformers causal language model and its tokenizer.
        method: a method or its text, "minference" or "xattention:block=64". Its other options stay as given.
        out: folder of the profile. A calibration that was stopped goes on where it was; a finished one is returned.
        target: "recall=0.95" (attention mass kept, at least), "density=0.1" (causal pairs computed, at most) or
            "loss=1%" (relative L1 error of the attention output, at most), in the mean over layers, prompts and heads.
        data: UTF-8 text files; none for the built-in mix of essays and retrieval (see `capture.prompts`).
        length: tokens of a prompt. samples: prompts searched on (4), or a procedure's steps. held: prompts checked on.
        layers: their numbers; None for all. seed: of prompts and whatever a search draws. name: the model's, for the
            profile. backend: kernels by name.
        progress: called with (what runs, share of the whole done). say: called with sentences for the user.

    Raises:
        ConfigError: nothing to calibrate, an impossible target, too little text, or a folder of another calibration.
        UnsupportedError: a model that no recipe can serve.
    """
    method, target = _method(method), Target.parse(target) if isinstance(target, str) else target
    if (why := why_not(model)) is not None:
        raise UnsupportedError(f"model: {why}")
    if searchable(method) is None:
        search_of(method, target, backend)  # a target it cannot aim at is refused before anything is written
    chosen = _layers(model, layers)
    limit = getattr(model.get_decoder().config, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise ConfigError(f"length: expected at most the model's {limit} positions, got {length}")
    for option, value, least in (("samples", samples, 1), ("held", held, 1), ("length", length, 2)):
        if value is not None and value < least:
            raise ConfigError(f"{option}: expected at least {least}, got {value}")
    trains = method.id in PROCEDURES
    count = SAMPLES if samples is None or trains else samples
    texts = capture.prompts(tokenizer, data, length, count + held, seed)
    if (own := getattr(method.search(target), "prompts", None)) is not None:  # a search on prompts of its own making
        texts[:count] = own(tokenizer, length, count, seed)
    facts = dict(
        method=method.describe(), target=str(target), model=fingerprint(model), data=capture.digest(texts), seed=seed,
        length=length, samples=samples if trains else count, held=held, layers=chosen, dtype=str(model.dtype),
    )  # fmt: skip
    checkpoint = Checkpoint(Path(out), facts)
    if checkpoint.finished:
        say(f"{out} holds this profile already")
        return profiles.load(str(out))
    files = tuple(str(f) for f in data)
    tick = progress or (lambda what, share: None)
    job = Job(model, tokenizer, method, target, length, samples, chosen, seed, files, backend, texts[:count], checkpoint,
              tick, say)  # fmt: skip
    return _Calibration(job, texts[count:], name).run()


def _method(given: Method | str) -> Method:
    if isinstance(given, str):
        head, colon, rest = given.strip().partition(":")
        bare, at, preset = head.partition("@")
        given = SHORT.get(bare, bare) + at + preset + colon + rest
    found = Recipe.of(given).methods
    if len(found) != 1:
        raise ConfigError(f"method: expected one method such as minference or flexprefill:block=64, got {given!r}")
    if found[0].id not in PROCEDURES and (why := searchable(found[0])) is not None:
        raise ConfigError(f"method: {why}")
    return found[0]


def search_of(method: Method, target: Target, backend: str | None = None) -> Search:
    """The method's own search, or the bisection of its knob. ConfigError if neither can aim at this target."""
    return method.search(target) or Bisect(method, target, backend)


def _layers(model: Any, layers: Sequence[int] | None) -> tuple[int, ...] | None:
    if layers is None:
        return None
    total = len(attention_layers(model.get_decoder()))
    if not layers or not all(0 <= i < total for i in layers):
        raise ConfigError(f"layers: expected numbers 0 to {total - 1}, got {list(layers)}")
    return tuple(sorted(set(layers)))


class _Calibration:
    """One run: a procedure if the method has one, a search if it has one or a knob, the check, the profile."""

    def __init__(self, job: Job, held: list[Tensor], name: str):
        self.job, self.held, self.name = job, held, name
        self.began = time.perf_counter()

    def run(self) -> Profile:
        job = self.job
        (stage, done, prompt), state = job.checkpoint.load()
        method, found = job.method, Found()
        report: dict[str, Any] = {}
        if job.method.id in PROCEDURES:
            if stage == 0:
                found = _procedure(job.method.id)(replace(job, tick=self._tick(0.0, 0.8)))
                self._profile(found, {}).save(job.checkpoint.draft)
                job.checkpoint.save((1, 0, 0), {})
                (stage, done, prompt), state = (1, 0, 0), {}
            draft = profiles.load(str(job.checkpoint.draft))
            found = Found(draft.options, draft.tensors, draft.report)
            method, report = _found(method, found, job.checkpoint.draft), {"learned": found.report}
        if searchable(method) is None:
            more = self._search(method, stage, done, prompt, state, first=0.8 if stage else 0.0)
            found = Found(found.options | more.options, found.tensors | more.tensors)
            report["search"] = more.report
        self._profile(found, {}).save(job.checkpoint.draft)
        chosen = _found(job.method, found, job.checkpoint.draft)
        checked = self._check(chosen)
        recipe = describe(chosen, job.checkpoint.folder)
        report |= {"held_out": checked, "recipe": recipe, "length": job.length, "prompts": len(job.texts)}
        report["seconds"] = round(time.perf_counter() - self.began, 1)
        self._profile(found, report).save(job.checkpoint.folder)
        job.checkpoint.clear()
        return profiles.load(str(job.checkpoint.folder))

    # ------------------------------------------------------------------ the search
    def _search(self, method: Method, stage: int, done: int, prompt: int, state: dict[str, Tensor], first: float) -> Found:
        job = self.job
        search = search_of(method, job.target, job.backend)
        if state:
            search.resume(state)
            job.say(f"going on at pass {done + 1} of {search.passes}, prompt {prompt + 1} of {len(job.texts)}")
        tick = self._tick(first, 0.95)
        while done < search.passes:
            for i in range(prompt, len(job.texts)):
                where = f"pass {done + 1} of {search.passes}, prompt {i + 1} of {len(job.texts)}"
                begun = (done * len(job.texts) + i) / (search.passes * len(job.texts))
                each = 1 / (search.passes * len(job.texts))
                self._show(search, job.texts[i], lambda share, w=where, a=begun, z=each: tick(w, a + z * share))  # type: ignore[misc]
                if i + 1 < len(job.texts):
                    job.checkpoint.save((stage, done, i + 1), search.state())
            search.end_pass()
            done, prompt = done + 1, 0
            job.checkpoint.save((stage, done, 0), search.state())
        return search.finish()

    def _show(self, search: Search, ids: Tensor, tick: Callable[[float], None]) -> None:
        """One prompt, layer by layer."""
        job, seen = self.job, 0

        def see(x: AttnInput, out: Tensor, grad: Tensor | None = None) -> None:
            nonlocal seen
            seen += 1
            search.see(x, out, grad)
            tick((x.layer + 1) / x.layers)

        each = capture.each_gradient if search.wants_grad else capture.each_layer
        each(job.model, ids, see, job.layers, job.backend)
        if not seen:
            raise ConfigError("layers: all of the chosen ones keep the model's own sliding window")

    # ------------------------------------------------------------------ the check
    def _check(self, method: Method) -> dict[str, Any] | None:
        """Figures of the method on held-out prompts, and whether they hold the target; None where it plans nothing."""
        job, got = self.job, []
        if not {"prefill", "decode"} & set(method.roles):
            job.say(f"{method.id} plans no attention; what was found is not checked on held-out prompts")
            return None
        tick = self._tick(0.95, 1.0)
        for i, ids in enumerate(self.held):
            tick(f"check on held-out prompt {i + 1} of {len(self.held)}", i / len(self.held))
            shared: dict[str, Any] = {}

            def see(x: AttnInput, out: Tensor, shared=shared) -> None:  # type: ignore[no-untyped-def]
                judge = Judge(x, decode=decodes(method), backend=job.backend)
                got.append(judge(method, shared, count=True).tensor())

            capture.each_layer(job.model, ids, see, job.layers, job.backend)
        figures = Figures(*torch.stack(got).mean(0).tolist())
        value = {"recall": figures.recall, "loss": figures.loss, "density": figures.computed}[job.target.kind]
        meets = value >= job.target.value if job.target.kind == "recall" else value <= job.target.value
        return _plain(dataclasses.asdict(figures)) | {"prompts": len(self.held), "meets": bool(meets)}  # type: ignore[no-any-return]

    # ------------------------------------------------------------------ small things
    def _tick(self, first: float, last: float) -> Progress:
        """Progress within a stretch of the whole."""
        return lambda what, share: self.job.tick(what, first + (last - first) * min(1.0, share))

    def _profile(self, found: Found, report: dict[str, Any]) -> Profile:
        job = self.job
        return Profile(
            method=job.method.id,
            options=found.options,
            tensors=found.tensors,
            model=self.name or type(job.model).__name__,
            fingerprint=fingerprint(job.model),
            data=job.checkpoint.facts["data"],
            seed=job.seed,
            target=str(job.target),
            report=report or found.report,
        )


def _procedure(name: str) -> Callable[[Job], Found]:
    module, _, attr = PROCEDURES[name].partition(":")
    return getattr(importlib.import_module(module), attr)  # type: ignore[no-any-return]


def _found(method: Method, found: Found, folder: Path) -> Method:
    """The method with what was found: options set, and `profile` where it reads tensors from a folder."""
    names = {f.name for f in dataclasses.fields(method)}
    options = {n: tuple(v) if isinstance(v, list) else v for n, v in found.options.items() if n in names}
    if "profile" in names and (found.tensors or not options):
        options["profile"] = str(folder)
    return replace(method, **options)


def describe(method: Method, folder: Path) -> str:
    """Recipe text of a method: what differs from its defaults, with `folder` in place of the draft it reads."""
    own = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
    fresh = {f.name: f.default for f in dataclasses.fields(method)}
    if own.get("profile") == str(folder / "draft"):
        own["profile"] = str(folder)
    args = ",".join(f"{n}={v}" for n, v in own.items() if v != fresh[n])
    return f"{method.id}:{args}" if args else method.id
