"""Points, fronts and recommendations on made-up evaluations whose losses and costs are known."""

from __future__ import annotations

import csv
import io
import json
import random
from dataclasses import replace

import pytest

from foveate.bench import results as bench
from foveate.errors import ConfigError, FoveateError
from foveate.evals.choice import recommend
from foveate.evals.frontier import (
    load_summary,
    markdown,
    marked,
    point_of,
    points_of,
    summary,
    table,
    text_of,
    write,
    write_summary,
)
from foveate.evals.pareto import COSTS, Point, by_protocol, front, points
from foveate.evals.results import Results
from foveate.evals.statistics import Paired
from tests.eval_records import FACTS, evaluation, record


def at(found: list[Point], recipe: str, length: int = 4096) -> Point:
    (one,) = [p for p in found if p.recipe == recipe and p.length == length]
    return one


def scored(recipe: str, scores: dict[str, list[float]], protocol: str = "seen", length: int = 4096, **costs: float):
    """Records of one recipe: scores by task, and one round of costs."""
    found = [
        record(recipe, "ruler", task, length, protocol, i, score=s)
        for task, own in scores.items()
        for i, s in enumerate(own)
    ]
    return found + ([record(recipe, "cost", "cost", length, "seen", 0, **costs)] if costs else [])


def results(*groups) -> Results:
    return Results(dict(FACTS), [r for group in groups for r in group])


# ---------------------------------------------------------------------- points
def test_only_tasks_count_where_dense_is_good_enough():
    """On "hard" dense is right one time in ten and the recipe always: it must not gain by it."""
    hard = [1.0] + [0.0] * 9
    found = points(results(scored("dense", {"easy": [1.0] * 10, "hard": hard}),
                           scored("x", {"easy": [1.0] * 8 + [0.0] * 2, "hard": [1.0] * 10})))  # fmt: skip
    x = at(found, "x")
    assert x.tasks == ("easy",) and x.quality == pytest.approx(0.8) and x.n == 10
    assert x.loss is not None and x.loss.mean == pytest.approx(0.2) and x.loss.low < 0.2 < x.loss.high
    assert at(found, "dense").loss is None and at(found, "dense").value("loss") == 0.0


def test_all_recipes_are_compared_on_the_samples_that_all_have():
    """Sample 0 is missing under y: it counts for nobody. z has too few samples and takes none away."""
    y = [r for r in scored("y", {"a": [0.0, 1.0, 1.0, 1.0]}) if r.index != 0]
    z = [r for r in scored("z", {"a": [1.0] * 4}) if r.index == 3]
    found = points(results(scored("dense", {"a": [0.0, 1.0, 1.0, 1.0]}), scored("x", {"a": [1.0, 0.0, 1.0, 1.0]}), y, z))
    assert [p.n for p in found] == [3, 3, 3, 0]
    assert at(found, "dense").quality == 1.0 and at(found, "x").quality == pytest.approx(2 / 3)
    assert at(found, "z").quality is None and at(found, "z").loss is None


def test_tasks_weigh_the_same_and_a_question_counts_once():
    """Task a has 2 questions under two protocols, b 4 under one."""
    dense = scored("dense", {"a": [1.0] * 2, "b": [1.0] * 4}) + scored("dense", {"a": [1.0] * 2}, "unseen")
    x = scored("x", {"a": [1.0, 0.0], "b": [1.0] * 4}) + scored("x", {"a": [0.0, 0.0]}, "unseen")
    both = at(points(results(dense, x)), "x")
    assert both.quality == pytest.approx((0.25 + 1.0) / 2) and both.n == 6 and both.protocols == ("seen", "unseen")
    assert both.loss is not None and both.loss.mean == pytest.approx(1 - both.quality)
    assert at(points(results(dense, x), ["unseen"]), "x").quality == 0.0
    split = by_protocol(results(dense, x))
    assert list(split) == ["seen", "unseen"] and at(split["seen"], "x").quality == 0.75


