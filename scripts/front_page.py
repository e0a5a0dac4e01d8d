"""What README.md shows of the registry and of benchmarks/results: the methods by role, the strongest figures with what
each was measured against and what it costs, and the few tables that tell most. Everything else is in BENCHMARKS.md.

A figure stands here only if its file is there; new recipes and new files change which row is the best, never the form.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tables import blocks_table

Found = dict[str, dict[str, Any]]
Row = dict[str, Any]

ROLES = {
    "prefill": "prefill: attention while a prompt is read",
    "decode": "decode: attention of each new token",
    "cache": "cache: what is kept in memory",
}
NEEDS = {"profile": "¹", "weights": "²"}
# Recipes of whole decode steps worth a line here, in this order; BENCHMARKS.md has all.
STEPS = (
    "no attention",
    "dense",
    "quest:page=64,share=group",
    "decode=lserve:assign=even,share=group",
    "cache=kivi:bits=4",
    "decode=quest:page=64,share=group+cache=kivi:bits=4",
)
COMPILED = ", compiled"
QUEST = "quest:page=64,share=group"
BLOCKS = "h200_blocks_fa4"  # the newest run beside FlashAttention-4
PAGES = "quest, pages of 64"  # the same, as the bench of one layer names it
MASS = (0.94, 0.96)  # shares of the attention mass of which the headline names the fastest recipe


def methods_table() -> str:
    """The methods that can serve each role, each a link to its page."""
    from foveate.registry import METHODS, get

    lines = ["| role | methods |", "| --- | --- |"]
    for role, title in ROLES.items():
        own = [n for n in METHODS if role in get(n).roles]
        named = ", ".join(f"[`{n}`](docs/methods/{n}.md){NEEDS.get(get(n).needs, '')}" for n in own)
        lines.append(f"| {title} | {named} |")
    marks = "¹ works best with, or needs, a profile made by `foveate calibrate`; ² needs trained weights"
    return "\n".join([*lines, "", f"{len(METHODS)} methods, `dense` among them. {marks}."])


# ---------------------------------------------------------------------- words for figures
def card(device: str) -> str:
    """ "NVIDIA H100 80GB HBM3" as "H100"."""
    return device.removeprefix("NVIDIA ").split()[0] if device.startswith("NVIDIA ") else device


def tokens(n: int) -> str:
    """131072 as "128K"."""
    return f"{n // 1024}K" if n % 1024 == 0 else f"{n:,}"


def time(ms: float) -> str:
    """Milliseconds with three digits, in the unit that suits them."""
    value, unit = (ms * 1000, "us") if ms < 1 else (ms, "ms") if ms < 1000 else (ms / 1000, "s")
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def median(row: Row) -> float:
    return float(row["ms"]["median"])


# ---------------------------------------------------------------------- the strongest figures
def headline(found: Found) -> str:
    """One line a claim: dense, Foveate, the quotient, and what is kept or lost."""
    rows = [row for part in (_prompt, _layer, _whole, _drafts, _blocks, _cpu) for row in part(found)]
    head = ["| what is timed | dense | Foveate | gain | what is kept, where it ran |", "| --- | --- | --- | --- | --- |"]
    return "\n".join(head + ["| " + " | ".join(row) + " |" for row in rows])


def calibrated(found: Found) -> dict[str, Any] | None:
    """The newest timing of prefill attention with settings by head."""
    own = [d for d in found.values() if d.get("bench") == "prefill attention" and any(map(_settings, d["rows"]))]
    return max(own, key=lambda d: d["date"], default=None)


def _settings(row: Row) -> bool:
    return "calibration" in row["params"]


def _prompt(found: Found) -> Iterator[tuple[str, ...]]:
    data = calibrated(found)
    if data is None:
        return
    done = set()
    for least in MASS:
        own = [r for r in data["rows"] if _settings(r) and least <= r["params"]["mass"] <= 1]
        best = max(own, key=lambda r: r["params"]["speedup"], default=None)
        if best is None or best["impl"] in done:
            continue
        done.add(best["impl"])
        p = best["params"]
        dense = {r["impl"]: median(r) for r in data["rows"] if r["case"] == best["case"] and r["impl"].startswith("dense")}
        mine = f" ({time(dense['dense, ours'])} ours)" if "dense, ours" in dense else ""
        yield (
            f"attention of one layer, {tokens(p['n'])} prompt, choosing included, {100 * least:.0f} % of the mass or more",
            f"{time(dense['dense, cuDNN'])} cuDNN{mine}",
            f"{time(median(best))}, `{p['recipe']}` calibrated by head",
            f"**{p['speedup']:.1f}x**",
            f"{percent(p['mass'])} of the attention mass, {percent(p['density_computed'])} of the pairs; made queries and "
            f"keys; {card(data['device'])}",
        )


def _layer(found: Found) -> Iterator[tuple[str, ...]]:
    data = found.get("h100_decode_pages")
    if data is None:
        return
    b, n = max((r["params"]["b"], r["params"]["n"]) for r in data["rows"])
    mine = {r["impl"]: median(r) for r in data["rows"] if (r["params"]["b"], r["params"]["n"]) == (b, n)}
    if PAGES not in mine or "torch flash" not in mine:
        return
    yield (
        f"attention of one layer, one decode step, {b} x {tokens(n)} tokens",
        f"{time(mine['torch flash'])} PyTorch flash",
        f"{time(mine[PAGES])}, `quest`, pages of 64",
        f"**{mine['torch flash'] / mine[PAGES]:.0f}x**",
        f"2,048 tokens of each context read, bounds and selection counted; made data; {card(data['device'])}",
    )


def _whole(found: Found) -> Iterator[tuple[str, ...]]:
    newest: dict[str, tuple[str, dict[str, Any]]] = {}
    for (device, case), data in steps(found).items():
        if case not in newest or data["date"] > newest[case][1]["date"]:
            newest[case] = (device, data)
    for case, (device, data) in newest.items():
        rows = _compiled(data)
        if "dense" in rows and QUEST in rows:
            yield (
                f"whole decode step, Llama-3-8B's shape, {_case(case)}",
                f"{time(median(rows['dense']))} ours",
                f"{time(median(rows[QUEST]))}, `{QUEST}`",
                f"**{median(rows['dense']) / median(rows[QUEST]):.1f}x**",
                f"{percent(rows[QUEST]['density'])} of the tokens read; random weights: speed alone; {card(device)}",
            )


def _drafts(found: Found) -> Iterator[tuple[str, ...]]:
    """A token of self-speculation where every draft stands, and how many must for it to be worth it."""
    data = found.get("h200_speculate")
    cycle = next((r for r in data["rows"] if r["impl"] == "cycle, compiled"), None) if data else None
    if data is None or cycle is None:
        return
    p, stood = cycle["params"], "random weights, which do not say how many stand"
    if (accepted := _accepted(found, p["draft"])) is not None:
        stood = f"{accepted[0]:.1f} to {accepted[1]:.1f} stand on SmolLM2 at 8K, by task"
    best = float(p["token_ms_at"].split()[-1])
    yield (
        f"one token by drafts and their verification, exactly dense's, Llama-3-8B's shape, {_case(cycle['case'])}",
        f"{time(p['dense_ms'])} ours",
        f"{time(best)}, `pillar_attn` drafts, if all {p['draft']} stand",
        f"**{p['dense_ms'] / best:.1f}x**",
        f"even at {p['even_at'] - 1:.1f} of {p['draft']}; {stood}; {card(data['device'])}",
    )


def _accepted(found: Found, drafts: int) -> tuple[float, float] | None:
    """The fewest and the most of so many drafts that stood, mean of a task, where drafts read 5 % of an 8K prompt, as many
    as in the cycle beside which this stands."""
    rows = found["h200_accept_smollm2"]["rows"] if "h200_accept_smollm2" in found else []
    mine = [r["params"] for r in rows if r["case"].startswith("8192 ") and "ratio=0.05" in r["params"].get("recipe", "")]
    means = [p["accepted"] for p in mine if p["drafts"] == drafts and p.get("accepted") is not None]
    return (min(means), max(means)) if means else None


def _blocks(found: Found) -> Iterator[tuple[str, ...]]:
    data = found.get(BLOCKS)
    if data is None:
        return
    case = "32K w128 d128 keep 0.05"
    mine = {r["impl"]: r for r in data["rows"] if r["case"] == case}
    if not {"gluon", "fa4", "cudnn"} <= mine.keys():
        return
    ours, fa4, dense = (median(mine[i]) for i in ("gluon", "fa4", "cudnn"))
    yield (
        f"given blocks of a 32K prompt, {percent(mine['gluon']['density'])} of the pairs",
        f"{time(dense)} cuDNN; {time(fa4)} FlashAttention-4, same blocks",
        f"{time(ours)}, gluon kernel",
        f"**{dense / ours:.0f}x**; {fa4 / ours:.2f}x",
        f"exactly the pairs named; bf16, 32 query and 8 kv heads; {card(data['device'])}",
    )


def _cpu(found: Found) -> Iterator[tuple[str, ...]]:
    compare = {r["recipe"]: r for r in found["cpu_compare"]["rows"]} if "cpu_compare" in found else {}
    if (bench := found.get("cpu_prefill")) is not None:
        times = {r["impl"]: median(r) for r in bench["rows"]}
        name, base = "minference@8k", "transformers sdpa"
        if name in times and base in times:
            kept = compare.get(name)
            length = found["cpu_compare"]["facts"]["prompt_tokens"] if kept else 0
            cost = f"next-token KL {kept['kl']:.3f} and the answer kept at {length:,}; " if kept and kept["answered"] else ""
            facts = bench["facts"]
            yield (
                f"first token of {facts['model']}, {facts['prompt_tokens']:,} tokens",
                f"{time(times[base])} transformers",
                f"{time(times[name])}, `{name}`",
                f"**{times[base] / times[name]:.1f}x**",
                f"{cost}{facts['threads']} CPU threads",
            )
    dense, small = compare.get("dense"), compare.get("snapkv@8k")
    if dense and small and small["answered"]:
        yield (
            f"KV memory of {found['cpu_compare']['facts']['model']}, "
            f"{found['cpu_compare']['facts']['prompt_tokens']:,} tokens",
            f"{dense['kv_bytes'] / 2**20:.0f} MiB",
            f"{small['kv_bytes'] / 2**20:.0f} MiB, `snapkv@8k`",
            f"**{dense['kv_bytes'] / small['kv_bytes']:.1f}x** smaller",
            f"next-token KL {small['kl']:.3f}, the answer kept on this prompt; harder tasks lose more, see below",
        )


# ---------------------------------------------------------------------- the tables that tell most
def figures(found: Found, summaries: Found) -> str:
    """The measured part; `summaries` are the evaluations among the results."""
    from foveate.bench.tables import compare_table

    out = []
    if (demo := found.get("cpu_compare")) is not None:
        facts, rows = demo["facts"], demo["rows"]
        out.append(
            f"**The demo.** `foveate compare`, {facts['model']} reading {facts['prompt']}, {facts['dtype']}, "
            f"{facts['device']} (one run, {facts['date']}):\n\n" + compare_table(rows)
        )
    if (prompt := calibrated(found)) is not None:
        out.append(
            f"**A long prompt.** One layer, 32 query and 8 kv heads, D 128, bf16, one {card(prompt['device'])}, one run. "
            "Each method's settings were searched by head for a share of the mass on other draws of the same made queries "
            "and keys; mass kept and time are of a draw that the search did not see:\n\n" + prompt_table(prompt)
        )
    if (blocks := found.get(BLOCKS)) is not None:
        out.append(
            f"**Block lists beside FlashAttention-4**, the same lists, one {card(blocks['device'])}, 32 query and 8 kv "
            "heads, D 128, bf16, causal, blocks of 128; TFLOP/s over kept pairs:\n\n"
            f"![TFLOP/s against density](benchmarks/figures/{BLOCKS}.svg)\n\n"
            + blocks_table(blocks, width=128)
            + "\n\n"
            + " ".join(_slower(blocks, found.get("h100_backward")))
        )
    if steps(found):
        out.append(
            "**A whole decode step** of a model of Llama-3-8B's shape, bf16, random weights and contexts, layers compiled, "
            "replayed as a CUDA graph; in brackets attention's part, what is left without `no attention`:\n\n"
            + whole_table(found)
        )
    if (quality := summaries.get("eval_smollm2")) is not None:
        names = "; ".join(f"{i} `{r['recipe']}`" for i, r in enumerate(quality["recipes"], 1))
        out.append(
            f"**What is lost.** {quality['facts']['model']} on one {card(quality['facts']['hardware'])}, over retrieval "
            "tasks that dense does; a model of 135 million parameters tests methods, it does not stand for large models. "
            f"{names}:\n\n![Score against density, time and memory](benchmarks/figures/eval_smollm2.svg)"
        )
        out += losses(summaries.get("eval_smollm2_prefill"))
    return "\n\n".join(out)


def prompt_table(data: dict[str, Any], most: int = 8) -> str:
    """The fastest recipes with settings by head, and dense attention."""
    own = sorted((r for r in data["rows"] if _settings(r) and r["params"]["mass"] <= 1), key=median)
    dense = [r for r in data["rows"] if r["impl"].startswith("dense")]
    base = next(median(r) for r in dense if r["impl"] == "dense, cuDNN")
    lines = [
        "| recipe | tokens | mass kept | least head | pairs computed | choosing | attention | over cuDNN |",
        "| --- " * 8 + "|",
    ]
    for r in [*own[:most], *sorted(dense, key=median)]:
        p = r["params"]
        kept = ("100 %", "100 %", "100 %", "-", time(median(r)))
        if _settings(r):
            kept = (percent(p["mass"]), percent(p["mass_least_head"]), percent(p["density_computed"]),
                    time(p["plan_ms"]), time(p["attend_ms"]))  # fmt: skip
        cells = [f"`{r['impl']}`" if _settings(r) else r["impl"], tokens(p["n"]), *kept]
        faster = p.get("speedup", base / median(r))  # over the rounds of cuDNN that this recipe took turns with
        lines.append(f"| {' | '.join(cells)} | {faster:.2f}x |")
    left = len(own) - most
    return "\n".join(lines) + (f"\n\n{left} slower rows are in BENCHMARKS.md." if left > 0 else "")


def steps(found: Found) -> dict[tuple[str, str], dict[str, Any]]:
    """For each card and case the run with most of the recipes shown here, the newest among equals."""
    out: dict[tuple[str, str], dict[str, Any]] = {}
    rank = lambda d: (len(_compiled(d)), d["date"])  # noqa: E731
    for data in found.values():
        if data.get("bench") != "step" or "dense" not in _compiled(data):
            continue
        key = (data["device"], data["rows"][0]["case"])
        if key not in out or rank(data) > rank(out[key]):
            out[key] = data
    return dict(sorted(out.items(), key=lambda item: item[0][1], reverse=True))


def _compiled(data: dict[str, Any]) -> dict[str, Row]:
    """Rows of replayed, compiled steps of the recipes shown here, by recipe."""
    rows = {r["params"]["recipe"].removesuffix(COMPILED): r for r in data["rows"] if r["impl"].endswith(COMPILED)}
    return {name: rows[name] for name in STEPS if name in rows}


def _case(case: str) -> str:
    """ "131072 tokens, batch 1" as "1 x 128K tokens"."""
    n, _, rest = case.partition(" tokens, batch ")
    return f"{rest} x {tokens(int(n))} tokens" if n.isdigit() and rest else case


def whole_table(found: Found) -> str:
    columns = steps(found)
    titles = [f"{_case(case)}, {card(device)}" for device, case in columns]
    lines = ["| recipe | " + " | ".join(titles) + " |", "| --- " * (1 + len(titles)) + "|"]
    tables = [_compiled(d) for d in columns.values()]
    for name in STEPS:
        if not any(name in t for t in tables):
            continue
        cells = []
        for t in tables:
            part = t[name]["params"].get("attention_ms") if name in t else None
            cells.append("-" if name not in t else time(median(t[name])) + (f" ({part:.2f})" if part is not None else ""))
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _slower(blocks: dict[str, Any], backward: dict[str, Any] | None) -> Iterator[str]:
    """In words: where FlashAttention-4 is the faster one."""
    pairs = list(_beside(blocks, "gluon", lambda r: r["params"]["D"] == 128))
    lost = [
        f"{tokens(n)} at {density:.2f} ({theirs:.0f} against {ours:.0f})"
        for n, density, ours, theirs in pairs
        if theirs > ours
    ]
    if lost:
        yield f"FlashAttention-4 is faster in {len(lost)} of the {len(pairs)} cases measured: {', '.join(lost)}."
    if backward is not None:
        pairs = list(_beside(backward, "ours", lambda r: True))
        won = [p for p in pairs if p[2] >= p[3]]
        yield (
            f"Backward of such lists: ours is faster in {len(won)} of {len(pairs)} cases, those of a density up to "
            f"{max(p[1] for p in won):.2f}."
            if won
            else "Backward of such lists: FlashAttention-4 is faster in all cases."
        )


def _beside(data: dict[str, Any], ours: str, chosen: Any) -> Iterator[tuple[int, float, float, float]]:
    """(tokens, density, our TFLOP/s, theirs) of each case that both ran."""
    rows = [r for r in data["rows"] if chosen(r)]
    for case in dict.fromkeys(r["case"] for r in rows):
        mine = {r["impl"]: r for r in rows if r["case"] == case}
        if ours in mine and "fa4" in mine:
            one = mine[ours]
            yield one["params"]["N"], one["density"], one["tflops"], mine["fa4"]["tflops"]


def losses(summary: dict[str, Any] | None, most: int = 8) -> list[str]:
    """One sentence: what recipes lose at the greatest length with the question seen, least first."""
    from foveate.evals.frontier import points_of

    points = [p for p in points_of(summary).get("seen", []) if p.quality is not None] if summary is not None else []
    if summary is None or not points:
        return []
    longest = max(p.length for p in points)
    own = [p for p in points if p.length == longest]
    dense = next((p for p in own if p.dense), None)
    rest = sorted((p for p in own if p.loss is not None), key=lambda p: p.loss.mean)
    if dense is None or not rest:
        return []
    named = "; ".join(
        f"`{p.recipe.partition(':profile')[0]}` {100 * p.loss.mean:.1f} ({100 * p.loss.low:.1f} to {100 * p.loss.high:.1f})"
        for p in rest[:most]
    )
    more = f"; {len(rest) - most} others more, up to {100 * rest[-1].loss.mean:.0f}" if len(rest) > most else ""
    return [
        f"Methods of prefill there at {longest:,} tokens, points lost of dense's {100 * dense.quality:.1f} with 95 % "
        f"intervals, {dense.n} samples: {named}{more}."
    ]
