"""The shared policy of methods that reuse a selection: when it is made anew, and what an old one still covers."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from foveate.cache.fixed import fix
from foveate.layout import Layout
from foveate.methods.base import Method
from foveate.recipe import Recipe
from foveate.reuse import Held, Refresh
from tests.drive import Drive, qkv


@dataclass(frozen=True)
class Newest(Method):
    """Selects the first entry and the newest one, by `policy`."""

    policy: Refresh

    id = "newest"
    roles = ("decode",)
    evicted_ok = True

    def plan(self, x, state):
        if not self.policy.due(x, state, "newest"):
            return self.policy.again(x, state, "newest")
        here = (x.kv.positions() == x.q_pos[:, None]) & x.kv.exists()
        last = here.int().argmax(-1).to(torch.int32)[..., None, None]
        tiles = torch.cat([torch.zeros_like(last), last], -1)
        count = torch.full_like(tiles[..., 0], 2)
        layout = Layout(x.shape, tile_width=1, q_pos=x.layout_pos(), tiles=tiles, tile_count=count)
        return self.policy.keep(x, state, "newest", layout)


def seen(drive) -> set[int]:
    x, plan, _ = drive.last
    mask = plan.to_mask(x.kv)[0, 0, 0] & x.kv.exists()[0, 0]
    return set(x.kv.positions()[0, 0][mask].tolist())


def steps(policy, n, cache=None, start=40):
    q, k, v = qkv(1, 4, 2, start + n)
    drive = Drive(Recipe(decode=Newest(policy), cache=cache))
    drive(*(t[:, :, :start] for t in (q, k, v)))
    for t in range(start, start + n):
        drive(*(x[:, :, t : t + 1] for x in (q, k, v)))
        yield t, drive


def test_selected_every_third_step_and_nothing_appended_since_is_missed():
    chosen = 40
    for t, drive in steps(Refresh(3), 9):
        chosen = t if (t - 40) % 3 == 0 else chosen
        assert seen(drive) == {0} | set(range(chosen, t + 1))


def test_a_full_ring_still_gets_its_new_tokens():
    """The ring's length stands still; slot 0 is a sink."""
    for t, drive in steps(Refresh(4), 12, cache="streaming_llm:sink=2,window=10"):
        since = (t - 40) % 4
        assert set(range(t - since, t + 1)) <= seen(drive)


@pytest.mark.parametrize("similarity,anew", [(1.1, True), (-1.1, False)])
def test_by_similarity(similarity, anew):
    for t, drive in steps(Refresh(100, similarity), 5):
        assert seen(drive) == ({0, t} if anew else {0} | set(range(40, t + 1)))


def test_a_selection_stays_where_it_is():
    """A captured step reads the memory of the first selection: later ones are written there."""
    places = set()
    for t, drive in steps(Refresh(2), 8):
        if t == 40:
            drive.cache.store = fix(drive.cache.store, drive.cache.seen)
            continue
        held = drive.cache.batch["newest"]
        places.add((held.layout.tiles.data_ptr(), held.length.data_ptr()))
    assert len(places) == 2  # made before the store was fixed, and for good
    fork = held.fork()
    assert isinstance(fork, Held) and fork.layout.tiles.data_ptr() != held.layout.tiles.data_ptr()


def test_beams_and_rollbacks_select_anew():
    for change in (lambda c: c.reorder(torch.tensor([0])), lambda c: c.truncate(2)):
        for _, drive in steps(Refresh(100), 6):
            pass
        assert len(seen(drive)) == 7
        change(drive.cache)
        drive(*qkv(1, 4, 2, 1, seed=5))
        assert len(seen(drive)) == 2
