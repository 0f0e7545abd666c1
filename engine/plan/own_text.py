"""What it takes that the model writes text of its own (:mod:`engine.evaluation.own_text`): memory and time.

The whole model is in memory for once, and beside it keys, values and logits of the documents that are written
at a time: as many as fit into half of what is free, since a step is not much slower for many than for few.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from engine.architecture.families import Architecture
from engine.config.calibration import shared_out, texts_of
from engine.config.run import RunConfig
from engine.config.stages import STAGES, learns_answers
from engine.plan.estimate import Workload
from engine.plan.rates import Speed, load_seconds

DOCUMENT_TOKENS = 256
"""A document has at most this many tokens."""
MOST_DOCUMENTS = 5120
"""So many are written at a time at most: beyond it a step takes longer for more."""
LEAST_DOCUMENTS = 64
"""So few, where memory is short."""
_LOGIT_BYTES = 20
"""Of a logit and its copies while a token is drawn: as it is, float32, probabilities, their sum."""


class Written(NamedTuple):
    """Windows of one length that a run needs of the model's own text."""

    train: int
    validation: int


def own_text_windows(config: RunConfig) -> Mapping[int, Written]:
    """By length; each stage takes of them from the first on. Empty where no text is the model's own."""
    texts = texts_of(config.data)
    mine = [index for index, text in enumerate(texts) if text.data.is_own]
    found: dict[int, Written] = {}
    for stage in STAGES:
        section = getattr(config, stage.name, None)
        reads = stage.reads_text and stage.wanted(config) and not learns_answers(config, stage)
        if not mine or not reads or section is None:
            continue
        train, validation = (
            shared_out(texts, count)[mine[0]] for count in (section.sequences, section.val_sequences)
        )
        before = found.get(section.sequence_length, Written(0, 0))
        found[section.sequence_length] = Written(max(before.train, train), max(before.validation, validation))
    return {length: written for length, written in found.items() if sum(written)}


def document_bytes(arch: Architecture, model_bytes: int) -> int:
    """Of one document while it is written: keys and values, twice those of a block, and logits."""
    cache = 2 * (arch.blocks + 1) * arch.kv_heads * arch.head_dim * DOCUMENT_TOKENS * model_bytes
    return cache + _LOGIT_BYTES * arch.vocab


def documents_at_a_time(each: int, free: int) -> int:
    """How many documents of ``each`` so many bytes are written together where so much is ``free``."""
    return max(LEAST_DOCUMENTS, min(MOST_DOCUMENTS, free // 2 // each))


def _documents(config: RunConfig) -> int:
    return sum(sum(n) * -(-length // DOCUMENT_TOKENS) for length, n in own_text_windows(config).items())


def _blocks_bytes(work: Workload) -> int:
    return work.arch.blocks * work.arch.params_per_block * work.model_bytes


def documents_here(work: Workload, free: int) -> int:
    """How many documents are written at a time where so many bytes are ``free``."""
    return documents_at_a_time(document_bytes(work.arch, work.model_bytes), free - _blocks_bytes(work))


def writing_memory(work: Workload) -> dict[str, int]:
    """What is there while text is written; empty where none is."""
    count = min(work.documents or LEAST_DOCUMENTS, _documents(work.asked))
    if not count:
        return {}
    blocks = _blocks_bytes(work)
    return {"all blocks": blocks, "text being written": count * document_bytes(work.arch, work.model_bytes)}


def writing_seconds(work: Workload, rates: Speed, stored_bytes: int) -> float:
    """Steps of all documents, at launches or at what is moved and computed."""
    documents, arch = _documents(work.asked), work.arch
    if not documents:
        return 0.0
    steps = DOCUMENT_TOKENS * math.ceil(documents / (work.documents or MOST_DOCUMENTS))
    flops = 2 * documents * DOCUMENT_TOKENS * arch.params / rates.flops
    moved = documents * DOCUMENT_TOKENS * document_bytes(arch, work.model_bytes)
    launch = rates.generating_launch if arch.eager_attention else rates.writing_launch
    written = flops + steps * arch.blocks * launch + moved * rates.writing_per_byte
    return load_seconds(arch, stored_bytes) + written


def own_text_bytes(config: RunConfig) -> int:
    """Of the file that a run keeps."""
    return sum(4 * length * sum(count) for length, count in own_text_windows(config).items())
