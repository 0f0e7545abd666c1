"""The two matrices that are as long as the vocabulary: the input embedding and the output head.

They may be one (tied), and at a few hundred million weights they are most of a small model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.errors import PreflightError

if TYPE_CHECKING:
    from engine.models.causal_lm import CausalLM


def head_names(lm: CausalLM) -> tuple[str, ...]:
    """Names of the embedding and of a head of its own, as those of linears are: without ``.weight``.

    Raises:
        PreflightError: for a model in which either is no plain matrix of that name.
    """
    names = {id(parameter): name for name, parameter in lm.model.named_parameters()}
    found: list[str] = []
    for what, module in (
        ("embedding", lm.model.get_input_embeddings()),
        ("head", lm.model.get_output_embeddings()),
    ):
        weight = getattr(module, "weight", None)
        name = names.get(id(weight), "")
        if weight is None or weight.ndim != 2 or not name.endswith(".weight"):
            raise PreflightError(
                f"this model has no {what} that is one matrix", where="grid.head_bits", hint="set it to 0"
            )
        found.append(name.removesuffix(".weight"))
    return tuple(dict.fromkeys(found))
