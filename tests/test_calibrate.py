"""Calibration: what is captured, how a knob is bisected, how a run stops and goes on, what is written, what is refused."""

from __future__ import annotations

import gc
import json
import weakref
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from typer.testing import CliRunner

import foveate
from foveate import calibrate, cli, models, registry
from foveate.calibrate import capture, duo
from foveate.calibrate.cli import numbers
from foveate.calibrate.generic import Bisect, Judge, judge
from foveate.errors import ConfigError
from foveate.evals.task import rng_of
from foveate.evals.text import Source
from foveate.kernels.dispatch import attend
from foveate.layout import Layout
from foveate.methods.base import AttnInput, Method, State, option
from foveate.methods.search import Knob, Target
from foveate.profile import load
from foveate.recipe import Recipe
from tests.models import tiny, tokens
from tests.prompts import call, prompt
from tests.tiny import save_model


@dataclass(frozen=True)
class Near(Method):
    """A window: more of it keeps more, which any slow search can check."""

    window: int = option(1, low=1)

    id: ClassVar[str] = "near"
    roles: ClassVar[tuple[str, ...]] = ("prefill",)
    source: ClassVar[str] = "tests"
    knob: ClassVar[Knob | None] = Knob("window", 1, 200, log=True, whole=True)

    def plan(self, x: AttnInput, state: State) -> Layout:
        return Layout.static(x.shape, sink=1, window=self.window, q_offset=x.offset(128), device=x.device)


@dataclass(frozen=True)
class Far(Near):
    """The same, with less kept for larger values, on a linear scale."""

    id: ClassVar[str] = "far"
    knob: ClassVar[Knob | None] = Knob("window", 1, 200, more=False)
    window: float = option(1.0, low=1)

    def plan(self, x: AttnInput, state: State) -> Layout:
        return Layout.static(x.shape, sink=1, window=201 - int(self.window), device=x.device)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def small(folder):
    return models.load(folder, device="cpu", dtype="fp32")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(" ".join(f"line {i} of {i * i % 97} words, {'abcdefgh'[i % 8] * (i % 5)}." for i in range(120)))
    return path


@dataclass(frozen=True)
class Picky(Near):
    """It only knows one kind of target."""

    id: ClassVar[str] = "picky"

    def search(self, target):
        raise ConfigError(f"target: picky expects density=..., got {target}")


@pytest.fixture
def near(monkeypatch):
    monkeypatch.setitem(registry.METHODS, "near", "tests.test_calibrate:Near")


def shown(shape="peaked", m=200, layer=0, layers=1):
    q, k, v = (t.float() for t in prompt(shape, m=m))
    return call(q, k, v, layer=layer, layers=layers)


# ---------------------------------------------------------------------- capture
def test_every_layer_in_order_and_only_one_at_a_time():
    model, ids = tiny("llama"), tokens(1, 60)
    seen, alive = [], []

    def take(x, out):
        gc.collect()
        alive.append(sum(ref() is not None for ref in refs))
        refs.append(weakref.ref(x.kv.k))
        seen.append((x.layer, x.start, x.q.shape, x.kv.capacity, x.rope is not None))
        torch.testing.assert_close(out, attend(x.q, x.kv, None, scale=x.scale))

    refs: list = []
    capture.each_layer(model, ids, take)
    assert seen == [(i, 0, (1, 4, 60, 16), 60, True) for i in range(3)]
    assert max(alive) == 0
    foveate.apply(model, "dense").remove()  # nothing was left on the model


def test_chosen_layers_end_the_forward_early():
    model = tiny("llama")
    ran = []
    model.model.layers[2].register_forward_hook(lambda *a: ran.append(2))
    seen = []
    capture.each_layer(model, tokens(1, 20), lambda x, out: seen.append(x.layer), layers=[1])
    assert seen == [1] and not ran


def test_layers_with_a_window_of_the_model_are_left_out():
    seen = []
    capture.each_layer(tiny("gemma3_text"), tokens(1, 40), lambda x, out: seen.append(x.layer))
    assert seen == [1, 3]


