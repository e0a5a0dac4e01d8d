"""Break-even lengths: the crossing, the measurement, the table, the gate that uses it, and what is shown of it."""

from __future__ import annotations

import importlib.util
import json
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from typer.testing import CliRunner

import foveate
from foveate import cli, payoff, registry
from foveate.bench import breakeven, decode, results
from foveate.bench.breakeven import BreakEven, Shape, crossing
from foveate.bench.decode import Stage, Subject
from foveate.cache import LayerCache
from foveate.cache.fixed import FixedDense
from foveate.doctor import device_name
from foveate.errors import ConfigError
from foveate.kernels import reference
from foveate.kernels.base import Want
from foveate.kv import KV
from foveate.layout import Layout
from foveate.methods.base import Method
from foveate.methods.quest import Quest
from foveate.methods.token_select import TokenSelect
from foveate.recipe import Recipe
from foveate.report import bench_plots
from foveate.runtime import Info, Step, attention
from tests.drive import qkv
from tests.models import tiny, tokens
from tests.test_graphs import Dry, said

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
SMALL = Shape(4, 2, 32, torch.float32, 3)
WINDOW = "prefill=streaming_llm:sink=4,window=60"
QUEST = "quest:budget=32,dense_layers=1"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A cache folder and a packaged table of this test's own."""
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(payoff, "PACKAGED", tmp_path / "packaged.json")
    monkeypatch.setattr(breakeven, "LEAST", 0.0)
    payoff.pay_off.cache_clear()
    yield tmp_path
    payoff.pay_off.cache_clear()


def entry(length: int | None, **other):
    about = dict(shortest=64, longest=4096, shape="4/2 heads of 32, batch 1, float32", commit="abc", date="2026-01-01")
    return {"length": length, **about, **other}


def known(text: str, phase: str, length: int | None, device: str | None = None):
    return {device or device_name(CPU): {registry.parse(text).describe(): {phase: entry(length)}}}


def package(*tables):
    payoff.PACKAGED.write_text(payoff.dumped(payoff.merged(*tables)))
    payoff.pay_off.cache_clear()


def length(text: str, phase: str = "decode") -> int:
    return payoff.pay_off(registry.parse(text), phase, CPU).length


# ---------------------------------------------------------------------- the crossing
@pytest.mark.parametrize("true,power", [(3000, 0.5), (4096, 1.0), (30000, 0.1)])
def test_a_power_of_the_length_crosses_where_it_is_1(true, power):
    points = [(n, (n / true) ** power) for n in (1024, 2048, 4096, 8192, 16384, 32768)]
    assert crossing(points) in (true, true + 1)
    halves = [(n, s) for n, s in points if n in (1024, 32768)]  # a line in logarithms: two points say the same
    assert abs(crossing(halves) - true) <= 1


def test_the_last_crossing_counts_and_none_is_none():
    assert crossing([]) is None and crossing([(512, 0.9)]) is None and crossing([(512, 1.2)]) == 512
    assert crossing([(512, 1.2), (1024, 1.5)]) == 512
    assert crossing([(512, 1.2), (1024, 1.5), (2048, 1.0)]) is None  # as fast as dense is not faster
    got = crossing([(512, 1.3), (1024, 0.8), (2048, 1.25)])
    assert got == pytest.approx(1448, abs=1)  # 0.8 and 1.25 are as far from 1: half way in logarithms
    assert crossing([(512, 1.0), (1024, 2.0)]) == 512 and crossing([(512, 1.5), (1024, 1.0), (2048, 2.0)]) == 1024
    assert crossing([(512, 0.5), (1024, 1.5), (2048, 0.8), (4096, 1.25)]) == pytest.approx(2896, abs=1)


def test_a_break_even_says_what_was_measured():
    made = lambda *s: str(BreakEven("r", "m", "decode", dict(zip((512, 1024), s, strict=True))))  # noqa: E731
    assert made(0.5, 0.9) == "never faster up to 1,024" and made(1.1, 1.2) == "faster from 512 on, the shortest"
    assert made(0.5, 2.0) == "faster from 725 on"


