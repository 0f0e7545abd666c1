"""The network as an ONNX graph, traced by torch from the model's own forward, without a weight in it.

:func:`traced` is what can be made before anything is trained: token numbers and a mask go in, logits come
out, all of any batch and length, and every weight is an input of the graph under the model's name for it. A
linear that is to be quantized is one operator already, with its weight as a single operand. :func:`finished`
puts in the tensors as the files hold them::

    MatMulNBits(x, qweight, scales, qzeros)    K inputs, N outputs, bits, block_size

Everything is computed in float32. What is stored in 16 bits, scales and norms, is widened by a ``Cast``, once
for all when a runtime loads the file, and of an embedding only the rows that are looked up.

Positions are counted from the mask, as transformers' ``generate`` does, so that texts may be padded on either
side. Left out: a cache of keys and values.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from engine.errors import PreflightError
from engine.export.layout import Linear
from engine.models.foreign import foreign
from engine.models.skeleton import build_skeleton, find_blocks, linear_names

if TYPE_CHECKING:
    from engine.models.causal_lm import CausalLM

OPERATOR, DOMAIN = "MatMulNBits", "com.microsoft"
INPUTS, OUTPUT = ("input_ids", "attention_mask"), "logits"
HINT = "leave onnx out of export.formats"
_NETWORK = "network"


class _Linear(nn.Module):
    """Stands for a linear: the operator, whose weight is there by name alone."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.sizes = {"K": linear.in_features, "N": linear.out_features}
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = torch.onnx.ops.symbolic(
            f"{DOMAIN}::{OPERATOR}",
            (x, self.weight),
            dict(self.sizes),
            dtype=x.dtype,
            shape=(*x.shape[:-1], self.sizes["N"]),
            version=1,
        )
        return product if self.bias is None else product + self.bias


class _Network(nn.Module):
    """The model as a function of tokens and their mask."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.network = model
        self.takes_positions = "position_ids" in inspect.signature(type(model).forward).parameters

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        positions = {}
        if self.takes_positions:
            positions["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        output = self.network(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False, return_dict=True, **positions
        )
        logits: Tensor = output.logits
        return logits


def sketched(lm: CausalLM) -> Any:
    """The graph of one block of each kind that the model has, with linears as they are before quantization:
    what can be asked, in seconds, whether graph and runtime can hold the model.

    Raises:
        PreflightError: for a model that no graph can be made of.
    """
    return _traced(lm, (), sketch=True)


def traced(lm: CausalLM, buffers: Iterable[str]) -> Any:
    """The graph of the model as an ``onnx.ModelProto``, whose weights, and the ``buffers`` that files hold,
    are inputs of the graph. A block takes about a second.

    Raises:
        PreflightError: for a model that no graph can be made of.
    """
    return _traced(lm, buffers)


def _traced(lm: CausalLM, buffers: Iterable[str], *, sketch: bool = False) -> Any:
    from onnxscript import optimizer

    model, names = _without_weights(lm)
    if sketch:
        _keep_one_of_each(model)
    else:
        _replace_linears(model)
    weights = {f"{_NETWORK}.{name}": first for name, first in names.items()}
    weights |= {f"{_NETWORK}.{name}": name for name in buffers}
    with foreign(f"no ONNX graph can be made of {type(lm.model).__name__}", lm.source.name, HINT), _quietly():
        program = _exported(_Network(model).eval())
        graph = program.model.graph
        # Before constants are folded: a weight is none, and there is nothing yet that could be folded.
        for name in [name for name in graph.initializers if name in weights]:
            value = graph.initializers.pop(name)
            value.const_value = None
            graph.inputs.append(value)
        # Not program.optimize(): its search for patterns takes the square of the nodes, and a runtime has its
        # own.
        optimizer.inline(program.model)
        optimizer.fold_constants(program.model)
        optimizer.remove_unused_nodes(program.model)
        proto = program.model_proto
    _tidy(proto)
    _require_flat(lm, proto.graph)
    _rename(proto.graph, weights)
    return proto


def _exported(network: nn.Module) -> Any:
    """The network as torch's exporter writes it down; what it fails for, without its own advice."""
    ids = torch.zeros((2, 8), dtype=torch.int64)
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    try:
        return torch.onnx.export(
            network,
            (ids, torch.ones_like(ids)),
            dynamo=True,
            input_names=INPUTS,
            output_names=(OUTPUT,),
            dynamic_shapes=(axes, axes),
            optimize=False,
            verbose=False,
        )
    except Exception as error:
        if error.__cause__ is None:
            raise
        raise error.__cause__ from None


def finished(
    proto: Any, linears: Mapping[str, Linear], tensors: Mapping[str, Any], names: Mapping[str, str]
) -> None:
    """Put the stored tensors into a traced graph.

    ``linears`` are the quantized ones by the model's names, ``tensors`` all of the files, each as a
    ``TensorProto``, and ``names`` says what the files call a weight or a linear of the model.
    """
    graph = proto.graph
    inserted = _Inserted(linears, tensors, names, graph.input)
    nodes = [made for node in graph.node for made in inserted.nodes(node)]
    inputs = [each for each in graph.input if each.name in INPUTS]
    _replace(graph.node, nodes)
    _replace(graph.input, inputs)
    graph.initializer.extend(tensors.values())