def test_costs_are_medians_and_streams_are_paired():
    made = evaluation(lengths=(4096,), samples=4)
    x, dense = at(points(made), "flexprefill@8k"), at(points(made), "dense")
    assert x.first_token == pytest.approx(0.8 * 0.71) and x.step == pytest.approx(0.021 * 1.02) and x.rounds == 3
    assert x.kv_bytes == pytest.approx(90e6) and (x.density, x.computed, x.decode_density) == (0.31, 0.372, 1.0)
    assert x.kl == pytest.approx(0.011) and x.same == pytest.approx(0.989)
    assert x.nll is not None and x.nll.mean == pytest.approx(0.011) and x.nll.n == 4  # although the texts differ by 0.1
    assert dense.nll is None and dense.value("nll") == 0.0


def test_densities_come_from_where_they_were_measured():
    bare = results([record("dense", "agreement", "agreement", 64, "prefill", 0, kl=0.0, density=0.5)],
                   [record("x", "ruler", "a", 64, "seen", 0, score=1.0, density=0.25)])  # fmt: skip
    found = points(bare)
    assert at(found, "dense", 64).density == 0.5 and at(found, "x", 64).density == 0.25
    assert all(p.quality is None and p.first_token is None for p in found)  # no dense score, no costs
    assert points(Results({}, [])) == []


# ---------------------------------------------------------------------- fronts
def brute(found: list[Point], x: str, y: str, up: bool) -> set[int]:
    """Places of the points that nobody beats, by definition."""
    best = set()
    for i, p in enumerate(found):
        a, b = getattr(p, x), getattr(p, y)
        if a is None or b is None:
            continue
        beaten = False
        for q in found:
            c, d = getattr(q, x), getattr(q, y)
            if c is not None and d is not None and q.length == p.length:
                better = d > b if up else d < b
                beaten |= (c < a and (better or d == b)) or (c == a and better)
        if not beaten:
            best.add(i)
    return best


@pytest.mark.parametrize("y, up", [("quality", True), ("kl", False)])
def test_front_is_that_of_brute_force(y, up):
    rng = random.Random(3)
    grid = [None, *(i / 5 for i in range(6))]  # few values: ties in one and in both
    sizes = set()
    for _ in range(200):
        found = [
            Point(f"r{i}", f"s{i}", rng.choice((64, 128)), first_token=rng.choice(grid), **{y: rng.choice(grid)})
            for i in range(rng.randrange(9))
        ]
        got = front(found, "first_token", y)
        want = brute(found, "first_token", y, up)
        assert {found.index(p) for p in got} == want
        assert [(p.length, p.first_token) for p in got] == sorted((p.length, p.first_token) for p in got)
        sizes.add(len(want))
    assert len(sizes) > 3  # the trial saw empty, small and large fronts


def test_front_of_ties_single_points_and_nan():
    one, same = Point("a", "a", 64, quality=0.5, step=1.0), Point("b", "b", 64, quality=0.5, step=1.0)
    assert front([one], "step") == [one] and front([one, same], "step") == [one, same]
    assert front([one, replace(same, step=float("nan"))], "step") == [one]
    assert front([one, replace(same, length=128, step=9.0)], "step") == [one, replace(same, length=128, step=9.0)]
    assert front([one], "kv_bytes") == [] and front([], "step") == []


