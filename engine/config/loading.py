"""RunConfig: everything that decides what a run computes.

A configuration is a tree of frozen structs (:mod:`engine.config.schema`). It comes from a preset or a TOML
file, is overridden by flags and ``--set section.field=value``, is checked in one place (:func:`validate`),
and is written back into the run directory as ``config.toml``, from which the same run can start again.

Fields that may be left out (``None``) are derived: :func:`resolve` fills them from bits and phase, so a
resolved configuration has no learning rate left that training would have to guess.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import os
import shlex
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from engine.config.base import Section, describe, field_types, is_section
from engine.config.run import RunConfig
from engine.config.tasks import TASKS
from engine.config.validation import convert
from engine.errors import UsageError
from engine.system.guarded import BadFile, NoFile, parsed, read_toml

# A revision, split or column, and above all the trust in its code, belongs to the source it was written
# for. Where a layer (a file that extends another, a flag) names another source, these go back to their
# defaults unless the layer gives them too.
_BELONGS_TO_SOURCE = ("revision", "trust_remote_code", "subset", "split", "column")


# -- presets and files ---------------------------------------------------------------------------------


def presets_dir() -> Path:
    """Where the shipped presets are: inside the installed package, or at the root of a checkout."""
    engine = Path(__file__).resolve().parents[1]
    packaged = engine / "presets"
    return packaged if packaged.is_dir() else engine.parent / "presets"


def preset_names() -> list[str]:
    """Names that :func:`load` accepts, sorted."""
    return sorted(path.stem for path in presets_dir().glob("*.toml"))


def preset_path(name: str) -> Path:
    """The file of a preset; :class:`UsageError` with near names for an unknown one."""
    names = preset_names()
    if name not in names:
        raise UsageError(
            f"there is no preset {name!r}", hint=_suggest(name, names) or "eqat presets lists them"
        )
    return presets_dir() / f"{name}.toml"


def load(name_or_path: str, *, overrides: Mapping[str, object] | None = None) -> RunConfig:
    """A preset, a TOML file, or a run directory (its ``config.toml``), with ``overrides`` applied.

    A file may say ``extends = "preset"`` (or a path next to it) and give only what differs. The result
    has the right fields and types; whether the values make sense is for :func:`validate`.
    """
    path = Path(os.path.expanduser(name_or_path))
    if os.path.isfile(path / "config.toml"):
        path = path / "config.toml"
    elif not (path.suffix == ".toml" or len(path.parts) > 1):
        path = preset_path(name_or_path)
    config = _from_tree(_read_layers(path, seen=()), where=str(path))
    return apply_overrides(config, overrides or {})


def load_run(run: Path) -> RunConfig:
    """The configuration that a run directory holds; unlike a file of the user's, it is not behind a link."""
    path = run / "config.toml"
    return _from_tree(_read_layers(path, seen=(), root=run), where=str(path))


def from_toml(text: str) -> RunConfig:
    """The inverse of :func:`to_toml`; ``extends`` may name a preset."""
    try:
        tree = parsed(tomllib.loads, text, Path("config"), "TOML")
    except BadFile as error:
        raise UsageError(error.message, where=error.where) from error
    return _from_tree(_extend(tree, directory=None, seen=()), where="config")


def to_toml(config: RunConfig) -> str:
    """``config`` as TOML text. TOML has no null: a field that is ``None`` is left out."""
    import tomli_w

    return tomli_w.dumps(_without_none(to_dict(config)))


def equivalent_command(config: RunConfig) -> str:
    """The ``eqat run`` command that makes this configuration again, on any machine.

    Only what differs from the preset is named. Where the run computes (device, threads, memory) is left out,
    and a configuration without a preset is named as the file that every run directory and model card holds.
    """
    if config.name not in preset_names():
        return "eqat run config.toml"
    base = flat(to_dict(resolve(load(config.name))))
    changes = [
        f"--set {key}={_flag_value(value)}"
        for key, value in flat(to_dict(resolve(config))).items()
        if base.get(key) != value
        and key not in ("name", "description")
        and (not key.startswith("runtime.") or key == "runtime.seed")
    ]
    return shlex.join(shlex.split(" ".join(["eqat run", config.name, *changes])))


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of a configuration tree by their dotted names."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= flat(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = value
    return leaves