@dataclass(frozen=True)
class Push(Method):
    """Dense attention whose output in one layer is moved by a given tensor, `by[0]`."""

    at: int = 0
    by: object = None

    id: ClassVar[str] = "push"
    roles: ClassVar[tuple[str, ...]] = ("prefill",)

    def attend(self, x, plan, state):
        out = attend(x.q, x.kv, plan, scale=x.scale, softcap=x.softcap)
        return out + self.by[0] if x.layer == self.at else out, None, None


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_gradients_are_those_of_the_models_own_loss(family):
    model, ids = tiny(family), tokens(1, 24)
    got = {}
    capture.each_gradient(model, ids, lambda x, out, grad: got.update({x.layer: (out, grad)}))
    assert list(got) == ([0, 1, 2] if family == "llama" else [1])  # gemma2's first layer has a window
    for layer, (out, grad) in got.items():
        move = torch.zeros_like(out).requires_grad_()
        with foveate.use(model, Recipe(prefill=Push(at=layer, by=[move]))):
            loss = model(ids, labels=ids, use_cache=False).loss
        (want,) = torch.autograd.grad(loss, move)
        assert float(want.abs().max()) > 1e-4
        torch.testing.assert_close(grad, want, atol=1e-7, rtol=1e-4)


def test_the_model_comes_back_as_it_was():
    model = tiny("llama").bfloat16()
    model.lm_head.weight.requires_grad_(False)
    before = {n: (p.clone(), p.requires_grad) for n, p in model.named_parameters()}
    capture.each_gradient(model, tokens(1, 20), lambda x, out, grad: None)
    for name, p in model.named_parameters():
        want, wanted = before[name]
        assert p.dtype == torch.bfloat16 and torch.equal(p, want) and p.requires_grad == wanted and p.grad is None


# ---------------------------------------------------------------------- prompts
def test_prompts_of_files_are_disjoint_and_seeded(small, text):
    tokenizer = small[1]
    one = capture.prompts(tokenizer, [text], 150, 8, 0)
    assert all(ids.shape == (1, 150) for ids in one)
    whole = tokenizer(text.read_text())["input_ids"]
    starts = sorted(next(i for i in range(len(whole)) if whole[i : i + 150] == ids[0].tolist()) for ids in one)
    assert all(b - a >= 150 for a, b in zip(starts, starts[1:], strict=False))
    same, other = (capture.prompts(tokenizer, [text], 150, 8, seed) for seed in (0, 1))
    assert capture.digest(same) == capture.digest(one) != capture.digest(other)


def test_the_built_in_mix(small):
    made = capture.prompts(small[1], [], 600, 4, 0)
    told = [small[1].decode(ids[0]) for ids in made]
    assert made[0].shape == made[3].shape == (1, 600) and all(590 - 60 < ids.shape[1] <= 600 for ids in made)
    assert "value" in told[1].replace(" ", "").lower() and not torch.equal(made[0], made[3])


def test_bad_data(small, tmp_path):
    tokenizer = small[1]
    short = tmp_path / "short.txt"
    short.write_text("just a few words")
    with pytest.raises(ConfigError, match="2 prompts of 100 tokens need 200 tokens of text, got 16; give more text"):
        capture.prompts(tokenizer, [short], 100, 2, 0)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        capture.prompts(tokenizer, [tmp_path / "latin.txt"], 100, 2, 0)
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ConfigError, match="holds no words"):
        capture.prompts(tokenizer, [tmp_path / "empty.txt"], 100, 2, 0)


# ---------------------------------------------------------------------- one plan against dense
def test_judge_is_two_calls_of_attend():
    x = shown()
    got = judge(Near(window=30), x)
    layout = Near(window=30).plan(x, State())
    rows = Judge(x).calls[0][1].rows
    out, lse = attend(x.q, x.kv, layout, scale=x.scale, return_lse=True)
    full, all_lse = attend(x.q, x.kv, None, scale=x.scale, return_lse=True)
    assert got.recall == pytest.approx(float((lse - all_lse).exp()[0][:, rows].mean()), rel=1e-4)
    wrong = (out - full)[0][:, rows].abs().sum((1, 2)) / full[0][:, rows].abs().sum((1, 2))
    assert got.loss == pytest.approx(float(wrong.mean()), rel=1e-3)
    assert got.density == pytest.approx(layout.density()) and got.computed == pytest.approx(layout.density_computed())


@dataclass(frozen=True)
class Own(Near):
    """A method with arithmetic of its own: what `Near` gives, as an attend."""

    def attend(self, x, plan, state):
        return (*attend(x.q, x.kv, plan, scale=x.scale, return_lse=True), None)


