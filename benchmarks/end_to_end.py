"""What training all blocks together brings, in many settings, each from the same blocks of one Block-AP.

    python benchmarks/end_to_end.py MODEL --data TEXT --held-out TEXT --bits 2 \\
        --try "e2e_qp" --try "e2e_qat lr_weight=0.01 epochs=8" --try "e2e_qat lr_weight=0.02 epochs=8"

MODEL is what ``model.source`` takes, TEXT what ``data.source`` takes: its part for training is trained on,
its part for evaluation measured. ``--tokens FILE`` takes windows of a safetensors file instead (``train``,
``e2e`` and ``val`` of one length, ``test`` in one row). ``--own-text`` adds as much text of the model's own
to both. The column "learnt" is of text that was trained on: how much of it is known by heart.

The streams lie on the device, and no run directory is made: what is measured is the methods alone, by the
engine's own code. ``--block-ap`` and ``--try`` set fields of the sections of the same name; of several
``--block-ap`` each is followed by every ``--try``, and so are blocks that are only rounded (``--rounded``);
``--once`` is a ``--try`` behind the first of them alone:

    --rounded --try "lr_qat rank=32 downcast=fixed" --try "e2e_qat start=latents train=weights,scales,norms"

Seconds include installing the blocks and compiling.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from common import (
    DEVICE,
    GIB,
    Marks,
    compile_passages,
    dtype,
    peak_gib,
    reset_peak,
    synchronize,
    table,
    where,
)
from safetensors.torch import load_file

from engine.config.block_ap import BlockAPConfig
from engine.config.data import DataConfig
from engine.config.e2e_qat import E2EQATConfig
from engine.config.e2e_qp import E2EQPConfig
from engine.config.grid import GridConfig
from engine.config.lr_qat import LRQATConfig
from engine.config.model import ModelConfig
from engine.config.overrides import apply_overrides
from engine.config.run import RunConfig
from engine.data.activations import ActivationStore, make_store
from engine.data.encoding import Encoder
from engine.data.tokens import token_windows
from engine.evaluation.own_text import own_windows
from engine.evaluation.perplexity import perplexity
from engine.methods.advance import Portions, advance
from engine.methods.blockwise.block_ap import train_block
from engine.methods.blockwise.reconstruction import Streams
from engine.methods.blockwise.rtn import round_to_nearest
from engine.methods.network.e2e_qat import train_weights
from engine.methods.network.e2e_qp import train_scales
from engine.methods.network.lr_qat import low_rank_linears, train_factors
from engine.methods.network.network import NetworkData
from engine.methods.network.norms import trained_norms
from engine.methods.network.teacher import Teacher
from engine.models.causal_lm import CausalLM
from engine.models.source import ModelSource
from engine.plan.own_text import documents_at_a_time
from engine.quant.downcast import upcast
from engine.quant.fake_linear import FakeQuantLinear, latent_linears, steps_of
from engine.quant.low_rank import Kernel
from engine.quant.packed import Kernels, PackedBlock
from engine.quant.slots import slots

FAST = DEVICE.type == "cuda"
AT_A_TIME = 16
"""Sequences that pass through blocks together."""
WRITTEN_BYTES = 6 << 20
"""What the writing of a document of the model's own text takes: SmolLM2's."""


class Made(NamedTuple):
    """A block, and what lies behind its integers."""

    packed: PackedBlock
    latents: dict[str, Tensor]
    """Float32, counted in grid steps."""


class Lab:
    """A model, its text, and what is done with them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.grid = args, GridConfig(bits=args.bits, group_size=args.group_size)
        source = ModelSource.open(ModelConfig(source=args.model))
        self.lm = CausalLM(source, DEVICE, dtype())
        if FAST:
            Kernels.switch_on(DEVICE)
            Kernel.switch_on(DEVICE)
            compile_passages(self.lm)
        self.encoder = Encoder(source.tokenizer(), rows=self.lm.vocab_size)
        self.blocks, self.network, self.val = self._text()
        self.measured = self._measured()

    def _windows(self, name: str, part: Any, count: int) -> Tensor:
        return token_windows(
            self.encoder,
            DataConfig(source=name),
            part,
            sequences=count,
            length=self.args.length,
            seed=self.args.seed,
        )

    def _text(self) -> tuple[Tensor, Tensor, Tensor]:
        """What blocks are trained on, what the network is, and what validates both."""
        args = self.args
        if args.tokens:
            found = load_file(args.tokens)
            train, more, val = (found[name].long() for name in ("train", "e2e", "val"))
        else:
            both = self._windows(args.data, "train", 2 * args.sequences)
            train, more = both[: args.sequences], both[args.sequences :]
            val = self._windows(args.data, "validation", args.val_sequences)
        network = torch.cat([train, more])
        if args.own_text:
            own = self._own(len(network))
            train, network = torch.cat([train, own[: len(train)]]), torch.cat([network, own])
        return train, network, val

    def _own(self, count: int) -> Tensor:
        begun = time.monotonic()
        memory = int(self.args.own_memory * GIB)
        documents = documents_at_a_time(WRITTEN_BYTES, memory)
        own = own_windows(
            self.lm,
            self.encoder,
            windows=count,
            length=self.args.length,
            seed=self.args.seed,
            documents=documents,
            reserve=memory // 2 if FAST else 0,
        )
        print(f"wrote {count} sequences in {time.monotonic() - begun:.1f} s", file=sys.stderr, flush=True)
        return own

    def _measured(self) -> dict[str, Tensor]:
        args = self.args
        if args.tokens:
            flat = load_file(args.tokens)["test"].long()
            own = flat[: len(flat) // args.length * args.length].view(-1, args.length)
        else:
            own = self._windows(args.data, "evaluation", args.windows)
        others = {Path(name).stem: self._windows(name, "evaluation", args.windows) for name in args.held_out}
        return {"its kind": own, **others, "learnt": self.blocks[: min(32, args.sequences)]}

    def perplexities(self, packed: list[PackedBlock] | None = None) -> list[float]:
        """Of the model as it came, or with these blocks."""

        def block(index: int) -> nn.Module:
            loaded = self.lm.load_block(index)
            return loaded if packed is None else packed[index].install(loaded)

        given = max(1, len(self.encoder.begin))
        return [
            perplexity(self.lm, block, windows, given=given, batch_size=AT_A_TIME).perplexity
            for windows in self.measured.values()
        ]

    def _store(self, tokens: Tensor) -> ActivationStore:
        store = make_store("device", (*tokens.shape, self.lm.hidden_size), dtype(), DEVICE)
        for start in range(0, len(tokens), AT_A_TIME):
            store.write(start, self.lm.embed(tokens[start : start + AT_A_TIME].to(DEVICE)))
        return store

    def _advance(self, index: int, block: nn.Module, store: ActivationStore) -> None:
        advance(self.lm, index, block, store, Portions(AT_A_TIME), dtype(), Marks())

    def rounded(self) -> list[Made]:
        """All blocks, rounded to nearest."""
        made = []
        for index in range(self.lm.blocks):
            block, again = (self.lm.load_block(index, dtype=torch.float32) for _ in range(2))
            packed = round_to_nearest(again, self.lm.linear_names(index), self.grid)
            latents = {
                slot.name: steps_of(slot.linear().weight.detach(), packed.linears[slot.name].scale)
                for slot in slots(block, packed.linears)
            }
            made.append(Made(packed, latents))
        return made

    def block_ap(self, changes: dict[str, Any]) -> list[Made]:
        """All blocks, trained one after the other."""
        config = BlockAPConfig(**changes).resolved(self.grid)
        config.check_on(self.grid, "block_ap")
        tokens = torch.cat([self.blocks, self.val])
        streams = Streams(self._store(tokens), self._store(tokens), len(self.blocks))
        made = []
        for index in range(self.lm.blocks):
            block = self.lm.load_block(index, dtype=torch.float32)
            self._advance(index, block, streams.full)
            arguments = (self.lm, index, block, streams, config, self.grid)
            seed = self.args.seed * 1_000_003 + index
            result = train_block(
                *arguments,
                seed=seed,
                dtype=dtype(),
                progress=Marks(),
                fast=FAST,
                compiles=FAST,
                keeps="float16",
            )
            self._advance(index, block, streams.quantized)
            latents = {
                name: upcast(result.latents[name].to(DEVICE), weight.zero_point, weight.grid)
                for name, weight in result.packed.linears.items()
            }
            made.append(Made(result.packed, latents))
        return made

    def teacher(self) -> Teacher:
        """The full-precision model's last hidden states on the network's text."""
        store = self._store(torch.cat([self.network, self.val]))
        for index in range(self.lm.blocks):
            self._advance(index, self.lm.load_block(index), store)
        return Teacher(store)

    def trained(
        self, kind: str, changes: dict[str, Any], before: list[Made], teacher: Teacher
    ) -> tuple[list[PackedBlock], int]:
        """The blocks after ``e2e_qp``, ``e2e_qat`` or ``lr_qat``, and its steps."""
        packed = [block.packed for block in before]
        data = NetworkData(torch.cat([self.network, self.val]), len(self.network), teacher)
        common: dict[str, Any] = {
            "seed": self.args.seed,
            "dtype": dtype(),
            "progress": Marks(),
            "recompute": False,
            "compiles": FAST,
            "records": FAST,
        }
        sizes = {"sequences": len(self.network), "val_sequences": len(self.val)}
        sizes["sequence_length"] = self.args.length
        blocks = [self.lm.load_block(index, dtype=dtype()) for index in range(self.lm.blocks)]
        if kind == "e2e_qp":
            for block, of_block in zip(blocks, packed, strict=True):
                of_block.install(block)
            scales = E2EQPConfig(**sizes, **changes).resolved(self.grid)
            result = train_scales(self.lm, blocks, data, scales, **common)
            made = [
                {name: block.get_submodule(name).packed() for name in of_block.linears}  # type: ignore[operator]
                for block, of_block in zip(blocks, packed, strict=True)
            ]
        elif kind == "e2e_qat":
            weights = E2EQATConfig(enabled=True, **sizes, **changes).resolved(self.grid)
            linears = self._linears(blocks, before, weights.start)
            result = train_weights(self.lm, blocks, data, weights, fast=FAST, **common)
            made = [{name: linear.freeze() for name, linear in named.items()} for named in linears]
        else:
            factors = LRQATConfig(enabled=True, **sizes, **changes).resolved(self.grid)
            latent = enumerate(self._linears(blocks, before, factors.start))
            low = [low_rank_linears(blocks[index], named, factors, index) for index, named in latent]
            result = train_factors(self.lm, blocks, data, factors, **common)
            made = [{name: linear.freeze() for name, linear in named.items()} for named in low]
        together = zip(made, packed, blocks, strict=True)
        after = [PackedBlock(new, {**old.others, **trained_norms(block)}) for new, old, block in together]
        return after, result.steps

    def _linears(
        self, blocks: list[nn.Module], before: list[Made], start: str
    ) -> list[dict[str, FakeQuantLinear]]:
        """The blocks' linears, counted in grid steps."""
        return [
            latent_linears(block, made.packed, made.latents if start == "latents" else None)
            for block, made in zip(blocks, before, strict=True)
        ]


def moved(before: list[PackedBlock], after: list[PackedBlock]) -> float:
    """Fraction of integers that are others."""
    pairs = [
        (one.linears[name].codes(), other.linears[name].codes())
        for one, other in zip(before, after, strict=True)
        for name in one.linears
    ]
    return sum(int((a.cpu() != b.cpu()).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)


def settings(section: str, words: list[str]) -> dict[str, Any]:
    """``lr_weight=0.01`` as a field of a section, read as ``--set`` reads it."""
    given = {f"{section}.{name}": value for name, _, value in (word.partition("=") for word in words)}
    changed = getattr(apply_overrides(RunConfig(), given), section)
    return {name: getattr(changed, name) for name in (word.partition("=")[0] for word in words)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("model")
    parser.add_argument("--data", default="builtin")
    parser.add_argument("--tokens")
    parser.add_argument("--held-out", nargs="*", default=[])
    parser.add_argument("--own-text", action="store_true")
    parser.add_argument("--own-memory", type=float, default=50.0, help="GiB for the writing of own text")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--sequences", type=int, default=512)
    parser.add_argument("--val-sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounded", action="store_true")
    parser.add_argument("--block-ap", action="append", default=[], help='such as "epochs=1"; repeatable')
    parser.add_argument("--try", action="append", dest="tried", default=[])
    parser.add_argument("--once", action="append", default=[], help="a --try behind the first blocks alone")
    args = parser.parse_args()
    lab = Lab(args)
    rows: list[list[str]] = []

    def add(name: str, values: list[float], begun: float, rest: list[str]) -> None:
        seconds = time.monotonic() - begun
        rows.append([name, *(f"{value:,.2f}" for value in values), f"{seconds:.1f}", *rest])
        print(rows[-1], file=sys.stderr, flush=True)

    begun = time.monotonic()
    add("full precision", lab.perplexities(), begun, ["", "", ""])
    teacher = lab.teacher() if args.tried or args.once else None
    weights = 0
    rounded = [None] if args.rounded else []
    for number, changes in enumerate([*rounded, *(args.block_ap or ([] if rounded else [""]))]):
        reset_peak()
        begun = time.monotonic()
        made = lab.rounded() if changes is None else lab.block_ap(settings("block_ap", changes.split()))
        packed = [block.packed for block in made]
        synchronize()
        took, peak = time.monotonic() - begun, peak_gib()
        values = lab.perplexities(packed)
        rest = ["", "", f"{peak:.1f}"]
        name = "round to nearest" if changes is None else f"Block-AP {changes}".strip()
        add(name, values, time.monotonic() - took, rest)
        weights = sum(w.words.numel() * 32 // w.bits for block in packed for w in block.linears.values())
        for variant in [*args.tried, *(args.once if number == 0 else [])]:
            kind, *words = variant.split()
            reset_peak()
            # As in a run, which has one such training: what others compiled counts towards a limit.
            torch._dynamo.reset()
            begun = time.monotonic()
            assert teacher is not None
            after, steps = lab.trained(kind, settings(kind, words), made, teacher)
            synchronize()
            took, peak = time.monotonic() - begun, peak_gib()
            values = lab.perplexities(after)
            rest = [f"{1e3 * took / steps:.0f}", f"{100 * moved(packed, after):.2f} %", f"{peak:.1f}"]
            add(variant, values, time.monotonic() - took, rest)
    table(" | ".join(["trained", *lab.measured, "seconds", "ms a step", "moved", "peak GiB"]), rows)
    print(
        f"{args.model}, w{args.bits}g{args.group_size}, {2 * weights / GIB:.2f} GiB of weights at 16 bits, "
        f"seed {args.seed}; {where()}"
    )


if __name__ == "__main__":
    main()
