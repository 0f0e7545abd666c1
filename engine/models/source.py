"""Finding a model: a local directory, a hub id, a GGUF file, or random weights.

:meth:`ModelSource.open` answers four questions for the rest of the engine: the configuration, the
tokenizer, a reader for single tensors, and an identity that changes whenever the model does.

Nothing is read of a model's folder before all of it was judged (:mod:`engine.architecture.model_folder`), and
everything that is read later is compared with what was judged: a run whose model is replaced meanwhile ends
with an IdentityError.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig

from engine.architecture.description import RANDOM_MODELS, local_config, resolve_source, stored_tensors
from engine.architecture.model_folder import NO_ASSETS, ModelFolder
from engine.architecture.refusals import refuse_model
from engine.config.model import RANDOM, ModelConfig
from engine.errors import PreflightError
from engine.models.foreign import foreign
from engine.models.gguf import GGUFReader, gguf_config
from engine.models.gguf_tokenizer import mend
from engine.models.hub import download
from engine.models.kept_tokenizer import kept_tokenizer
from engine.models.random_weights import RandomReader
from engine.models.skeleton import refuse_config
from engine.models.tokenizer import byte_tokenizer
from engine.models.weights import SafetensorsReader, WeightReader
from engine.system.guarded import SMALL, BadFile, bad_file, parse_object
from engine.system.stamps import StampedFile

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
        folder: ModelFolder | None = None,
        file: Path | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        is_part: bool = False,
    ) -> None:
        refuse_config(config, name)
        self.name = name
        self.kind = kind
        self.config = config
        self.weights = weights
        self.folder = folder
        self.directory = folder.path if folder is not None else None
        self.file = file
        self.revision = revision
        self.trust_remote_code = trust_remote_code
        self.is_part = is_part
        """Whether it is the language model of a larger one (that sees, hears), whose files these are."""
        # Taken now: running the model can correct the configuration (a head that is not tied after all).
        with foreign("its configuration cannot be written down", name):
            self._sha256 = self._digest()
        self._assets = folder.assets_digest() if folder is not None else NO_ASSETS
        self._tokenizer: Any = None

    @classmethod
    def open(cls, model: ModelConfig) -> ModelSource:
        """Find the model; every way in which that can fail is a PreflightError of one sentence."""
        resolved = resolve_source(model.source)
        if isinstance(resolved, Path):
            if os.path.isfile(resolved):
                return cls._open_gguf(resolved)
            return cls._open_directory(resolved, model)
        if resolved.startswith(RANDOM):
            return cls._open_random(resolved)
        folder = download(resolved, model.revision, trust_remote_code=model.trust_remote_code)
        return cls._open_directory(folder, model, hub_id=resolved)

    @classmethod
    def _open_directory(cls, directory: Path, model: ModelConfig, hub_id: str | None = None) -> ModelSource:
        folder = ModelFolder.judge(directory)
        name = hub_id or directory.name
        # What the plan has asked of these files, asked again by the same code: a run may find others.
        refuse_model(local_config(folder), stored_tensors(folder))
        config = read_config(folder, model.trust_remote_code)
        refuse_config(config, hub_id or str(directory))
        with foreign("its configuration has no language model's part", str(directory / "config.json")):
            text = config.get_text_config()
        return cls(
            name,
            "hub" if hub_id else "directory",
            text,
            SafetensorsReader(directory, folder),
            folder=folder,
            # The cache names a snapshot's folder after its commit.
            revision=directory.name if hub_id else None,
            trust_remote_code=model.trust_remote_code,
            is_part=text is not config,
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
        options = dict(RANDOM_MODELS[address])
        config = AutoConfig.for_model(options.pop("model_type"), **options)
        return cls(address.removeprefix(RANDOM), "random", config, RandomReader(config))

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
            with foreign(
                "the tokenizer cannot be loaded",
                self.name,
                "the model's folder needs its tokenizer files (tokenizer.json or tokenizer.model)",
            ):
                tokenizer = self._tokenizer_of_files()
                # One that cannot do this would fail in the middle of a text.
                tokenizer.decode(tokenizer("a b")["input_ids"])
        except PreflightError as error:
            if "trust_remote_code=True" in str(error.__cause__) and not self.trust_remote_code:
                raise PreflightError(
                    "the tokenizer runs code from its own repository",
                    where=self.name,
                    hint="read that code, then run it with --trust-remote-code",
                ) from error
            raise
        self._refuse_other_tokenizer(tokenizer)
        return tokenizer

    def _refuse_other_tokenizer(self, tokenizer: Any) -> None:
        """A vocabulary that is larger than the embedding is another model's. Tokens that somebody added to
        it harm only where they are used (:mod:`engine.data.encoding`)."""
        rows = getattr(self.config, "vocab_size", None)
        largest = tokenizer.vocab_size - 1
        if isinstance(rows, int) and largest >= rows:
            raise PreflightError(
                f"the tokenizer has a token {largest}, but the model's embedding only {rows} rows",
                where=self.name,
                hint="check that tokenizer and config.json belong to the same model",
            )

    def _tokenizer_of_files(self) -> Any:
        # Whether code is trusted is said in every case: left out, transformers asks on the terminal and runs
        # the code on "y".
        if self.file is not None:
            return self._tokenizer_of_gguf(self.file)
        assert self.folder is not None
        self.folder.check_small_files()
        tokenizer = AutoTokenizer.from_pretrained(self.folder.path, trust_remote_code=self.trust_remote_code)
        self.folder.check_small_files()
        return tokenizer

    def _tokenizer_of_gguf(self, file: Path) -> Any:
        """The tokenizer is in the file. transformers would also read what lies beside it, which does not
        belong to it, so the file gets a folder of its own."""

        def of_file() -> Any:
            with tempfile.TemporaryDirectory(prefix="eqat-tokenizer-") as place:
                os.symlink(file.absolute(), os.path.join(place, file.name))
                return AutoTokenizer.from_pretrained(place, gguf_file=file.name, trust_remote_code=False)

        assert isinstance(self.weights, GGUFReader)
        tokenizer = kept_tokenizer(self.weights.header_bytes(), of_file)
        for stamped in self.weights.files():
            stamped.check()
        return mend(tokenizer, self.weights.tokenizer_settings)

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
            digest.update(f"{file.path.name}:{file.size};".encode())
            for sample in _samples(file):
                digest.update(sample)
        for code in self._own_code():
            digest.update(f"{code.path.name}:".encode() + code.read(SMALL))
        for line in self.weights.inventory():
            digest.update(line.encode())
        return digest.hexdigest()

    def assets_identity(self) -> str:
        """SHA-256 of what decides, besides configuration and weights, what a model does: tokenizer files,
        chat templates, generation settings. Of a GGUF file and of random weights that of nothing: theirs are
        in the file, or made."""
        return self._assets

    def stored_config(self) -> dict[str, Any] | None:
        """config.json as its authors wrote it; None where no such file describes just this network (of a
        multimodal model only the language model's part is used).

        Raises:
            IdentityError: when it is no longer the file that was opened.
        """
        return None if self.folder is None or self.is_part else self.folder.read_object("config.json")

    def generation_settings(self) -> dict[str, Any]:
        """generation_config.json; empty where there is none, and for a broken one, which is worth no failure.

        Raises:
            IdentityError: when it is no longer the file that was opened.
        """
        if self.folder is None or "generation_config.json" not in self.folder:
            return {}
        file = self.folder.files["generation_config.json"]
        content = file.read(SMALL)
        try:
            return parse_object(content, file.path)
        except BadFile:
            return {}

    def save_assets(self, out_dir: Path) -> None:
        """Write what belongs to a checkpoint besides its weights: config, generation config, tokenizer.

        Raises:
            IdentityError: when a file is no longer the one that was opened.
        """
        out_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
        with foreign("its configuration cannot be written", self.name):
            self.config.save_pretrained(out_dir)
        if self.folder is None:
            self.tokenizer().save_pretrained(out_dir)
            GenerationConfig.from_model_config(self.config).save_pretrained(out_dir)
            return
        self.folder.check_small_files()
        # Files are copied as they are: reading and writing them again can change a tokenizer.
        for name in self.folder.copied():
            place = out_dir / name  # additional templates lie in a folder of their own
            place.parent.mkdir(mode=0o755, exist_ok=True)
            place.write_bytes(self.folder.file(name).read())
        for file in self._own_code():
            (out_dir / file.path.name).write_bytes(file.read())

    def _own_code(self) -> list[StampedFile]:
        """Python files that came with the model, where the user allowed them to run."""
        if self.folder is None or not self.trust_remote_code:
            return []
        return [self.folder.files[name] for name in self.folder.named("*.py")]


def _samples(file: StampedFile) -> Iterator[bytes]:
    """Evenly spread pieces of a file, its beginning and its end among them; a small file whole."""
    size = file.size
    starts = list(range(0, size, SAMPLE_BYTES))
    if len(starts) > SAMPLES:
        starts = [(size - SAMPLE_BYTES) * index // (SAMPLES - 1) for index in range(SAMPLES)]
    try:
        with file.opened() as content:
            for start in starts:
                content.seek(start)
                yield content.read(SAMPLE_BYTES)
    except OSError as error:
        raise bad_file(error, file.path) from error


def read_config(folder: ModelFolder, trust_remote_code: bool = False) -> PreTrainedConfig:
    """``config.json`` as a transformers configuration."""
    directory, path = folder.path, folder.path / "config.json"
    raw = local_config(folder)
    model_type = raw.get("model_type")
    if raw.get("auto_map") and not trust_remote_code and model_type not in _known_types():
        raise PreflightError(
            f"model type {model_type!r} runs code from its own repository",
            where=str(path),
            hint="read that code, then run it with --trust-remote-code",
        )
    with foreign(f"model type {model_type!r} is not understood by transformers", str(path), fields=raw.copy):
        if trust_remote_code and raw.get("auto_map"):
            config = AutoConfig.from_pretrained(directory, trust_remote_code=True)
        else:
            config = _of_fields(raw, directory)
    folder.files["config.json"].check()
    return config


def _of_fields(raw: dict[str, Any], directory: Path) -> PreTrainedConfig:
    """What transformers makes of the file, less what says how a model is to be run, and not what it is."""
    plain = readable(raw)
    if plain == raw:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)
    with tempfile.TemporaryDirectory(prefix="eqat-config-") as place:
        Path(place, "config.json").write_text(json.dumps(plain))
        config = AutoConfig.from_pretrained(place, trust_remote_code=False)
    config.name_or_path = str(directory)
    return config


def readable(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without the spellings that transformers does not read from a file, although it reads
    the model: a type of weights with its module's name, or left open, and attention that cannot be had."""
    plain: dict[str, Any] = {
        key: readable(value) if key.endswith("_config") and isinstance(value, Mapping) else value
        for key, value in raw.items()
    }
    for key in ("dtype", "torch_dtype"):
        kind = plain.get(key)
        if kind == "auto":
            del plain[key]
        elif isinstance(kind, str):
            plain[key] = kind.removeprefix("torch.")
    if plain.get("output_attentions"):
        # Neither is asked for when a model is built here; together they are refused.
        for key in ("_attn_implementation", "attn_implementation"):
            plain.pop(key, None)
    return plain


def _known_types() -> set[str]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return set(CONFIG_MAPPING.keys())