# ---------------------------------------------------------------------- measuring
def test_a_run_measures_resumes_and_says_what_failed(tmp_path, monkeypatch):
    path, asked = tmp_path / "b.json", []
    options = dict(shape=SMALL, device="cpu", rounds=1, json=path)
    first = breakeven.run([WINDOW, QUEST], lengths=[64, 96], progress=lambda what, share: asked.append(what), **options)
    assert asked == [
        f"prefill, 96 tokens, {WINDOW}", f"decode, 96 tokens, {QUEST}", f"prefill, 64 tokens, {WINDOW}",
        f"decode, 64 tokens, {QUEST}",
    ]  # fmt: skip
    assert results.load(path) == first and first["bench"] == "breakeven" and first["notes"] == []
    by = {(r["params"]["phase"], r["params"]["n"]): r for r in first["rows"]}
    window, quest = by["prefill", 96], by["decode", 96]
    pairs = sum(min(i + 1, 60 + min(4, max(0, i - 59))) for i in range(96))
    assert window["density"] == pytest.approx(pairs / (96 * 97 / 2))
    assert quest["density"] == pytest.approx((1 + 2 * 32 / 96) / 3, abs=0.1)  # a dense layer of three
    for r in first["rows"]:
        p = r["params"]
        assert p["speedup"] == pytest.approx(p["dense_median"] / r["ms"]["median"], rel=1e-2)
        assert p["plan_ms"] + p["attend_ms"] == pytest.approx(r["ms"]["median"], abs=1e-3) and p["plan_ms"] >= 0
        assert (p["h"], p["g"], p["d"], p["layers"], p["b"]) == (4, 2, 32, 3, 1)

    asked.clear()
    more = breakeven.run(
        [WINDOW, QUEST, "lserve"], lengths=[64, 96], phases=["decode"], progress=lambda what, share: asked.append(what),
        **options,
    )  # fmt: skip
    assert asked == [f"decode, {n} tokens, lserve" for n in (96, 64)]  # it has no gates, which is its own trouble
    assert more["rows"] == first["rows"] and len(more["notes"]) == 2 and "sparsity=0.5 needs gates" in more["notes"][0]

    monkeypatch.setattr(breakeven.time, "monotonic", iter(range(0, 10**6, 100)).__next__)
    late = breakeven.run([WINDOW], lengths=[128], seconds=50, **options)
    assert late["rows"] == first["rows"] and late["notes"] == ["1 measurements were not made: the 50 s were over"]


def test_an_interruption_leaves_what_was_measured(tmp_path):
    path = tmp_path / "b.json"

    def stop(what, share):
        if share > 0.4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        breakeven.run([WINDOW], lengths=[64, 96], shape=SMALL, device="cpu", rounds=1, json=path, progress=stop)
    assert [r["params"]["n"] for r in results.load(path)["rows"]] == [96]
    with pytest.raises(ConfigError, match=r"has shape .*'layers': 3.*expected .*'layers': 4"):
        breakeven.run([WINDOW], shape=Shape(4, 2, 32, torch.float32, 4), device="cpu", json=path)
    results.write(path, results.load(path) | {"device": "another"})
    with pytest.raises(ConfigError, match="has device another, expected CPU"):
        breakeven.run([WINDOW], shape=SMALL, device="cpu", json=path)


@dataclass(frozen=True)
class Slow(Method):
    """Takes its time to plan nothing in particular."""

    id = "slow"
    roles = ("prefill", "decode")

    def plan(self, x, state):
        time.sleep(0.03)
        return Layout.static(x.shape, window=8, block_q=1 if x.phase == "decode" else 64, device=x.device)


def test_time_is_put_where_it_is_spent():
    two = Shape(4, 2, 32, torch.float32, 2)
    with torch.inference_mode():
        problem = breakeven.Problem.make(64, 4, 2, 32, torch.float32, CPU)
        prefill = breakeven.prefill_row("slow", Slow(), problem, SMALL, 3)
        per_layer = breakeven.decode_row("slow", Slow(), Stage(64, 4, 2, 32, torch.float32, 2, CPU), two, 1)
    assert prefill.params["plan_ms"] >= 30 and min(prefill.ms["min"], per_layer.ms["min"]) >= 30
    assert per_layer.params["graph"] == 0 and prefill.params["dense"] in ("dense, SDPA", "dense, ours")


