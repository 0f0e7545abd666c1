"""Exports through PyTorch: unpacked to 16 bits, or as transformers and the library of a format compute with
them.

The row of 16 bits is transformers' own model, filled with what an export holds by eqat's reader of its
format. So there is one of every run, it predicts what the packed ones should predict, and it is as large and
as fast as the original. It computes in the type that the export declares, and in bfloat16 where that is of 32
bits.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from engine.bench.measuring import GPUMemory, HostMemory, Memory
from engine.export.layout import form_of
from engine.export.stored import dtype_name
from engine.process import choose_device
from engine.run.benched import Request

HALVES = (torch.bfloat16, torch.float16)


class TorchModel:
    """A causal language model of transformers, with a cache of keys and values."""

    precision: str

    def __init__(self, request: Request) -> None:
        place = choose_device(request.device)
        if place.type == "cuda":
            torch.cuda.set_device(place)
        self.device = torch.cuda.get_device_name(place) if place.type == "cuda" else "cpu"
        self._place = place
        self.model: Any = self.load(request, place)
        self.precision = dtype_name(self.model.dtype)
        self._cache: Any = None
        last = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        self._options: dict[str, Any] = {"logits_to_keep": 1} if last else {}

    def load(self, request: Request, place: torch.device) -> Any:
        """The model in the request's folder."""
        raise NotImplementedError

    @staticmethod
    def memory(device: str) -> Memory:
        """Where the model is going to be; asked before it is loaded."""
        place = choose_device(device)
        if place.type != "cuda":
            return HostMemory()
        torch.cuda.set_device(place)
        return GPUMemory()

    def prefill(self, prompt: Sequence[int]) -> int:
        self._cache = None
        return self._read(prompt)

    def decode(self, token: int) -> int:
        return self._read([token])

    @torch.no_grad()
    def _read(self, tokens: Sequence[int]) -> int:
        ids_1T = torch.tensor([list(tokens)], device=self._place)
        out = self.model(
            input_ids=ids_1T, past_key_values=self._cache, use_cache=True, return_dict=True, **self._options
        )
        self._cache = out.past_key_values
        return int(out.logits[0, -1].argmax())


class Dequantized(TorchModel):
    """Any export, its weights as numbers of 16 bits."""

    def load(self, request: Request, place: torch.device) -> Any:
        form, folder = form_of(request.format), Path(request.folder)
        code = request.trust_remote_code
        lm = form.open(folder, place, torch.bfloat16, trust_remote_code=code)
        declared = form.declared(lm, torch.bfloat16)
        if declared in HALVES and declared != lm.dtype:
            lm = form.open(folder, place, declared, trust_remote_code=code)
        # In one piece for as long as the process lives.
        self._whole = contextlib.ExitStack()
        return self._whole.enter_context(lm.whole(lm.load_block)).eval()


class Packed(TorchModel):
    """An export that transformers and the library of its format compute with as it is packed."""

    def load(self, request: Request, place: torch.device) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(
            request.folder, device_map=str(place), trust_remote_code=request.trust_remote_code
        ).eval()
