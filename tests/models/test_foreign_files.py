"""Any bytes in place of a header, an index, a GGUF file or a configuration: a result or one line, at once.

Real files are spoiled, byte by byte and number by number. Memory is limited meanwhile, so that a count that
somebody believes shows.
"""

from __future__ import annotations

import json
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_files
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.architecture.description import describe
from engine.architecture.gguf_header import GGML_TYPES, read_gguf_header
from engine.architecture.headers import safetensors_header
from engine.config.model import ModelConfig
from engine.errors import EqatError, ExitCode
from engine.models.foreign import memory_headroom
from engine.models.gguf import GGUFReader, gguf_config
from engine.models.source import ModelSource
from engine.models.weights import SafetensorsReader
from engine.system.stamps import StampedFile

SECONDS = 10.0


def bounded(read: Callable[[], object]) -> str:
    """What a reading refuses; empty when it succeeds."""
    began = time.process_time()  # a reading that goes round and round, not a machine that is busy
    refused: EqatError | None = None
    try:
        with memory_headroom(1 << 30):
            read()
    except EqatError as error:
        refused = error
    assert time.process_time() - began < SECONDS
    if refused is None:
        return ""
    assert refused.exit_code == ExitCode.PREFLIGHT
    assert "\n" not in str(refused)
    assert len(str(refused)) < 2000
    return str(refused)


def mutations(content: bytes) -> st.SearchStrategy[bytes]:
    """The content with a few bytes changed, a piece cut out, doubled or put in."""

    def spoil(seed: int, kind: str) -> bytes:
        draw = random.Random(seed)
        data = bytearray(content)
        at = draw.randrange(len(data))
        if kind == "bytes":
            for _ in range(draw.randint(1, 4)):
                data[draw.randrange(len(data))] = draw.choice([0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)])
        elif kind == "number":
            data[at : at + 8] = struct.pack("<Q", draw.choice([0, 1 << 31, 1 << 40, 1 << 63, (1 << 64) - 1]))
        elif kind == "cut":
            del data[at : at + draw.randint(1, 100)]
        elif kind == "twice":
            data[at:at] = data[at : at + draw.randint(1, 200)]
        else:
            data[at:at] = draw.choice([b"[" * 5000, b"9" * 5000, b"NaN", b"null", b"-1", b"1e999", b"true"])
        return bytes(data)

    kinds = st.sampled_from(["bytes", "number", "cut", "twice", "insertion"])
    return st.builds(spoil, st.integers(0, 1 << 32), kinds)


# -- safetensors ---------------------------------------------------------------------------------------


def header_of(file: Path) -> bytes:
    content = file.read_bytes()
    return content[: 8 + int.from_bytes(content[:8], "little")]


def read_folder(folder: Path) -> None:
    describe(str(folder))
    reader = SafetensorsReader(folder)
    for name in reader.names()[:3]:
        reader.load(name)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build(tmp_path_factory.mktemp("foreign") / "model", "llama2", shard_size="100KB")


@pytest.mark.parametrize("name", ["header", "model.safetensors.index.json", "config.json"])
def test_any_bytes_in_a_models_small_files_are_read_or_refused(name: str, model: Path) -> None:
    file = model / name if name != "header" else sorted(model.glob("model-*.safetensors"))[0]
    whole = file.read_bytes()
    header = header_of(file) if name == "header" else whole

    @given(spoiled=mutations(header))
    @settings(max_examples=60, deadline=None)
    def check(spoiled: bytes) -> None:
        file.write_bytes(spoiled + whole[len(header) :])
        bounded(lambda: read_folder(model))
        if name == "config.json":
            bounded(lambda: ModelSource.open(ModelConfig(source=str(model))))

    try:
        check()
    finally:
        file.write_bytes(whole)