def test_methods_with_their_own_arithmetic_are_run():
    x = replace(shown(m=50))
    one, two = judge(Own(window=9), x), judge(Near(window=9), x)  # 50 rows: all are looked at
    assert one.recall == pytest.approx(two.recall, rel=1e-4) and one.loss == pytest.approx(two.loss, rel=1e-3)
    assert judge(Own(window=50), x).recall == pytest.approx(1.0)


def test_decode_methods_are_judged_on_steps():
    x = shown(m=400, layer=5, layers=8)
    some, every = (judge(registry.parse(f"quest:budget={n}"), x) for n in (32, 512))
    assert every.recall == pytest.approx(1.0, abs=1e-5) and some.recall < 0.9
    with pytest.raises(ConfigError, match="snapkv: the generic search judges plans of prefill and decode"):
        judge(registry.parse("snapkv"), x)


# ---------------------------------------------------------------------- bisection
def searched(method, target, inputs, stop: int = 99):
    search = Bisect(method, Target.parse(target))
    for done in range(search.passes):
        if done == stop:
            state, search = search.state(), Bisect(method, Target.parse(target))
            search.resume(state)
        for x in inputs:
            search.see(x, None, None)
        search.end_pass()
    return search.finish()


@pytest.fixture(scope="module")
def scan():
    """(inputs, figures of every window 1..120, mean over the inputs)."""
    inputs = [shown(shape, 120, layer, 2) for layer, shape in enumerate(("random", "diagonal"))]
    found = {}
    for window in range(1, 121):
        got = [judge(Near(window=window), x) for x in inputs]
        found[window] = {n: sum(getattr(f, n) for f in got) / 2 for n in ("recall", "loss", "computed")}
    return inputs, found


def best(target, found):
    """The cheapest window that holds (recall, loss), or the richest (density)."""
    kind, value = target.kind, target.value
    holds = {"recall": lambda f: f["recall"] >= value, "loss": lambda f: f["loss"] <= value}
    good = [w for w, f in found.items() if holds.get(kind, lambda f: f["computed"] <= value)(f)]
    return max(good) if kind == "density" else min(good)


@pytest.mark.parametrize("target", ["recall=0.9", "loss=30%", "density=0.3"])
def test_bisection_finds_what_a_scan_finds(target, scan):
    inputs, figures = scan
    found = searched(Near(), target, inputs)
    want = best(Target.parse(target), figures)
    assert found.report["holds"] and abs(found.options["window"] - want) <= max(1, 0.02 * want)
    assert isinstance(found.options["window"], int)


def test_less_is_more_and_linear(scan):
    inputs, figures = scan
    found = searched(Far(), "recall=0.9", inputs)
    assert abs(201 - int(found.options["window"]) - best(Target("recall", 0.9), figures)) <= 1


def test_a_target_out_of_reach_says_so():
    found = searched(Near(), "density=0.001", [shown(m=120)])
    assert found.options == {"window": 1} and not found.report["holds"]
    found = searched(Near(), "recall=0.0001", [shown(m=120)])
    assert found.options == {"window": 1} and found.report["holds"]


@pytest.mark.parametrize("stop", [1, 2])
def test_a_resumed_bisection_equals_the_whole(stop):
    inputs = [shown("diagonal", 150)]
    assert searched(Near(), "recall=0.9", inputs, stop) == searched(Near(), "recall=0.9", inputs)


def test_layers_of_one_forward_share_a_step_and_prompts_do_not():
    met = []

    @dataclass(frozen=True)
    class Shares(Near):
        def plan(self, x, state):
            met.append((self.window, x.layer, state.step.get("from")))
            state.step.setdefault("from", x.layer)
            return super().plan(x, state)

    search = Bisect(Shares(), Target())
    for layer in (0, 1, 0, 1):
        search.see(shown(m=40, layer=layer, layers=2), None, None)
    assert [m[1:] for m in met if m[0] == 200] == [(0, None), (1, 0), (0, None), (1, 0)]


# ---------------------------------------------------------------------- the loop
class StopError(Exception):
    pass


def stopper(after: int):
    calls = [0]

    def tick(what, share):
        calls[0] += 1
        if calls[0] > after:
            raise StopError

    return tick


