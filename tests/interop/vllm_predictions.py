"""What vLLM predicts with an export: run by the Python of its environment, which has nothing of ours.

``python vllm_predictions.py IDS.json OUT EXPORT...``: of every token of every window the likeliest one, and
the log-probability of the one that is there; then what is written after the first few. Each export gets
``OUT/<its name>.json``.

vLLM's kernel of packed weights wants AVX-512. Where the processor has none, its place is taken by a product
of torch's with the words that vLLM has read and arranged for that kernel: this tries all of vLLM but the
kernel, and ``kernel`` says so.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
)


def product(
    input: Any,  # as vLLM calls it
    q_weight: Any,
    scales: Any,
    zeros: Any,
    bias: Any,
    pack_factor: int,
    isa_hint: str,
) -> Any:
    """``input @ ((q - z) * s)``, of words in blocks of 16 outputs: ``[O/16, I * 2]``."""
    import torch

    def fields(words: Any) -> Any:
        shifts = torch.arange(0, 32, 4, dtype=torch.int32)
        return ((words[..., None] >> shifts) & 15).flatten(-2).float()

    inputs, (groups, outputs) = input.shape[-1], scales.shape
    codes_IO = fields(q_weight.view(outputs // 16, inputs, 2)).permute(1, 0, 2).reshape(inputs, outputs)
    codes_GSO = codes_IO.view(groups, -1, outputs)
    middle = 8.0 if zeros is None else fields(zeros)[:, None]
    weight_IO = ((codes_GSO - middle) * scales.float()[:, None]).reshape(inputs, outputs)
    made = input.float() @ weight_IO
    return (made if bias is None else made + bias.float()).to(input.dtype)


def predictions(folder: str, asked: dict[str, Any]) -> dict[str, Any]:
    import vllm

    windows = asked["windows"]
    model = vllm.LLM(model=folder, dtype="float16", enforce_eager=True, max_model_len=1 + len(windows[0]))
    # What comes after the last token is not asked for, and one has to be made.
    scored = vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    best, logprobs = [], []
    for answer in model.generate([{"prompt_token_ids": each} for each in windows], scored, use_tqdm=False):
        places = answer.prompt_logprobs[1:]
        best.append([min(place, key=lambda token: place[token].rank) for place in places])
        ids = answer.prompt_token_ids[1:]
        logprobs.append([place[token].logprob for token, place in zip(ids, places, strict=True)])
    starts = [{"prompt_token_ids": each[: asked["prompt"]]} for each in windows]
    plain = vllm.SamplingParams(temperature=0, max_tokens=asked["new"], ignore_eos=True)
    written = [list(answer.outputs[0].token_ids) for answer in model.generate(starts, plain, use_tqdm=False)]
    return {"best": best, "logprobs": logprobs, "written": written}


def main(ids: Path, out: Path, *folders: Path) -> None:
    import torch
    import vllm
    from vllm import _custom_ops

    kernel = hasattr(torch.ops._C, "cpu_gemm_wna16")
    if not kernel:
        _custom_ops.cpu_gemm_wna16 = product
    asked = json.loads(ids.read_text())
    for folder in folders:
        found = predictions(str(folder), asked)
        said = {"version": vllm.__version__, "kernel": kernel, **found}
        (out / f"{folder.name}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
