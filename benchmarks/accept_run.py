"""How many drafts of self-speculation stand on a trained model, and what a token takes beside dense decoding.

    python benchmarks/accept_run.py --model smollm2 --lengths 2048,4096,8192 --out FILE [--seconds 500]
    python benchmarks/accept_run.py --model needle --lengths 8192,16384,32768,65536 --out FILE \\
        --tasks needle_word,niah_multikey_1,niah_multivalue,niah_multiquery,kv_retrieval,vt

Greedy generation after prompts of a length: "continue" goes on with essays, "summarise", "questions" and "quote" ask for
something about them, other names are tasks of `foveate evals`. Drafters are recipes in which {draft} is the number of
drafts, {share} a share of the prompt and {budget} as many tokens (at least `--least`).

A prompt is read once; dense steps and all drafters go on from the same keys and values. Of a drafter:
  accepted, stood     mean of drafts that stood in a cycle, and "how many: cycles", without first cycles (`first` is their
                      mean: after a prompt a drafter has no scores yet), cycles of fewer drafts, and those that an end cuts
  reach               share of these cycles in which at least 1, 2, ... drafts stood
  each                chance that a draft stands whose forerunners did, of all drafts that were judged
  token_cycle         tokens by cycles, first and last ones included: what a user gets
  same, ties, wrong   samples whose tokens are dense's; that differ from them, but by no more than rounding: every token is
                      the best of a dense pass over the sequence up to `gap` of its logit, the most seen; that are wrong
  cycle_ms, dense_ms  medians, a cycle once its graphs are recorded, and a dense step, taken in the same process, over all
                      samples and tasks of the length; gain: dense_ms by the median of the row's ms
  replays, verifications  drafts and verifications that were replayed, in all samples and tasks of the length
  at_8b               how many times as fast as dense steps it would be at `--costs` (milliseconds of a draft, a verification
                      and a dense step), by `reach`, at the number of drafts best_8b, not more than there were
The row's ms is a token: a cycle by the tokens a cycle gave, over samples. Drafters whose graphs end with each verification
run without graphs (`way`): read their counts, not their times, which have no gain. Rows are
appended; what a file holds is not run again.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import step_run

import foveate
from foveate import speculate
from foveate.adapters.graphs import stays
from foveate.bench import results
from foveate.errors import ConfigError
from foveate.evals.suites import choose
from foveate.evals.task import make
from foveate.evals.text import Source
from foveate.models import load
from foveate.prompts import chat, count, encode, essays
from foveate.recipe import Recipe

DRAFTERS = (
    "pillar_attn:draft={draft},ratio={share},least={least}",
    "decode=quest:budget={budget},dense_layers=0",
    "decode=double_sparsity:budget={budget},dense_layers=0",
    "decode=streaming_llm:sink=4,window={budget}",
)
TASKS = "continue,summarise,questions,quote,needle_word,niah_multiquery,vt"
ASKED = {
    "summarise": "Summarise the text above in one paragraph.",
    "questions": "Write ten questions that a reader of the text above should be able to answer.",
    "quote": "Repeat the last paragraph of the text above word for word.",
}
COSTS = "6.3,13.1,9.23"  # one H200, a model of Llama-3-8B's shape at 128K: results/h200_speculate.json
WARM = 4  # cycles and steps before the clock: graphs are recorded in the third cycle at the latest


@dataclass
class Sample:
    """A prompt that was read: ids int64 `[1, N]`, the entries of all its tokens but the last, and dense's answer."""

    ids: Tensor
    new: int
    entries: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    dense: list[int] = field(default_factory=list)
    ms: list[float] = field(default_factory=list)


