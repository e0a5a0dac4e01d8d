"""How far a recipe's predictions and layer outputs are from dense attention's on one document, prefill and decode apart.

"prefill" reads the whole document in one call. "decode" reads all but the last `steps` tokens, lets the cache policy
work, and feeds the rest one by one (teacher forcing); its loss is that of the tokens predicted by those steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..adapters.context import ContextCache
from ..adapters.transformers import Handle, use
from ..diagnosis import Diagnosis, Share, _logits
from ..errors import ConfigError, ShapeError
from ..layout import Layout, Parts
from ..methods.base import AttnInput, Method
from ..recipe import Recipe
from .stream import Reference, Tick

EVERY = 8  # decode steps from one look at masses and outputs to the next; predictions are compared at every step
LOW = 0.01  # the percentile of `mass_low`
_DENSE = Recipe.of("dense")


@dataclass(frozen=True)
class Measured:
    """One phase. Names as in `Record.values`; what was not measured or is not finite is left out, and a note says so.

    Attributes:
        perplexity: "nll" and "nll@P" (nats), "tokens"; with LongPPL's keys, in prefill, "long_nll" and "long_tokens".
        agreement: "kl", "kl_max" (nats), "same"; "mass", "mass_low", "error"; "density", "computed".
        notes: sentences for the reader.
    """

    perplexity: dict[str, float]
    agreement: dict[str, float]
    notes: list[str] = field(default_factory=list)


# ---------------------------------------------------------------------- the meter
@dataclass
class Fidelity(Diagnosis):
    """A diagnosis of one phase that also compares each layer's output with dense attention over the same queries and keys.

    Attributes:
        phase: "prefill" or "decode"; calls of the other are not looked at, but for the entries that a policy may drop.
        sinks: learned sink logits `[H]` by layer, of models that have them.
        errors: by layer, squared norm of (output - dense output) over that of the dense output, on the sampled rows.
        kept: `[H, R]` tensors of mass kept. calls: of this phase, by layer; in decode every `EVERY`th is looked at.
    """

    phase: str = "prefill"
    sinks: dict[int, Tensor] = field(default_factory=dict)
    errors: dict[int, Share] = field(default_factory=dict)
    kept: list[Tensor] = field(default_factory=list)
    calls: dict[int, int] = field(default_factory=dict)

    keeps_values: ClassVar[bool] = True

    def attended(self, x: AttnInput, plan: Layout | Parts, out: Tensor) -> None:
        done = self.calls[x.layer] = self.calls.get(x.layer, -1) + (x.phase == self.phase)
        if x.phase == self.phase and (x.phase == "prefill" or done % EVERY == 0):
            super().attended(x, plan, out)
        else:  # what a policy may drop must be remembered at every step
            self._all_keys(x)

    def _all_keys(self, x: AttnInput) -> Tensor | None:
        return super()._all_keys(x) if self.phase == "decode" else None  # prefill has every entry at hand

    def compared(self, x: AttnInput, rows: Tensor, visible: Tensor, kept: Tensor, out: Tensor) -> None:
        self.kept.append(kept.cpu())
        dense = self.dense_rows(x, rows, visible)
        got = out[0][:, rows].float()
        part, whole = float((got - dense).square().sum()), float(dense.square().sum())
        self.errors.setdefault(x.layer, Share()).add(part, whole)

    def dense_rows(self, x: AttnInput, rows: Tensor, visible: Tensor) -> Tensor:
        """What dense attention over every key seen gives on these rows: fp32 `[H, R, Dv]`, one kv head at a time."""
        if x.layer in self._keys:  # entries may be gone from x.kv
            keys, values = self._keys[x.layer], self._values[x.layer]
            visible = torch.ones(1, 1, 1, dtype=torch.bool, device=x.device)
        else:
            kv = x.kv.to_dense()
            keys, values = kv.k[0], kv.v[0]
        out = []
        for i, q in enumerate(x.q[0][:, rows].chunk(keys.shape[0])):
            s = _logits(q, keys[i : i + 1], x).masked_fill(~visible, float("-inf"))
            o = s.softmax(-1) @ values[i : i + 1].float()
            if x.layer in self.sinks:
                sink = self.sinks[x.layer].float().chunk(keys.shape[0])[i]
                o = o * torch.sigmoid(s.logsumexp(-1) - sink[:, None])[..., None]
            out.append(o)
        return torch.cat(out)

    def values(self) -> dict[str, float | None]:
        """ "mass", "mass_low", "error", "density", "computed" of the phase; None: nothing could be compared."""
        errors = [math.sqrt(share.value) for share in self.errors.values() if share.value is not None]
        low = torch.cat([t.flatten() for t in self.kept]).quantile(LOW) if self.kept else None
        return {
            "mass": self.mass_kept(self.phase),
            "mass_low": None if low is None else float(low),
            "error": sum(errors) / len(errors) if errors else None,
            "density": self.named[self.phase].value,
            "computed": self.computed[self.phase].value,
        }


# ---------------------------------------------------------------------- one recipe on one document
def measure(
    model: Any,
    recipe: Recipe | Method | str,
    ids: Tensor,
    reference: Reference,
    *,
    steps: int | None = None,
    backend: str | None = None,
    seed: int = 0,
    tick: Tick = lambda tokens: None,
) -> dict[str, Measured]:
    """{"prefill": ..., "decode": ...} of a recipe on a document, against dense.

    Args:
        ids: int64 `[1, N]`, the reference's document. steps: the reference's, or None for it. backend: kernels by name.
        seed: of the rows that are sampled. tick: hears how many tokens were read; those that need not be read again
            (another recipe with the same prefill was measured on this reference) are reported as well.

    Raises:
        ShapeError: other ids than the reference's. ConfigError: other steps, or a recipe that does not exist.
    """
    recipe = Recipe.of(recipe)
    if ids.shape != reference.ids.shape or not torch.equal(ids.to(reference.ids.device), reference.ids):
        raise ShapeError(f"ids: expected the reference's {list(reference.ids.shape)} tokens, got others {list(ids.shape)}")
    if steps is not None and steps != reference.steps:
        raise ConfigError(f"steps: expected the reference's {reference.steps}, got {steps}")
    run = _Run(model, reference, backend, seed, tick)
    return {"prefill": run.prefill(recipe), "decode": run.decode(recipe)}


@dataclass
class _Run:
    model: Any
    reference: Reference
    backend: str | None
    seed: int
    tick: Tick

    def prefill(self, recipe: Recipe) -> Measured:
        n = self.reference.ids.shape[1]
        known = ("prefill", (recipe.prefill or _DENSE.prefill).describe(), self.backend, self.seed)  # type: ignore[union-attr]
        alone = recipe.heads is None and not _watches(recipe)  # nothing but its method has a say in what prefill computes
        if alone and known in self.reference.measured:
            self.tick(n)
            return self.reference.measured[known]  # type: ignore[no-any-return]
        with use(self.model, recipe, backend=self.backend) as handle, torch.no_grad():
            meter = self._meter(handle, recipe, "prefill")
            out = self.model.get_decoder()(input_ids=self.reference.ids, use_cache=False)
            self.tick(n)
            found = self._compare(out.last_hidden_state[0], 0, meter, handle.notes)
        if alone:
            self.reference.measured[known] = found
        return found

    def decode(self, recipe: Recipe) -> Measured:
        ids, steps = self.reference.ids, self.reference.steps
        start = ids.shape[1] - steps
        decoder = self.model.get_decoder()
        with use(self.model, recipe, backend=self.backend) as handle, torch.no_grad():
            meter = self._meter(handle, recipe, "decode")
            if self._forks(recipe):
                cache: ContextCache = self.reference.cache.fork()
            else:
                cache = decoder(input_ids=ids[:, :start], use_cache=True).past_key_values
            self.tick(start)
            hidden = []
            for t in range(start, start + steps):
                out = decoder(input_ids=ids[:, t : t + 1], past_key_values=cache, use_cache=True)
                hidden.append(out.last_hidden_state[0])
                self.tick(1)
            return self._compare(torch.cat(hidden), start, meter, handle.notes)

    def _forks(self, recipe: Recipe) -> bool:
        """Whether dense's cache is what the recipe would have after the same tokens."""
        dense = recipe.prefill in (None, _DENSE.prefill) and recipe.heads is None and not recipe.evicts
        same = recipe.storage == _DENSE.storage and self.backend == self.reference.backend
        return dense and same and not _watches(recipe)

    def _meter(self, handle: Handle, recipe: Recipe, phase: str) -> Fidelity:
        sinks = {m.layer_idx: s for m in handle.layers if isinstance(s := getattr(m, "sinks", None), Tensor)}
        meter = Fidelity(recipe, self.backend, seed=self.seed, phase=phase, sinks=sinks)
        handle.meter = meter
        return meter

    def _compare(self, hidden: Tensor, first: int, meter: Fidelity, notes: list[str]) -> Measured:
        """The figures of final hidden states `[n, C]` at positions first .. first + n - 1, the last of the document."""
        ref, n = self.reference, hidden.shape[0]
        nll, kl, same = [], [], []
        targets = ref.ids[0, first + 1 :]
        for i, logits in ref.head.tables(hidden):
            ours = logits.log_softmax(-1)
            theirs = ref.head(ref.hidden[first + i : first + i + len(ours)]).log_softmax(-1)
            kl.append((theirs.exp() * (theirs - ours)).sum(-1).clamp(min=0.0).cpu())
            same.append((theirs.argmax(-1) == ours.argmax(-1)).cpu())
            wanted = targets[i : i + len(ours)]  # the last token of the document has none
            nll.append(-ours[: len(wanted)].gather(-1, wanted[:, None])[:, 0].cpu())
        kls, losses = torch.cat(kl).double(), torch.cat(nll).double()
        perplexity = {"nll": float(losses.mean()), **by_position(losses, first + 1), "tokens": float(n - 1)}
        if ref.keys is not None and first == 0:
            perplexity |= {"long_nll": float(losses[ref.keys].mean()), "long_tokens": float(ref.keys.sum())}
        agreement: dict[str, float | None] = {
            "kl": float(kls.mean()),
            "kl_max": float(kls.max()),
            "same": float(torch.cat(same).double().mean()),
            **meter.values(),
        }
        lost: list[str] = []
        out = Measured(_finite(perplexity, lost), _finite(agreement, lost), list(notes))
        if lost:
            out.notes.append(f"{meter.phase}: not measured or not finite: {', '.join(lost)}")
        return out


def by_position(losses: Tensor, first: int) -> dict[str, float]:
    """Mean loss by position of the predicted token: "nll@P" for positions P to 2 P - 1, P a power of two.

    losses `[n]`: of the tokens at positions first (at least 1) .. first + n - 1.
    """
    end, p, out = first + len(losses), 1, {}
    while p < end:
        low, high = max(p, first), min(2 * p, end)
        if low < high:
            out[f"nll@{p}"] = float(losses[low - first : high - first].mean())
        p *= 2
    return out


def _watches(recipe: Recipe) -> bool:
    """Whether a method looks at the results of prefill, so that it must not be skipped."""
    return any(type(m).observe is not Method.observe and "prefill" in m.observes for m in recipe.methods)


def _finite(values: dict[str, Any], lost: list[str]) -> dict[str, float]:
    good = {name: float(v) for name, v in values.items() if v is not None and math.isfinite(v)}
    lost += [name for name in values if name not in good]
    return good
