"""Where a configuration comes from: presets, TOML files that may extend each other, run directories.

It is a tree of frozen structs (:mod:`engine.config.run`), overridden by flags and ``--set`` of single fields
(:mod:`engine.config.overrides`) and checked by :func:`engine.config.validation.validate`.
"""

from __future__ import annotations

import functools
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.config.base import Section, field_types, is_section
from engine.config.fields import suggest, suggest_field
from engine.config.origins import located
from engine.config.overrides import apply_overrides, merge
from engine.config.run import SWEEP, YOUNGER, RunConfig, run_config
from engine.config.tables import EXTENSIONS
from engine.config.validation import convert
from engine.errors import UsageError
from engine.system.guarded import BadFile, NoFile, parsed, read_toml


@functools.cache
def presets_dir() -> Path:
    """Where the shipped presets are: inside the installed package, or at the root of a checkout."""
    engine = Path(__file__).resolve().parents[1]
    packaged = engine / "presets"
    return packaged if packaged.is_dir() else engine.parent / "presets"


def preset_names() -> list[str]:
    """Names that :func:`load` accepts, sorted."""
    return sorted(path.stem for path in presets_dir().glob("*.toml"))


def sweep_names() -> list[str]:
    """The presets of sweeps, each of which asks for several runs; :func:`load_sweep` accepts them, sorted."""
    return sorted(path.stem for path in (presets_dir() / "sweeps").glob("*.toml"))


def preset_path(name: str) -> Path:
    """The file of a preset; :class:`UsageError` with near names for an unknown one."""
    path = presets_dir() / f"{name}.toml"
    if not _is_shipped(path, name):
        near = suggest(name, [*preset_names(), *sweep_names()])
        raise UsageError(f"there is no preset {name!r}", hint=near or "eqat presets lists them")
    return path


def _is_shipped(path: Path, name: str) -> bool:
    """Whether ``path`` is there and ``name`` leads nowhere else; the folder is not listed for it."""
    return os.path.basename(name) == name and os.path.isfile(path)


def sweep_path(name: str) -> Path:
    """The file of a preset of a sweep."""
    return presets_dir() / "sweeps" / f"{name}.toml"


def configuration_file(name_or_path: str) -> Path:
    """The file that is meant by a preset's name, a path, or a run directory."""
    path = Path(os.path.expanduser(name_or_path))
    if os.path.isfile(path / "config.toml"):
        return path / "config.toml"
    if path.suffix == ".toml" or len(path.parts) > 1:
        return path
    sweep = sweep_path(name_or_path)
    return sweep if _is_shipped(sweep, name_or_path) else preset_path(name_or_path)


def load(name_or_path: str, *, overrides: Mapping[str, object] | None = None) -> RunConfig:
    """A preset, a TOML file, or a run directory (its ``config.toml``), with ``overrides`` applied.

    A file may say ``extends = "preset"`` (or a path next to it) and give only what differs. The result
    has the right fields and types; whether the values make sense is for
    :func:`~engine.config.validation.validate`.
    """
    path = configuration_file(name_or_path)
    if path == sweep_path(name_or_path):
        raise UsageError(
            "asks for several runs, not for one",
            where=name_or_path,
            hint=f"eqat sweep {name_or_path} makes them; with --dry-run it shows their plan",
        )
    config = _from_layers(name_or_path, path, _read_layers(path, seen=()))
    return apply_overrides(config, overrides) if overrides else config


def load_sweep(name_or_path: str) -> tuple[RunConfig, dict[str, Any]]:
    """The same, and the table ``[sweep]`` beside it, which is empty where the file has none."""
    path = configuration_file(name_or_path)
    tree = _read_layers(path, seen=())
    table = tree.pop(SWEEP, {})
    if not isinstance(table, Mapping):
        raise UsageError("must be a table", where=f"{path}: {SWEEP}", hint='like "grid.bits" = [2, 3, 4]')
    return _from_layers(name_or_path, path, tree), dict(table)


def _from_layers(name_or_path: str, path: Path, tree: Mapping[str, Any]) -> RunConfig:
    """The configuration that a file and what it extends describe."""
    try:
        return _from_tree(tree, earlier=path.parent == Path(os.path.expanduser(name_or_path)))
    except UsageError as error:
        raise located(error, path) from error