class _Inserted:
    """The nodes of a traced graph with the stored tensors as their operands."""

    def __init__(
        self,
        linears: Mapping[str, Linear],
        tensors: Mapping[str, Any],
        names: Mapping[str, str],
        inputs: Iterable[Any],
    ) -> None:
        self.linears, self.tensors, self.names = linears, tensors, names
        self.types = {
            each.name: each.type.tensor_type.elem_type for each in inputs if each.name not in INPUTS
        }
        """What the graph computes with, by a weight's name."""
        self._widened: set[str] = set()

    def nodes(self, node: Any) -> Iterator[Any]:
        """What stands for one node of the traced graph, in order."""
        if node.op_type == OPERATOR and node.domain == DOMAIN:
            yield from self._quantized(node)
        elif node.op_type == "Gather" and node.input[0] in self.types:
            yield from self._looked_up(node)
        else:
            for index, name in enumerate(node.input):
                if name in self.types:
                    yield from self._widen(stored := self.names[name], self.types[name])
                    node.input[index] = self._called(stored, self.types[name])
            yield node

    def _quantized(self, node: Any) -> Iterator[Any]:
        from onnx import TensorProto, helper

        name = node.input[1].removesuffix(".weight")
        linear, stored = self.linears[name], self.names[name]
        scales = f"{stored}.scales"
        yield from self._widen(scales, TensorProto.FLOAT)
        operands = [node.input[0], f"{stored}.qweight", self._called(scales, TensorProto.FLOAT)]
        if not linear.grid.symmetric:
            operands.append(f"{stored}.qzeros")
        node.input[:] = operands
        for key, value in (("bits", linear.grid.bits), ("block_size", linear.group_size)):
            node.attribute.append(helper.make_attribute(key, value))
        yield node

    def _looked_up(self, node: Any) -> Iterator[Any]:
        """Rows of a table, widened when they were found and not before."""
        from onnx import helper

        wanted, stored = self.types[node.input[0]], self.names[node.input[0]]
        node.input[0] = stored
        if self.tensors[stored].data_type == wanted:
            yield node
            return
        rows = node.output[0]
        node.output[0] = f"{rows}.stored"
        yield node
        yield helper.make_node("Cast", [node.output[0]], [rows], to=wanted)

    def _widen(self, stored: str, wanted: int) -> Iterator[Any]:
        """What makes a stored tensor one of another type; nothing where it is, or was made already."""
        from onnx import helper

        called = self._called(stored, wanted)
        if called != stored and called not in self._widened:
            self._widened.add(called)
            yield helper.make_node("Cast", [stored], [called], to=wanted)

    def _called(self, stored: str, wanted: int) -> str:
        return stored if self.tensors[stored].data_type == wanted else f"{stored}.{wanted}"


def _without_weights(lm: CausalLM) -> tuple[PreTrainedModel, dict[str, str]]:
    """The model whose weights have a shape and the memory of one number, and the names of its parameters,
    each with the first name of the same one."""
    model = build_skeleton(lm.source.config, torch.float32, trust_remote_code=lm.source.trust_remote_code)
    if lm.tied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    parameters = dict(model.named_parameters(remove_duplicate=False))
    first: dict[int, str] = {}
    for name, parameter in parameters.items():
        first.setdefault(id(parameter), name)
    names = {name: first[id(parameter)] for name, parameter in parameters.items()}
    small = {
        name: nn.Parameter(torch.zeros((), dtype=each.dtype).expand(each.shape), requires_grad=False)
        for name, each in parameters.items()
        if names[name] == name
    }
    for name in parameters:
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, small[names[name]])
    return model, names


def _replace_linears(model: PreTrainedModel) -> None:
    """Let every linear of a block be the operator."""
    _, blocks = find_blocks(model)
    for block in blocks:
        for name in linear_names(block):
            linear = block.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            block.set_submodule(name, _Linear(linear))


def _keep_one_of_each(model: PreTrainedModel) -> None:
    """Leave out blocks that differ from an earlier one in nothing but their number."""
    name, blocks = find_blocks(model)
    owner, _, leaf = name.rpartition(".")
    kinds = {_kind(block): block for block in reversed(blocks)}
    setattr(model.get_submodule(owner), leaf, nn.ModuleList(reversed(kinds.values())))


def _kind(block: nn.Module) -> str:
    """What a block is, its own number apart."""
    plain = [
        (
            name,
            sorted(
                (key, value) for key, value in vars(module).items() if key != "layer_idx" and _is_plain(value)
            ),
        )
        for name, module in block.named_modules()
    ]
    return f"{block} {plain}"


def _is_plain(value: object) -> bool:
    return isinstance(value, bool | int | float | str)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what the exporter says of itself: operators of packages that are not there, older names."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _tidy(proto: Any) -> None:
    """Take out what says where and how it was traced: paths of this machine, and shapes that a runtime infers
    by itself."""
    proto.producer_name, proto.producer_version = "eqat", ""
    graph = proto.graph
    for part in (proto, graph, *graph.node, *graph.input, *graph.output):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    del graph.value_info[:]


def _rename(graph: Any, weights: Mapping[str, str]) -> None:
    """Call weights as the model does; a tied one is one input, under its first name."""
    inputs: dict[str, Any] = {}
    for value in graph.input:
        value.name = weights.get(value.name, value.name)
        inputs.setdefault(value.name, value)
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = weights.get(name, name)
    _replace(graph.input, list(inputs.values()))


def _replace(field: Any, values: list[Any]) -> None:
    """Other elements of a repeated field, some of which may be its own."""
    copies = [type(each).FromString(each.SerializeToString()) for each in values]
    del field[:]
    field.extend(copies)


def _require_flat(lm: CausalLM, graph: Any) -> None:
    """PreflightError for a graph with others inside of it, which take one way or another by the text."""
    if any(each.HasField("g") or each.graphs for node in graph.node for each in node.attribute):
        raise PreflightError(
            f"the ONNX graph of {type(lm.model).__name__} would take another way by the text",
            where=lm.source.name,
            hint=HINT,
        )
