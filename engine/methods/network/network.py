"""The loss of all blocks together: what every end-to-end method minimises, whichever parameters it trains.

The blocks run one after the other on what the model is for: next-token cross-entropy, or the Kullback-Leibler
divergence to the full-precision model's prediction. A method (:mod:`engine.methods.network.e2e_qp`) brings
its parameters, as ``groups``, and brings them back into their domain after a step, in ``project``.

Memory: activations can be recomputed block by block in the backward pass, and the logits never exist as a
whole (:mod:`engine.methods.network.head_loss`). The teacher's last hidden states were computed before
(:mod:`engine.methods.network.teacher`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from engine.data.prefetch import to_device
from engine.errors import NonFiniteError
from engine.evaluation.perplexity import NO_LABEL
from engine.gpu.compiled import SWITCH_HINT, Compiled
from engine.methods.network.head_loss import HeadLoss
from engine.methods.network.teacher import Teacher
from engine.models.causal_lm import block_forward
from engine.training.loop import NON_FINITE_HINT, Method, Settings, Training
from engine.training.progress import Keeper, Progress
from engine.training.snapshot import Snapshot

if TYPE_CHECKING:
    from engine.models.causal_lm import CausalLM


@dataclass(frozen=True)
class NetworkData:
    """Token windows ``[N, T]`` (training, then validation) and, for KL, the teacher's last hidden states."""

    tokens: Tensor
    train: int
    teacher: Teacher | None


@dataclass(frozen=True)
class NetworkResult:
    """Losses on the validation sequences before training and at its best (none without any)."""

    initial_loss: float | None
    val_loss: float | None
    steps: int


class _Batch(NamedTuple):
    tokens_BT: Tensor
    labels_T: Tensor
    """Of all sequences one after the other; -100 where a sequence ends."""
    teacher_TH: Tensor | None
    predictions: int


class Network(Method):
    """All blocks together, measured by what they predict."""

    def __init__(
        self,
        lm: CausalLM,
        blocks: list[nn.Module],
        data: NetworkData,
        dtype: torch.dtype,
        *,
        recompute: bool = True,
    ) -> None:
        """``blocks`` are on the device; ``recompute`` computes each block's activations again in the backward
        pass instead of keeping them."""
        self.lm, self.blocks, self.data, self.dtype = lm, blocks, data, dtype
        self.recompute = recompute
        self.poll: Callable[[], None] = lambda: None
        self.head = HeadLoss(lm)
        self._train_forward: Callable[..., Tensor] = block_forward
        """A block's forward pass in the steps; compiled where that pays. Validations stay plain."""

    def compile(self, progress: Progress, where: str) -> None:
        """Compile the blocks' steps and the losses; what cannot be is said and stays as it is."""

        def slower(what: str) -> Callable[[str], None]:
            return lambda why: progress.warning(
                "compile",
                f"{where}: steps are slower, {what} cannot be compiled: {why}",
                hint=SWITCH_HINT,
            )

        self._train_forward = Compiled(
            block_forward, expect_silence=progress.expect_silence, on_failure=slower("blocks")
        )
        self.head.compile(expect_silence=progress.expect_silence, on_failure=slower("losses"))

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        """Last hidden states (before the final norm), ``[B, T, H]``."""
        hidden = self.lm.embed(tokens_BT).to(self.dtype)
        if not torch.is_grad_enabled():
            for index, block in enumerate(self.blocks):
                hidden = self.lm.run_block(block, index, hidden)
            return hidden
        # So that the first block is compiled like the others.
        hidden = hidden.detach().requires_grad_(self._train_forward is not block_forward)
        batch, length = tokens_BT.shape
        for index, block in enumerate(self.blocks):
            arguments = self.lm.block_kwargs(index, batch, length, hidden.dtype)
            if self.recompute:
                # Nothing in a block is random, and asking a GPU for its generator's state waits for it.
                hidden = recomputed(
                    self._train_forward,
                    block,
                    hidden,
                    arguments,
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            else:
                hidden = self._train_forward(block, hidden, arguments)
        return hidden

    def batch(self, rows: Tensor) -> _Batch:
        """What is read, and what is to be predicted."""
        tokens = self.data.tokens[rows]
        labels = torch.full_like(tokens, NO_LABEL)
        labels[:, :-1] = tokens[:, 1:]
        tokens, labels = to_device(tokens, self.lm.device), to_device(labels, self.lm.device)
        if self.data.teacher is None:
            return _Batch(tokens, labels.flatten(), None, tokens.numel() - len(rows))
        return _Batch(tokens, labels.flatten(), self.data.teacher.read(rows).flatten(0, 1), tokens.numel())

    def micro_step(self, rows: Tensor, weight: float, scale: Callable[[Tensor], Tensor]) -> Tensor:
        batch = self.batch(rows)
        hidden_BTH = self.hidden(batch.tokens_BT)
        # Every position is predicted from its own hidden state alone: the batch is one row of tokens.
        flat_TH = hidden_BTH.detach().flatten(0, 1)
        loss, gradient_TH = self.head.gradient(
            flat_TH, batch.labels_T, batch.teacher_TH, weight / batch.predictions, scale
        )
        hidden_BTH.backward(gradient_TH.view_as(hidden_BTH))
        return loss

    def upcoming(self, rows: Tensor) -> None:
        if self.data.teacher is not None:
            self.data.teacher.expect(rows)

    def save_memory(self) -> str:
        if self.recompute:
            return ""
        self.recompute = True
        return "recomputing activations"

    @torch.no_grad()
    def validate(self, micro_batch: int) -> float | None:
        rows = torch.arange(self.data.train, self.data.tokens.shape[0])
        if not len(rows):
            return None
        total = torch.zeros((), device=self.lm.device)
        for part in rows.split(micro_batch):
            self.poll()
            batch = self.batch(part)
            flat_TH = self.hidden(batch.tokens_BT).flatten(0, 1)
            loss = self.head.value(flat_TH, batch.labels_T, batch.teacher_TH)
            total += loss * (len(part) / len(rows) / batch.predictions)
        return total.item()


def train_network(
    network: Network,
    settings: Settings,
    progress: Progress,
    snapshot: Snapshot | None = None,
    keeper: Keeper | None = None,
) -> NetworkResult:
    """Train what ``network`` trains, in place; ``snapshot`` is the state to continue from, ``keeper`` keeps
    such states.

    Raises:
        NonFiniteError: if training diverges and two restarts at lower learning rates do not help.
        StopRequested: at a step boundary, after a stop was asked for.
    """
    training = Training(network, network.data.train, settings, progress, snapshot, keeper)
    network.poll = training.boundary
    training.run()
    position, best = training.position, training.best.val_loss
    if position.initial_val is not None and best is None:
        raise NonFiniteError(
            f"the validation loss is not finite after {position.steps_done} steps",
            where=settings.where,
            hint=NON_FINITE_HINT,
        )
    return NetworkResult(position.initial_val, best, position.steps_done)
