"""A recipe as a model of lm-evaluation-harness: any of its tasks runs under any recipe. And our results in its form.

    python -m foveate.evals.lm_eval run --model foveate --model_args pretrained=smollm2,recipe=snapkv --tasks ...

or, from Python, `lm_eval.simple_evaluate(model=FoveateLM(recipe="snapkv"), tasks=[...])`. The harness cannot express a
question that comes after the compression of its context: every figure of a cache policy there is "question seen".
"""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor

from ..adapters.transformers import use
from ..recipe import Recipe
from .results import COUNTS, Results
from .statistics import cells

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as err:  # the only module of Foveate that needs it
    raise ImportError("foveate.evals.lm_eval needs lm-evaluation-harness; pip install 'foveate[eval]'") from err

_LOG = logging.getLogger("foveate")


@register_model("foveate")
class FoveateLM(HFLM):  # type: ignore[misc]
    """The harness's own Hugging Face model, with a recipe on while it computes.

    Args:
        pretrained: whatever `foveate --model` takes, or a loaded transformers model (then `tokenizer` as well).
        recipe: text, or a `Recipe`. kernels: a kernel backend by name. Everything else is HFLM's.
    """

    def __init__(
        self,
        pretrained: Any = "smollm2",
        recipe: Recipe | str = "dense",
        kernels: str | None = None,
        tokenizer: Any = None,
        device: str | None = None,
        dtype: Any = "auto",
        **options: Any,
    ) -> None:
        self.foveate_recipe = Recipe.of(recipe)
        self.foveate_kernels = kernels
        self.foveate_warned = False
        if isinstance(pretrained, str):
            from ..models import load

            pretrained, tokenizer = load(pretrained, device=device or "auto", dtype=dtype)
        super().__init__(
            pretrained=pretrained,
            tokenizer=tokenizer,
            backend="causal",
            device=str(next(pretrained.parameters()).device),
            **options,
        )

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        if self.foveate_recipe.decode_only and not self.foveate_warned:
            _LOG.warning(
                "recipe %s acts in decode only; log-likelihood tasks never decode, so they measure dense attention",
                self.foveate_recipe,
            )
            self.foveate_warned = True
        with use(self.model, self.foveate_recipe, backend=self.foveate_kernels):
            return super()._model_call(inps, attn_mask, labels)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        with use(self.model, self.foveate_recipe, backend=self.foveate_kernels):
            return super()._model_generate(context, max_length, stop, **options)

    def get_model_info(self) -> dict[str, Any]:
        return {**super().get_model_info(), "recipe": self.foveate_recipe.describe()}


def export(results: Results, recipe: str) -> dict[str, Any]:
    """One recipe's scores as the harness writes results: `results[task]["LENGTH,PROTOCOL"]`, with standard errors.

    `recipe` is a recipe's name as it was asked for. Tasks where dense scores less than 60 % are there as well: what
    counts is for the reader of the harness's tables to decide, `meta.counts` says it.
    """
    found = [c for c in cells(results) if recipe in (c.recipe, c.settings)]
    table: dict[str, dict[str, Any]] = {}
    samples: dict[str, dict[str, int]] = {}
    for c in found:
        row = table.setdefault(c.task, {"alias": c.task})
        row[f"{c.length},{c.protocol}"] = c.mean
        row[f"{c.length}_stderr,{c.protocol}"] = (c.mean * (1 - c.mean) / max(1, c.n - 1)) ** 0.5
        samples[c.task] = {"original": c.n, "effective": c.n}
    return {
        "results": table,
        "n-samples": samples,
        "config": {"model": "foveate", "model_args": {"pretrained": results.facts["model"], "recipe": recipe}},
        "git_hash": results.facts.get("commit"),
        "meta": {"counts": COUNTS, "facts": results.facts},
    }


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    from foveate.evals import lm_eval as _registered  # noqa: F401  (run as a script, this module is not the one registered)

    cli_evaluate()