def go(small, out, text, method="near", progress=None, **options):
    defaults = dict(target="recall=0.9", length=140, samples=2, held=1, data=[text], name="tiny")
    return calibrate.run(*small, method, out=out, progress=progress, **(defaults | options))


def test_a_whole_run(small, text, tmp_path, near):
    ticks = []
    found = go(small, tmp_path / "p", text, progress=lambda what, share: ticks.append(share))
    assert found.method == "near" and set(found.options) == {"window"} and found.model == "tiny"
    assert found.target == "recall=0.9" and found.fingerprint and found.data and found.date and found.seed == 0
    report = found.report
    assert report["search"]["holds"] and report["search"]["recall"] >= 0.9
    assert report["held_out"]["prompts"] == 1 and 0 < report["held_out"]["computed"] < 1.2
    assert report["held_out"]["meets"] == (report["held_out"]["recall"] >= 0.9)
    assert report["recipe"] == f"near:window={found.options['window']}"
    assert ticks == sorted(ticks) and ticks[0] >= 0 and ticks[-1] <= 1
    assert sorted(p.name for p in (tmp_path / "p").iterdir()) == ["calibration.json", "profile.json"]
    said = []
    assert go(small, tmp_path / "p", text, say=said.append, progress=stopper(0)) == found
    assert said == [f"{tmp_path / 'p'} holds this profile already"]