# ---------------------------------------------------------------------- text
def test_markdown_csv_and_json_agree(tmp_path):
    found = points(evaluation(samples=10))
    rows = list(csv.DictReader(io.StringIO(text_of(found, "csv"))))
    data = json.loads(text_of(found, "json"))
    lines = [line.strip("| ").split(" | ") for line in table(found).splitlines()[2:]]
    assert len(rows) == len(data) == len(lines) == len(found) == 10
    for p, row, one, line in zip(found, rows, data, lines, strict=True):
        assert point_of(one) == p
        assert (row["recipe"], int(row["length"]), float(row["quality"])) == (p.recipe, p.length, p.quality)
        assert float(row["first_token"]) == p.first_token and row["front"].split() == one["front"]
        assert (row["loss"] == "") is p.dense and (p.dense or float(row["loss_high"]) == p.loss.high)
        assert line[:3] == [f"{p.length:,}", f"`{p.recipe}`", f"{100 * p.quality:.1f}"]
        loss = "0" if p.dense else f"{100 * p.loss.mean:.1f} ({100 * p.loss.low:.1f} to {100 * p.loss.high:.1f})"
        assert line[3].replace("-0.0", "0.0") == loss.replace("-0.0", "0.0")
        assert (line[-1] == "-") is (not one["front"])
    for kind in ("md", "csv", "json"):
        assert write(found, tmp_path / f"points.{kind}").read_text() == text_of(found, kind)
    with pytest.raises(ConfigError, match=r"md, csv, json, got 'txt'"):
        write(found, tmp_path / "points.txt")


def test_each_point_says_which_fronts_it_is_on():
    found = points(evaluation(samples=10))
    for p, on in marked(found):
        assert on == [x for x in COSTS if p in front(found, x)]


# ---------------------------------------------------------------------- recommend
RIGHT = [1.0] * 100


def choice():
    """dense 10 s; safe 6 s with no loss, bold 4 s with 2 points lost, wild 1 s with 30."""
    return results(
        scored("dense", {"a": RIGHT, "b": RIGHT}, first_token=10.0, step=1.0, kv_bytes=100.0, density=1.0),
        scored("safe", {"a": RIGHT, "b": RIGHT}, first_token=6.0, step=2.0, kv_bytes=100.0, density=0.5),
        scored("bold", {"a": RIGHT[:-2] + [0.0] * 2, "b": RIGHT[:-2] + [0.0] * 2}, first_token=4.0, step=0.5, kv_bytes=50.0,
               density=0.31),
        scored("wild", {"a": RIGHT[:-30] + [0.0] * 30, "b": RIGHT[:-30] + [0.0] * 30}, first_token=1.0, step=0.1,
               kv_bytes=9.0),
    )  # fmt: skip


@pytest.mark.parametrize(
    "loss, by, want",
    [(0.0, "first_token", "safe"), (0.01, "first_token", "safe"), (0.02, "first_token", "bold"),
     (0.5, "first_token", "wild"), (0.01, "step", "dense"), (0.02, "kv_bytes", "bold"), (1.0, "kv_bytes", "wild")],
)  # fmt: skip
def test_recommend_takes_the_cheapest_that_loses_little_enough(loss, by, want):
    made = choice()
    found = recommend(made, 4096, loss, by)
    assert found.point.recipe == want
    assert found.point in front(points(made), by)  # nothing beats it
    assert all((p.value("loss") or 0) <= loss for p in found.others)


def test_recommend_gives_its_measured_reason():
    found = recommend(choice(), 4096, 0.02)
    low, high = found.point.loss.low, found.point.loss.high
    assert found.reason == (
        "bold: 0.40x dense's time to first token at 4,096 tokens, loss 2.0 points "
        f"({100 * low:.1f} to {100 * high:.1f}) over 2 tasks x 100 samples (seen), density 0.31"
    )
    assert high > 0.02 and any("does not exclude a loss above 2.0 points" in w for w in found.warnings)
    assert any("one round" in w for w in found.warnings)
    assert "no recipe" in recommend(choice(), 4096, 0.01, "step").reason


def test_no_difference_seen_is_not_no_difference():
    """200 samples without a difference exclude 1.5 points, not 1."""
    assert any("does not exclude a loss of up to 1.5 points" in w for w in recommend(choice(), 4096, 0.01).warnings)
    assert not any("does not exclude" in w for w in recommend(choice(), 4096, 0.016, "first_token").warnings)


