"""The phases of a run, in order.

    prepare          open the model, draw and tokenize the text
    evaluate_fp      perplexity of the model as it came
    evaluate_rtn     ... of plain round-to-nearest
    block_ap         train block after block            (or `rtn`: only round them)
    evaluate_block_ap
    e2e_qp           train the scales through the whole network
    evaluate_e2e_qp
    export           write, verify

Each finished block is a checkpoint entry, so a stopped or killed run continues behind the last of them: the
streams are brought there by the same code that produced them, and then training goes on.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from torch import Tensor, nn

from engine import telemetry
from engine.checkpoint import CheckpointStore
from engine.data.activations import ActivationStore, make_store
from engine.data.sampler import ALONE, World
from engine.data.text import corpus_name
from engine.evaluation.perplexity import perplexity
from engine.export.gptq_v2 import export_gptq_v2
from engine.export.verify import VerifyResult, verify_gptq_v2
from engine.methods.block_ap import Streams, advance, train_block
from engine.methods.e2e_qp import E2EData, Teacher, positions, train_scales
from engine.methods.rtn import round_to_nearest
from engine.models.causal_lm import CausalLM
from engine.models.source import ModelSource
from engine.preparation import (
    PREPARE_SILENCE,
    Tokens,
    deciding_fields,
    digest,
    draw_tokens,
    write_manifest,
)
from engine.quant.packed import PackedBlock, PackedLinear, PackedWeight
from engine.reporter import Reporter
from engine.run import events
from engine.run.config import (
    GridConfig,
    RunConfig,
    RuntimeConfig,
    equivalent_command,
    to_toml,
)
from engine.run.directory import RunDirectory
from engine.run.errors import UsageError
from engine.run.plan import Plan, host_budget
from engine.setup import package_versions

# Part of the evaluation text on which exported and trained logits are compared.
VERIFY_WINDOWS, VERIFY_TOKENS = 2, 512


@dataclass
class Pipeline:
    """One attempt at one run. The fields below ``device`` are filled as the phases pass."""

    run: RunDirectory
    config: RunConfig
    plan: Plan
    report: Reporter
    device: torch.device
    task: Literal["run", "eval", "export"] = "run"
    world: World = ALONE

    source: ModelSource = field(init=False)
    lm: CausalLM = field(init=False)
    tokens: Tokens = field(init=False)
    checkpoint: CheckpointStore = field(init=False)
    teacher: ActivationStore | None = None
    teacher_rows: Tensor | None = None
    perplexities: dict[str, float] = field(default_factory=dict)

    def phases(self) -> list[events.Phase]:
        """Names of the phases this configuration runs, in order."""
        config = self.config
        block_ap, e2e_qp = config.block_ap.enabled, config.e2e_qp.enabled
        evaluate = config.evaluation.enabled
        final: events.Phase = "evaluate_e2e_qp" if e2e_qp else "evaluate_block_ap"
        if self.task == "eval":
            return ["prepare", final]
        if self.task == "export":
            return ["prepare", "export"]
        wanted: list[tuple[events.Phase, bool]] = [
            ("prepare", True),
            ("evaluate_fp", evaluate),
            ("evaluate_rtn", evaluate),
            ("block_ap", block_ap),
            ("rtn", not block_ap),
            ("evaluate_block_ap", evaluate and block_ap),
            ("e2e_qp", e2e_qp),
            ("evaluate_e2e_qp", evaluate and e2e_qp),
            ("export", bool(config.export.formats)),
        ]
        return [name for name, included in wanted if included]

    def __call__(self) -> None:
        """Run every phase that is not finished yet."""
        self.report.begin(self.phases(), {phase.name: phase.seconds for phase in self.plan.phases})
        with self.report.phase("prepare"):
            self.prepare()
        for name in self.phases()[1:]:
            with self.report.phase(name):
                self._phase_method(name)()

    def _require_finished(self) -> None:
        """`eval` and `export` work on what a run has trained; there must be all of it."""
        trained = all(f"block-{i:03d}" in self.checkpoint for i in range(self.lm.blocks))
        if not trained or (self.config.e2e_qp.enabled and not self.checkpoint.fact("e2e_qp_done")):
            raise UsageError(
                "the run has not finished training", where=self.run.id, hint=f"eqat resume {self.run.id}"
            )

    def _phase_method(self, name: events.Phase) -> Callable[[], None]:
        methods: dict[events.Phase, Callable[[], None]] = {
            "evaluate_fp": lambda: self.evaluate("fp", self._full_block),
            "evaluate_rtn": lambda: self.evaluate("rtn", self._rounded_block),
            "rtn": self.round_blocks,
            "block_ap": self.train_blocks,
            "evaluate_block_ap": lambda: self.evaluate("block_ap", self._packed_block),
            "e2e_qp": self.train_end_to_end,
            "evaluate_e2e_qp": lambda: self.evaluate("e2e_qp", self._packed_block),
            "export": self.export,
        }
        return methods[name]

    # Prepare

    def prepare(self) -> None:
        """Open the model (no block is loaded yet), tokenize, open the checkpoint."""
        self.report.expect_silence(PREPARE_SILENCE)
        self.source = ModelSource.open(self.config.model)
        self.lm = CausalLM(self.source, self.device, compute_dtype("auto", self.device))
        self.tokens = draw_tokens(self.config, self.source.tokenizer(), self.report)
        model, data = digest(self.source.identity()), self.tokens.digest()
        self.report.expect_silence(PREPARE_SILENCE)
        self.checkpoint = CheckpointStore(
            self.run.checkpoints_dir,
            {**deciding_fields(self.config), "model": model, "data": data},
            on_damage=lambda message: self.report.warning("checkpoint", message),
        )
        write_manifest(self.run, self.config, self.source, self.device, data)
        if self.task != "run":
            self._require_finished()
        for stage in events.STAGES:
            known = self.checkpoint.fact(f"eval_{stage}")
            if known and known["perplexity"] is not None:
                self.perplexities[stage] = known["perplexity"]

    # Evaluation

    def evaluate(self, stage: events.Stage, block_for: Callable[[int], nn.Module]) -> None:
        """Perplexity of one version of the model, unless an earlier attempt measured it."""
        known = self.checkpoint.fact(f"eval_{stage}")
        if known is None or self.task == "eval":
            config = self.config.evaluation
            result = perplexity(
                self.lm,
                block_for,
                self.tokens.evaluation,
                batch_size=config.batch_size,
                store_kind=self.plan.activation_store,
                store_path=self.run.cache_dir / "evaluation.bin",
                store_budget_bytes=host_budget(self.config, self.plan.machine) // 2,
                on_progress=self.report.step,
                should_stop=self._heartbeat,
            )
            known = {
                "perplexity": result.perplexity if math.isfinite(result.perplexity) else None,
                "tokens": result.tokens,
                "seconds": result.seconds,
            }
            self.checkpoint.remember(f"eval_{stage}", known)
            self._commit(self.report.phase_name, None)
        if known["perplexity"] is not None:
            self.perplexities[stage] = known["perplexity"]
        self.report.emit(
            events.Eval(
                stage=stage,
                sequence_length=self.config.evaluation.sequence_length,
                corpus=corpus_name(self.config.evaluation.data),
                **known,
            )
        )

    def _heartbeat(self) -> bool:
        self.report.checkpoint_requested()
        return False

    def _full_block(self, index: int) -> nn.Module:
        return self.lm.load_block(index)

    def _rounded_block(self, index: int) -> nn.Module:
        """Plain round-to-nearest between minimum and maximum: the baseline every method is compared with."""
        block = self.lm.load_block(index)
        grid = self.config.grid
        plain = GridConfig(
            bits=grid.bits, group_size=grid.group_size, symmetric=grid.symmetric, range="minmax"
        )
        return round_to_nearest(block, self.lm.linear_names(index), plain).install(block)

    def _packed_block(self, index: int) -> nn.Module:
        return self.packed(index).install(self.lm.load_block(index))

    # Block-AP

    def round_blocks(self) -> None:
        """Without Block-AP: every block to its initial grid."""
        for index in range(self.lm.blocks):
            self.report.block_started(index, self.lm.blocks)
            if f"block-{index:03d}" in self.checkpoint:
                self.report.block_finished(restored=True)
                continue
            block = self.lm.load_block(index, dtype=torch.float32)
            packed = round_to_nearest(block, self.lm.linear_names(index), self.config.grid)
            self._finish_block("rtn", index, packed)
            self.report.block_finished()
            self.report.checkpoint_requested()

    def train_blocks(self) -> None:
        """Block-AP over all blocks; those of an earlier attempt are replayed to bring the streams up to
        date."""
        if all(f"block-{i:03d}" in self.checkpoint for i in range(self.lm.blocks)):
            for index in range(self.lm.blocks):
                self.report.block_started(index, self.lm.blocks)
                self.report.block_finished(**self.checkpoint.fact(f"losses-{index:03d}"), restored=True)
            return
        config = self.config.block_ap
        dtype = compute_dtype(config.compute_dtype, self.device)
        with self._streams(dtype) as streams:
            for index in range(self.lm.blocks):
                self.report.block_started(index, self.lm.blocks)
                if f"block-{index:03d}" in self.checkpoint:
                    self._replay(index, streams, dtype)
                    losses = self.checkpoint.fact(f"losses-{index:03d}")
                    self.report.block_finished(**losses, restored=True)
                    continue
                result = train_block(
                    self.lm,
                    index,
                    streams,
                    config,
                    self.config.grid,
                    seed=_mix(self.config.runtime.seed, index),
                    dtype=dtype,
                    progress=self.report,
                    world=self.world,
                )
                losses = {
                    "initial_loss": result.initial_loss,
                    "final_loss": result.final_loss,
                    "val_loss": result.val_loss,
                }
                self.checkpoint.remember(f"losses-{index:03d}", losses)
                self._finish_block("block_ap", index, result.packed)
                self.report.block_finished(**losses)
            self._keep_teacher(streams)

    @contextmanager
    def _streams(self, dtype: torch.dtype) -> Iterator[Streams]:
        """Both activation streams, filled with the embedded tokens."""
        tokens = self.tokens.block_ap
        full = self._store("full", tokens, dtype)
        quantized = self._store("quantized", tokens, dtype)
        try:
            self._embed_into(tokens, full, quantized)
            yield Streams(full, quantized, self.tokens.block_ap_train)
        finally:
            quantized.close()
            if full is not self.teacher:
                full.close()

    def _store(self, name: str, tokens: Tensor, dtype: torch.dtype) -> ActivationStore:
        self.run.cache_dir.mkdir(exist_ok=True)
        return make_store(
            self.plan.activation_store,
            (*tokens.shape, self.lm.hidden_size),
            dtype,
            self.device,
            path=self.run.cache_dir / f"{name}.bin",
            # Two streams live at the same time.
            budget_bytes=host_budget(self.config, self.plan.machine) // 2,
        )

    @torch.no_grad()
    def _embed_into(self, tokens: Tensor, *stores: ActivationStore) -> None:
        for start in range(0, tokens.shape[0], self.config.block_ap.batch_size):
            self.report.checkpoint_requested()
            rows = tokens[start : start + self.config.block_ap.batch_size]
            hidden = self.lm.embed(rows.to(self.device))
            for store in stores:
                store.write(start, hidden)

    def _replay(self, index: int, streams: Streams, dtype: torch.dtype) -> None:
        batch = self.config.block_ap.batch_size
        block = self.lm.load_block(index, dtype=torch.float32)
        advance(self.lm, index, block, streams.full, batch, dtype, self.report)
        self.packed(index).install(block)
        advance(self.lm, index, block, streams.quantized, batch, dtype, self.report)
        self.report.checkpoint_requested()

    def _keep_teacher(self, streams: Streams) -> None:
        """After the last block the full-precision stream is E2E-QP's teacher, where it holds its text."""
        config = self.config.e2e_qp
        _, rows = self._teacher_text()
        if config.enabled and config.loss == "kl" and rows is not None:
            self.teacher, self.teacher_rows = streams.full, rows

    def _teacher_text(self) -> tuple[Tensor, Tensor | None]:
        """The text whose last hidden states teach E2E-QP, and where its own sequences lie in it.

        Block-AP's, where that contains it and is computed in the same arithmetic. A resumed run computes it
        anew from the same text in the same batches: in other batches, the last bits would be others.
        """
        rows = positions(self.tokens.e2e_qp, self.tokens.block_ap)
        stream_dtype = compute_dtype(self.config.block_ap.compute_dtype, self.device)
        if rows is None or stream_dtype != self._e2e_dtype():
            return self.tokens.e2e_qp, None
        return self.tokens.block_ap, rows

    def _e2e_dtype(self) -> torch.dtype:
        return compute_dtype(self.config.e2e_qp.compute_dtype, self.device)

    # E2E-QP

    def train_end_to_end(self) -> None:
        """Train the scales of all blocks together; the integers stay as Block-AP left them."""
        if self.checkpoint.fact("e2e_qp_done"):
            return
        config, dtype = self.config.e2e_qp, self._e2e_dtype()
        if config.loss == "kl" and self.teacher is None:
            self.teacher = self._teacher(dtype)
        blocks = []
        for index in range(self.lm.blocks):
            blocks.append(self.packed(index).install(self.lm.load_block(index, dtype=dtype)))
            self.report.checkpoint_requested()
        telemetry.release_memory()
        teacher = None if self.teacher is None else Teacher(self.teacher, self.teacher_rows)
        data = E2EData(self.tokens.e2e_qp, self.tokens.e2e_qp_train, teacher)
        train_scales(
            self.lm,
            blocks,
            data,
            config,
            seed=_mix(self.config.runtime.seed, self.lm.blocks),
            dtype=dtype,
            progress=self.report,
            world=self.world,
        )
        for index, block in enumerate(blocks):
            trained = {
                name: module.packed()
                for name, module in block.named_modules()
                if isinstance(module, PackedLinear)
            }
            tensors = {f"{name}.scale": weight.scale for name, weight in trained.items()}
            tensors |= {f"{name}.zero_point": weight.zero_point for name, weight in trained.items()}
            self.checkpoint.put(f"scales-{index:03d}", _on_cpu(tensors))
        self.checkpoint.remember("e2e_qp_done", True)
        self._commit("e2e_qp", None)
        if self.teacher is not None:
            self.teacher.close()
            self.teacher = None

    def _teacher(self, dtype: torch.dtype) -> ActivationStore:
        """The full-precision model's last hidden states on the end-to-end text, one block in memory at a
        time."""
        tokens, self.teacher_rows = self._teacher_text()
        store = self._store("teacher", tokens, dtype)
        self._embed_into(tokens, store)
        for index in range(self.lm.blocks):
            block = self.lm.load_block(index, dtype=torch.float32)
            advance(self.lm, index, block, store, self.config.block_ap.batch_size, dtype, self.report)
            self.report.checkpoint_requested()
        return store

    # Export

    def export(self) -> None:
        """Write every requested format from the integer codes, then read it back and compare."""
        for name in self.config.export.formats:
            assert name == "gptq_v2", name
            path = self.run.export_dir / name
            card = self._card()
            written = export_gptq_v2(
                path,
                self.lm,
                self.source,
                self.packed,
                shard_bytes=int(self.config.export.shard_gib * 2**30),
                card=card,
                on_block=self.report.step,
            )
            verified = self._verify(path, card)
            self.report.emit(
                events.Export(
                    format=name,
                    path=str(path.relative_to(self.run.path)),
                    verified=verified.verified,
                    max_logit_diff=verified.max_logit_diff,
                    bytes=written.bytes,
                    fp_bytes=written.fp_bytes,
                    bits_per_weight=written.bits_per_weight,
                    logit_tolerance=verified.tolerance,
                    perplexity=verified.perplexity_packed,
                    perplexity_trained=verified.perplexity_trained,
                    tokens=verified.tokens,
                )
            )
        shutil.rmtree(self.run.cache_dir, ignore_errors=True)

    # Blocks between phases

    def packed(self, index: int) -> PackedBlock:
        """Block ``index`` as quantized so far: after E2E-QP with its trained scales."""
        grid = self.config.grid
        packed = PackedBlock.from_tensors(
            self.checkpoint.get(f"block-{index:03d}"), grid.bits, grid.symmetric
        )
        if not self.checkpoint.fact("e2e_qp_done"):
            return packed
        trained = self.checkpoint.get(f"scales-{index:03d}")
        linears = {
            name: PackedWeight(
                weight.words,
                trained[f"{name}.scale"],
                trained[f"{name}.zero_point"],
                weight.bits,
                weight.symmetric,
            )
            for name, weight in packed.linears.items()
        }
        return PackedBlock(linears, packed.others)

    def _finish_block(self, phase: events.Phase, index: int, packed: PackedBlock) -> None:
        self.checkpoint.put(f"block-{index:03d}", packed.tensors())
        self._commit(phase, index)

    def _commit(self, phase: events.Phase, block: int | None) -> None:
        committed = self.checkpoint.commit()
        self.report.emit(
            events.CheckpointCommitted(
                generation=committed.generation,
                bytes=committed.bytes,
                seconds=committed.seconds,
                phase=phase,
                block=block,
            )
        )

    def _verify(self, path: Path, card: dict[str, Any]) -> VerifyResult:
        """Read the files back and compare bits and logits; an export that differs is never handed out."""
        tokens = self.tokens.evaluation if len(self.tokens.evaluation) else self.tokens.block_ap
        if not len(tokens):
            tokens = torch.arange(VERIFY_TOKENS).remainder(self.lm.vocab_size).unsqueeze(0)
        tokens = tokens[:VERIFY_WINDOWS, :VERIFY_TOKENS]
        result = verify_gptq_v2(
            path,
            self.lm,
            self.packed,
            tokens,
            on_block=lambda done, blocks: self.report.checkpoint_requested(),
        )
        if not result.verified:
            failed = path.with_name(f"{path.name}.failed")
            shutil.rmtree(failed, ignore_errors=True)
            path.rename(failed)
        result.raise_if_failed()
        return result

    def _card(self) -> dict[str, Any]:
        config = self.config
        evaluation = self.tokens.evaluation
        return {
            "base_model": config.model.source,
            "command": equivalent_command(config),
            "config": to_toml(
                msgspec.structs.replace(config, runtime=RuntimeConfig(seed=config.runtime.seed))
            ),
            "perplexity": self.perplexities,
            "versions": package_versions(),
            "evaluation": f"{corpus_name(config.evaluation.data)}, {evaluation.shape[0]} windows of "
            f"{evaluation.shape[1]} tokens",
        }


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The torch dtype of a configured one; ``auto`` is bfloat16 on a GPU and float32 on the CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _mix(seed: int, index: int) -> int:
    """A seed of its own for each block, so that a block draws the same whether or not others ran before
    it."""
    return seed * 1_000_003 + index