def test_a_policy_that_decodes_is_measured_over_caches_it_has_cut(monkeypatch):
    """Only where the recipe names it as the policy, too; what it drops between steps is part of a step."""
    seen = []
    made = Stage.subject
    monkeypatch.setattr(Stage, "subject", lambda stage, recipe: seen.append(recipe) or made(stage, recipe))
    text = "duo_attention:sink=4,window=20"
    options = dict(lengths=[96], shape=SMALL, phases=["decode"], device="cpu", rounds=1)
    for recipe, cuts in ((f"decode={text}+cache={text}", True), (f"decode={text}", False), (f"{QUEST}+cache={text}", False)):
        data = breakeven.run([recipe], **options)
        assert not data["notes"] and (seen[-1].cache is not None) == cuts and seen[-1].decode is not None
        assert "drop_ms" not in data["rows"][0]["params"]  # nothing is captured here: drops happen in the steps themselves
    assert seen[0].cache == seen[0].decode and seen[0].cache.profile  # the same made gates

    monkeypatch.setattr(Subject, "dropping", lambda self: (16, 48.0))
    monkeypatch.setattr(breakeven, "alternate", lambda calls, *a: {name: [24.0] for name in calls})
    method = registry.parse(f"{text},sparsity=1")
    with torch.inference_mode():
        row = breakeven.decode_row("d", method, Stage(64, 4, 2, 32, torch.float32, 3, CPU), SMALL, 1, cuts=True)
    assert row.params["drop_ms"] == 16.0 and row.params["drop_every"] == 16
    assert row.ms["median"] == pytest.approx(1 + 15 / 16)  # a step of a layer takes 1 ms, one in 16 takes 16


def test_decode_figures_are_those_of_one_layer_in_one_step(monkeypatch):
    ms = {"dense, ours": [64.0, 64.0], "whole": [32.0, 48.0], "attend": [1.0, 1.0]}  # 8 steps, or one, of 4 layers
    monkeypatch.setattr(breakeven, "alternate", lambda calls, *a: {name: ms[name] for name in calls})
    with torch.inference_mode():
        method, stage = registry.parse("quest:budget=32"), Stage(64, 4, 2, 32, torch.float32, 4, CPU)
        row = breakeven.decode_row("q", method, stage, Shape(4, 2, 32, torch.float32, 4), 2)
    p = row.params
    assert row.ms == {"median": 1.25, "min": 1.0, "max": 1.5} and (p["dense_median"], p["speedup"]) == (2.0, 1.6)
    assert (p["plan_ms"], p["attend_ms"]) == (1.0, 0.25)


def test_the_faster_dense_is_the_one_to_beat():
    ms = {"dense, a": [6.0, 5.0], "dense, b": [4.0, 4.0], "whole": [2.0, 2.0], "plan": [0.5, 0.5]}
    row = breakeven._row("prefill", "r", Slow(), 64, SMALL, ms, ["dense, a", "dense, b"], 0.5, ms["plan"])
    p = row.params
    assert (p["dense"], p["dense_median"], p["speedup"], p["plan_ms"], p["attend_ms"]) == ("dense, b", 4.0, 2.0, 0.5, 1.5)


@pytest.mark.parametrize(
    "recipes,options,why",
    [
        (["snapkv"], {}, "'snapkv' has no method for prefill or decode"),
        (["dense"], {}, "no method for prefill or decode"),
        ([WINDOW], dict(lengths=[1]), "lengths: expected at least 2 tokens, got 1"),
        ([WINDOW], dict(phases=["training"]), "phases: expected prefill or decode, got 'training'"),
        (["quezt"], {}, "unknown id 'quezt'"),
    ],
)
def test_what_cannot_be_measured_is_refused(recipes, options, why):
    with pytest.raises(ConfigError, match=why):
        breakeven.run(recipes, device="cpu", shape=SMALL, **options)


# ---------------------------------------------------------------------- decode steps
class Graph:
    """Stands for a graph of the device: a capture runs nothing but the host's part, a replay runs it."""

    made: ClassVar[list[Graph]] = []

    def __init__(self, call):
        self.call, self.count = call, 0
        Graph.made.append(self)

    def replay(self):
        self.count += 1
        self.call()


