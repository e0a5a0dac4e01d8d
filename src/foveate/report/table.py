"""The columns of a comparison, for the terminal and the page alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..measure import Comparison, Row
from ..recipe import Recipe


@dataclass(frozen=True)
class Column:
    """A column: its title, what it means, and how a row shows in it: `cell(row, dense) -> (figure, detail)`."""

    title: str
    help: str
    cell: Callable[[Row, Row], tuple[str, str]]


def seconds(value: float | None) -> str:
    """ "15.3 s" or "812 ms"."""
    if value is None:
        return "-"
    return f"{value:.1f} s" if value >= 10 else f"{value:.2f} s" if value >= 1 else f"{1000 * value:.0f} ms"


def size(value: float | None) -> str:
    """Bytes as "352 MiB"."""
    if value is None:
        return "-"
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            break
        value /= 1024
    else:
        unit = "GiB"
    return f"{value:.0f} {unit}" if value >= 100 or unit == "B" else f"{value:.1f} {unit}"


def percent(value: float | None) -> str:
    """ "35 %", with one digit more where it matters."""
    if value is None:
        return "-"
    shown = 100 * value
    return f"{shown:.0f} %" if shown >= 99.95 or 10 <= shown < 90 else f"{shown:.1f} %"


def times(value: float | None, base: float | None) -> str:
    """ "0.72x" of the base."""
    return f"{value / base:.2f}x" if value is not None and base else ""


def _kl(row: Row, dense: Row) -> tuple[str, str]:
    if row.kl is None:
        return "-", ""
    return (f"{row.kl:.4f}" if row.kl < 1 else f"{row.kl:.2f}"), f"max {row.kl_max:.2f}" if row.kl_max is not None else ""


def _decode(value: float | None) -> str:
    return "" if value is None else f"decode {percent(value)}"


def _answer(row: Row, dense: Row) -> tuple[str, str]:
    mark = {True: "yes", False: "no", None: ""}[row.answered]
    text = " ".join(row.answer.split())
    return (text if len(text) <= 60 else text[:57] + "..."), mark


def _same(row: Row, dense: Row) -> tuple[str, str]:
    if row.same_tokens is None:
        return "-", ""
    return f"{row.same_tokens}/{row.tokens}", f"first {row.same_greedy}" if row is not dense else ""


def _selected(named: float | None, computed: float | None) -> tuple[str, str]:
    rounded = named is not None and computed is not None and abs(named - computed) > 0.005
    return percent(computed), f"chosen {percent(named)}" if rounded else ""


COLUMNS = (
    Column(
        "first token",
        "wall time from the prompt to the first token, and relative to dense",
        lambda r, d: (seconds(r.first_token), times(r.first_token, d.first_token)),
    ),
    Column(
        "decode",
        "tokens per second (median step), and relative to dense",
        lambda r, d: (f"{r.tokens_per_second:.1f}/s" if r.tokens_per_second else "-",
                      times(r.tokens_per_second, d.tokens_per_second)),
    ),
    Column(
        "computed, prefill",
        "query-key pairs the kernel computes in prefill, relative to all visible pairs; where it differs, the pairs chosen",
        lambda r, d: _selected(r.prefill_density, r.prefill_computed),
    ),
    Column(
        "read, decode",
        "entries read per decode step, relative to all tokens seen; evicted entries count as not read",
        lambda r, d: _selected(r.decode_density, r.decode_computed),
    ),
    Column(
        "KV memory",
        "bytes the cache has allocated at the end, and relative to dense",
        lambda r, d: (size(r.kv_bytes), times(r.kv_bytes, d.kv_bytes)),
    ),
    Column(
        "estimator",
        "share of the time to first token that was spent deciding what to compute; below it the same for decode",
        lambda r, d: (percent(r.estimator), _decode(r.decode_estimator)),
    ),
    Column(
        "same tokens",
        "positions at which the most likely next token is dense's, given dense's text; below it, leading tokens of the "
        "free answer that are dense's",
        _same,
    ),
    Column("KL", "divergence of the next-token distribution from dense's, nats: mean and largest", _kl),
    Column(
        "mass kept",
        "share of the attention probability on computed pairs, from a separate sampled pass: prefill, decode",
        lambda r, d: (percent(r.mass), _decode(r.decode_mass)),
    ),
    Column("answer", "the generated answer, and whether it holds the fact", _answer),
)  # fmt: skip


CLEAR = 0.95  # of dense's time: one timed pass each cannot tell less from noise


def summary(comparison: Comparison) -> str:
    """One honest sentence: the rows that are clearly faster and still give dense's answer, or that there are none.

    Only recipes that act in a phase are named for its speed: what the others differ in is the spread of single passes.
    Where other work took the cores during any of the timed passes, it names the smallest cache alone and says why.
    """
    dense = comparison.dense
    good = [r for r in comparison.rows[1:] if r.error is None and r.answered == dense.answered and r.first_token]
    if dense.answered is False:
        return "Dense attention itself does not give the answer here, so the answers of the others say nothing."
    if not good or not dense.first_token or not dense.tokens_per_second:
        return "No recipe gives the answer that dense attention gives." if comparison.rows[1:] else ""
    prefills, decodes = ([r for r in good if _acts(r.recipe, phase)] for phase in ("prefill", "decode"))
    first = min(prefills, key=lambda r: r.first_token or 0.0, default=dense)
    decode = max(decodes, key=lambda r: r.tokens_per_second or 0.0, default=dense)
    small = min(good, key=lambda r: r.kv_bytes or 0)
    busy, parts = comparison.busy, []
    if not busy and first is not dense and first.first_token and first.first_token <= CLEAR * dense.first_token:
        parts.append(
            f"the earliest first token comes from {first.recipe} ({times(first.first_token, dense.first_token)} of dense)"
        )
    if (
        not busy
        and decode is not dense
        and decode.tokens_per_second
        and CLEAR * decode.tokens_per_second >= dense.tokens_per_second
    ):
        speed = times(decode.tokens_per_second, dense.tokens_per_second)
        parts.append(f"the fastest decode from {decode.recipe} ({speed} of dense)")
    if small.kv_bytes and dense.kv_bytes and small.kv_bytes < dense.kv_bytes:
        parts.append(f"the smallest cache from {small.recipe} ({times(small.kv_bytes, dense.kv_bytes)})")
    same = "that give the same answer" if dense.answered else "compared"
    if not parts:
        faster = "" if busy else f", or faster by {1 - CLEAR:.0%} or more"
        parts.append(f"none is smaller than dense here{faster}")
    doubt = " Other work was running on this machine, so no order of speed is certain." if busy else ""
    return f"Of the recipes {same}, {'; '.join(parts)}.{doubt}"


def _acts(text: str, phase: str) -> bool:
    """Whether a recipe does anything but dense attention in a phase; what it does to the cache counts for decode."""
    recipe = Recipe.of(text)
    own, policies = getattr(recipe, phase), (recipe.heads, recipe.cache if phase == "decode" else None)
    return (own is not None and own.id != "dense") or any(p is not None for p in policies)
