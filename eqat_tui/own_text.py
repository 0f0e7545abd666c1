"""Where things are kept for this user, and the user's own defaults."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

from engine.config.user import FOLDER_VARIABLE, UserConfig, load_user_config, user_config_path
from engine.run.finding import default_runs_dir, full
from engine.system.user_cache import CACHE_VARIABLE, token_cache
from engine.system.user_state import STATE_VARIABLE, queue_folder
from eqat_tui.models import HUB_VARIABLES, hub_cache
from eqat_tui.output import cell, key_values


def owned(runs_dir: Path | None) -> dict[str, Any]:
    """What ``eqat paths --json`` prints: each place, what decides it, whether it is there; the defaults."""
    config = load_user_config()
    return {
        "config": _place(user_config_path(), _variable(FOLDER_VARIABLE)),
        "runs": _place(default_runs_dir(runs_dir), _runs_decided_by(runs_dir, config)),
        "tokens": _place(token_cache(), _variable(CACHE_VARIABLE)),
        "queue": _place(queue_folder(), _variable(STATE_VARIABLE)),
        "hub": _place(hub_cache(), next(filter(None, map(_variable, HUB_VARIABLES)), "")),
        "defaults": msgspec.to_builtins(config),
    }


def _place(path: Path, decided_by: str) -> dict[str, Any]:
    return {"path": str(full(path)), "exists": os.path.lexists(path), "decided_by": decided_by}


def _variable(name: str) -> str:
    return f"${name}" if os.environ.get(name) else ""


def _runs_decided_by(flag: Path | None, config: UserConfig) -> str:
    if flag is not None:
        return "--runs-dir"
    return _variable("EQAT_RUNS_DIR") or ("config.toml" if config.runs_dir else "")


def own_text(found: dict[str, Any]) -> str:
    """The same for people."""
    places = {
        "defaults": _words(found["config"]),
        "runs": _words(found["runs"]),
        "tokenized text": _words(found["tokens"]),
        "queue": _words(found["queue"]),
        "models and data sets": _words(found["hub"]),
    }
    defaults = found["defaults"]
    notify = defaults.pop("notify")
    told = {
        **{name: value for name, value in defaults.items() if value},
        **{
            f"notify.{name}": value
            for name, value in notify.items()
            if value and (name != "on" or _tells(notify))
        },
    }
    parts = [key_values(places)]
    if told:
        parts.append(key_values({name: _value(value) for name, value in told.items()}))
    return "\n\n".join(parts)


def _tells(notify: dict[str, Any]) -> bool:
    return bool(notify["command"] or notify["webhook"])


def _words(place: dict[str, Any]) -> str:
    notes = [
        *([] if place["exists"] else ["not there"]),
        *([place["decided_by"]] if place["decided_by"] else []),
    ]
    return cell(place["path"]) + (f" ({', '.join(notes)})" if notes else "")


def _value(value: Any) -> str:
    return cell(" ".join(map(str, value)) if isinstance(value, list | tuple) else str(value))