@pytest.mark.parametrize("text,phases", [("dense", 1), (QUEST, 1), ("decode=lserve:assign=even,budget=192,refresh=4", 2)])
def test_captured_steps_are_recorded_once_a_phase_and_count(text, phases, monkeypatch):
    Graph.made = []
    monkeypatch.setattr(decode, "DEVICES", ("cpu",))
    monkeypatch.setattr(decode, "_record", Graph)
    stage = Stage(300, 4, 2, 32, torch.float32, 3, CPU)
    counted = []
    monkeypatch.setattr(FixedDense, "replayed", lambda store, n=1: counted.append(1))  # the host's part, done by `call` here
    with torch.inference_mode():
        subject = Subject(stage, Recipe(decode=Recipe.of(text).decode))
        assert subject.captured and len(subject.graphs) == phases
        before = sum(g.count for g in subject.graphs.values())
        subject.cycle()
    assert sum(g.count for g in subject.graphs.values()) == before + stage.CYCLE
    if phases == 2:
        select, reuse = (subject.graphs[p].count for p in ("select", "reuse"))
        assert 2 * select < reuse  # one step in four selects
    assert len(Graph.made) == phases + 1  # and one of attention alone


def test_dense_steps_begin_at_the_end_of_the_context_again():
    with torch.inference_mode():
        stage = Stage(64, 4, 2, 32, torch.float32, 2, CPU)
        dense = stage.dense()
        room = dense.left
        dense.cycle()
        assert dense.left == room - 1 and stage.dense() is dense
        assert dense.left == decode.ROOM // stage.CYCLE and dense.caches[0].store.lens == [[64, 64]]
        seen = decode.Plans()
        dense._step(seen)
    assert [x.kv.capacity for x, _ in seen.calls] == [65, 65] and [x.layer for x, _ in seen.calls] == [0, 1]
    assert torch.equal(seen.calls[1][0].kv.k, stage.k[1][:, :, :65])  # each layer reads its own
    assert torch.equal(stage.k[1][:, :, 64:65], stage.new[1])


# ---------------------------------------------------------------------- the table
def test_exact_counts_before_defaults_before_the_own_rule():
    assert length("quest:budget=512") == 512  # nothing measured: the method's own rule
    why = payoff.pay_off(registry.parse("quest:budget=512"), "decode", CPU).why
    assert why == f"its own rule, as nothing like it was measured on {device_name(CPU)}"
    package(known("quest", "decode", 3000), known("quest:share=group", "decode", 2000))
    assert length("quest") == 3000 and length("quest:share=group") == 2000
    assert length("quest:dense_layers=0") == 3000  # the same budget as the defaults
    assert length("quest:budget=512") == 512 and length("quest", "prefill") == registry.parse("quest").min_length
    says = lambda text: str(payoff.pay_off(registry.parse(text), "decode", CPU))  # noqa: E731
    where = f"measured on {device_name(CPU)}"
    assert says("quest") == f"dense below 3,000 tokens: {where}, 4/2 heads of 32, batch 1, float32"
    assert f": {where} at its default settings, 4/2" in says("quest:dense_layers=0")
    package(known("quest", "decode", 3000, "another device"))
    assert length("quest") == registry.parse("quest").min_length


def test_a_method_whose_steps_are_captured_says_nothing_of_one_whose_steps_are_not(monkeypatch):
    package(known("token_select", "decode", 99_000))
    assert length("token_select:chunk=256") == length("token_select:theta=0.9") == 99_000
    monkeypatch.setattr(TokenSelect, "phase", lambda self, step: None if self.theta is not None else "step")
    rule = registry.parse("token_select").min_length
    assert length("token_select:theta=0.8") == rule != 99_000 == length("token_select:chunk=128")


def test_never_faster_means_dense_as_far_as_was_measured():
    package(known("quest", "decode", None))
    found = payoff.pay_off(registry.parse("quest"), "decode", CPU)
    assert found.length == 4097 and found.why.startswith("never faster up to 4,096, measured on ")  # that one included