def _flag_value(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return shlex.quote(",".join(map(str, value)))
    return shlex.quote(str(value).lower() if isinstance(value, bool) else str(value))


def to_dict(config: RunConfig) -> dict[str, Any]:
    """``config`` as plain dicts, lists, strings and numbers."""
    tree = msgspec.to_builtins(config)
    assert isinstance(tree, dict)
    return tree


def config_hash(config: RunConfig) -> str:
    """SHA-256 of everything that decides the result, learning rates resolved.

    Left out: the labels, and ``runtime`` except its seed, since where a run computes is not what it
    computes. Two configurations with the same hash may continue each other's checkpoints.
    """
    tree = to_dict(resolve(config))
    del tree["name"], tree["description"]
    tree["runtime"] = {"seed": config.runtime.seed}
    return hashlib.sha256(msgspec.json.encode(tree, order="deterministic")).hexdigest()


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
    # A name and a description tell what the file itself is, never what it was made from.
    base.pop("name", None)
    base.pop("description", None)
    return _merge(base, tree)


def _merge(base: Mapping[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``layer`` on top, table by table."""
    merged = dict(base)
    if "source" in layer and layer["source"] != base.get("source"):
        for key in _BELONGS_TO_SOURCE:
            merged.pop(key, None)
    for key, value in layer.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _from_tree(tree: Mapping[str, Any], *, where: str) -> RunConfig:
    _check_keys(tree, RunConfig, where=where)
    return convert(_as_written_now(tree))


def _as_written_now(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """``tree`` with the values of earlier versions as this one spells them: their runs stay readable."""
    e2e_qp = tree.get("e2e_qp")
    if not isinstance(e2e_qp, Mapping) or not isinstance(e2e_qp.get("activation_checkpointing"), bool):
        return tree
    word = "on" if e2e_qp["activation_checkpointing"] else "off"
    return {**tree, "e2e_qp": {**e2e_qp, "activation_checkpointing": word}}


def _check_keys(tree: Mapping[str, Any], section: type[Section], *, where: str, prefix: str = "") -> None:
    """Refuse unknown keys here, where their dotted name and near names are known."""
    fields = field_types(section)
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if key not in fields:
            raise UsageError(f"{name}: there is no such field", where=where, hint=_suggest_field(name))
        if is_section(fields[key]) and isinstance(value, Mapping):
            _check_keys(value, fields[key], where=where, prefix=f"{name}.")


def _without_none(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, Mapping) else value
        for key, value in tree.items()
        if value is not None
    }


# -- overrides -----------------------------------------------------------------------------------------


def apply_overrides(config: RunConfig, overrides: Mapping[str, object]) -> RunConfig:
    """``config`` with ``{"block_ap.epochs": "3", ...}`` set.

    Strings are read as the field's type wants them (``none`` for a field that may be left out, commas
    between the members of a list); other values are taken as they are. Giving ``data.source`` another
    value drops the split, column and revision that belonged to the old one, unless given as well.
    """
    layer: dict[str, Any] = {}
    for name, value in overrides.items():
        *sections, field = name.strip().split(".")
        kind = _field_type(name.strip())
        node = layer
        for section in sections:
            node = node.setdefault(section, {})
        node[field] = _read_value(name.strip(), kind, value) if isinstance(value, str) else value
    return convert(_merge(to_dict(config), layer))


@functools.lru_cache(1)
def field_names() -> tuple[str, ...]:
    """Dotted names of all fields, as ``--set`` takes them."""
    return tuple(_leaves(RunConfig, ""))


def _leaves(section: type[Section], prefix: str) -> Iterable[str]:
    for name, kind in field_types(section).items():
        if is_section(kind):
            yield from _leaves(kind, f"{prefix}{name}.")
        else:
            yield prefix + name


def _field_type(name: str) -> Any:
    kind: Any = RunConfig
    for part in name.split("."):
        fields = field_types(kind) if is_section(kind) else {}
        if part not in fields:
            raise UsageError("there is no such field", where=name, hint=_suggest_field(name))
        kind = fields[part]
    if is_section(kind):
        inside = ", ".join(f"{name}.{field}" for field in field_types(kind))
        raise UsageError("is a section, not a field", where=name, hint=f"set one of {inside}")
    return kind


def _read_value(name: str, kind: Any, text: str) -> Any:
    """``text`` as typed after ``--set name=``, as a value for a field of type ``kind``."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if type(None) in options and text.strip().lower() in ("none", "null", ""):
        return None
    if str in options:
        return text
    if typing.get_origin(kind) is tuple:
        members = text.strip().removeprefix("[").removesuffix("]").split(",")
        return [member.strip().strip("\"'") for member in members if member.strip()]
    try:
        # strict=False is msgspec's reading of text: "3" is an integer, "1e-4" a float, "true" a bool.
        return msgspec.convert(text.strip(), kind, strict=False)
    except msgspec.ValidationError as error:
        raise UsageError(f"cannot be {text!r}", where=name, hint=describe(kind)) from error


def _suggest_field(name: str) -> str:
    """Near names for a wrong one: in its section, else the same field elsewhere, else anything near."""
    known = field_names()
    section, _, last = name.rpartition(".")
    same = [field for field in known if field.rsplit(".", 1)[-1] == last]
    here = {field.rsplit(".", 1)[-1]: field for field in known if field.rpartition(".")[0] == section}
    near = [here[field] for field in difflib.get_close_matches(last, here, n=3, cutoff=0.6)]
    sections = [field for field, kind in field_types(RunConfig).items() if is_section(kind)]
    near = near or same or difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(near[:4])}?" if near else f"fields are in {', '.join(sections)}"


def _suggest(wrong: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(wrong, list(known), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else ""


OPERATIONAL = (
    "runtime.",
    "export.",
    "e2e_qp.micro_batch_size",
    "e2e_qp.activation_checkpointing",
    "evaluation.batch_size",
)
"""Fields, or beginnings of their names, that say how a run is carried out and not what it computes."""
DECIDING = ("runtime.seed", "runtime.deterministic")


def is_operational(name: str) -> bool:
    """Whether a resumed run may have another value of this field."""
    return name.startswith(OPERATIONAL) and name not in DECIDING


# -- derived values ------------------------------------------------------------------------------------


def resolve(config: RunConfig) -> RunConfig:
    """``config`` with every derived value filled in; resolving twice changes nothing.

    Learning rates that were left out follow bits and scaling. A symmetric grid fixes its zero points, so
    they leave Block-AP's trained set, of which they are part by default.
    """
    two_bits = config.grid.bits == 2
    block_ap, e2e_qp = config.block_ap, config.e2e_qp
    absolute = block_ap.lr_scaling == "absolute"
    lr_weight = (2e-5 if two_bits else 1e-5) if absolute else 0.02
    lr_quant = 1e-4 if absolute else 0.005
    lr_e2e = (2e-5 if two_bits else 1e-5) if e2e_qp.lr_scaling == "absolute" else 0.005
    train = block_ap.train
    if config.grid.symmetric:
        train = tuple(name for name in train if name != "zero_points")
    return msgspec.structs.replace(
        config,
        block_ap=msgspec.structs.replace(
            block_ap,
            train=train,
            lr_weight=lr_weight if block_ap.lr_weight is None else block_ap.lr_weight,
            lr_quant=lr_quant if block_ap.lr_quant is None else block_ap.lr_quant,
        ),
        e2e_qp=msgspec.structs.replace(e2e_qp, lr=lr_e2e if e2e_qp.lr is None else e2e_qp.lr),
    )


def absolute_paths(config: RunConfig) -> RunConfig:
    """``config`` with local sources made absolute, so that a run resumes from any working directory."""

    def absolute(source: str) -> str:
        path = os.path.expanduser(source)  # os.path, not Path: it takes any text without raising
        return os.path.realpath(path) if source and os.path.exists(path) else source

    names = ("model.source", "data.source", "evaluation.data.source")
    sources = {name: value_of(config, name) for name in names}
    tree = to_dict(config)
    for name, source in sources.items():
        *sections, field = name.split(".")
        node = tree
        for section in sections:
            node = node[section]
        node[field] = absolute(source)
    evaluation = tree["evaluation"]
    evaluation["tasks"] = [name if name in TASKS else absolute(name) for name in evaluation["tasks"]]
    return convert(tree)


def value_of(config: RunConfig, name: str) -> Any:
    """The value of the field called ``name`` (dotted)."""
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value
