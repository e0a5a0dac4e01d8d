import gc
import os
from collections import Counter

import torch

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)  # two workers share the two cores of CI

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.interpreter import quicken

    quicken()


def pytest_collection_modifyitems(items):
    """Long files first, so that no worker is alone with one at the end. `make test` hands out files in this order.

    A run in Triton's interpreter or of the real model counts as 60 tests, one that needs a GPU as none.
    """
    size = Counter()
    for item in items:
        long = item.name == "test_in_the_interpreter" or item.get_closest_marker("model")
        size[item.path] += 0 if item.path.parent.name == "gpu" else 60 if long else 1
    items.sort(key=lambda item: -size[item.path])


def pytest_collection_finish():
    """What was imported lives to the end: the garbage collector need not look at it again and again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()
