"""Which stored tensor each tensor of a model is read from, found as transformers finds it.

Checkpoints are older than the classes that read them. transformers therefore renames while it loads, by a
table of its own for each model (``conversion_mapping.py``): Pythia's ``embed_out`` is ``lm_head`` today. Its
table and its function are asked here, with the names alone, so that we read what it would read, and nothing
else: a tensor that is not in the model's ``state_dict`` (a rotary table, a mask, a layer more than the model
has) is never loaded, whatever it is called. When it saves, transformers undoes the renaming, and so does an
export.

transformers also makes some tensors out of others (it merges the weights of experts). Those are no renaming:
a model that needs one is refused by its name.

A language model that is part of a larger one is the one case that transformers does not load by itself; there
the part's own prefix comes before its table (:data:`PARTS`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

PARTS: tuple[tuple[tuple[str, str], ...], ...] = (
    (),
    (("language_model.model.", "model."), ("language_model.lm_head.", "lm_head.")),
    (("model.language_model.", "model."),),
    (("model.text_model.", "model."),),
)
"""What a language model's names begin with in a checkpoint, and in the model itself: the same; the text part
of a multimodal checkpoint, in the old, the new and a rarer order of words."""


class Leftover(NamedTuple):
    """A stored tensor that the model does not ask for."""

    stored: str
    name: str
    """What it would be called beside the model's own tensors: the name of a part without the whole."""
    place: str
    """The name under which transformers looks for it in the model."""
    inside: bool
    """Its prefix says that it lies within the language model, should that be part of a larger one."""


class TensorNames:
    """The names of a model's tensors in a checkpoint."""

    def __init__(self, model: PreTrainedModel, stored: Iterable[str]) -> None:
        wanted = dict.fromkeys(model.state_dict(), True)
        names = sorted(stored, key=dot_natural_key)
        found = [_Match(model, wanted, names, part) for part in PARTS]
        best = max(found, key=lambda match: len(match.stored))
        self.stored: Mapping[str, str] = best.stored
        """By the model's name; of two that would become the same tensor, the one that transformers takes."""
        self.converted: Mapping[str, str] = best.converted
        """Tensors that transformers would make out of others, and what it would do."""
        self.leftovers: Sequence[Leftover] = best.leftovers
        self._reversed = best.reversed()
        self._forward = best

    def exported(self, name: str) -> str:
        """What an export calls the model's tensor ``name``: what transformers would save it as."""
        renamed, _ = rename_source_key(name, self._reversed, [], reverse=True)
        return renamed if self._forward.place(renamed)[0] == name else name

    def exported_linear(self, name: str) -> str:
        """What an export calls a linear; its codes and scales are called after its weight."""
        weight = self.exported(f"{name}.weight")
        return weight.removesuffix(".weight") if weight.endswith(".weight") else name


class _Match:
    """The stored names as they fall into place where the model is a certain part of the checkpoint."""

    def __init__(
        self,
        model: PreTrainedModel,
        wanted: dict[str, bool],
        names: Sequence[str],
        part: tuple[tuple[str, str], ...],
    ) -> None:
        # The names of the oldest releases are read, but not given to what is new.
        transforms: list[Any] = get_model_conversion_mapping(model, add_legacy=bool(names))
        self._renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
        self._converters = [each for each in transforms if isinstance(each, WeightConverter)]
        self._prefix, self._wanted, self._made_anew = model.base_model_prefix, wanted, not names
        self.stored: dict[str, str] = {}
        self.converted: dict[str, str] = {}
        self.leftovers: list[Leftover] = []
        for name in names:
            own = _own_name(name, part)
            place, operation = self.place(own)
            if place not in wanted or place in self.stored:
                self.leftovers.append(Leftover(name, own, place, not name == own == place))
            elif operation:
                self.converted[place] = operation
            else:
                self.stored[place] = name

    def place(self, name: str) -> tuple[str, str]:
        """Where transformers puts a stored tensor, and what it does with it besides renaming."""
        place, pattern = rename_source_key(
            name, self._renamings, self._converters, self._prefix, self._wanted
        )
        if place not in self._wanted and name in self._wanted:
            # It has its name already, whatever an older one would have become.
            place, pattern = name, None
        if pattern is None:
            return place, ""
        converter = next(each for each in self._converters if pattern in each.source_patterns)
        return place, " and ".join(type(operation).__name__ for operation in converter.operations)

    def reversed(self) -> list[WeightRenaming]:
        """The renamings that were used, undone; those of a new model, where there was nothing to rename."""
        used = [each for each in self._renamings if each.was_used()]
        if self._made_anew:
            used = [each for each in self._renamings if not isinstance(each, PrefixChange)]
        return [each.reverse_transform() for each in reversed(used)]


def _own_name(name: str, part: tuple[tuple[str, str], ...]) -> str:
    for stored, own in part:
        if name.startswith(stored):
            return own + name.removeprefix(stored)
    return name
