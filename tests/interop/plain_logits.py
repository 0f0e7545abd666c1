"""Logits of a gptq_v2 export by code that is not ours: numpy unpacks, the transformers there is computes.

``python plain_logits.py EXPORT IDS.json OUT.json`` in a process of its own, so that the release of
transformers is the caller's choice (PYTHONPATH).
"""

from __future__ import annotations

import json
import sys
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


def main(folder: Path, ids: Path, out: Path) -> None:
    said = json.loads((folder / "config.json").read_text())
    bits = said.pop("quantization_config")["bits"]
    plain = out.with_suffix(".plain")
    plain.mkdir()
    (plain / "config.json").write_text(json.dumps(said))
    save_file(weights(folder, bits), plain / "model.safetensors", {"format": "pt"})
    # Each release has names of its own for tensors; what it does not find would be random.
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        plain, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(loading.values()), loading
    with torch.no_grad():
        logits = model(torch.tensor(json.loads(ids.read_text()))).logits
    out.write_text(json.dumps({"version": transformers.__version__, "logits": logits.tolist()}))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
