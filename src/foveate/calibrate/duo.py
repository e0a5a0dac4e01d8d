"""DuoAttention's gates: which kv heads a model needs in full to repeat passkeys from its context, learned by distillation.

Xiao et al. 2024, arXiv 2410.10819, section 2.3: every kv head mixes full and streaming attention under a gate, and the
gates alone are trained to leave the final hidden states as they are while an L1 penalty pushes them down.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..adapters.capability import attention_layers
from ..adapters.transformers import use
from ..errors import ConfigError, UnsupportedError
from ..evals.needle import planted
from ..evals.task import rng_of
from ..evals.text import Source
from ..kernels.dispatch import attend
from ..layout import Layout
from ..methods.base import AttnInput, Method, State
from ..methods.duo_attention import DuoAttention
from ..methods.search import Found
from ..recipe import Recipe
from .capture import in_fp32

if TYPE_CHECKING:
    from .loop import Job

STEPS = 200  # published: 2,000
RATE, PENALTY = 0.02, 0.05  # learning rate, weight of the mean gate
LENGTHS = 50  # lengths that prompts take, evenly spaced
KEYS, WORDS = 10, 32  # passkeys of a long prompt, words of each
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
ALPHABET = (
    *("Alpha", "Bravo", "Charlie", "Delta", "Echo", "Foxtrot", "Golf", "Hotel", "India", "Juliett", "Kilo", "Lima"),
    *("Mike", "November", "Oscar", "Papa", "Quebec", "Romeo", "Sierra", "Tango", "Uniform", "Victor", "Whiskey", "Xray"),
    *("Yankee", "Zulu"),
)
FACT = "The {ordinal} passkey, to be remembered word by word, is: {words}."
ASK = "\nWhat is the {ordinal} passkey, word by word?"
TELL = " {words}."


# ---------------------------------------------------------------------- the procedure
def learn(job: Job) -> Found:
    """Gates `[layers, kv heads]` for a job, resumable after every step.

    One step reads one prompt twice: with full attention for the target, and under the gates. Steps are `job.samples`
    (200; published 2,000), lengths run from a thirty-second of `job.length`, or what the passkeys need, to all of it.
    """
    model, steps = job.model, job.samples or STEPS
    layers = attention_layers(model.get_decoder())
    if any(getattr(m, "sinks", None) is not None for m in layers):
        raise UnsupportedError("duo_attention: gates cannot be learned on a model with attention sinks of its own")
    method = job.method
    assert isinstance(method, DuoAttention)
    config = model.get_decoder().config
    groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    source = _source(job)
    lengths = _lengths(job, source)
    gates = torch.ones(len(layers), groups, device=model.device)
    train = Train(gates, steps)
    (_, done, _), state = job.checkpoint.load()
    if state:
        train.resume(state)
        job.say(f"going on at step {done + 1} of {steps}")
    mix = Mix(gates=train.box, sink=method.sink, window=method.window, backend=job.backend)
    last: list[float] = []
    with in_fp32(model):
        for step in range(done, steps):
            job.tick(f"step {step + 1} of {steps}, mean gate {float(train.gates.detach().mean()):.3f}", step / steps)
            rng = rng_of(job.seed, "duo", job.length, step)
            ids, labelled = passkeys(job.tokenizer, source, rng.choice(lengths), rng)
            last.append(train.step(lambda ids=ids, at=labelled: distillation(model, ids.to(model.device), at, mix)))  # type: ignore[misc]
            job.checkpoint.save((0, step + 1, 0), train.state())
    final = train.gates.detach().clamp(0, 1).cpu()
    tail = last[-max(1, steps // 10) :]
    report = {"steps": steps, "mean_gate": float(final.mean()), "loss": sum(tail) / len(tail) if tail else None}
    return Found(tensors={"gates": final}, report=report)


def distillation(model: Any, ids: Tensor, labelled: Tensor, mix: Mix) -> Tensor:
    """Mean squared difference of final hidden states (behind the last norm) with and without the gates, over the
    positions `labelled` (int64) of ids `[1, N]`; differentiable in the gates."""
    decoder = model.get_decoder()
    with use(model, Recipe.of("dense"), backend=mix.backend), torch.no_grad():
        target = decoder(input_ids=ids, use_cache=False).last_hidden_state[0, labelled]
    with use(model, Recipe(prefill=mix), backend=mix.backend):
        got = decoder(input_ids=ids, use_cache=False).last_hidden_state[0, labelled]
    return (got - target).square().mean()


@dataclass(frozen=True)
class Mix(Method):
    """Full and streaming attention of the same queries and keys, weighed by a gate per kv head.

    `gates` is a list of one tensor `[layers, kv heads]`, so that a new tensor can take its place. The published code
    mixes in the teacher's full output instead; the paper's equation, and this, the student's own.
    """

    gates: Any = None
    sink: int = 64
    window: int = 256
    backend: str | None = None

    id: ClassVar[str] = "duo_gates"
    roles: ClassVar[tuple[str, ...]] = ("prefill",)

    def attend(self, x: AttnInput, plan: Any, state: State) -> tuple[Tensor, None, None]:
        rule = dict(sink=self.sink, window=self.window, q_offset=x.offset(128), q_pos=x.layout_pos(), device=x.device)
        stream = Layout.static(x.shape, validate=False, **rule)
        same: dict[str, Any] = dict(scale=x.scale, softcap=x.softcap, backend=self.backend)
        full, near = attend(x.q, x.kv, plan, **same), attend(x.q, x.kv, stream, **same)
        assert isinstance(full, Tensor) and isinstance(near, Tensor)
        gate = self.gates[0][x.layer].to(full.dtype).repeat_interleave(x.q.shape[1] // x.groups)[:, None, None]
        return gate * full + (1 - gate) * near, None, None


# ---------------------------------------------------------------------- the optimiser
class Train:
    """AdamW without decay on the gates, the rate rising over the first fifth of the steps and falling over the last,
    never below a tenth; gates are clamped to [0, 1] before every step."""

    def __init__(self, gates: Tensor, steps: int):
        self.gates = gates.detach().clone().requires_grad_()
        self.box = [self.gates]
        self.steps, self.done = steps, 0
        self.optimiser = torch.optim.AdamW([self.gates], lr=RATE, weight_decay=0.0)

    def step(self, loss_of: Callable[[], Tensor]) -> float:
        """One step; the distillation loss before it."""
        fifth = max(1.0, self.steps / 5)
        share = min(1.0, max((self.done + 1) / fifth, 0.1), max((self.steps - self.done) / fifth, 0.1))
        self.optimiser.param_groups[0]["lr"] = RATE * share
        with torch.no_grad():
            self.gates.clamp_(0, 1)
        loss = loss_of()
        self.optimiser.zero_grad()
        (loss + PENALTY * self.gates.abs().mean()).backward()
        self.optimiser.step()
        self.done += 1
        return float(loss.detach())

    def state(self) -> dict[str, Tensor]:
        own = self.optimiser.state[self.gates]
        return {"gates": self.gates.detach(), "mean": own["exp_avg"], "square": own["exp_avg_sq"],
                "done": torch.tensor(self.done)}  # fmt: skip

    def resume(self, state: dict[str, Tensor]) -> None:
        """Continue where `state` was taken."""
        self.done = int(state["done"])
        with torch.no_grad():
            self.gates.copy_(state["gates"])
        mean, square = (state[n].to(self.gates).clone() for n in ("mean", "square"))
        own = {"step": torch.tensor(float(self.done)), "exp_avg": mean, "exp_avg_sq": square}
        self.optimiser.state[self.gates] = own


# ---------------------------------------------------------------------- passkeys
def passkeys(tokenizer: Any, source: Source, length: int, rng: random.Random) -> tuple[Tensor, Tensor]:
    """A prompt of at most `length` tokens: prose with passkeys, then each asked for and told, in order.

    Returns:
        (ids int64 `[1, N]`, positions int64 of all question and answer tokens). Ten passkeys of 32 words where they take
        less than half of the prompt, else as many, and then as long, as do.
    """
    keys, words, tail, need = _sizes(tokenizer, length, rng)
    depths = sorted(rng.sample(range(1000), len(keys)))
    facts = [FACT.format(ordinal=o, words=w) for o, w in zip(ORDINALS, words, strict=False)]
    room = length - len(tail)
    size = max(1, (room - need) * 3 // 4)  # words of prose; a word is at least a token in nearly all text
    while True:
        context, _ = planted(source, size, facts, [0.05 + 0.9 * d / 999 for d in depths])
        ids = _encode(tokenizer, context)
        if len(ids) <= room or size == 1:
            break
        size = max(1, int(size * min(0.97, room / len(ids))))
    if len(ids) > room:
        raise ConfigError(f"length: {length} tokens have no room for a passkey; give more")
    both = torch.tensor([ids + tail])
    return both, torch.arange(len(ids), both.shape[1])


def _sizes(tokenizer: Any, length: int, rng: random.Random) -> tuple[list[int], list[str], list[int], int]:
    """(numbers of the passkeys, their words, tokens of questions and answers, tokens of the facts) for a length."""
    drawn = [[rng.choice(ALPHABET) for _ in range(WORDS)] for _ in range(KEYS)]
    for keys, size in [*((k, WORDS) for k in range(KEYS, 2, -1)), *((2, w) for w in (32, 24, 16, 8, 4)), (1, 4)]:
        words = [" ".join(line[:size]) for line in drawn[:keys]]
        tail = "".join(ASK.format(ordinal=o) + TELL.format(words=w) for o, w in zip(ORDINALS, words, strict=False))
        ids = _encode(tokenizer, tail, bare=True)
        if 2 * len(ids) <= length // 2 or keys == 1:
            break
    return list(range(keys)), words, ids, len(ids)


def _encode(tokenizer: Any, text: str, bare: bool = False) -> list[int]:
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    return ids[len(list(tokenizer("", verbose=False)["input_ids"])[:1]) :] if bare else ids


def _source(job: Job) -> Source:
    """Prose of the job's files, or the built-in one."""
    if not job.data:
        return Source.of()
    texts = [Source.of(Path(f)) for f in job.data]
    return Source(texts[0].nouns, texts[0].adjectives, texts[0].verbs, tuple(w for t in texts for w in t.prose), "data")


def _lengths(job: Job, source: Source) -> list[int]:
    """Prompt lengths, evenly spaced from a thirty-second of the longest, or the least that holds a passkey."""
    least = max(job.length // 32, 4 * len(_sizes(job.tokenizer, 0, random.Random(0))[2]))
    if least > job.length:
        raise ConfigError(f"length: expected at least {least} tokens for a passkey, got {job.length}")
    return sorted({math.floor(least + (job.length - least) * i / (LENGTHS - 1)) for i in range(LENGTHS)})
