"""docs/methods and `foveate methods ID`: a page and a picture for every method, and they say what is so."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from foveate.catalogue import entry, shown
from foveate.cli import app
from foveate.errors import ConfigError
from foveate.registry import METHODS, get

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def pages():
    before = list(sys.path)
    sys.path.insert(0, str(ROOT / "scripts"))
    yield importlib.import_module("pages")
    sys.path[:] = before


@pytest.fixture(scope="module")
def drawn(pages):
    return {name: pages.pictures.draw(name) for name in METHODS}


def test_there_is_a_fresh_page_for_every_method(pages, drawn):
    made = pages.render(drawn)
    assert {path.stem for path in made} == {*METHODS, "README"}
    assert not [path.name for path in pages.stale(made, drawn)], "run `make benchmarks`"


def test_what_is_stale_is_found(pages, drawn, tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "PAGES", tmp_path)
    some = {name: drawn[name] for name in ("quest", "snapkv")}
    made = {tmp_path / f"{name}.md": name for name in some}
    every = {f"{name}.{end}" for name in some for end in ("md", "png")}
    assert {p.name for p in pages.stale(made, some)} == every
    for path, text in made.items():
        path.write_text(text)
    for name, picture in some.items():
        (tmp_path / f"{name}.png").write_bytes(pages.pictures.png(picture.pixels))
    assert not pages.stale(made, some)
    (tmp_path / "quest.md").write_text("quest!")
    (tmp_path / "gone.md").write_text("a method that was removed")
    moved = some["snapkv"].pixels.clone()
    moved[0, 200:, :20] = 3 - moved[0, 200:, :20]
    (tmp_path / "snapkv.png").write_bytes(pages.pictures.png(moved))
    assert {p.name for p in pages.stale(made, some)} == {"quest.md", "gone.md", "snapkv.png"}
    moved = some["snapkv"].pixels.clone()
    moved[0, 250, :3] = 3 - moved[0, 250, :3]  # as a near tie on another processor would
    (tmp_path / "snapkv.png").write_bytes(pages.pictures.png(moved))
    assert {p.name for p in pages.stale(made, some)} == {"quest.md", "gone.md"}


def test_pages_are_small():
    files = [p for p in (ROOT / "docs").rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 1.5e6
    assert max(p.stat().st_size for p in files if p.suffix == ".png") <= 12 * 1024


# ---------------------------------------------------------------------- pictures
def test_a_picture_is_a_png_that_others_read(pages, drawn, tmp_path):
    image = pytest.importorskip("PIL.Image")
    path = tmp_path / "x.png"
    path.write_bytes(pages.pictures.png(drawn["quest"].pixels))
    seen = torch.tensor(list(image.open(path).convert("RGB").tobytes())).view(256, -1, 3)
    want = torch.tensor(pages.pictures.COLOURS)[drawn["quest"].pixels.long()]
    for head in range(4):
        at = head * (256 + pages.pictures.GAP)
        assert torch.equal(seen[:, at : at + 256], want[head])
    assert torch.equal(pages.pictures.read(path.read_bytes()), drawn["quest"].pixels)


def test_pictures_show_the_pairs(pages, drawn):
    """A rule, a selection in decode and an eviction, each told from its picture alone."""
    p = pages.pictures
    i, j = torch.arange(256)[:, None], torch.arange(256)
    rule = (j <= i) & ((j < 4) | (i - j < 20))
    assert torch.equal(drawn["streaming_llm"].pixels == p.TAKEN, rule.expand(4, -1, -1))
    quest = drawn["quest"].pixels
    assert bool((quest[:, : p.PROMPT] != p.TAKEN).all()) and bool(((quest == p.READ) <= (j <= i)).all())
    taken = (quest[:, p.PROMPT :] == p.TAKEN).sum(-1)
    assert int(taken.max()) == 64 and int(taken.min()) > 48  # four pages of 16, the last one still growing
    assert bool((quest[0, p.PROMPT :, [3, 61, 150]] == p.TAKEN).all())  # the keys that head 0 looks at
    kept = drawn["snapkv"].pixels[:, p.PROMPT :] == p.TAKEN
    assert bool((kept[:, 0].sum(-1) == 48 + 1).all())  # the capacity, and the token itself
    assert bool((kept[:, 1:] | ~kept[:, :-1]).all())  # an entry that stays stays
    assert torch.equal(kept[0], kept[1]) and not torch.equal(kept[1], kept[2])  # a list per kv head


def test_a_method_that_leaves_nothing_out_has_no_picture(drawn):
    assert drawn["dense"] is None and all((d.pixels == 1).any() for d in drawn.values() if d is not None)


# ---------------------------------------------------------------------- figures
def test_rows_of_a_method_are_found_by_its_whole_name(pages):
    assert pages.names("prefill=hip:k=64+quest@8k", "hip") and pages.names("quest: update, pages of 16", "quest")
    assert not pages.names("chip", "hip") and not pages.names("spargeattn@8k", "act") and not pages.names("x-quest", "quest")
    assert pages.names("dense", "dense") and not pages.names("dense, cuDNN", "dense")


def test_figures_come_from_the_results(pages):
    found = pages.results()
    text = "\n".join(pages.measured("quest", found))
    row = next(r for r in found["cpu_compare"]["rows"] if r["recipe"] == "quest@8k")
    assert f"| `quest@8k` | {row['first_token']:.2f} s | {row['tokens_per_second']:.1f}/s |" in text
    assert "minference" not in text and "| dense | b 1, n 32768 |" in text and "| 4,096 | `dense` |" in text
    assert pages.measured("no_such_method", found) == []


# ---------------------------------------------------------------------- the terminal
def call(*args: str):
    return CliRunner().invoke(app, ["methods", *args])


@pytest.mark.parametrize("name", METHODS)
def test_the_terminal_shows_the_same_facts(name):
    e, got = entry(name), call(name)
    assert got.exit_code == 0, got.output
    words = " ".join(got.stdout.split())
    assert e.title and e.line and e.paper and (e.text or name == "dense")
    for text in (e.line, e.paper, *e.use, *e.avoid, *(o.name for o in e.options), *(o.help for o in e.options)):
        assert " ".join(text.split()) in words, text
    assert json.loads(call(name, "--json").stdout)["id"] == name
    assert not any("|" in o.values + o.help for o in e.options)  # which would end a cell of the page's table


def test_facts_are_those_of_the_class():
    e = entry("quest")
    assert e.title == "Quest" and e.roles == get("quest").roles and e.presets["8k"]["budget"] == 1024
    page = next(o for o in e.options if o.name == "page")
    assert page.default == 16 and page.values == "int, at least 1" and page.help == "tokens of a page"
    assert any("2,048 tokens" in text for text in e.avoid) and any("share=group" in text for text in e.use)
    assert any("calibrate flexprefill" in text for text in entry("flexprefill").use) is bool(get("flexprefill").knob)
    assert [shown(v) for v in (None, True, 0.5, 1, "x")] == ["none", "true", "0.5", "1", "x"]


def test_an_unknown_method_is_one_line():
    got = call("qest")
    assert got.exit_code == 2 and "did you mean" in got.stderr and len(got.stderr.strip().split("\n")) == 1
    with pytest.raises(ConfigError, match="qest"):
        entry("qest")
