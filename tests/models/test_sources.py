"""Every way to name a model opens the same kind of source, and its identity tells models apart."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import gguf_files
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from engine.config.model import ModelConfig
from engine.models.causal_lm import CausalLM
from engine.models.source import SAMPLE_BYTES, SAMPLES, ModelSource, _samples
from engine.models.weights import SafetensorsReader
from engine.system.stamps import StampedFile

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


def open_source(folder: Path | str) -> ModelSource:
    return ModelSource.open(ModelConfig(source=str(folder)))


def logits(lm: CausalLM) -> torch.Tensor:
    with torch.no_grad():
        hidden = lm.embed(tiny.tokens())
        for index in range(lm.blocks):
            hidden = lm.run_block(lm.load_block(index), index, hidden)
        return lm.head(hidden)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_are_read_as_safetensors_reads_them(tmp_path: Path, dtype: torch.dtype) -> None:
    tiny.build(tmp_path, "llama2", dtype=dtype, shard_size="100KB")
    expected = {}
    for file in tmp_path.glob("*.safetensors"):
        expected.update(load_file(file))
    reader = SafetensorsReader(tmp_path)
    assert reader.names() == sorted(expected)
    for name, tensor in expected.items():
        assert reader.shape(name) == tuple(tensor.shape)
        loaded = reader.load(name)
        assert loaded.dtype == tensor.dtype == reader.dtype(name)
        assert torch.equal(loaded, tensor)


def test_shards_make_no_difference(tmp_path: Path) -> None:
    one = tiny.build(tmp_path / "one", "qwen3")
    many = tiny.build(tmp_path / "many", "qwen3", shard_size="50KB")
    assert len(list(many.glob("*.safetensors"))) > 3
    first, second = (CausalLM(open_source(folder), CPU, torch.float32) for folder in (one, many))
    assert torch.equal(logits(first), logits(second))


def rename(folder: Path, prefix: str, replacement: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    renamed = {
        replacement + name.removeprefix(prefix) if name.startswith(prefix) else name: tensor
        for name, tensor in tensors.items()
    }
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("replacement", ["", "language_model.model.", "model.language_model."])
def test_checkpoints_saved_from_another_wrapper_are_understood(tmp_path: Path, replacement: str) -> None:
    folder = tiny.build(tmp_path, "smollm2")
    expected = logits(CausalLM(open_source(folder), CPU, torch.float32))
    rename(folder, "model.", replacement)
    assert torch.equal(logits(CausalLM(open_source(folder), CPU, torch.float32)), expected)


def test_the_text_part_of_a_multimodal_checkpoint_is_a_model_of_its_own(tmp_path: Path) -> None:
    text = tiny.build(tmp_path, "gemma3")
    expected = logits(CausalLM(open_source(text), CPU, torch.float32))
    rename(text, "model.", "language_model.model.")
    config = json.loads((text / "config.json").read_text())
    AutoConfig.for_model("gemma3", text_config=config).save_pretrained(text)
    lm = CausalLM(open_source(text), CPU, torch.float32)
    assert lm.block_prefix(0) == "model.layers.0"
    assert torch.equal(logits(lm), expected)


def test_head_stored_beside_a_tied_embedding_stays_tied_only_if_equal(tmp_path: Path) -> None:
    folder = tiny.build(tmp_path, "smollm2")
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding.clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert CausalLM(open_source(folder), CPU, torch.float32).tied
    tensors["lm_head.weight"] = embedding * 2
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    source = open_source(folder)
    lm = CausalLM(source, CPU, torch.float32)
    assert not lm.tied
    assert not source.config.tie_word_embeddings
    assert torch.equal(lm.outer_state()["lm_head.weight"], embedding * 2)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder).eval()(tiny.tokens()).logits
    torch.testing.assert_close(logits(lm), expected, atol=1e-5, rtol=0)


def test_tied_model_stored_under_the_name_of_its_head(tmp_path: Path) -> None:
    folder = tiny.build(tmp_path, "smollm2")
    expected = logits(CausalLM(open_source(folder), CPU, torch.float32))
    rename(folder, "model.embed_tokens.weight", "lm_head.weight")
    assert torch.equal(logits(CausalLM(open_source(folder), CPU, torch.float32)), expected)


def test_random_model_is_the_same_every_time() -> None:
    first, second = open_source("random://tiny-llama"), open_source("random://tiny-llama")
    assert first.identity() == second.identity()
    lms = [CausalLM(source, CPU, torch.float32) for source in (first, second)]
    assert torch.equal(logits(lms[0]), logits(lms[1]))
    assert not torch.equal(lms[0].load_block(0).mlp.up_proj.weight, lms[0].load_block(1).mlp.up_proj.weight)
    norm = lms[0].load_block(0).input_layernorm.weight
    assert torch.equal(norm, torch.ones_like(norm))


def test_byte_tokenizer_returns_any_text_unchanged() -> None:
    source = open_source("random://tiny-llama")
    tokenizer = source.tokenizer()
    text = "Tab\tand\n newline,  two spaces, naïve — 日本 🙂"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == source.config.vocab_size
    assert tokenizer.eos_token_id == source.config.eos_token_id


def test_identity_changes_with_the_model_and_only_with_it(tmp_path: Path) -> None:
    one = open_source(tiny.build(tmp_path / "one", "llama2", seed=1)).identity()
    again = open_source(tmp_path / "one").identity()
    wider = open_source(tiny.build(tmp_path / "wider", "llama2", intermediate_size=160)).identity()
    half = open_source(tiny.build(tmp_path / "half", "llama2", seed=1, dtype=torch.float16)).identity()
    assert one == again
    assert len({one["sha256"], wider["sha256"], half["sha256"]}) == 3


def identity(folder: Path, **options: object) -> str:
    model = ModelConfig(source=str(folder), **options)  # type: ignore[arg-type]
    return str(ModelSource.open(model).identity()["sha256"])


def test_the_same_files_are_the_same_model_wherever_and_whenever(tmp_path: Path) -> None:
    folder = tiny.build(tmp_path / "here", "llama2", shard_size="100KB")
    shutil.copytree(folder, tmp_path / "there", copy_function=shutil.copyfile)
    for file in (tmp_path / "there").iterdir():
        os.utime(file, (1, 1))
    # As the hub's cache keeps them: links to files that are named after their content.
    snapshot = tmp_path / "models--some--one" / "snapshots" / COMMIT
    blobs = tmp_path / "models--some--one" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copyfile(file, blobs / f"{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert len({identity(place) for place in (tmp_path / "here", tmp_path / "there", snapshot)}) == 1


def test_other_weights_of_the_same_size_are_another_model(tmp_path: Path) -> None:
    one, two = (tiny.build(tmp_path / str(seed), "llama2", seed=seed) for seed in (1, 2))
    assert (one / "config.json").read_bytes() == (two / "config.json").read_bytes()
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (one, two)]
    assert sizes[0] == sizes[1]
    assert identity(one) != identity(two)


def test_a_change_in_any_single_shard_is_another_model(tmp_path: Path) -> None:
    folder = tiny.build(tmp_path, "llama2", shard_size="100KB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 3
    seen = {identity(folder)}
    for shard in shards:
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
        seen.add(identity(folder))
    assert len(seen) == len(shards) + 1


def test_another_gguf_file_of_the_same_size_is_another_model(tmp_path: Path) -> None:
    one, two = (gguf_files.write(tmp_path / f"{seed}.gguf", "llama2", seed=seed) for seed in (1, 2))
    two.replace(tmp_path / "moved.gguf")
    (tmp_path / "copy").mkdir()
    copied = shutil.copyfile(one, tmp_path / "copy" / one.name)
    assert identity(one) == identity(copied)
    shutil.copyfile(tmp_path / "moved.gguf", copied)
    assert one.stat().st_size == copied.stat().st_size
    assert identity(one) != identity(copied)


def test_a_models_own_code_is_part_of_it_where_it_is_run(tmp_path: Path) -> None:
    folder = tiny.build(tmp_path, "llama2")
    before = [identity(folder, trust_remote_code=trusted) for trusted in (False, True)]
    (folder / "modeling.py").write_text("x = 1")
    after = [identity(folder, trust_remote_code=trusted) for trusted in (False, True)]
    assert after[0] == before[0]
    assert after[1] != before[1]


@pytest.mark.alone
def test_the_identity_of_a_model_of_140_gigabytes_takes_1920_reads(tmp_path: Path) -> None:
    shards = [tmp_path / f"shard-{number:02d}" for number in range(30)]
    for shard in shards:
        with shard.open("wb") as file:
            file.truncate(140 * 10**9 // 30)  # sparse: it takes no room
    began = time.process_time()
    digest = hashlib.sha256()
    reads = 0
    for shard in shards:
        for sample in _samples(StampedFile.of(shard)):
            assert len(sample) == SAMPLE_BYTES
            digest.update(sample)
            reads += 1
    assert reads == 30 * SAMPLES == 1920
    assert time.process_time() - began < 1


@pytest.mark.parametrize("size", [0, 1, SAMPLE_BYTES, SAMPLES * SAMPLE_BYTES - 1, SAMPLES * SAMPLE_BYTES])
def test_a_small_file_is_sampled_whole(tmp_path: Path, size: int) -> None:
    content = random.Random(size).randbytes(size)
    (tmp_path / "file").write_bytes(content)
    assert b"".join(_samples(StampedFile.of(tmp_path / "file"))) == content


def test_samples_of_a_large_file_are_spread_from_its_first_to_its_last_byte(tmp_path: Path) -> None:
    size = 3 * SAMPLES * SAMPLE_BYTES + 12345
    content = random.Random(0).randbytes(size)
    (tmp_path / "file").write_bytes(content)
    samples = list(_samples(StampedFile.of(tmp_path / "file")))
    starts = [content.index(sample) for sample in samples]
    assert len(starts) == SAMPLES
    assert (starts[0], starts[-1]) == (0, size - SAMPLE_BYTES)
    gaps = [after - before for before, after in itertools.pairwise(starts)]
    assert max(gaps) - min(gaps) <= 1


# -- code that comes with a model ------------------------------------------------------------------------


ASK_FOR_TOKENIZER = """
import sys
from engine.models.source import ModelSource
from engine.config.model import ModelConfig
from engine.errors import EqatError
try:
    ModelSource.open(ModelConfig(source=sys.argv[1], trust_remote_code=sys.argv[2] == "True")).tokenizer()
