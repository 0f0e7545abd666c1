"""Logits of a gptq_v2 export by code that is not ours: numpy unpacks, the transformers there is computes.

``python plain_logits.py IDS.json OUT EXPORT...`` in a process of its own, so that the release of transformers
is the caller's choice (PYTHONPATH). Each export gets ``OUT/<its name>.json``: logits, or what went wrong.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file


def unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """The little-endian stream of ``bits``-wide numbers along each row."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
    fields = stream.reshape(len(words), -1, bits)
    return (fields << np.arange(bits, dtype=np.uint8)).sum(-1, dtype=np.int32)


def weights(folder: Path, bits: int) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors.update(load_file(file))
    plain = {}
    for name, tensor in tensors.items():
        prefix, _, last = name.rpartition(".")
        if last == "qweight":
            codes = unpacked(tensor.T.numpy(), bits)
            zeros = unpacked(tensors[f"{prefix}.qzeros"].numpy(), bits).T
            scales = tensors[f"{prefix}.scales"].T.float().numpy()
            group = tensors[f"{prefix}.g_idx"].numpy()
            weight = (codes - zeros[:, group]) * scales[:, group]
            plain[f"{prefix}.weight"] = torch.from_numpy(weight).contiguous()
        elif last not in ("qzeros", "scales", "g_idx"):
            plain[name] = tensor.float()
    return plain


def logits_of(folder: Path, ids: torch.Tensor, plain: Path) -> torch.Tensor:
    """Those of the dequantized model, which is written to ``plain`` first."""
    said = json.loads((folder / "config.json").read_text())
    bits = said.pop("quantization_config")["bits"]
    plain.mkdir()
    (plain / "config.json").write_text(json.dumps(said))
    save_file(weights(folder, bits), plain / "model.safetensors", {"format": "pt"})
    # Each release has names of its own for tensors; what it does not find would be random.
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        plain, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(loading.values()), loading
    with torch.no_grad():
        return model(ids).logits


def main(ids: Path, out: Path, *folders: Path) -> None:
    tokens = torch.tensor(json.loads(ids.read_text()))
    for folder in folders:
        found: dict[str, object] = {"version": transformers.__version__}
        try:
            found["logits"] = logits_of(folder, tokens, out / f"{folder.name}-plain").tolist()
        except Exception:  # of this export; the others are read all the same
            found["error"] = traceback.format_exc()
        (out / f"{folder.name}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