def test_what_was_measured_here_is_heard_first():
    package(known("quest", "decode", 3000), known("quest:share=group", "decode", 2000))
    assert length("quest") == 3000
    path = payoff.remember(known("quest", "decode", 700))
    assert path == payoff.own_file() and length("quest") == 700 and length("quest:share=group") == 2000
    payoff.remember(known("quest", "decode", 800))
    payoff.remember(known("minference", "prefill", 900))
    assert length("quest") == 800 and length("minference", "prefill") == 900


def test_what_was_measured_here_counts_before_what_another_version_wrote():
    package({device_name(CPU): {"quest": {"decode": entry(3000)}}})  # as if made before quest had options
    assert length("quest") == 3000
    payoff.remember(known("quest", "decode", 700))
    assert length("quest") == 700


def test_other_files_are_refused_and_old_options_are_not_heard():
    package({device_name(CPU): {"quest:gone=1": {"decode": entry(5)}, "nobody": {"decode": entry(6)}}})
    assert length("quest") == registry.parse("quest").min_length
    for text in (
        "{",
        "[]",
        '{"cpu": {"quest": {"decode": {"length": "a", "longest": 1, "shape": ""}}}}',
        '{"a": {"b": {"c": {}}}}',
    ):
        payoff.own_file().parent.mkdir(exist_ok=True)
        payoff.own_file().write_text(text)
        payoff.pay_off.cache_clear()
        with pytest.raises(ConfigError, match=r"is no table of break-even lengths .*delete it and run"):
            length("quest")


def test_the_packaged_table_is_one(monkeypatch):
    monkeypatch.undo()
    for methods in payoff.read(payoff.PACKAGED).values():
        for text, phases in methods.items():
            assert registry.parse(text).describe() == text and set(phases) <= set(breakeven.PHASES)


# ---------------------------------------------------------------------- the gate
def gated(text: str, n: int, gate: bool, decode: bool):
    """(output of the last call, its notes, queries and all keys): n tokens and, if asked, one more."""
    q, k, v = qkv(1, 4, 2, n + 1, 32)
    cache, step = LayerCache(), Step(gate=gate)
    recipe, info = Recipe.of(text), Info(2, 4, 32**-0.5)
    with torch.no_grad():
        out = attention(recipe, cache, q[:, :, :n], k[:, :, :n], v[:, :, :n], step, info)
        if decode:
            out = attention(recipe, cache, q[:, :, n:], k[:, :, n:], v[:, :, n:], step, info)
    m = n + decode
    last = q[:, :, n:m] if decode else q[:, :, :n]
    dense = reference.forward(
        last,
        KV.dense(k[:, :, :m], v[:, :, :m]),
        Layout.dense(1, 4, last.shape[2], m),
        scale=32**-0.5,
        softcap=0.0,
        want=Want(),
    )[0]
    return out, list(step.notes), dense


@pytest.mark.parametrize("text,phase", [(WINDOW, "prefill"), ("quest:budget=32,dense_layers=0", "decode")])
def test_the_gate_runs_dense_below_the_measured_length(text, phase):
    decode = phase == "decode"
    method = getattr(Recipe.of(text), phase)
    package({device_name(CPU): {method.describe(): {phase: entry(120)}}})
    out, notes, dense = gated(text, 100, True, decode)
    assert torch.allclose(out, dense, atol=1e-5)
    assert notes == [
        f"{method.id}: dense below 120 tokens: measured on {device_name(CPU)}, 4/2 heads of 32, batch 1, float32"
    ]
    for n, gate in ((100, False), (120, True)):  # without the gate; at its length
        out, notes, dense = gated(text, n, gate, decode)
        assert not torch.allclose(out, dense, atol=1e-3) and notes == []