except EqatError as error:
    print(int(error.exit_code), error)
"""


def with_tokenizer_code(folder: Path, marker: Path) -> None:
    """A tokenizer that is a Python file of the model's repository."""
    (folder / "tok.py").write_text(f"open({str(marker)!r}, 'w').write('ran')")
    settings = {"auto_map": {"AutoTokenizer": ["tok.T", "tok.T"]}, "tokenizer_class": "T"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def asked_for_a_tokenizer(model: Path, *, trusted: bool = False) -> str:
    """What a process says whose user answers every question with y."""
    result = subprocess.run(
        [sys.executable, "-c", ASK_FOR_TOKENIZER, str(model), str(trusted)],
        env={**os.environ, "HF_MODULES_CACHE": str(model.parent / "modules"), "PYTHONPATH": str(ROOT)},
        input="y\n" * 10,
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout


def test_code_beside_a_gguf_file_is_not_run_and_nobody_is_asked(tmp_path: Path) -> None:
    file = gguf_files.write(tmp_path / "model.gguf", "llama2")
    with_tokenizer_code(tmp_path, tmp_path / "marker")
    said = asked_for_a_tokenizer(file)
    assert said.startswith("3 model: the tokenizer cannot be loaded"), "the file has none"
    assert not (tmp_path / "marker").exists()


def test_a_tokenizer_made_of_code_runs_only_with_the_flag_that_its_refusal_names(tmp_path: Path) -> None:
    folder = tiny.build(tmp_path / "model", "llama2")
    with_tokenizer_code(folder, tmp_path / "marker")
    said = asked_for_a_tokenizer(folder)
    assert said.startswith("3 model: the tokenizer runs code")
    assert "--trust-remote-code" in said
    assert not (tmp_path / "marker").exists()
    asked_for_a_tokenizer(folder, trusted=True)
    assert (tmp_path / "marker").exists()


def test_saved_assets_are_enough_for_transformers(tmp_path: Path) -> None:
    for name, source in {
        "directory": open_source(tiny.build(tmp_path / "model", "gemma2")),
        "random": open_source("random://tiny-llama"),
    }.items():
        out = tmp_path / name
        source.save_assets(out)
        assert AutoConfig.from_pretrained(out).to_dict()["hidden_size"] == 64
        tokenizer = AutoTokenizer.from_pretrained(out)
        assert tokenizer("a b")["input_ids"] == source.tokenizer()("a b")["input_ids"]
        assert json.loads((out / "generation_config.json").read_text())


# -- hub ids, without a network ------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"

OPEN_FROM_HUB = """
import sys
from engine.models.source import SAMPLE_BYTES, SAMPLES, ModelSource, _samples
from engine.config.model import ModelConfig
from engine.errors import EqatError
for name in sys.argv[1:]:
    try:
        source = ModelSource.open(ModelConfig(source=name))
        weights, digest = len(source.weights.names()), source.identity()["sha256"]
        print("opened", source.name, source.kind, source.revision, weights, digest)
    except EqatError as error:
        print(int(error.exit_code), error)
"""


def cached_model(cache: Path, name: str) -> Path:
    """A tiny model as the hub's cache keeps it."""
    repository = cache / f"models--someone--{name}"
    snapshot = tiny.build(repository / "snapshots" / COMMIT, "llama2", shard_size="100KB")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return snapshot


def test_hub_ids_open_offline_from_a_complete_cache_and_are_refused_clearly_otherwise(tmp_path: Path) -> None:
    local = shutil.copytree(cached_model(tmp_path, "complete"), tmp_path / "local")
    interrupted = sorted(cached_model(tmp_path, "interrupted").glob("model-*.safetensors"))[1]
    interrupted.unlink()
    # A process of its own, because the hub's library reads these variables once, when it is imported.
    result = subprocess.run(
        [sys.executable, "-c", OPEN_FROM_HUB, "someone/complete", "someone/interrupted", "someone/absent"],
        env={**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    complete, incomplete, absent = result.stdout.splitlines()
    assert complete == f"opened someone/complete hub {COMMIT} 30 {identity(local)}"
    assert incomplete.startswith("3 ")
    assert interrupted.name in incomplete
    assert absent.startswith("3 someone/absent: the hub cannot be reached")
