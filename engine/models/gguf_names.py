"""What llama.cpp calls the tensors of a model, and what it changes in them; for reading and for writing.

Three things differ from transformers:

* names (``blk.3.attn_q.weight`` is ``model.layers.3.self_attn.q_proj.weight``);
* Llama's query and key rows, which llama.cpp permutes for its interleaved rotary embedding;
* Gemma's norm weights, which llama.cpp stores with the 1 added that transformers adds when computing.
"""

from __future__ import annotations

from torch import Tensor

ROPE_DIVISORS = "rope_freqs.weight"
"""What the rotary frequencies are divided by (Llama 3.1 and later): a tensor of the file alone."""


class GGUFNames:
    """The names and changes of one architecture of so many blocks."""

    def __init__(self, architecture: str, blocks: int) -> None:
        import gguf

        self.architecture = architecture
        arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
        self._map = gguf.get_tensor_name_map(arch, blocks)

    def stored(self, name: str) -> str:
        """GGUF name of a transformers parameter; empty when there is none."""
        base, _, suffix = name.rpartition(".")
        mapped = self._map.get_name(base) if suffix in ("weight", "bias") else None
        return f"{mapped}.{suffix}" if mapped is not None else ""

    def permuted_heads(self, stored: str, heads: int, kv_heads: int) -> int:
        """Heads whose rows lie in llama.cpp's order in the tensor it calls ``stored``; 0 where none do."""
        if self.architecture != "llama":
            return 0
        return heads if ".attn_q." in stored else kv_heads if ".attn_k." in stored else 0

    def added(self, stored: str) -> float:
        """What llama.cpp adds to the weights of that tensor."""
        return 1.0 if self.architecture in ("gemma2", "gemma3") and stored.endswith("norm.weight") else 0.0


def unpermute_rotary(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection in transformers' order.

    llama.cpp rotates neighbouring rows of a head (0 with 1), transformers those half a head apart
    (0 with d/2); llama.cpp's converter moved the rows accordingly, here they move back.
    """
    rest = weight.shape[1:]
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, half, 2, *rest).transpose(1, 2).reshape(weight.shape).contiguous()


def permute_rotary(weight: Tensor, heads: int) -> Tensor:
    """The rows in llama.cpp's order again."""
    rest = weight.shape[1:]
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, *rest).transpose(1, 2).reshape(weight.shape).contiguous()