@pytest.mark.parametrize("after", [1, 3, 6, 12])
def test_a_stopped_run_goes_on(small, text, tmp_path, near, after):
    """From wherever it was stopped, also in the middle of a forward, to the same profile; no prompt is read twice."""
    want = go(small, tmp_path / "whole", text)
    with pytest.raises(StopError):
        go(small, tmp_path / "p", text, progress=stopper(after))
    again = []
    got = go(small, tmp_path / "p", text, progress=lambda what, share: again.append(what))
    assert got.options == want.options
    first, second = (dict(p.report["search"]) for p in (got, want))
    assert first == second
    assert len(again) == 2 * 2 * 3 + 1 - 2 * (after // 2)  # two layers a prompt, two prompts a pass, one check


def test_another_calibration_is_refused(small, text, tmp_path, near):
    with pytest.raises(StopError):
        go(small, tmp_path, text, progress=stopper(1))
    before = (tmp_path / "calibration.json").read_text()
    for change in (dict(target="recall=0.8"), dict(seed=1), dict(length=130), dict(samples=3), dict(layers=[1])):
        with pytest.raises(ConfigError, match=r"holds another calibration .*; use another --out") as err:
            go(small, tmp_path, text, **change)
        assert "\n" not in str(err.value) and next(iter(change)) in str(err.value)
    assert (tmp_path / "calibration.json").read_text() == before


def test_damaged_state_is_one_clear_error(small, text, tmp_path, near):
    with pytest.raises(StopError):
        go(small, tmp_path, text, progress=stopper(3))
    (tmp_path / "state.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match=r"cannot read .*state\.safetensors"):
        go(small, tmp_path, text)
    (tmp_path / "calibration.json").write_text("{")
    with pytest.raises(ConfigError, match=r"cannot read .*calibration\.json"):
        go(small, tmp_path, text)


def test_minference_writes_a_profile_that_applies(small, text, tmp_path):
    found = go(small, tmp_path, text, "minference", samples=1, layers=[1])
    assert found.tensors["pattern"].shape == (2, 4) and found.tensors["sizes"][0].tolist() == [[1000, 6096]] * 4
    assert found.report["recipe"] == f"minference:profile={tmp_path}"
    with foveate.use(small[0], found.report["recipe"]), torch.no_grad():
        small[0](tokens(1, 100) % 90, use_cache=False)
    with pytest.raises(ConfigError, match=r"profile: made for tiny \(minference\) with"):
        foveate.apply(tiny("llama"), found.report["recipe"])


def test_a_search_that_wants_gradients_gets_them(small, text, tmp_path, monkeypatch):
    class Sees:
        passes, wants_grad = 2, True

        def __init__(self):
            self.sums = torch.zeros(2)

        def see(self, x, out, grad):
            assert grad.shape == out.shape == (1, 4, 140, 8)
            self.sums[x.layer] += grad.abs().sum()

        def end_pass(self):
            pass

        def finish(self):
            from foveate.methods.search import Found

            return Found({"window": 7}, report={"sums": self.sums.tolist()})

        def state(self):
            return {"sums": self.sums}

        def resume(self, state):
            self.sums = state["sums"]

    monkeypatch.setitem(registry.METHODS, "near", "tests.test_calibrate:Near")
    monkeypatch.setattr(Near, "search", lambda self, target: Sees(), raising=False)
    found = go(small, tmp_path, text)
    assert found.options == {"window": 7} and min(found.report["search"]["sums"]) > 0


def test_what_cannot_be_calibrated(small, text, tmp_path, near, monkeypatch):
    monkeypatch.setitem(registry.METHODS, "picky", "tests.test_calibrate:Picky")
    for options, complaint in (
        (dict(method="picky"), "picky expects density"),
        (dict(method="dense"), "dense has no hyperparameter that trades quality for speed"),
        (dict(method="near+quest"), "expected one method such as"),
        (dict(method="nearr"), "unknown id 'nearr'; did you mean 'near'"),
        (dict(target="recall=2"), "expected recall=, density= or loss="),
        (dict(layers=[2]), r"layers: expected numbers 0 to 1, got \[2\]"),
        (dict(length=600), "at most the model's 512 positions, got 600"),
        (dict(samples=0), "samples: expected at least 1, got 0"),
        (dict(samples=400), "402 prompts|401 prompts"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            go(small, tmp_path / "x", text, **options)
        assert not (tmp_path / "x").exists()
    with pytest.raises(foveate.FoveateError, match="expected a transformers model"):
        calibrate.run(torch.nn.Linear(2, 2), small[1], "near", out=tmp_path / "x")


# ---------------------------------------------------------------------- DuoAttention's gates
def test_open_gates_are_the_teacher():
    """alpha = 1 everywhere: the student is the teacher; below 1 it is not."""
    model, ids = tiny("llama"), tokens(1, 60)
    at = torch.arange(30, 60)
    for value, zero in ((1.0, True), (0.5, False)):
        mix = duo.Mix(gates=[torch.full((3, 2), value)], sink=2, window=8)
        loss = float(duo.distillation(model, ids, at, mix).detach())
        assert (loss < 1e-10) == zero


def test_gradient_of_the_gates_is_finite_differences():
    model, ids = tiny("llama").double(), tokens(1, 40)
    at = torch.arange(20, 40)
    gates = torch.rand(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    run = lambda g: duo.distillation(model, ids, at, duo.Mix(gates=[g], sink=2, window=8))  # noqa: E731
    (grad,) = torch.autograd.grad(run(gates), gates)
    for i in range(3):
        for g in range(2):
            move = torch.zeros(3, 2, dtype=torch.float64)
            move[i, g] = 3e-3  # not smaller: the norms of transformers' Llama compute in fp32 whatever the model's dtype
            slope = float((run(gates + move) - run(gates - move)).detach()) / 6e-3
            assert slope == pytest.approx(float(grad[i, g]), rel=2e-3, abs=1e-6)


def test_a_planted_pair_of_heads_separates():
    """Head 0 reads a key far back, head 1 its neighbours: within 200 steps one gate stays open and one closes."""
    q, k, v = (t.float() * 0.3 for t in prompt("random", h=2, g=2, m=120, d=16))
    q[:, 0, 60:, 0] = k[:, 0, 7, 0] = 9.0
    v[:, 0, 7] = 5.0
    x = call(q, k, v)
    train = duo.Train(torch.ones(1, 2), 200)
    mix = duo.Mix(gates=train.box, sink=2, window=90)
    full = attend(x.q, x.kv, None, scale=x.scale)
    v[:, 1, 3:30] = v[:, 1, 31:58].mean()  # what head 1 would miss is like what it sees

    def loss():
        return (mix.attend(x, x.dense(), State())[0] - full)[0, :, 100:].square().mean()

    for _ in range(200):
        train.step(loss)
    one, two = train.gates.detach()[0].tolist()
    assert one > 0.9 and two < 0.1


def test_learning_rate_rises_and_falls():
    train = duo.Train(torch.ones(1, 1), 100)
    rates = []
    for _ in range(100):
        train.step(lambda: 0 * train.gates.sum())
        rates.append(train.optimiser.param_groups[0]["lr"])
    want = [0.02 * min(1, max((t + 1) / 20, 0.1), max((100 - t) / 20, 0.1)) for t in range(100)]
    assert rates == pytest.approx(want)


def test_passkeys(small):
    tokenizer = small[1]
    for length in (400, 500, 3000, 40_000):
        ids, at = duo.passkeys(tokenizer, Source.of(), length, rng_of(0, "duo", length, 0))
        assert 0.75 * length < ids.shape[1] <= length
        told = tokenizer.decode(ids[0])
        asked = tokenizer.decode(ids[0, at])
        ask = tokenizer.decode(tokenizer("What is the first passkey")["input_ids"])
        assert at.tolist() == list(range(int(at[0]), ids.shape[1])) and ask in asked
        assert ask not in told[: len(told) - len(asked)]
        keys = asked.count(tokenizer.decode(tokenizer("passkey")["input_ids"]))
        assert keys == (10 if length == 40_000 else told.count(tokenizer.decode(tokenizer("passkey")["input_ids"])) / 2)
        words = asked.replace(" ", "").split("wordbyword?")[1].split(".")[0]
        assert words in told.replace(" ", "")[: -len(asked.replace(" ", ""))]  # the answer is in the context
    with pytest.raises(ConfigError, match="no room for a passkey"):
        duo.passkeys(tokenizer, Source.of(), 60, rng_of(0, "duo", 60, 0))


def test_gates_are_learned_stopped_and_resumed(small, text, tmp_path):
    options = dict(method="duo:sink=4,window=16", samples=4, length=460, target="density=0.6", held=1)
    want = go(small, tmp_path / "whole", text, **options)
    gates = want.tensors["gates"]
    assert gates.shape == (2, 2) and 0 <= float(gates.min()) < float(gates.max()) <= 1
    assert want.report["held_out"]["computed"] <= 0.65 and want.report["learned"]["steps"] == 4
    assert want.report["recipe"].startswith("duo_attention:sparsity=")
    for after in (2, 7):  # while learning, while bisecting the sparsity
        with pytest.raises(StopError):
            go(small, tmp_path / str(after), text, progress=stopper(after), **options)
        got = go(small, tmp_path / str(after), text, **options)
        torch.testing.assert_close(got.tensors["gates"], gates, atol=1e-6, rtol=0)
        assert got.options == want.options
    with foveate.use(small[0], want.report["recipe"]), torch.no_grad():
        small[0].generate(tokens(1, 60) % 90, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert all(p.requires_grad for p in small[0].parameters())


def test_models_with_sinks_of_their_own_are_refused():
    job = SimpleNamespace(model=tiny("gpt_oss"), samples=1)
    with pytest.raises(foveate.FoveateError, match="attention sinks of its own"):
        duo.learn(job)


# ---------------------------------------------------------------------- the command
def test_command(folder, text, tmp_path, near):
    args = ["calibrate", "near", "--model", folder, "--data", str(text), "--length", "140", "--samples", "2", "--held", "1"]
    args += ["--dtype", "fp32", "--device", "cpu", "--layers", "0-1", "--target", "recall=0.9", "--out", str(tmp_path / "p")]
    got = CliRunner().invoke(cli.app, args)
    assert got.exit_code == 0, got.output
    found = load(str(tmp_path / "p"))
    assert f"near:window={found.options['window']}" in got.stdout and "held out" in got.stdout
    assert "target      recall=0.9" in got.stdout
    plain = json.loads((tmp_path / "p" / "profile.json").read_text())
    assert plain["format"] == "foveate-profile" and plain["model"] == folder
    other = CliRunner().invoke(cli.app, [*args, "--seed", "3"])
    (line,) = [told for told in other.stderr.splitlines() if told.strip()]
    assert other.exit_code == 2 and "holds another calibration" in line


@pytest.mark.parametrize(
    "args,complaint",
    [
        (["near", "--layers", "a-b"], "layers: expected numbers and ranges such as 0,4-7"),
        (["near", "--data", "nowhere.txt"], "data: no file nowhere.txt"),
        (["near", "--target", "speed=3"], "target: expected recall="),
        (["dense"], "dense has no hyperparameter"),
    ],
)
def test_command_complains_before_it_loads(args, complaint, near):
    got = CliRunner().invoke(cli.app, ["calibrate", *args, "--model", "a model that is not there"])
    assert got.exit_code == 2 and complaint in got.stderr


def test_numbers():
    assert numbers("0,4-7") == [0, 4, 5, 6, 7] and numbers(None) is None
    assert numbers("3") == [3]
