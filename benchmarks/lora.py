"""What 16-bit LoRA learns of the conversations that a quantized model learns the answers of.

    python benchmarks/lora.py MODEL --source alpaca.json --sequences 2048 --epochs 2

MODEL is a folder in Hugging Face's form. The conversations are those of a run with ``instructions.source``
and ``instructions.packing=false``, of the same seed and sizes; so is what is measured, the perplexity of
held-out answers, which for the model as it came must be the run's own figure. peft (which a user of eqat does
not need) has the adapters, on every linear of the blocks, with AdamW and a cosine schedule.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parent))
from common import DEVICE, dtype, peak_gib, reset_peak, synchronize, table, where

from engine.config.instructions import InstructionsConfig
from engine.data.encoding import Encoder
from engine.data.packing import Answers
from engine.phases.instructions import Conversations, InstructionWindows

AT_A_TIME = 16


def mean_nll(model: Any, tokens_BT: Tensor, answers: Answers) -> tuple[Tensor, int]:
    """The sum of -log p over the answers' tokens, and how many they are."""
    predicts_BT = answers.predicts_NT.to(DEVICE)
    ids_BT = tokens_BT.to(DEVICE)
    logits_AV = model(input_ids=ids_BT).logits[predicts_BT].float()
    labels_A = ids_BT.roll(-1, 1)[predicts_BT]
    return functional.cross_entropy(logits_AV, labels_A, reduction="sum"), len(labels_A)


@torch.no_grad()
def answer_perplexity(model: Any, held_out: Conversations) -> float:
    total, count = 0.0, 0
    for start in range(0, len(held_out.tokens_NT), AT_A_TIME):
        rows = slice(start, start + AT_A_TIME)
        nll, tokens = mean_nll(model, held_out.tokens_NT[rows], held_out.answers[rows])
        total, count = total + nll.item(), count + tokens
    return math.exp(total / count)


def train(model: Any, taught: Conversations, args: argparse.Namespace) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=0.0)
    count = len(taught.tokens_NT)
    steps = args.epochs * count // args.batch
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / (0.03 * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps)),
    )
    order = torch.Generator().manual_seed(args.seed)
    for _ in range(args.epochs):
        for rows in torch.randperm(count, generator=order).split(args.batch):
            nll, tokens = mean_nll(model, taught.tokens_NT[rows], taught.answers[rows])
            (nll / tokens).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("model")
    parser.add_argument("--source", required=True, help="conversations, as instructions.source names them")
    parser.add_argument("--sequences", type=int, default=2048)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--held-out", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(args.seed)
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype()).to(DEVICE)
    encoder = Encoder(
        AutoTokenizer.from_pretrained(args.model), rows=model.get_input_embeddings().weight.shape[0]
    )
    config = InstructionsConfig(source=args.source, packing=False, evaluation_sequences=args.held_out)
    windows = InstructionWindows(config, encoder, args.seed, lambda code, message: None)
    taught = windows.draw("train", args.sequences, args.length)
    held_out = windows.draw("evaluation", args.held_out, args.length)
    before = answer_perplexity(model, held_out)
    how = LoraConfig(
        r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, how)
    model.print_trainable_parameters()
    reset_peak()
    begun = time.monotonic()
    train(model, taught, args)
    synchronize()
    took = time.monotonic() - begun
    after = answer_perplexity(model, held_out)
    cells = [str(args.rank), f"{args.lr:g}", str(args.sequences), str(args.epochs)]
    cells += [f"{before:.3f}", f"{after:.3f}", f"{took:.0f}", f"{peak_gib():.1f}"]
    table("rank | rate | conversations | epochs | before | after | seconds | peak GiB", [cells])
    print(f"{args.model}, batch {args.batch}, length {args.length}, seed {args.seed}; {where()}")


if __name__ == "__main__":
    main()