def test_gates_of_captured_steps_go_by_the_length_of_the_step():
    """A fixed store has room for far more than the gate: steps below it are dense, those from it on are not, by graphs."""
    text = "quest:page=4,budget=16,dense_layers=0"
    package(known(text, "decode", 70))
    model, ids = tiny(), tokens(1, 60)

    def told(captured):
        calls, recorded, handle = [], [], foveate.apply(model, text, gate=True)
        if captured:
            handle.graphs = Dry(handle)
            record = handle.graphs.record
            handle.graphs.record = lambda *a: recorded.append(1) or record(*a)
            handle.graphs.install()
        plan = Quest.plan
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Quest, "plan", lambda self, x, s: calls.append((x.stored, x.kv.capacity)) or plan(self, x, s))
            out = said(model, ids, steps=24)
        if captured:
            assert handle.graphs.replays >= 18 and len(recorded) == 2  # each side of the gate ran once as it is
        handle.remove()
        return out, calls

    (want, plain), (got, fixed) = told(False), told(True)
    assert torch.equal(got, want) and plain and plain[0] == (70, 70)
    assert fixed[0][0] == 70 and fixed[0][1] > 70  # by capacity the gate would have let every step through
    assert {n for n, _ in fixed} == {n for n, _ in plain} == set(range(70, 84))


def test_a_measured_length_shorter_than_the_own_rule_counts():
    text = "minference:pattern=a_shape,init=4,recent=20"
    assert registry.parse(text).min_length == 169
    out, notes, dense = gated(text, 160, True, False)
    assert torch.allclose(out, dense, atol=1e-5) and "dense below 169 tokens: its own rule" in notes[0]
    package(known(text, "prefill", 150))
    out, notes, dense = gated(text, 160, True, False)
    assert not torch.allclose(out, dense, atol=1e-3) and notes == []


# ---------------------------------------------------------------------- what is shown
def made(speeds: dict[tuple[str, str], list[float]], lengths=(2048, 4096, 8192)) -> dict:
    rows = []
    for (phase, text), values in speeds.items():
        for n, s in zip(lengths, values, strict=True):
            method = getattr(Recipe.of(text), phase)
            ms = {"dense, ours": [n / 1000], "whole": [n / 1000 / s]}
            row = breakeven._row(phase, text, method, n, Shape(), ms, ["dense, ours"], 0.5, [n / 4000 / s])
            rows.append(row)
    return results.result("breakeven", rows, "cpu", notes=[], shape=Shape().facts())