def load_run(run: Path) -> RunConfig:
    """The configuration that a run directory holds; unlike a file of the user's, it is not behind a link."""
    path = run / "config.toml"
    tree = _read_layers(path, seen=(), root=run)
    try:
        return _from_tree(tree, earlier=True)
    except UsageError as error:
        raise located(error, path) from error


def as_earlier(config: RunConfig, tree: Mapping[str, Any] | None = None) -> RunConfig:
    """``config`` with what versions without a field did in the place of each field that ``tree``, what a
    run's file says, lacks; without a ``tree`` of every field. A younger section that the file does not have
    is as it is where nobody asks for it."""
    given = tree or {}
    unknown = {name for name in YOUNGER if tree is not None and name not in tree}
    changes = {
        f"{name}.{field}": value
        for name, kind in field_types(type(config)).items()
        if is_section(kind) and name not in unknown
        for field, value in kind.earlier().items()
        if field not in given.get(name, {})
    }
    return apply_overrides(config, changes)


def from_toml(text: str, *, earlier: bool = False) -> RunConfig:
    """The inverse of :func:`~engine.config.writing.to_toml`; ``extends`` may name a preset. ``earlier``: the
    text names every field that there was when it was written."""
    try:
        tree = parsed(tomllib.loads, text, Path("config"), "TOML")
    except BadFile as error:
        raise UsageError(error.message, where=error.where) from error
    return _from_tree(_extend(tree, directory=None, seen=()), earlier=earlier)


def _read_layers(path: Path, *, seen: tuple[Path, ...], root: Path | None = None) -> dict[str, Any]:
    """The merged tree of ``path`` and what it extends, outermost last. Below ``root`` nothing is a link."""
    path = Path(os.path.realpath(path)) if root is None else path
    if path in seen:
        raise UsageError("extends itself", where=str(path))
    try:
        tree = read_toml(path, root=root, follow=root is None)
    except BadFile as error:
        what = f"cannot be read: {error.message}" if isinstance(error, NoFile) else error.message
        raise UsageError(what, where=error.where, hint="eqat presets lists the presets") from error
    tree = _extend(tree, directory=path.parent, seen=(*seen, path))
    tree.setdefault("name", path.stem)
    return tree


def _extend(tree: dict[str, Any], *, directory: Path | None, seen: tuple[Path, ...]) -> dict[str, Any]:
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    if not isinstance(parent, str):
        raise UsageError("must be the name of a preset or a path", where="extends")
    if parent.endswith(".toml") and directory is not None:
        path = directory / os.path.expanduser(parent)
    else:
        path = preset_path(parent)
    base = _read_layers(path, seen=seen)
    # They tell what the file itself is, and is swept over, never what it was made from.
    for own in ("name", "description", SWEEP):
        base.pop(own, None)
    return merge(base, tree)


def _from_tree(tree: Mapping[str, Any], *, earlier: bool = False) -> RunConfig:
    """The configuration that a tree describes; a :class:`UsageError` names the field. ``earlier``: the tree
    is a run's, which names every field that there was when the run was made."""
    _check_keys(tree, run_config())
    config = convert(_as_written_now(tree))
    return as_earlier(config, tree) if earlier else config


def _as_written_now(tree: Mapping[str, Any]) -> dict[str, Any]:
    """``tree`` with the values of earlier versions as this one spells them: their runs stay readable."""
    kinds = field_types(run_config())
    return {
        name: kinds[name].as_written_now(value)
        if is_section(kinds[name]) and isinstance(value, Mapping)
        else value
        for name, value in tree.items()
    }


def _check_keys(tree: Mapping[str, Any], section: type[Section], *, prefix: str = "") -> None:
    """Refuse unknown keys here, where their dotted name and near names are known."""
    fields = field_types(section)
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if key not in fields:
            hint = suggest_field(name)
            if name == SWEEP:
                hint = "eqat sweep FILE makes the runs that it asks for"
            elif not prefix and isinstance(value, Mapping):
                hint += f"; a section of an extension is known where {EXTENSIONS} names its module"
            raise UsageError("there is no such field", where=name, hint=hint)
        if is_section(fields[key]) and isinstance(value, Mapping):
            _check_keys(value, fields[key], prefix=f"{name}.")