@dataclass
class Watch(speculate.Stats):
    """Counts that also say when the host knew of each cycle, in seconds, and when there was none yet."""

    at: list[float] = field(default_factory=lambda: [time.perf_counter()])

    def cycle(self, drafted: int, stood: int, rows: int) -> None:
        super().cycle(drafted, stood, rows)
        self.at.append(time.perf_counter())

    def ms(self, n: int) -> list[float]:
        """Milliseconds of the cycles of n drafts but the first ones."""
        spent = [(k, 1e3 * (b - a)) for (k, _), a, b in zip(self.stood, self.at, self.at[1:], strict=False)]
        full = [t for k, t in spent[WARM:] if k == n] or [t for k, t in spent if k == n]
        return full or [t for _, t in spent]


# ---------------------------------------------------------------------- prompts
def prompts(task: str, tokenizer: Any, length: int, new: int, samples: int, source: Source) -> list[tuple[list[int], int]]:
    """(token ids, most new tokens) of each sample; both together take no more than `length` tokens."""
    if task not in ASKED and task != "continue":
        made = [make(choose([task])[0][0], tokenizer, length, i, 0, source) for i in range(samples)]
        return [(encoded.ids, min(new, sample.max_new_tokens)) for sample, encoded in made]
    texts, out = essays(), []
    for i in range(samples):
        at = i * len(texts) // samples
        around = "\n\n".join(texts[at:] + texts[:at])[: 8 * length]
        ids = tokenizer(around, add_special_tokens=False, verbose=False)["input_ids"]
        if task == "continue":
            out.append((ids[: length - new], new))
            continue
        most, room = length - new, length - new - count(tokenizer, chat(tokenizer, ASKED[task]))
        while len(asked := encode(tokenizer, chat(tokenizer, f"{tokenizer.decode(ids[:room])}\n\n{ASKED[task]}"))) > most:
            room -= len(asked) - most
        out.append((asked, new))
    return out


def read(net: Any, sample: Sample) -> None:
    """Keys and values of the prompt but its last token, with room behind them."""
    with foveate.use(net, "dense"):
        cache = net(input_ids=sample.ids[:, :-1], use_cache=True, logits_to_keep=1).past_key_values
    m, space = sample.ids.shape[1] - 1, (0, 0, 0, step_run.ROOM)
    for layer in cache.layers:
        kv = layer.cache.store.view()
        sample.entries.append(tuple(torch.nn.functional.pad(t[:, :, :m], space) for t in (kv.k, kv.v)))  # type: ignore[arg-type]


