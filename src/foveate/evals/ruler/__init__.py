"""RULER: Hsieh et al. 2024, "RULER: What's the Real Context Size of Your Long-Context Language Models?" (arXiv 2404.06654).

Prompt templates are those of NVIDIA/RULER (Apache-2.0), word for word: scores depend on them. The generators are our own:
they draw from the same distributions, but sample i depends on its own seed alone, distractors never repeat a queried key
or an answer, and the filler grows in units of a sentence, a word or a list entry, so that a length is met within 1 %.

Eleven tasks need no data file (`RULER_11`); qa_1 and qa_2 need SQuAD and HotpotQA from the user. qa_synth_1 and qa_synth_2
stand in for them where there is no data; they are a suite of their own, "synth", so that no figure called RULER averages
them in.
"""

from __future__ import annotations

from ..task import Task
from .niah import NIAH
from .qa import QA
from .tracking import VT
from .words import CWE, FWE

RULER_11: tuple[str, ...] = (*(t.name for t in NIAH), VT.name, CWE.name, FWE.name)
TASKS: tuple[Task, ...] = (*NIAH, VT, CWE, FWE, *QA)
