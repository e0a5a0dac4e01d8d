"""The page and the terminal tables of an evaluation: complete, labelled, self-contained, and quiet about what is missing."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from foveate.evals.pareto import Point, by_protocol
from foveate.evals.results import Results
from foveate.report import eval_plots, evals, plots
from foveate.report.eval_terminal import print_results
from tests.eval_records import FACTS, evaluation, record
from tests.test_report import Links

HEADINGS = ("Quality against cost", "Needle in a haystack", "Scores by task", "Perplexity by position",
            "Agreement with dense", "What was selected", "What does not count")  # fmt: skip


@pytest.fixture(scope="module")
def made() -> Results:
    return evaluation(lengths=(4096, 8192), samples=10, recipes=("dense", "flexprefill@8k", "snapkv@8k"))


@pytest.fixture(scope="module")
def page(made) -> str:
    return evals.render(made)


def test_the_page_is_self_contained_and_well_formed(page):
    links = Links()
    links.feed(page)
    assert not links.open
    assert all(link.startswith(("data:", "#")) for link in links.found)
    assert "script" not in links.tags and "url(http" not in page and "@import" not in page
    assert page.lstrip().lower().startswith("<!doctype html>")


def test_the_page_has_every_section_and_label(page):
    plain = page.replace("<wbr>", "")
    for heading in HEADINGS:
        assert f">{heading}" in plain, heading
    assert "a &lt;model&gt;" in plain and "a <model>" not in plain
    for text in ("a made-up card", "dense below 60 %", "n = 20", "needle seen", "from 1,024",
                 "30 samples of 3 tasks: easy, vt, needle",
                 "Times are medians of 3 rounds", "settings of snapkv@8k", "do not count", "torch 2.13.0"):  # fmt: skip
        assert text in plain, text
    headings = re.findall(r"<h3>(.*?)</h3>", plain)
    scores = [h for h in headings if "prefill" not in h and "decode" not in h]
    assert scores and all(">seen<" in h or ">unseen<" in h for h in scores), scores  # no score without its protocol
    assert plain.count("<svg") >= 2 * 2 * 4 + 2 * 3  # four panels a length and protocol, three needle grids a protocol


@pytest.mark.parametrize("suite, gone", [
    ("needle", "Needle in a haystack"), ("perplexity", "Perplexity by position"), ("agreement", "Agreement with dense"),
])  # fmt: skip
def test_sections_without_records_are_left_out(made, monkeypatch, suite, gone):
    monkeypatch.setattr(plots, "available", lambda: False)  # the drawings take the time
    text = evals.render(Results(made.facts, [r for r in made.records if r.suite != suite]))
    assert gone not in text and "Scores by task" in text


def test_a_page_of_nothing_and_of_single_suites(made):
    text = evals.render(Results(dict(FACTS), []))
    assert "no records in this folder" in text and not any(f">{h}" in text for h in HEADINGS)
    for suite in ("cost", "perplexity", "agreement", "ruler", "needle"):
        evals.render(Results(made.facts, [r for r in made.records if r.suite == suite and r.length == 4096]))
    evals.render(Results({"model": "m"}, made.records[:1]))  # dense alone, one sample, no facts


def test_without_matplotlib_the_page_still_has_the_tables(made, monkeypatch, page):
    monkeypatch.setattr(plots, "available", lambda: False)
    text = evals.render(made)
    assert "need matplotlib" in text and "need matplotlib" not in page
    assert text.count("<tr") == page.count("<tr") and text.count("<svg") == 6  # needle grids are drawn by hand


def test_names_and_texts_are_escaped(made, monkeypatch):
    monkeypatch.setattr(plots, "available", lambda: False)
    bad = [replace(r, recipe="<b>&", settings="<i>", task="<u>") if r.recipe != "dense" else r for r in made.records[:400]]
    text = evals.render(Results({**FACTS, "model": "<script>alert(1)</script>"}, bad))
    assert not any(tag in text for tag in ("<i>", "<u>", "<script>", "<b>&"))


def test_write_replaces_the_page(made, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "available", lambda: False)
    assert evals.write(made, tmp_path) == tmp_path / "index.html"
    assert "Scores by task" in (tmp_path / "index.html").read_text()


def test_scores_of_the_page_are_those_of_the_records(made, monkeypatch):
    monkeypatch.setattr(plots, "available", lambda: False)
    own = [r.values["score"] for r in made.records
           if (r.recipe, r.task, r.length, r.protocol) == ("snapkv@8k", "vt", 8192, "unseen")]  # fmt: skip
    text = evals.render(made)
    table = text.partition('<h3>ruler <span class="tag" title="question unseen by the cache policy">')[2]
    row = next(r for r in re.findall(r"<tr.*?</tr>", table) if ">vt</td>" in r and "8,192" in r)
    assert f"<td>{100 * sum(own) / len(own):.1f}<small>" in row


def test_a_needle_grid_colours_and_numbers_its_cells():
    grid = eval_plots.needle_grid({(0.0, 4096): (1.0, 3), (1.0, 4096): (0.0, 3), (1.0, 8000): (0.5, 2)})
    fills = re.findall(r'fill="rgb\((.*?)\)"', grid)
    blue, orange = (",".join(map(str, c)) for c in (plots.BLUE, plots.ORANGE))
    assert fills == [blue, orange, fills[2]] and fills[2] not in (blue, orange)
    assert ">4K<" in grid and ">8,000<" in grid and ">50<" in grid and "8,000 tokens, depth 100 %: 50 (2 samples)" in grid
    many = eval_plots.needle_grid({(d / 10, n * 1024): (1.0, 1) for d in range(11) for n in range(1, 12)})
    assert many.count("<rect") == 121 and "<text" in many and ">100<" not in many


def test_scores_that_are_alike_do_not_look_far_apart():
    """A tenth of a point fills no axis: the scale spans four points at least."""
    plt = pytest.importorskip("matplotlib.pyplot")
    for scores, least, most in (((1.0, 0.999), 4.0, 6.0), ((1.0, 0.2), 80.0, 100.0)):
        points = [Point(str(i), str(i), 1024, dense=i == 0, quality=q, step=1.0 + i) for i, q in enumerate(scores)]
        axis = plt.figure().add_subplot()
        eval_plots._draw_front(axis, points, "step", {"0": 1, "1": 2})
        low, high = axis.get_ylim()
        assert least <= high - low <= most
        plt.close("all")


def test_the_drawing_of_the_fronts_stands_alone(made):
    own = by_protocol(made)
    numbers = {r["settings"]: r["number"] for r in evals.recipes_of(made)}
    text = eval_plots.fronts_file(own, numbers)
    assert text.startswith("<svg") and "prefers-color-scheme" in text and 'xmlns="http://www.w3.org/2000/svg"' in text
    assert f"made from {eval_plots.digest(own)} " in text and "4,096 tokens, unseen" in text
    assert "background:#fff" in text  # its inks are chosen for a ground that it brings along
    other = {k: [replace(p, step=9.0) for p in v] for k, v in own.items()}
    assert eval_plots.digest(other) != eval_plots.digest(own)
    assert eval_plots.fronts_file({}, {}) is None and eval_plots.front_panel([], "step", {}) is None


def test_the_terminal_says_the_same(made, capsys):
    print_results(made)
    out = capsys.readouterr().out
    for text in ("ruler", "needle", "perplexity", "agreement: KL", "cost", "4,096 seen", "8,192 unseen",
                 "2 of 3 tasks count", "flexprefill@8k", "0.71x", "n 20"):  # fmt: skip
        assert text in out, text
    print_results(Results({}, []))
    assert "no records" in capsys.readouterr().out


def test_the_terminal_says_when_no_task_counts(capsys):
    print_results(Results({"model": "m"}, [record("dense", "ruler", "vt", 64, "seen", 0, score=0.2)]))
    out = capsys.readouterr().out
    assert "0 of 1 task count" in out and "dense < 60" in out
