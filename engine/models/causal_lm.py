"""A causal language model that is never whole: embed, then one block after another, then the head.

Quantizing block by block needs a model in three pieces. The outer piece (embedding, final norm, head)
stays on the device; a decoder block exists only between :meth:`CausalLM.load_block` and the moment the
caller drops it.

What a block is called with differs between architectures and between layers: rotary tables (one, or a
local and a global one), causal and sliding-window masks, positions. Nothing of it is assumed here. The
model's own forward runs on the structure without weights, with every block's ``forward`` replaced by a
stand-in, and the stand-ins do one of three things:

* ``embed`` stops at the first block and takes what it was given: the embedded tokens;
* ``block_kwargs`` lets all of them note their arguments;
* ``head`` lets the last one return the hidden states in question, and the forward continues with
  whatever the model does after its blocks (norm, head, scaling, soft cap).
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from engine.architecture.families import GPU_HEAD_VALUES, HEAD_VALUES
from engine.architecture.positions import PositionTable, position_table
from engine.errors import PreflightError
from engine.gpu.compiled import Compiled, P, T
from engine.models.foreign import foreign
from engine.models.parameters import check_checkpoint, load_buffers, load_parameter, named
from engine.models.skeleton import build_skeleton, find_blocks, linear_names, refuse_block, text_config
from engine.models.source import ModelSource
from engine.models.weights import NamedReader

KEPT_SHAPES = 4
"""Batch shapes whose block arguments are kept; masks of long sequences are not small."""

StandIn = Callable[[int, Tensor, dict[str, Any]], Tensor]
"""Called in place of block ``i`` with its hidden states and its other arguments by name."""


_Arguments = tuple[int, int, torch.dtype, bytes]
"""Batch, length, dtype, and where positions are not the usual ones, these."""


class _Enough(Exception):
    """Ends a forward pass of the structure once a stand-in has what it came for."""


class CausalLM:
    """A model whose blocks are loaded, used and dropped one at a time."""

    # Some families rewrite their rotary tables in place for longer texts, which tensors born in inference
    # mode forbid: those of a model that is opened inside of it have to be like all others.
    @torch.inference_mode(False)
    def __init__(self, source: ModelSource, device: torch.device, dtype: torch.dtype) -> None:
        self.source = source
        self.device = device
        self.dtype = dtype
        self.head_values = GPU_HEAD_VALUES if device.type == "cuda" else HEAD_VALUES
        self.model = build_skeleton(source.config, dtype, trust_remote_code=source.trust_remote_code)
        if not source.config.architectures:
            # GGUF files and text parts of multimodal models do not say; exports must.
            source.config.architectures = [type(self.model).__name__]
        with foreign(f"{type(self.model).__name__} has no usable decoder blocks", source.name):
            self._prefix, self._blocks = find_blocks(self.model)
        for index, block in enumerate(self._blocks):
            refuse_block(block, self.block_prefix(index))
        self.names, self.weights = named(self.model, source)
        with foreign(f"{type(self.model).__name__} has no usable embeddings", source.name):
            self.tied = self._tie_as_stored()
        check_checkpoint(self.model, self.names, self.weights, source)
        self._load_outer()
        self._arguments: OrderedDict[_Arguments, list[dict[str, Any]]] = OrderedDict()
        self._returns_tuple = False
        self._structure = threading.RLock()
        """Held while blocks stand in for something, and while one is copied: a thread may load the next."""
        self.tail: tuple[nn.Module, nn.Module] | None = None
        """Final norm and output embeddings, where they are all that follows the blocks."""
        self._compiled: Callable[[Callable[..., Any]], Compiled] | None = None
        """The compiled form of a function; none while nothing is compiled."""
        with foreign(f"{type(self.model).__name__} cannot be run block by block", source.name):
            self._probe()
            if (norm := self._find_norm()) is not None:
                self.tail = norm, self.model.get_output_embeddings()

    # -- structure ---------------------------------------------------------------------------------

    @property
    def blocks(self) -> int:
        """Number of decoder blocks."""
        return len(self._blocks)

    @property
    def hidden_size(self) -> int:
        return int(text_config(self.model.config).hidden_size)

    @property
    def text_config(self) -> Any:
        """The configuration of the part that reads text."""
        return text_config(self.model.config)

    @property
    def takes_positions(self) -> bool:
        """Whether its forward can be told where in its text each token stands."""
        return "position_ids" in inspect.signature(type(self.model).forward).parameters

    @property
    def vocab_size(self) -> int:
        return int(text_config(self.model.config).vocab_size)

    @functools.cached_property
    def position_table(self) -> PositionTable | None:
        """The table of positions, after whose last row no text goes on; None where there is none."""
        shapes = {name: tuple(parameter.shape) for name, parameter in self.model.named_parameters()}
        return position_table(text_config(self.model.config).to_dict(), shapes)

    @property
    def parameters_count(self) -> int:
        """Parameters of the whole model, tied ones counted once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def fp_bytes(self) -> int:
        """Size of the whole model at 16 bits per parameter."""
        return 2 * self.parameters_count

    def blocks_bytes(self) -> int:
        """Size of all blocks together, as they are loaded."""
        return sum(parameter.numel() for parameter in self._blocks.parameters()) * self.dtype.itemsize

    def block_prefix(self, index: int) -> str:
        """Name of a block in the checkpoint, such as ``model.layers.3``."""
        return f"{self._prefix}.{index}"

    def linear_names(self, index: int) -> tuple[str, ...]:
        """Names of the block's linear layers, relative to the block."""
        return linear_names(self._blocks[index])

    def outer_state(self) -> dict[str, Tensor]:
        """Parameters outside the blocks by checkpoint name; a tied head is left out."""
        return {name: p.detach() for name, p in self.model.named_parameters() if self._is_outer(name)}

    # -- running -----------------------------------------------------------------------------------

    @torch.no_grad()
    def embed(self, ids_BT: Tensor, positions_BT: Tensor | None = None) -> Tensor:
        """What the first block is given for these tokens, in the model's dtype; positions are none where
        tokens stand one behind the other."""
        caught: list[Tensor] = []

        def stop(index: int, hidden_BTH: Tensor, arguments: dict[str, Any]) -> Tensor:
            caught.append(hidden_BTH)
            raise _Enough

        self._forward(stop, input_ids=ids_BT.to(self.device), **self._placed(positions_BT))
        return caught[0]

    def block_kwargs(
        self,
        index: int,
        batch: int,
        length: int,
        dtype: torch.dtype | None = None,
        positions_BT: Tensor | None = None,
    ) -> dict[str, Any]:
        """What block ``index`` is called with besides hidden states of shape ``[batch, length, H]``.

        ``dtype`` is that of the hidden states; rotary tables are computed in it. Positions (int64, on the
        CPU) that begin anew within a row are of several texts, which see nothing of each other.
        """
        places = b"" if positions_BT is None else positions_BT.numpy().tobytes()
        key = (batch, length, dtype or self.dtype, places)
        if key not in self._arguments:
            self._arguments[key] = self._record(*key[:3], positions_BT=positions_BT)
            while len(self._arguments) > KEPT_SHAPES:
                self._arguments.popitem(last=False)
        self._arguments.move_to_end(key)
        return self._arguments[key][index]

    def run_block(
        self,
        module: nn.Module,
        index: int,
        hidden_BTH: Tensor,
        *,
        often: bool = False,
        positions_BT: Tensor | None = None,
    ) -> Tensor:
        """The block's output for these hidden states; differentiable if the block is. Positions are those of
        :meth:`block_kwargs`.

        ``often`` says that many batches of this shape pass through blocks: then it is worth
        :meth:`repeated`.
        """
        batch, length = hidden_BTH.shape[:2]
        arguments = self.block_kwargs(index, batch, length, hidden_BTH.dtype, positions_BT)
        forward = self.repeated(block_forward) if often and not torch.is_grad_enabled() else block_forward
        return forward(module, hidden_BTH, arguments)

    def compile(self, *, expect_silence: Callable[[float], None], on_failure: Callable[[str], None]) -> None:
        """Compile what is :meth:`repeated` from now on; the two are those of :class:`Compiled`."""
        make = functools.partial(
            Compiled, expect_silence=expect_silence, on_failure=on_failure, many_forms=True
        )
        self._compiled = functools.cache(make)

    def repeated(self, function: Callable[P, T]) -> Callable[P, T]:
        """``function``, for what is done many times in the same shapes: compiled, if anything is."""
        return function if self._compiled is None else self._compiled(function)

    def head_chunks(self, tokens: int) -> list[slice]:
        """Parts of so many tokens, whose logits are computed at once: of one size, but for the last, because
        a compiled form is made for each size."""
        most = max(1, self.head_values // self.vocab_size)
        size = math.ceil(tokens / math.ceil(tokens / most))
        return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]

    def head(self, hidden_BTH: Tensor) -> Tensor:
        """Logits for the last block's output; differentiable with respect to it."""
        if self.tail is not None:
            norm, output = self.tail
            logits: Tensor = output(norm(hidden_BTH.to(self.dtype)))
            return logits
        return self._forward_head(hidden_BTH)

    def _forward_head(self, hidden_BTH: Tensor) -> Tensor:
        """What the model's own forward does after its last block."""
        last = self.blocks - 1

        def finish(index: int, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
            return hidden_BTH.to(self.dtype) if index == last else hidden

        ids_BT = torch.zeros(hidden_BTH.shape[:2], dtype=torch.long, device=self.device)
        logits_BTV: Tensor = self._forward(finish, input_ids=ids_BT).logits
        return logits_BTV

    @contextmanager
    def whole(self, block_for: Callable[[int], nn.Module]) -> Iterator[Any]:
        """The model in one piece while the context lasts, its blocks being ``block_for(0)``, ...

        All of them are in memory at once.
        """
        structure = list(self._blocks)
        try:
            for index in range(self.blocks):
                self._blocks[index] = block_for(index)
            yield self.model
        finally:
            for index, block in enumerate(structure):
                self._blocks[index] = block

    # -- loading -----------------------------------------------------------------------------------

    def load_block(
        self, index: int, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> nn.Module:
        """Block ``index`` with its weights, new in memory of its own; frozen, in evaluation mode."""
        # Every layer of a block refers to the model's one configuration; it is shared, not copied.
        config = self.model.config
        with self._structure:
            block = copy.deepcopy(self._blocks[index], {id(c): c for c in (config, text_config(config))})
        dtype, device = dtype or self.dtype, device or self.device
        for name, parameter in list(block.named_parameters()):
            full = f"{self.block_prefix(index)}.{name}"
            _replace(block, name, load_parameter(self.weights, full, parameter.shape, dtype, device))
        load_buffers(self.weights, block, f"{self.block_prefix(index)}.", device)
        return block.requires_grad_(False).eval()

    def _load_outer(self) -> None:
        for name, parameter in list(self.model.named_parameters()):
            if self._is_outer(name):
                stored = load_parameter(self.weights, name, parameter.shape, self.dtype, self.device)
                _replace(self.model, name, stored)
        if self.tied:
            self._share_embedding()
        for name, module in self.model.named_modules():
            if self._is_outer(name):
                load_buffers(self.weights, module, f"{name}." if name else "", self.device, recurse=False)

    def _is_outer(self, name: str) -> bool:
        return name != self._prefix and not name.startswith(self._prefix + ".")

    # -- tied weights ------------------------------------------------------------------------------

    def _tie_as_stored(self) -> bool:
        """Whether head and embedding share their weight; the checkpoint decides where it disagrees."""
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        if head is None or not getattr(text_config(self.model.config), "tie_word_embeddings", False):
            return False
        names = {id(module): name for name, module in self.model.named_modules()}
        stored = [f"{names[id(module)]}.weight" for module in (embedding, head)]
        if all(name in self.weights for name in stored):
            if not torch.equal(self.weights.load(stored[0]), self.weights.load(stored[1])):
                # The checkpoint holds two different matrices, whatever its configuration says.
                head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
                for config in (self.model.config, self.source.config):
                    text_config(config).tie_word_embeddings = False
                return False
        elif stored[1] in self.weights:
            own = {name: name for name in self.model.state_dict() if name in self.weights}
            self.weights = NamedReader(self.weights, {**own, stored[0]: stored[1]})
        self._share_embedding()
        return True

    def _share_embedding(self) -> None:
        self.model.get_output_embeddings().weight = self.model.get_input_embeddings().weight

    # -- the model's own forward -------------------------------------------------------------------

    @contextmanager
    def _standing_in(self, stand_in: StandIn) -> Iterator[None]:
        def forward_of(index: int, block: nn.Module) -> Callable[..., Any]:
            signature = inspect.signature(type(block).forward)

            def forward(*args: Any, **kwargs: Any) -> Any:
                bound = signature.bind(block, *args, **kwargs)
                arguments = dict(list(bound.arguments.items())[1:])
                for name, parameter in signature.parameters.items():
                    if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                        arguments.update(arguments.pop(name, {}))
                hidden = arguments.pop(next(iter(arguments)))
                result = stand_in(index, hidden, arguments)
                return (result,) if self._returns_tuple else result

            return forward

        with self._structure:
            for index, block in enumerate(self._blocks):
                block.forward = forward_of(index, block)
            try:
                yield
            finally:
                for block in self._blocks:
                    # The class's own forward shows again; a copy of the block must not carry a stand-in.
                    del block.__dict__["forward"]

    def _forward(self, stand_in: StandIn, **inputs: Tensor) -> Any:
        with self._standing_in(stand_in):
            try:
                return self.model(**inputs, use_cache=False, return_dict=True)
            except _Enough:
                return None

    def _placed(self, positions_BT: Tensor | None) -> dict[str, Tensor]:
        return {} if positions_BT is None else {"position_ids": positions_BT.to(self.device)}

    def _record(
        self,
        batch: int,
        length: int,
        dtype: torch.dtype,
        token: int = 0,
        positions_BT: Tensor | None = None,
    ) -> list[dict[str, Any]]:
        recorded: list[dict[str, Any]] = []

        def note(index: int, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
            recorded.append(arguments)
            if index == self.blocks - 1:
                raise _Enough
            return hidden

        if dtype == self.dtype:
            inputs = {"input_ids": torch.full((batch, length), token, device=self.device)}
        else:
            shape = (batch, length, self.hidden_size)
            inputs = {"inputs_embeds": torch.zeros(shape, dtype=dtype, device=self.device)}
        # Kept tensors must be usable in a backward pass later and be computed as the model would
        # without autocast, whatever the caller is inside of.
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(self.device.type, enabled=False),
        ):
            self._forward(note, **inputs, **self._placed(positions_BT))
        return recorded

    def _probe(self) -> None:
        """Find out what blocks return, and refuse models whose blocks are told about the tokens."""
        if not (self._forwards_plainly() or self._forwards_plainly(returns_tuple=True)):
            raise PreflightError(
                f"the blocks of {type(self.model).__name__} are not called one after another",
                where=self.source.name,
                hint="only plain stacks of decoder blocks can be quantized block by block",
            )
        first, second = (self._record(1, 4, self.dtype, token) for token in (0, 1))
        for index, (one, other) in enumerate(zip(first, second, strict=True)):
            for name in one:
                if _has_nan(one[name]):
                    raise PreflightError(
                        f"argument {name!r} of the blocks is not a number",
                        where=self.block_prefix(index),
                        hint="check the numbers of rope_parameters, or rope_theta, in config.json",
                    )
                if not _same(one[name], other.get(name)):
                    raise PreflightError(
                        f"argument {name!r} depends on the tokens, which block-wise training cannot replay",
                        where=self.block_prefix(index),
                        hint="choose a model whose blocks see hidden states and positions only",
                    )

    @torch.no_grad()
    def _find_norm(self) -> nn.Module | None:
        """The module that makes, the output embeddings behind it, the very logits of the model's forward.

        None for models that do more (scale or cap their logits): their whole forward is run for every head.
        """
        head = self.model.get_output_embeddings()
        generator = torch.Generator().manual_seed(0)
        # Large enough for a cap to show.
        hidden = 30 * torch.randn(2, 5, self.hidden_size, generator=generator)
        hidden = hidden.to(device=self.device, dtype=self.dtype)
        expected = self._forward_head(hidden)
        parent = self.model.get_submodule(self._prefix.rpartition(".")[0])
        for module in parent.children():
            if module is head or not any(True for _ in module.parameters()) or self._blocks is module:
                continue
            try:
                if torch.equal(head(module(hidden)), expected):
                    return module
            except (RuntimeError, TypeError, IndexError, AttributeError):
                continue  # an embedding, a projection of other sizes
        return None

    @torch.no_grad()
    def _forwards_plainly(self, returns_tuple: bool = False) -> bool:
        """Whether all blocks are called in order on ``[B, T, H]`` and logits of ``[B, T, V]`` result."""
        self._returns_tuple = returns_tuple
        seen: list[int] = []

        def check(index: int, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
            if tuple(hidden.shape) != (2, 3, self.hidden_size):
                raise _Enough
            seen.append(index)
            return hidden

        try:
            output = self._forward(check, input_ids=torch.zeros((2, 3), dtype=torch.long, device=self.device))
        except torch.OutOfMemoryError:
            raise  # says nothing about the model
        except (RuntimeError, IndexError, TypeError, AttributeError):
            return False
        in_order = seen == list(range(self.blocks))
        return output is not None and in_order and tuple(output.logits.shape[:2]) == (2, 3)


def block_forward(block: nn.Module, hidden_BTH: Tensor, arguments: dict[str, Any]) -> Tensor:
    """The block's output."""
    output = block(hidden_BTH, **arguments)
    return output[0] if isinstance(output, tuple) else output


def _replace(root: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(owner), leaf, parameter)


def _has_nan(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.is_floating_point() and bool(value.isnan().any())
    return isinstance(value, list | tuple) and any(map(_has_nan, value))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return True