ENTRY: dict[str, Any] = {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]}


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": None},
        {"dtype": 5},
        {"dtype": ["F32"]},
        {"shape": None},
        {"shape": 8},
        {"shape": [2.0, 4]},
        {"shape": [True, 8]},
        {"shape": ["2", 4]},
        {"shape": [-2, -4]},
        {"shape": [2, 4] + [1] * 7},
        {"shape": [1 << 40, 0]},
        {"shape": [float("nan")]},
        {"shape": [2, 5]},
        {"data_offsets": [0]},
        {"data_offsets": [0, 32, 64]},
        {"data_offsets": [32, 0]},
        {"data_offsets": [-32, 0]},
        {"data_offsets": [0, 32.0]},
        {"data_offsets": [0, float("nan")]},
        {"data_offsets": [0, float("inf")]},
        {"data_offsets": [None, 32]},
        {"data_offsets": [False, 32]},
        {"data_offsets": [64, 96]},
        {"data_offsets": [0, 10**400]},
        {"data_offsets": "ab"},
        {"shape": [1 << 39, 1 << 39], "data_offsets": [0, 1 << 62]},
    ],
    ids=str,
)
def test_an_entry_of_a_header_has_types_and_bounds(change: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    for entry, right in (({**ENTRY, **change}, False), (ENTRY, True)):
        text = json.dumps({"a": entry, "__metadata__": {"format": "pt"}}).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(32))
        for read in (
            lambda path: safetensors_header(StampedFile.of(path)),
            lambda path: SafetensorsReader(path.parent),
        ):
            said = bounded(lambda read=read: read(file))  # type: ignore[misc]
            assert bool(said) is not right, said
            assert right or "model.safetensors" in said


