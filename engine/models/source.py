"""Finding a model: a local directory, a hub id, a GGUF file, or random weights.

:meth:`ModelSource.open` answers four questions for the rest of the engine: the configuration, the
tokenizer, a reader for single tensors, and an identity that changes whenever the model does.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig

from engine.models.gguf import GGUFReader, gguf_config
from engine.models.hub import download
from engine.models.random_weights import RandomReader
from engine.models.skeleton import refuse_config
from engine.models.tokenizer import byte_tokenizer
from engine.models.weights import SafetensorsReader, WeightReader
from engine.run.architecture import TINY_LLAMA, resolve_source
from engine.run.config import ModelConfig
from engine.run.disk_model import TOKENIZER_FILES
from engine.run.errors import PreflightError

SourceKind = Literal["directory", "hub", "gguf", "random"]

SAMPLES, SAMPLE_BYTES = 64, 64 << 10
"""Of a weight file, that go into a model's identity."""


class ModelSource:
    """A model that was found: configuration, tokenizer, weights and identity."""

    def __init__(
        self,
        name: str,
        kind: SourceKind,
        config: PreTrainedConfig,
        weights: WeightReader,
        *,
        directory: Path | None = None,
        file: Path | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        refuse_config(config, name)
        self.name = name
        self.kind = kind
        self.config = config
        self.weights = weights
        self.directory = directory
        self.file = file
        self.revision = revision
        self.trust_remote_code = trust_remote_code
        # Taken now: running the model can correct the configuration (a head that is not tied after all).
        self._sha256 = self._digest()
        self._tokenizer: Any = None

    @classmethod
    def open(cls, model: ModelConfig) -> ModelSource:
        """Find the model; every way in which that can fail is a PreflightError of one sentence."""
        resolved = resolve_source(model.source)
        if isinstance(resolved, Path):
            if not resolved.exists():
                raise PreflightError("no such file or folder", where=str(resolved), hint="check model.source")
            if resolved.is_file():
                return cls._open_gguf(resolved)
            return cls._open_directory(resolved, model)
        if resolved.startswith("random://"):
            return cls._open_random(resolved)
        folder = download(resolved, model.revision, trust_remote_code=model.trust_remote_code)
        return cls._open_directory(folder, model, hub_id=resolved)

    @classmethod
    def _open_directory(cls, directory: Path, model: ModelConfig, hub_id: str | None = None) -> ModelSource:
        config = read_config(directory, model.trust_remote_code)
        refuse_config(config, hub_id or str(directory))
        return cls(
            hub_id or directory.name,
            "hub" if hub_id else "directory",
            config.get_text_config(),
            SafetensorsReader(directory),
            directory=directory,
            # The cache names a snapshot's folder after its commit.
            revision=directory.name if hub_id else None,
            trust_remote_code=model.trust_remote_code,
        )

    @classmethod
    def _open_gguf(cls, file: Path) -> ModelSource:
        if file.suffix != ".gguf":
            raise PreflightError(
                "is a file, but not a .gguf file", where=str(file), hint="name the model's folder instead"
            )
        weights = GGUFReader(file)
        config = gguf_config(weights)
        return cls(file.stem, "gguf", config, weights, file=file)

    @classmethod
    def _open_random(cls, address: str) -> ModelSource:
        options = dict(TINY_LLAMA)
        config = AutoConfig.for_model(options.pop("model_type"), **options)
        return cls(address.removeprefix("random://"), "random", config, RandomReader(config))

    # ----------------------------------------------------------------------------------------------

    def tokenizer(self) -> Any:
        """The model's own tokenizer (byte-level for random models)."""
        if self._tokenizer is None:
            self._tokenizer = self._load_tokenizer()
        return self._tokenizer

    def _load_tokenizer(self) -> Any:
        if self.kind == "random":
            return byte_tokenizer(self.config.vocab_size)
        try:
            # Said in every case: left out, transformers asks on the terminal and runs the code on "y".
            if self.file is not None:
                # The tokenizer is in the file; code that lies beside it does not belong to it.
                return AutoTokenizer.from_pretrained(
                    self.file.parent, gguf_file=self.file.name, trust_remote_code=False
                )
            return AutoTokenizer.from_pretrained(self.directory, trust_remote_code=self.trust_remote_code)
        except Exception as error:  # tokenizer back ends raise whatever they like on a broken file
            if "trust_remote_code=True" in str(error) and not self.trust_remote_code:
                raise self._tokenizer_code_refused() from error
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise PreflightError(
                f"the tokenizer cannot be loaded: {lines[0]}",
                where=self.name,
                hint="the model's folder needs its tokenizer files (tokenizer.json or tokenizer.model)",
            ) from error

    def _tokenizer_code_refused(self) -> PreflightError:
        hint = "read that code, then run it with --trust-remote-code"
        if self.file is not None:
            hint = "put the .gguf file into a folder of its own; the code beside it is never run"
        return PreflightError("the tokenizer runs code from its own repository", where=self.name, hint=hint)

    def identity(self) -> dict[str, Any]:
        """What this model is, so that a resumed run notices when it is another one.

        The digest covers the configuration, every tensor's name, shape and stored size, the sizes of the
        files, 64 samples of each file's bytes, which training changes all over, and the model's own code
        where that is run. No file's time counts; ``path`` and ``name`` tell where it was found and are not
        compared, so a model may move. Thirty shards of 140 GB cost 1920 reads of 64 KiB. What it cannot see
        is a change that is confined to the bytes between the samples.
        """
        place = self.file or self.directory
        return {
            "kind": self.kind,
            "name": self.name,
            "path": str(place) if place is not None and self.kind != "hub" else None,
            "revision": self.revision,
            "sha256": self._sha256,
        }

    def _digest(self) -> str:
        digest = hashlib.sha256()
        # Where the folder lies and which transformers reads it are not part of what the model is.
        config = self.config.to_dict()
        config.pop("_name_or_path", None)
        config.pop("transformers_version", None)
        digest.update(json.dumps(config, sort_keys=True, default=str).encode())
        for file in self.weights.files():
            digest.update(f"{file.name}:{file.stat().st_size};".encode())
            for sample in _samples(file):
                digest.update(sample)
        for code in self._own_code():
            digest.update(f"{code.name}:".encode() + code.read_bytes())
        for line in self.weights.inventory():
            digest.update(line.encode())
        return digest.hexdigest()

    def save_assets(self, out_dir: Path) -> None:
        """Write what belongs to a checkpoint besides its weights: config, generation config, tokenizer."""
        out_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
        self.config.save_pretrained(out_dir)
        if self.directory is None:
            self.tokenizer().save_pretrained(out_dir)
            GenerationConfig.from_model_config(self.config).save_pretrained(out_dir)
            return
        # Files are copied as they are: reading and writing them again can change a tokenizer.
        names = [self.directory / name for name in (*TOKENIZER_FILES, "generation_config.json")]
        for file in (*filter(Path.is_file, names), *self._own_code()):
            shutil.copyfile(file, out_dir / file.name)

    def _own_code(self) -> list[Path]:
        """Python files that came with the model, where the user allowed them to run."""
        if self.directory is None or not self.trust_remote_code:
            return []
        return sorted(self.directory.glob("*.py"))


def _samples(file: Path) -> Iterator[bytes]:
    """Evenly spread pieces of a file, its beginning and its end among them; a small file whole."""
    size = file.stat().st_size
    starts = list(range(0, size, SAMPLE_BYTES))
    if len(starts) > SAMPLES:
        starts = [(size - SAMPLE_BYTES) * index // (SAMPLES - 1) for index in range(SAMPLES)]
    try:
        with file.open("rb") as content:
            for start in starts:
                content.seek(start)
                yield content.read(SAMPLE_BYTES)
    except OSError as error:
        raise PreflightError(f"cannot be read: {error.strerror}", where=str(file)) from error


def read_config(directory: Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """``config.json`` as a transformers configuration."""
    path = directory / "config.json"
    if not path.is_file():
        candidates = sorted(file.name for file in directory.glob("*.gguf"))
        hint = f"name the file itself: {directory / candidates[0]}" if candidates else "name a model's folder"
        raise PreflightError("the folder has no config.json", where=str(directory), hint=hint)
    try:
        raw = json.loads(path.read_bytes())
        model_type = raw.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise PreflightError("cannot be read as JSON", where=str(path), hint="download it again") from error
    if raw.get("auto_map") and not trust_remote_code and model_type not in _known_types():
        raise PreflightError(
            f"model type {model_type!r} runs code from its own repository",
            where=str(path),
            hint="read that code, then run it with --trust-remote-code",
        )
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:  # validation differs between versions: OSError, ValueError, their own types
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise PreflightError(
            f"model type {model_type!r} is not understood by transformers: {lines[0]}",
            where=str(path),
            hint="check config.json, or update transformers",
        ) from error


def _known_types() -> set[str]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return set(CONFIG_MAPPING.keys())
