"""Settings by head: the choice itself, the searches that use it, and the bench that calibrates on made prompts."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from benchmarks import prefill_run

from foveate.bench import calibrated
from foveate.bench.calibrated import Draws, calibrate, kept, label, reason
from foveate.bench.floors import UNITS, floors
from foveate.bench.prefill import KINDS, by_kind, kind_of, named, planned, prompt
from foveate.calibrate.generic import Bisect
from foveate.errors import ConfigError
from foveate.layout import Layout, Parts
from foveate.methods import _allocation, minference_search
from foveate.methods._allocation import Allocation, Ladder, allocate, computed, lower_hull
from foveate.methods.base import State
from foveate.methods.minference import MInference
from foveate.methods.minference_search import DENSE
from foveate.methods.search import Found, Target
from foveate.methods.streaming_llm import StreamingLLM
from foveate.profile import Profile
from foveate.recipe import Recipe
from tests.prompts import call
from tests.prompts import prompt as random_prompt

SHAPE = (8, 8, 32)  # one head of each eighth
N = 448
XATTENTION = "xattention:block=16,stride=4"


# ---------------------------------------------------------------------- the choice
@pytest.mark.parametrize("seed", range(3))
def test_a_choice_is_the_cheapest_of_its_mass(seed):
    """Against every choice there is: none keeps as much for less, and one step less would miss the value."""
    gen = torch.Generator().manual_seed(seed)
    mass, cost = torch.rand(2, 4, 5, generator=gen, dtype=torch.float64).sort(-1).values
    for value in (0.1, 0.4, 0.6, 0.75):
        taken = allocate(mass, cost, value)
        kept, paid = (t.gather(1, taken[:, None]).sum() for t in (mass, cost))
        for other in itertools.product(range(5), repeat=4):
            at = torch.tensor(other)[:, None]
            assert mass.gather(1, at).sum() < kept - 1e-12 or cost.gather(1, at).sum() > paid - 1e-12
        most = mass.amax(-1).mean()
        assert kept / 4 >= min(value, float(most)) - 1e-12
    assert torch.equal(allocate(mass, cost, 0.0), cost.argmin(-1))


def test_the_hull_drops_what_a_mixture_beats():
    assert lower_hull([0.1, 0.5, 0.9, 0.4, 1.0], [0.1, 0.5, 0.6, 0.7, 2.0]) == [0, 2, 4]
    assert lower_hull([0.3, 0.3, 0.2], [0.2, 0.1, 0.5]) == [1]


def test_cost_by_head_is_the_librarys_count():
    q, k, v = random_prompt("peaked", m=300)
    x = call(q.float(), k.float(), v.float())
    for text in (
        "anchor_attention:block=16,step=2,theta=1",
        XATTENTION,
        "sale:block_q=16,block_k=8,sink=8,window=8,segment=8",
    ):
        layout = dataclasses.replace(Recipe.of(text).prefill).plan(dataclasses.replace(x), State())
        if layout is not None:
            assert float(computed(layout).sum()) == layout.computed() and not layout.full
    plain = MInference(columns=40, diagonals=110).plan(x, State())
    assert float(computed(plain).sum()) == plain.computed()
    assert float(computed(x.dense()).sum()) == 4 * 300 * 301 / 2
    q, k, v = random_prompt("peaked", m=64 * 130)  # more blocks than are counted
    plain = MInference(columns=40, diagonals=110).plan(call(q.float(), k.float(), v.float()), State())
    assert float(computed(plain).sum()) == pytest.approx(plain.computed(), rel=0.01)


# ---------------------------------------------------------------------- a search
class Windows:
    """A ladder of windows, whose figures are known without a model."""

    @staticmethod
    def search(value=0.95):
        def found(settings, choice):
            return Found(tensors={"window": torch.tensor([*settings, 7])[choice]})

        def plan(x, width):
            return Layout.static(x.shape, window=width, block_q=16)

        return Allocation(Target("recall", value, True), Ladder("windows", lambda n: (1, n // 8, n // 2, n), plan, found))


def test_a_search_averages_calls_and_goes_on_where_it_was():
    # head 0 sees every key alike, head 1 its own alone
    k = torch.eye(512)[None, None].expand(1, 2, 512, 512)
    q = torch.stack([torch.zeros(512, 512), 800.0 * torch.eye(512)])[None]
    x = call(q, k, k, layer=1, layers=3)
    search = Windows.search()
    for i in range(2):
        search.see(x, q, None)
        if i == 0:
            half, search = search.state(), Windows.search()
            search.resume(half)
    found = search.finish()
    assert found.tensors["window"].tolist() == [[7, 7], [512, 1], [7, 7]]  # layers that were not shown: the default
    assert found.report["holds"] and found.report["recall"] == pytest.approx(1.0, abs=1e-4)
    recall = sum(min(i + 1, 256) / (i + 1) for i in range(512)) / 512
    assert search.sums[1, 0, 2, 0] / 2 == pytest.approx(recall, abs=1e-5)
    search.aim((recall + 1) / 2 - 1e-3)
    assert search.finish().tensors["window"][1].tolist() == [256, 1]
    search.ladder = dataclasses.replace(search.ladder, price=lambda width: 9.0 if width == 256 else 1.0)
    assert search.finish().tensors["window"][1].tolist() == [512, 1]  # what a slower kernel computes is worth less
    with pytest.raises(ConfigError, match="shown no layer"):
        Windows.search().finish()


def test_bisection_aims_again_at_what_it_has_tried():
    x = prompt(200, 8, 8, 16, torch.float32, "cpu", 5)
    search = Bisect(StreamingLLM(sink=1), Target("recall", 0.5))
    for _ in range(search.passes):
        search.see(x, x.q, None)
        search.end_pass()
    first = search.finish()
    search.aim(0.8)
    second = search.finish()
    assert first.report["recall"] >= 0.5 and second.report["recall"] >= 0.8
    assert first.options["window"] < second.options["window"]
    search.aim(0.5)
    assert search.finish().options == first.options


def test_the_target_by_head_has_a_text():
    assert Target.parse("mass=0.9") == Target("recall", 0.9, True) and str(Target.parse("mass=0.9")) == "mass=0.9"
    assert not Target.parse("recall=0.9").by_head
    for text in ("minference", "xattention", "spargeattn", "sale", "anchor_attention", "flexprefill"):
        method = Recipe.of(text).prefill
        assert isinstance(method.search(Target.parse("mass=0.9")), Allocation)
        assert not isinstance(method.search(Target.parse("recall=0.9")), Allocation)
        with pytest.raises(ConfigError, match="share"):
            dataclasses.replace(method, share="group").search(Target.parse("mass=0.9"))


# ---------------------------------------------------------------------- minference
def test_two_sorts_of_heads_apart_name_what_they_name_together():
    q, k, v = random_prompt("random", h=6, g=2, m=400)
    heads = (("vertical_slash", 12, 60), ("block_sparse", 2, 0), ("vertical_slash", 0, DENSE), ("block_sparse", 3, 0),
             ("vertical_slash", 40, 50), ("vertical_slash", 5, 70))  # fmt: skip
    method = MInference(sink=5, local=20, profile=(heads,))
    x = call(q, k, v)
    together, apart = method.plan(x, State()), method._parts(x, *method._sizes(x))
    assert isinstance(together, Layout) and isinstance(apart, Parts)
    apart.validate()
    masks = [part.layout.to_mask() for part in apart.parts]
    assert torch.equal(masks[0] | masks[1], together.to_mask()) and not (masks[0] & masks[1]).any()
    assert torch.equal(masks[0][:, 2], torch.ones(1, 400, 400, dtype=torch.bool).tril())  # a head with every distance
    assert together.diagonals.shape[-1] <= 2 * (400 // 64 + 2)


# ---------------------------------------------------------------------- the bench
@pytest.fixture(scope="module")
def draws():
    return Draws.make(N, *SHAPE, torch.float32, "cpu")


def test_draws_share_the_kinds_and_nothing_else(draws):
    measured = prompt(N, *SHAPE, torch.float32, "cpu")
    every = [measured, *draws.shown, *draws.checks]
    assert draws.seeds == tuple(range(1, len(every))) and 0 not in draws.seeds
    assert [kind_of(i, 8, 8) for i in range(8)] == list(KINDS) and kind_of(31, 32, 8) == "flat"
    for a, b in itertools.combinations(every, 2):
        for one, two in ((a.q, b.q), (a.kv.k, b.kv.k), (a.kv.v, b.kv.v)):
            same = torch.nn.functional.cosine_similarity(one.flatten(), two.flatten(), 0)
            assert abs(float(same)) < 0.3
    again = Draws.make(N, *SHAPE, torch.float32, "cpu")
    assert torch.equal(again.shown[0].q, draws.shown[0].q)


def test_what_is_found_holds_on_the_draws_of_the_check(draws, tmp_path, monkeypatch):
    monkeypatch.setattr(_allocation, "SHARES", (0.5, 0.8, 0.9, 0.95, 0.98, 1.0))
    target = Target.parse("mass=0.93")
    with torch.inference_mode():
        got = calibrate(XATTENTION, target, draws, tmp_path)
        fresh = prompt(N, *SHAPE, torch.float32, "cpu", 77)
        assert kept(got.method, fresh) > 0.93 - 0.02 and min(got.facts["check_mass"][-1]) >= 0.93
        kinds = by_kind(fresh, named(fresh, planned(got.method, fresh)[0]), torch.full((8,), 0.5))
    assert got.facts["seeds"] == list(draws.seeds[: calibrated.DRAWS])
    assert got.facts["check_seeds"] == list(draws.seeds[calibrated.DRAWS :])
    assert kinds["flat"]["density"] > 2 * kinds["diagonal"]["density"]
    assert kinds["peaked"]["mass"] == 0.5 and list(kinds) == list(dict.fromkeys(KINDS))
    text = next(tmp_path.glob("*/profile.json")).read_text()  # what was written says where it came from
    assert "seeds 1, 2" in text and '"target": "mass=0.93"' in text and str(tmp_path) not in text
    assert label(XATTENTION, target) == f"{XATTENTION} at mass=0.93"


def test_settings_by_head_hold_elsewhere_for_fewer_pairs(draws, tmp_path, monkeypatch):
    """On a prompt that the search has not seen: as much mass as the best setting for all heads, for fewer pairs."""
    monkeypatch.setattr(minference_search, "FINE", (0.25, 1.0, 4.0))
    monkeypatch.setattr(minference_search, "BLOCKS", 1.0)
    text, target = "minference:sink=4,local=16,last_q=32", Target.parse("mass=0.9")
    settings = Recipe.of(text).prefill.search(target).ladder.settings(N)
    with torch.inference_mode():
        mine = calibrate(
            text, target, dataclasses.replace(draws, shown=draws.shown[:1], checks=draws.checks[:1]), tmp_path
        ).method
        fresh = prompt(N, *SHAPE, torch.float32, "cpu", 77)
        mass, paid = kept(mine, fresh), float(named(fresh, planned(mine, fresh)[0]).sum())
        others = [minference_search._of(mine, entry) for entry in settings]
        enough = [float(named(fresh, planned(m, fresh)[0]).sum()) for m in others if kept(m, fresh) >= mass]
    assert mass > 0.9 - 0.02 and enough and paid < 0.9 * min(enough)


@pytest.mark.parametrize(
    "text",
    ["xattention", "spargeattn:theta=-0.1", "sale", "anchor_attention:block=32,step=2", "minference", "flexprefill"],
)
def test_a_profile_for_another_shape_is_refused(text, tmp_path):
    """Found for 32 layers of 8 heads: right for those, an error for 4 heads."""
    method = Recipe.of(text).prefill
    search = method.search(Target.parse("mass=0.9"))
    search._begin(2000)
    search.sums, search.seen = torch.rand(32, 8, len(search.settings), 2).double(), torch.ones(32, dtype=torch.int64)
    found = search.finish()
    Profile(method=method.id, options=found.options, tensors=found.tensors).save(tmp_path / "p")
    set_ = dataclasses.replace(method, profile=str(tmp_path / "p"))
    assert set_.plan(prompt(2000, 8, 8, 16, torch.float32, "cpu"), State()) is not None
    with pytest.raises(ConfigError, match=r"\[32, 4\]|4 heads"):
        set_.plan(prompt(2000, 4, 4, 16, torch.float32, "cpu"), State())


def test_what_has_nothing_to_find_says_so(draws, tmp_path):
    assert reason(Recipe.of("xattention").prefill) is None
    assert "no hyperparameter" in reason(Recipe.of("dense").prefill or Recipe.of("hip").prefill)
    with pytest.raises(ConfigError, match="mass= or recall="):
        calibrate(XATTENTION, Target.parse("density=0.1"), draws, tmp_path)
    with pytest.raises(ConfigError, match="no hyperparameter"):
        calibrate("hip", Target.parse("mass=0.9"), draws, tmp_path)


# ---------------------------------------------------------------------- the floor
def test_the_floor_is_what_the_best_pairs_hold():
    x = prompt(256, *SHAPE, torch.float32, "cpu", 3)
    got = floors(x, 0.9)
    assert set(got) == {f"{r} x {k}" for r, k in UNITS}
    rows = torch.cat([torch.arange(i, i + 64, 4) for i in (0, 64, 128, 192)])
    s = (x.q[0, :, rows] @ x.kv.k[0].mT) * x.scale
    hidden = torch.arange(256) > rows[:, None]
    p = s.masked_fill(hidden, -math.inf).softmax(-1)
    best = p.flatten().sort(descending=True).values
    want = int((best.cumsum(0) < 0.9 * p.sum()).sum()) / (8 * int((~hidden).sum()))
    assert got["1 x 1"]["density"] == pytest.approx(want, rel=0.03)
    edge = best[int((best.cumsum(0) < 0.9 * p.sum()).sum())]
    flat = p[7]
    assert got["1 x 1"]["flat mass"] == pytest.approx(float(flat[flat >= edge].sum() / flat.sum()), abs=0.03)
    order = [got[unit]["density"] for unit in ("1 x 1", "64 x 1", "64 x 32", "64 x 64", "128 x 128")]
    assert order == sorted(order) and order[0] < 0.6 * order[-1]
    # what is counted: visible pairs alone, so everything is everything
    assert floors(x, 1.0)["128 x 128"]["density"] == pytest.approx(1.0, abs=1e-6)


def test_the_run_measures_what_it_calibrated(tmp_path):
    with torch.inference_mode():
        data = prefill_run.run(
            [256], ["streaming_llm:sink=4", "hip"], shape=(4, 4, 16), rounds=1, device="cpu", dtype=torch.float32,
            target=Target.parse("mass=0.8"), profiles=tmp_path / "profiles", out=tmp_path / "out.json",
        )  # fmt: skip
    rows = {r["impl"]: r["params"] for r in data["rows"]}
    assert list(rows) == ["streaming_llm:sink=4 at mass=0.8", "dense, SDPA", "dense, ours"]
    mine = rows["streaming_llm:sink=4 at mass=0.8"]
    assert mine["recipe"] == "streaming_llm:sink=4" and mine["calibration"]["seeds"] == [1, 2] and mine["mass"] > 0.7
    assert mine["calibration"]["target"] == "mass=0.8" and mine["calibration"]["seconds"] > 0
    assert len(data["notes"]) == 1 and "hip" in data["notes"][0] and set(data["floors"]) == {"256"}
    assert str(tmp_path) not in (tmp_path / "out.json").read_text()
