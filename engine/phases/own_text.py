"""The model's own text for a run: written once, and kept with the run.

A run goes on only with the text that it began with (:mod:`engine.checkpoints.identity`), and no two devices
write the same. So what was written lies in the run's directory as long as that does; and in the user's cache,
so that the next run of the same model need not write it again.

A file is named by what decided the text: one that other settings would make never takes its place, and who
takes the settings back finds it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor

from engine import telemetry
from engine.config.run import RunConfig
from engine.data.encoding import Encoder
from engine.data.parts import Part
from engine.data.tokens import load_windows, store_windows, windows_file
from engine.evaluation.own_text import own_windows
from engine.evaluation.room import free_for_blocks
from engine.models.causal_lm import CausalLM
from engine.plan.machine import Machine
from engine.plan.own_text import (
    DOCUMENT_TOKENS,
    LEAST_DOCUMENTS,
    Written,
    document_bytes,
    documents_at_a_time,
    own_text_windows,
)
from engine.plan.plan import described
from engine.reporter import Reporter
from engine.run.directory import RunDirectory
from engine.system.files import atomic_write
from engine.system.user_cache import token_cache

FIRST_TOKEN_SILENCE = 600
"""Seconds that may pass unheard until the first token: all blocks are read before it."""
_SCHEME = 1  # raise it when the same model would write another text: old cache entries then die out


class OwnText:
    """The windows of a run's stages, out of what its model wrote; nothing is written before it is wanted."""

    def __init__(
        self,
        run: RunDirectory,
        config: RunConfig,
        lm: CausalLM,
        encoder: Encoder,
        made_from: Mapping[str, str],
        machine: Machine,
        report: Reporter,
    ) -> None:
        """``made_from`` are digests of the model and its tokenizer."""
        self.run, self.config, self.lm, self.encoder = run, config, lm, encoder
        self.made_from, self.machine, self.report = dict(made_from), machine, report
        self._wanted = own_text_windows(config)
        self._written: dict[int, Tensor] = {}

    def windows(self, part: Part, sequences: int, length: int) -> Tensor:
        """So many for a stage, int64 ``[sequences, length]``: those of every stage begin with the same ones,
        and those that validate are never among those that are trained on."""
        if length not in self._written:
            self._written[length] = self._all(length)
        first = 0 if part == "train" else self._wanted[length].train
        return self._written[length][first : first + sequences]

    def _all(self, length: int) -> Tensor:
        report, count = self.report, self._wanted[length]
        key = self._key(length, count)
        kept, cached = self.run.own_text(key), token_cache() / f"{key}.safetensors"
        for path in (kept, cached):
            found = load_windows(path, length, report.warning)
            if found is not None:
                windows = found[0]
                break
        else:
            windows = self._write(length, count).to(torch.int32)
        about = self.made_from
        if not cached.is_file():
            store_windows(cached, windows, about, [], report.warning)
        if not kept.is_file() or path != kept:
            atomic_write(kept, windows_file(windows, about, []), root=self.run.path)
        return windows.to(torch.int64)

    def _write(self, length: int, count: Written) -> Tensor:
        lm, report = self.lm, self.report
        each = document_bytes(described(self.config).architecture, lm.dtype.itemsize)
        free, _ = free_for_blocks(self.config, lm.device, self.machine)
        documents = documents_at_a_time(each, free - lm.blocks_bytes())
        wanted = sum(count) * -(-length // DOCUMENT_TOKENS)
        before = report.doing
        while True:
            report.doing = "writing text with the model"
            report.expect_silence(FIRST_TOKEN_SILENCE)
            try:
                return own_windows(
                    lm,
                    self.encoder,
                    windows=sum(count),
                    length=length,
                    seed=self.config.runtime.seed,
                    documents=documents,
                    reserve=min(documents, wanted) * each,
                    told=self._told,
                )
            except torch.OutOfMemoryError:
                if documents <= LEAST_DOCUMENTS:
                    raise
                documents = max(LEAST_DOCUMENTS, documents // 2)
            finally:
                report.doing = before
                report.step(0, 0)
                telemetry.release_memory()

    def _told(self, done: int, total: int) -> None:
        self.report.beat()
        self.report.step(done, total)

    def _key(self, length: int, count: Written) -> str:
        decides = {
            "own text": _SCHEME,
            **self.made_from,
            "begin": self.encoder.begin,
            "windows": count,
            "length": length,
            "document": DOCUMENT_TOKENS,
            "seed": self.config.runtime.seed,
        }
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:40]