# ---------------------------------------------------------------------- runs
def steps(net: Any, handle: Any, sample: Sample, ends: list[int]) -> None:
    """Dense greedy tokens up to an end token, and milliseconds of steps."""
    cache = step_run.context(sample.entries, sample.ids.shape[1] - 1, handle)
    out = [sample.ids[:, -1:]]

    def step() -> None:
        logits = net(input_ids=out[-1], past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        out.append(logits[:, -1].float().argmax(-1, keepdim=True))

    ms = step_run.timed(step, sample.new, sample.ids.device)[0]
    sample.ms = ms[WARM:] or ms
    sample.dense = until(torch.cat(out[1:], 1)[0].tolist(), ends)


def until(tokens: list[int], ends: list[int]) -> list[int]:
    """Tokens up to the first end token, that one included."""
    last = next((i for i, t in enumerate(tokens) if t in ends), len(tokens) - 1)
    return tokens[: last + 1]


def draft(net: Any, handle: Any, sample: Sample, n: int, new: int, ends: list[int]) -> tuple[list[int], Watch]:
    """Tokens of self-speculation with n drafts a cycle, and its counts."""
    cache, stats = step_run.context(sample.entries, sample.ids.shape[1] - 1, handle), Watch()
    options = dict(max_new_tokens=new, eos_token_id=ends or None, draft=n, stats=stats)
    out = speculate.generate(net, sample.ids, past_key_values=cache, **options)
    return out[0, sample.ids.shape[1] :].tolist(), stats


def gap(net: Any, ids: Tensor, tokens: list[int]) -> float:
    """The most by which one of `tokens` behind ids falls short of the best of a dense pass, as a share of that logit."""
    every = torch.cat([ids, torch.tensor([tokens], device=ids.device)], 1)
    with foveate.use(net, "dense"):
        logits = net(input_ids=every, use_cache=False, logits_to_keep=len(tokens) + 1).logits[0, :-1].float()
    best = logits.amax(-1)
    chosen = logits.gather(-1, every[0, -len(tokens) :, None])[:, 0]
    return float(((best - chosen) / best.abs().clamp(min=1)).max())


# ---------------------------------------------------------------------- counts
def judged(stood: list[tuple[int, int]], emitted: int) -> list[tuple[int, int, bool]]:
    """(drafted, stood, whether the cycle was cut by the end) of the cycles; of a cut one only the tokens emitted count."""
    out, left = [], emitted
    for k, s in stood:
        out.append((k, min(s, left), left < s + 1))
        left -= s + 1
    return out


def counts(runs: list[tuple[list[tuple[int, int]], int]], n: int, costs: tuple[float, float, float]) -> dict[str, Any]:
    """Facts of a row from (cycles, tokens emitted) of every sample; see above."""
    each = [judged(stood, emitted) for stood, emitted in runs]
    full = [s for one in each for k, s, cut in one[1:] if k == n and not cut]
    first = [one[0][1] for one in each if one and not one[0][2]]
    good = sum(s for one in each for _, s, _ in one)
    bad = sum(1 for one in each for k, s, cut in one if s < k and not cut)
    tokens, cycles = sum(e for _, e in runs), sum(len(one) for one in each)
    facts: dict[str, Any] = {"tokens": tokens, "cycles": cycles, "token_cycle": round(tokens / cycles, 2)}
    facts |= {"each": round(good / max(1, good + bad), 4)}
    if first:
        facts["first"] = round(statistics.fmean(first), 2)
    if full:
        reach = [sum(s >= j for s in full) / len(full) for j in range(1, n + 1)]
        facts |= {"accepted": round(statistics.fmean(full), 3), "full_cycles": len(full)}
        facts["stood"] = " ".join(f"{j}:{full.count(j)}" for j in range(n + 1))
        facts["reach"] = " ".join(f"{r:.3f}" for r in reach)
        best, gain = reckoned(reach, costs)
        facts |= {"best_8b": best, "at_8b": round(gain, 3)}
    return facts


def reckoned(reach: list[float], costs: tuple[float, float, float]) -> tuple[int, float]:
    """(drafts of a cycle, how many times as fast as dense steps) where that is most: a cycle of n drafts gives
    1 + reach[0] + ... + reach[n - 1] tokens. costs: of a draft, a verification, a dense step."""
    one, check, dense = costs
    gains = [dense * (1 + sum(reach[:n])) / (n * one + check) for n in range(1, len(reach) + 1)]
    return max(enumerate(gains, 1), key=lambda pair: pair[1])


# ---------------------------------------------------------------------- the run
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2", help="smollm2, needle, a .gguf file or a folder")
    parser.add_argument("--lengths", default="2048,4096,8192", help="tokens of prompt and answer, comma between them")
    parser.add_argument("--tasks", default=TASKS, help="comma between them")
    parser.add_argument("--drafters", default=";".join(DRAFTERS), help="recipes, semicolon between them")
    parser.add_argument("--drafts", default="8,4", help="of a cycle, comma between them")
    parser.add_argument("--shares", default="0.05,0.15", help="of the prompt that a draft reads, comma between them")
    parser.add_argument("--least", type=int, default=128, help="fewest tokens that a draft reads")
    parser.add_argument("--new", type=int, default=128, help="most new tokens of a sample")
    parser.add_argument("--samples", type=int, default=4, help="of a task and length")
    parser.add_argument(
        "--way", default="auto", help=f"auto (compiled on a GPU, plain elsewhere), {', '.join(step_run.WAYS)}"
    )
    parser.add_argument("--costs", default=COSTS, help="milliseconds of a draft, a verification, a dense step")
    parser.add_argument("--seconds", type=float, default=500, help="nothing further begins after these")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", metavar="FILE", help="JSON file to write; rows it holds are kept and not run again")
    args = parser.parse_args(argv)
    if args.new + 64 > step_run.ROOM:
        parser.error(f"--new: expected at most {step_run.ROOM - 64} tokens, got {args.new}")
    if args.way not in ("auto", *step_run.WAYS):
        parser.error(f"--way: expected auto or one of {', '.join(step_run.WAYS)}, got {args.way}")
    costs = tuple(float(ms) for ms in args.costs.split(","))
    if len(costs) != 3:
        parser.error(f"--costs: expected three numbers, got {args.costs}")
    with torch.no_grad():
        wrong = Run(args, costs).go()
    if wrong:
        sys.exit(f"{wrong} samples have other tokens than dense decoding, by more than rounding")


class Run:
    """All cells of one model. Rows go to the file as they come."""

    def __init__(self, args: argparse.Namespace, costs: tuple[float, float, float]):
        self.args, self.costs, self.until = args, costs, time.monotonic() + args.seconds
        self.net, self.tokenizer = load(args.model, device=args.device, dtype=args.dtype, say=print)
        ends, self.device = self.net.generation_config.eos_token_id, next(self.net.parameters()).device
        self.ends = list(ends) if isinstance(ends, (list, tuple)) else [] if ends is None else [ends]
        pad = self.ends[0] if self.ends else 0
        self.net.generation_config = GenerationConfig(do_sample=False, pad_token_id=pad)  # no penalties, no end of its own
        dtype = self.net.dtype
        self.slack = max(4 * torch.finfo(dtype).eps, 1e-4)  # of a logit's size
        self.facts = {"model": Path(args.model).name, "dtype": str(dtype).removeprefix("torch."), "new": args.new}
        self.facts |= {"samples": args.samples, "least": args.least, "costs": args.costs}
        self.rows: list[results.Row] = []
        if args.out and Path(args.out).exists():
            old = results.load(args.out)
            if old["bench"] != "accept" or old.get("facts") != self.facts:
                raise SystemExit(f"--out: {args.out} holds a run with other settings: {old.get('facts')}")
            self.rows = [results.Row(**row) for row in old["rows"]]
        self.way = args.way if args.way != "auto" else "compiled" if self.device.type == "cuda" else "plain"

    def over(self) -> bool:
        return time.monotonic() > self.until

    def has(self, case: str, impl: str) -> bool:
        return any((row.case, row.impl) == (case, impl) for row in self.rows)

    def add(self, row: results.Row) -> None:
        if not self.has(row.case, row.impl):
            self.rows.append(row)
        print(f"{row.case:32s} {row.impl:58s} {row.ms['median']:8.3f} ms  {row.params}", flush=True)
        if self.args.out:
            results.write(self.args.out, results.result("accept", self.rows, self.device, facts=self.facts))

    def go(self) -> int:
        """Run what is missing, as far as the time goes; the number of samples with wrong tokens, old rows included."""
        for length in (int(n) for n in self.args.lengths.split(",")):
            cells = list(self.cells(length))
            tasks = [
                t for t in self.args.tasks.split(",") if any(not self.has(f"{length} tokens, {t}", c[0]) for c in cells)
            ]
            if tasks and not self.over():
                self.length(length, cells, tasks)
                step_run.release()
        if self.over():
            print("the time is over; the rest is not measured", flush=True)
        return sum(row.params.get("wrong", 0) for row in self.rows)

    def cells(self, length: int) -> Any:
        """(name, recipe, drafts) of every drafter at a length, those of one recipe side by side."""
        asked = [text.strip() for text in self.args.drafters.split(";") if text.strip()]
        for text, share, n in itertools.product(asked, self.args.shares.split(","), self.args.drafts.split(",")):
            budget = max(self.args.least, round(float(share) * length))
            recipe = text.format(draft=n, share=share, least=self.args.least, budget=budget)
            yield f"{recipe}, {n} drafts", recipe, int(n)

    def length(self, length: int, cells: list[tuple[str, str, int]], tasks: list[str]) -> None:
        net, source, held = self.net, Source.of(), {}
        for task in tasks:
            try:
                made = prompts(task, self.tokenizer, length, self.args.new, self.args.samples, source)
            except ConfigError as err:  # too short for it: the others need not suffer
                print(f"# {length} tokens, {task} left out: {err}", flush=True)
                continue
            held[task] = [Sample(torch.tensor([ids], device=self.device), new) for ids, new in made]
            for sample in held[task]:
                read(net, sample)
        with foveate.use(net, "dense", **step_run.WAYS[self.way][1]) as handle:
            for task, samples in held.items():
                for sample in samples:
                    steps(net, handle, sample, self.ends)
                    step_run.release()
                ms = results.spread([statistics.median(s.ms) for s in samples])
                params = {"way": self.way, "samples": len(samples), "tokens": sum(len(s.dense) for s in samples)}
                self.add(results.Row(f"{length} tokens, {task}", "dense", params | self.notes(handle), ms))
        for name, recipe, n in cells:
            todo = {t: s for t, s in held.items() if not self.has(f"{length} tokens, {t}", name)}
            if todo and not self.over():  # a drafter of all tasks at once: it is compiled once
                self.drafter(length, name, recipe, n, todo)

    def notes(self, handle: Any) -> dict[str, str]:
        """Why something was not captured, if so."""
        said = [note for note in handle.notes if "not captured" in note or "not compiled" in note]
        return {"notes": "; ".join(said)} if said else {}

    def drafter(self, length: int, name: str, recipe: str, n: int, held: dict[str, list[Sample]]) -> None:
        way = self.way if stays(Recipe.of(recipe)) else "plain"
        dense = statistics.median(statistics.median(s.ms) for samples in held.values() for s in samples)
        found: dict[str, list[tuple[list[int], Watch]]] = {}
        with foveate.use(self.net, recipe, **step_run.WAYS[way][1]) as handle:
            clocks: list[Watch] = []
            if way != "plain":  # short answers end before their graphs are recorded
                one = next(iter(held.values()))[0]
                clocks.append(draft(self.net, handle, one, n, self.args.new, [])[1])
            for task, samples in held.items():
                found[task] = []
                for sample in samples:
                    step_run.release()
                    found[task].append(draft(self.net, handle, sample, n, sample.new, self.ends))
            notes: dict[str, Any] = self.notes(handle)
            if (graphs := handle.graphs) is not None:
                notes |= {"replays": graphs.replays, "verifications": graphs.calls.replays}
        clocks = clocks or [stats for runs in found.values() for _, stats in runs]
        cycle = statistics.median([t for clock in clocks for t in clock.ms(n)])
        for task, samples in held.items():
            runs, off = found[task], {}
            for i, (sample, (tokens, _)) in enumerate(zip(samples, runs, strict=True)):
                if tokens != sample.dense:
                    whole = len(tokens) == sample.new or tokens[-1] in self.ends
                    off[i] = gap(self.net, sample.ids, tokens) if whole else 1.0
            facts = {"recipe": recipe, "drafts": n, "way": way, "samples": len(samples)}
            facts |= counts([(stats.stood, len(tokens)) for tokens, stats in runs], n, self.costs)
            wrong = sum(share > self.slack for share in off.values())
            facts |= {"same": len(samples) - len(off), "ties": len(off) - wrong, "wrong": wrong}
            if off:
                facts["gap"] = round(max(off.values()), 5)
            ms = results.spread([cycle * stats.cycles / len(tokens) for tokens, stats in runs])
            facts |= {"cycle_ms": round(cycle, 3), "dense_ms": round(dense, 3)}
            if way == self.way:  # else the two ran differently
                facts["gain"] = round(dense / ms["median"], 3)
            self.add(results.Row(f"{length} tokens, {task}", name, facts | notes, ms))


if __name__ == "__main__":
    main()