def test_a_result_becomes_a_table_a_page_and_a_drawing(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("render", ROOT / "scripts" / "render.py")
    render = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(render)
    monkeypatch.setattr(render, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(render, "FIGURES", tmp_path / "figures")
    old = made({("prefill", "flexprefill"): [0.25, 0.5, 0.9], ("decode", "quest:share=group"): [0.5, 0.7, 0.9]})
    new = made({("decode", "quest:share=group"): [0.5, 1.0, 2.0]})
    results.write(tmp_path / "results" / "a.json", old | {"date": "2026-01-02"})
    results.write(tmp_path / "results" / "b.json", new | {"date": "2026-01-03"})
    pages = render.render()
    table = json.loads(pages[render.LENGTHS])[old["device"]]
    flex, quest = table[registry.parse("flexprefill").describe()], table[registry.parse("quest:share=group").describe()]
    assert flex["prefill"]["length"] is None and flex["prefill"]["longest"] == 8192
    assert quest["decode"]["length"] == 4096 and quest["decode"]["date"] == "2026-01-03"  # the newer one
    page = pages[ROOT / "BENCHMARKS.md"]
    assert "| `quest:share=group` | faster from 4,096 on | 0.50 | 1.00 | 2.00 |" in page
    assert "| `flexprefill` | never faster up to 8,192 | 0.25 | 0.50 | 0.90 |" in page
    assert "](benchmarks/figures/a.svg)" in page and "from 4,096" in pages[tmp_path / "figures" / "b.svg"]
    assert "never up to here" in pages[tmp_path / "figures" / "a.svg"]


def test_only_steps_can_be_uncaptured():
    data = made({("prefill", "hip"): [0.5, 1.0, 2.0], ("decode", "hip"): [0.5, 0.7, 0.9]}) | {"device": "NVIDIA H100"}
    for row in data["rows"]:
        if row["params"]["phase"] == "decode":
            row["params"]["graph"] = 0
    prefill, decode = breakeven.markdown(data).split("\n\n")
    assert "| `hip` | faster from" in prefill and "| `hip`, not captured | never faster" in decode


def test_a_drawing_marks_break_evens_and_stacks_the_time():
    data = made({("decode", "quest"): [0.5, 1.0, 2.0], ("decode", "adamas"): [0.1, 0.2, 0.4]})
    speeds, times = bench_plots._breakeven(data["rows"]).axes
    rings = [line for line in speeds.lines if line.get_markerfacecolor() == "none"]
    assert [tuple(float(x) for x in line.get_xydata()[0]) for line in rings] == [(4096.0, 1.0)]
    bars = [(p.get_x(), p.get_width()) for p in times.patches]
    assert [w for _, w in bars[:2]] == pytest.approx([0.25 / 2, 0.25 / 0.4])  # estimate, of dense's time
    assert bars[2] == pytest.approx((0.125, 0.375)) and sum(bars[3]) == pytest.approx(2.5)
    assert [t.get_text() for t in times.texts] == ["0.50", "2.50"]


def test_prefill_results_are_drawn_with_where_the_time_goes():
    data = json.loads((ROOT / "benchmarks" / "results" / "h100_prefill.json").read_text())
    figure = bench_plots._prefill(data["rows"])
    assert [a.get_title("left") for a in figure.axes] == ["32768 tokens", "131072 tokens"]
    for axis, n in zip(figure.axes, (32768, 131072), strict=True):
        mine = [r for r in data["rows"] if r["params"]["n"] == n and "plan_ms" in r["params"]]
        assert len(axis.patches) == 2 * len(mine)
        sums = [float(t.get_text()) for t in axis.texts]
        assert all(a <= b for a, b in pairwise(sums)) and len(sums) == len(mine)
    assert bench_plots.drawing("cpu_prefill", {"bench": "prefill attention", "rows": []}) is None


# ---------------------------------------------------------------------- the command
def call(*args: str):
    return CliRunner().invoke(cli.app, ["bench", "breakeven", *args])


def test_the_command_measures_keeps_and_goes_on(tmp_path):
    path = tmp_path / "b.json"
    small = ["--heads", "4,2", "--dim", "32", "--layers", "2", "--dtype", "fp32", "--device", "cpu", "--rounds", "1"]
    got = call("--recipes", QUEST, "--lengths", "64,96", "--json", str(path), *small)
    assert got.exit_code == 0, got.output
    assert QUEST in got.stdout and "64: " in got.stdout and str(payoff.own_file()) in got.stderr.replace("\n", "")
    data = results.load(path)
    assert [r["params"]["n"] for r in data["rows"]] == [96, 64]
    found = payoff.read(payoff.own_file())[device_name(CPU)][registry.parse(QUEST).describe()]["decode"]
    assert found["length"] == crossing(sorted((r["params"]["n"], r["params"]["speedup"]) for r in data["rows"]))
    assert (found["shortest"], found["longest"], found["shape"]) == (64, 96, "4/2 heads of 32, batch 1, float32")

    payoff.own_file().unlink()
    again = call("--recipes", QUEST, "--lengths", "64,96", "--json", str(path), "--no-keep", *small)
    assert again.exit_code == 0 and results.load(path)["rows"] == data["rows"] and not payoff.own_file().exists()
    printed = call("--recipes", QUEST, "--lengths", "64", "--json", "-", "--no-keep", *small)
    assert json.loads(printed.stdout)["bench"] == "breakeven"


@pytest.mark.parametrize(
    "args,why",
    [
        (["--heads", "32"], "heads: expected query heads and kv heads such as 32,8, got '32'"),
        (["--heads", "3,2"], "heads: expected query heads that are a multiple of the kv heads"),
        (["--recipes", "snapkv"], "'snapkv' has no method"),
        (["--lengths", "4k"], "lengths: expected whole numbers"),
        (["--phases", "both"], "phases: expected prefill or decode, got 'both'"),
    ],
)
def test_bad_arguments_are_one_line(args, why):
    got = call(*args, "--dtype", "fp32", "--device", "cpu")
    lines = [line for line in got.stderr.splitlines() if line.strip()]
    assert got.exit_code == 2 and len(lines) == 1 and lines[0].startswith("foveate: ") and why in lines[0]