def test_recommend_says_which_length_it_used_and_refuses_far_ones():
    made = results(
        *(scored(recipe, {"a": RIGHT}, length=n, first_token=t * n, step=1.0, kv_bytes=1.0)
          for n in (4096, 16384) for recipe, t in (("dense", 2.0), ("x", 1.0)))
    )  # fmt: skip
    near = recommend(made, 5000)
    assert near.point.length == 4096 and any("nothing was measured at 5,000 tokens" in w for w in near.warnings)
    assert recommend(made, 8192).point.length == 16384  # as near as 4,096, and the longer one risks more
    assert not any("nothing was measured" in w for w in recommend(made, 16384).warnings)
    for far in (2047, 32769, 131072):
        with pytest.raises(ConfigError, match=r"nothing measured from .*lengths with costs and scores: 4,096, 16,384"):
            recommend(made, far)


def test_recommend_refuses_what_it_cannot_know():
    made = choice()
    only = lambda keep: Results(made.facts, [r for r in made.records if keep(r)])  # noqa: E731
    cases = [
        (only(lambda r: r.recipe != "dense"), {}, "recipe dense, found none"),
        (only(lambda r: r.suite != "cost"), {}, r"cost records \(first_token\)"),
        (only(lambda r: r.suite == "cost"), {}, "no task counts"),
        (results(scored("dense", {"a": [0.5] * 9}, first_token=1.0)), {}, "no task counts"),
        (made, {"protocols": ["unseen"]}, "no task counts: .* under unseen"),
        (made, {"by": "density"}, "first_token, step, kv_bytes, got 'density'"),
        (made, {"max_loss": 1.5}, "max_loss"),
        (made, {"max_loss": float("nan")}, "max_loss"),
        (Results({}, []), {}, "recipe dense, found none"),
    ]
    for given, options, match in cases:
        with pytest.raises(ConfigError, match=match) as err:
            recommend(given, 4096, **options)
        assert "\n" not in str(err.value)
    with pytest.raises(ConfigError, match="length"):
        recommend(made, 0)


def test_a_recipe_that_was_not_timed_is_named():
    made = choice()
    made = Results(made.facts, [r for r in made.records if not (r.recipe == "wild" and r.suite == "cost")])
    found = recommend(made, 4096, 1.0)
    assert found.point.recipe == "bold" and any("lack of costs" in w and "wild" in w for w in found.warnings)


# ---------------------------------------------------------------------- summary
def test_a_summary_is_small_and_reads_back(tmp_path):
    made = evaluation(samples=12)
    path = write_summary(made, tmp_path / "eval_x.json")
    data = load_summary(path)
    assert data["records"] == len(made.records) and data["facts"]["model"] == "a <model>" and "versions" not in data["facts"]
    assert path.stat().st_size < 100_000 and "yes" not in {c.get("text") for c in data["cells"]}
    assert bench.load(path)["bench"] == "eval"  # one folder holds both kinds
    back, own = points_of(data), by_protocol(made)
    assert list(back) == list(own) == ["seen", "unseen"]
    for protocol in own:
        for a, b in zip(back[protocol], own[protocol], strict=True):
            assert (a.recipe, a.settings, a.length, a.tasks, a.n) == (b.recipe, b.settings, b.length, b.tasks, b.n)
            assert a.quality == pytest.approx(b.quality, rel=1e-5) and a.step == pytest.approx(b.step, rel=1e-5)
            assert (a.loss is None) is a.dense and isinstance(b.loss, Paired | None)
    assert summary(made) == json.loads(json.dumps(summary(made))) | {"points": summary(made)["points"]}
    text = markdown(data, "benchmarks/figures/eval_x.svg")
    for part in ("a made-up card", "Protocol unseen:", "(ruler/hard)", "| ruler/easy |", "eval_x.svg", "2 `flexprefill@8k`"):
        assert part in text, part


@pytest.mark.parametrize(
    "text", ["", "[]", '{"schema": 1, "bench": "kernels"}', '{"schema": 1, "bench": "eval", "facts": {}}']
)
def test_what_is_no_summary_is_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(FoveateError, match="summary: "):
        load_summary(tmp_path / "x.json")


def test_a_summary_of_nothing():
    data = summary(Results({}, []))
    assert data["points"] == data["cells"] == [] and markdown(data).startswith("Evaluation: ")