@pytest.mark.parametrize("length", [100_000_001, 1 << 40, 1 << 63])
def test_a_header_longer_than_the_format_allows_is_not_read(length: int, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    with file.open("wb") as stream:
        stream.write(length.to_bytes(8, "little"))
        stream.truncate(1 << 42)  # sparse: it takes no room
    assert "header" in bounded(lambda: safetensors_header(StampedFile.of(file)))


@pytest.mark.parametrize(
    "weight_map",
    [
        None,
        [],
        "x",
        {"a": None},
        {"a": 5},
        {"a": ["model.safetensors"]},
        {"a": "../model.safetensors"},
        {"a": "/etc/passwd"},
        {"a": ""},
        {"a": "."},
        {"a": "a\0b.safetensors"},
        {"a": "config.json"},
        {"a": "sub/model.safetensors"},
    ],
    ids=str,
)
def test_an_index_names_files_beside_it(weight_map: Any, model: Path) -> None:
    index = model / "model.safetensors.index.json"
    whole = index.read_text()
    try:
        index.write_text(json.dumps({"weight_map": weight_map}))
        for read in (describe, lambda source: SafetensorsReader(Path(source))):
            said = bounded(lambda read=read: read(str(model)))  # type: ignore[misc]
            assert "index" in said, said
    finally:
        index.write_text(whole)


# -- GGUF ----------------------------------------------------------------------------------------------


def packed(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def setting(key: str, kind: int, value: bytes) -> bytes:
    return packed(key) + struct.pack("<I", kind) + value


def gguf_of(
    *settings: bytes,
    tensors: bytes = b"",
    counts: tuple[int, int] | None = None,
    version: int = 3,
    after: bytes = bytes(4096),
) -> bytes:
    number, pairs = counts or (0, len(settings))
    return b"GGUF" + struct.pack("<IQQ", version, number, pairs) + b"".join(settings) + tensors + after


def tensor(name: str, dimensions: list[int], kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
    return packed(name) + sizes + struct.pack("<IQ", kind, offset)


STRING, ARRAY, U32, U64, F32 = 8, 9, 4, 10, 6
NESTED = struct.pack("<IQ", ARRAY, 1) * 100 + struct.pack("<IQ", U32, 0)
DAMAGED: dict[str, bytes] = {
    "version": gguf_of(version=1),
    "version of the other byte order": gguf_of(version=3 << 24),
    "tensors without end": gguf_of(counts=(1 << 60, 0)),
    "settings without end": gguf_of(counts=(0, 1 << 60)),
    "many tensors": gguf_of(counts=(1 << 21, 0), after=bytes(64 << 20)),
    "a long key": gguf_of(struct.pack("<Q", 1 << 62), counts=(0, 1)),
    "a long text": gguf_of(setting("a", STRING, struct.pack("<Q", (1 << 64) - 1))),
    "an unknown type": gguf_of(setting("a", 99, b"")),
    "no text": gguf_of(setting("a", STRING, struct.pack("<Q", 2) + b"\xff\xff")),
    "lists in lists": gguf_of(setting("a", ARRAY, NESTED)),
    "lists without end": gguf_of(setting("a", ARRAY, struct.pack("<IQ", ARRAY, 1 << 40))),
    "many empty lists": gguf_of(
        setting("a", ARRAY, struct.pack("<IQ", ARRAY, 1 << 20)), after=bytes(32 << 20)
    ),
    "texts without end": gguf_of(setting("a", ARRAY, struct.pack("<IQ", STRING, 1 << 60))),
    "texts that are too long": gguf_of(setting("a", ARRAY, struct.pack("<IQQ", STRING, 2, 1 << 60))),
    "numbers without end": gguf_of(setting("a", ARRAY, struct.pack("<IQ", U64, 1 << 61))),
    "numbers of an unknown type": gguf_of(setting("a", ARRAY, struct.pack("<IQ", 77, 1))),
    "twice the same setting": gguf_of(setting("a", U32, bytes(4)), setting("a", U32, bytes(4))),
    "twice the same tensor": gguf_of(tensors=tensor("a", [4]) * 2, counts=(2, 0)),
    "dimensions without end": gguf_of(tensors=packed("a") + struct.pack("<I", 1 << 31), counts=(1, 0)),
    "nine dimensions": gguf_of(tensors=tensor("a", [1] * 9), counts=(1, 0)),
    "a huge dimension": gguf_of(tensors=tensor("a", [1 << 41]), counts=(1, 0)),
    "a huge product": gguf_of(tensors=tensor("a", [1 << 39] * 8), counts=(1, 0)),
    "a huge place": gguf_of(tensors=tensor("a", [4], offset=(1 << 64) - 1), counts=(1, 0)),
    "behind the end": gguf_of(tensors=tensor("a", [4], offset=1 << 20), counts=(1, 0)),
    "a tensor without a name": gguf_of(tensors=tensor("", [4]), counts=(1, 0)),
    "a tensor with a long name": gguf_of(tensors=tensor("a" * 5000, [4]), counts=(1, 0)),
    "a tensor with a name of two lines": gguf_of(tensors=tensor("a\nb", [4]), counts=(1, 0)),
    "half a block": gguf_of(tensors=tensor("a", [33], kind=2), counts=(1, 0)),
    "an unknown quantization": gguf_of(tensors=tensor("a", [32], kind=4), counts=(1, 0)),
    **{
        f"alignment {value}": gguf_of(setting("general.alignment", U32, struct.pack("<I", value)))
        for value in (0, 3, 33, 1 << 21, (1 << 32) - 1)
    },
    "alignment as text": gguf_of(setting("general.alignment", STRING, packed("32"))),
    "alignment as a fraction": gguf_of(setting("general.alignment", F32, struct.pack("<f", 32.0))),
    "alignment as a list": gguf_of(setting("general.alignment", ARRAY, struct.pack("<IQI", U32, 1, 32))),
    "alignment as a truth": gguf_of(setting("general.alignment", 7, b"\x01")),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_gguf_header_is_refused_in_no_time(name: str, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(DAMAGED[name])
    said = bounded(lambda: read_gguf_header(file))
    assert "model.gguf" in said
    assert bounded(lambda: describe(str(file))) == said


def test_an_intact_header_is_read_however_it_lies(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    long = packed("x" * 1000) * 10_000  # more than is read at first
    words = setting("words", ARRAY, struct.pack("<IQ", STRING, 10_000) + long)
    file.write_bytes(
        gguf_of(
            words,
            setting("general.alignment", U32, struct.pack("<I", 64)),
            setting("lists", ARRAY, struct.pack("<IQ", ARRAY, 1) + struct.pack("<IQI", U32, 1, 7)),
            tensors=tensor("a", [4, 2], offset=64),
            counts=(1, 3),
        )
    )
    header = read_gguf_header(file)
    assert header.array_lengths == {"words": 10_000, "lists": 1}
    assert header.tensors["a"].shape == (2, 4)
    assert header.tensors["a"].start % 64 == 0
    assert set(GGML_TYPES) >= {0, 1, 2, 8}


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf_files.write(tmp_path_factory.mktemp("gguf") / "model.gguf", "llama2")


def read_gguf(file: Path) -> None:
    describe(str(file))
    reader = GGUFReader(file)
    gguf_config(reader)
    for name in ("model.norm.weight", "model.layers.0.self_attn.q_proj.weight"):
        reader.load(name)


def test_any_bytes_in_a_gguf_header_are_read_or_refused(gguf: Path) -> None:
    whole = gguf.read_bytes()
    assert bounded(lambda: read_gguf(gguf)) == ""
    begin = min(info.start for info in read_gguf_header(gguf).tensors.values())

    @given(spoiled=mutations(whole[:begin]))
    @settings(max_examples=150, deadline=None)
    def check(spoiled: bytes) -> None:
        gguf.write_bytes(spoiled + whole[begin:])
        bounded(lambda: read_gguf(gguf))

    try:
        check()
    finally:
        gguf.write_bytes(whole)


VALUES = [
    (U32, struct.pack("<I", 0)),
    (U32, struct.pack("<I", (1 << 32) - 1)),
    (U64, struct.pack("<Q", (1 << 64) - 1)),
    (5, struct.pack("<i", -1)),
    (F32, struct.pack("<f", float("nan"))),
    (F32, struct.pack("<f", float("inf"))),
    (F32, struct.pack("<f", -1.0)),
    (7, b"\x01"),
    (STRING, packed("12")),
    (ARRAY, struct.pack("<IQII", U32, 2, 1, 2)),
    (ARRAY, struct.pack("<IQ", U32, 0)),
]
USED = [
    "general.architecture",
    "llama.block_count",
    "llama.context_length",
    "llama.embedding_length",
    "llama.feed_forward_length",
    "llama.attention.head_count",
    "llama.attention.head_count_kv",
    "llama.attention.layer_norm_rms_epsilon",
    "llama.attention.key_length",
    "llama.rope.freq_base",
    "llama.rope.scaling.type",
    "tokenizer.ggml.bos_token_id",
]


@pytest.mark.parametrize("key", USED)
def test_every_setting_that_is_used_is_checked(key: str, gguf: Path, tmp_path: Path) -> None:
    """Of another type, out of every range, or missing."""
    file = tmp_path / "model.gguf"
    content = gguf.read_bytes()
    optional = ("key_length", "freq_base", "scaling.type", "token_id", "head_count_kv")
    for kind, value in [*VALUES, (None, b"")]:
        settings = content
        at = settings.find(packed(key))
        if at >= 0:  # the old one gets a name that nobody reads
            settings = settings.replace(packed(key), packed("x" * len(key)), 1)
        if kind is not None:
            pairs = int.from_bytes(settings[16:24], "little") + 1
            added = setting(key, kind, value)
            # Tensors begin at a multiple of 32 behind the header; what is added must not move them.
            padding = setting("pad", STRING, packed("p" * (-(len(added) + 23) % 32)))
            counts = settings[:16] + (pairs + 1).to_bytes(8, "little")
            settings = counts + added + padding + settings[24:]
        file.write_bytes(settings)
        said = bounded(lambda: read_gguf(file))
        # Other values of these may be right, or mean that there is none.
        lenient = ("token_id", "context_length", "scaling.type", "freq_base")
        assert said or key.endswith(lenient) or (kind is None and key.endswith(optional)), (kind, value)
