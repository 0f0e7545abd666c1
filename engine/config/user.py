"""The user's own defaults: ``config.toml`` in the folder for configuration files.

They are about this user and this machine (where runs are kept, which device, who is told) and never about
what a run computes. A flag, a variable of the environment, and a preset or file that says otherwise go before
them.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from engine.config import checks
from engine.config.base import Section, field_types, is_section, mistake, takes
from engine.errors import EqatError, UsageError
from engine.system.guarded import NoFile, read_toml

FOLDER_VARIABLE = "EQAT_CONFIG_DIR"
Occasion = Literal["done", "failed", "stopped", "waiting"]


class NotifyConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is told, and how, when a run ends or waits."""

    on: tuple[Occasion, ...] = ("done", "failed", "waiting")
    """A message is sent when a run is done, has failed, was stopped, or waits (for room on the disk)."""
    command: tuple[str, ...] = ()
    """This program is started with these arguments; {message}, {run}, {event} and {folder} are filled in."""
    webhook: str = ""
    """The message is posted to this address, as JSON with ``text`` (and ``content``, as some want it)."""
    bell: bool = False
    """Whoever follows the run in a terminal hears its bell."""

    def check(self, name: str) -> None:
        if self.webhook and not re.match(r"https?://[^/\s]", self.webhook):
            raise UsageError("is no address", where=f"{name}.webhook", hint="it begins with https://")
        if self.command and not self.command[0].strip():
            raise UsageError(
                "names no program", where=f"{name}.command", hint='like ["notify-send", "{message}"]'
            )


class UserConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All of it."""

    runs_dir: str = ""
    """Runs are kept here; else in ./runs."""
    device: str = ""
    """Runs compute on this device where neither flag nor file names one: auto, cpu, cuda or cuda:N."""
    theme: str = ""
    """The app's theme."""
    notify: NotifyConfig = NotifyConfig()

    def check(self, name: str) -> None:
        if self.device:
            checks.device(f"{name}device", self.device)
        self.notify.check(f"{name}notify")


def user_config_path() -> Path:
    """Where the file is, or would be: in ``$EQAT_CONFIG_DIR``, else in the user's folder for such files."""
    from platformdirs import user_config_dir

    folder = os.environ.get(FOLDER_VARIABLE)
    return Path(os.path.expanduser(folder) if folder else user_config_dir("eqat")) / "config.toml"


def load_user_config() -> UserConfig:
    """What the file says; the defaults where there is none.

    Raises:
        UsageError: names the file, and the field that is wrong.
    """
    path = user_config_path()
    try:
        tree = read_toml(path, follow=True)
    except NoFile:
        return UserConfig()
    except EqatError as error:
        raise UsageError(error.message, where=error.where, hint=error.hint) from error
    try:
        _check_keys(tree, UserConfig)
        config = msgspec.convert(tree, UserConfig)
        config.check("")
    except UsageError as error:
        raise UsageError(error.message, where=f"{path}: {error.where}", hint=error.hint) from error
    except msgspec.ValidationError as error:
        what, place = mistake(error)
        field = re.sub(r"\[.*?\]", "", place)
        raise UsageError(what, where=f"{path}: {field}", hint=takes(UserConfig, field)) from error
    return config


def _check_keys(tree: Mapping[str, Any], section: type[Section], prefix: str = "") -> None:
    fields = field_types(section)
    for key, value in tree.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, 1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"there are {', '.join(fields)}"
            raise UsageError("there is no such field", where=f"{prefix}{key}", hint=hint)
        if is_section(fields[key]) and isinstance(value, Mapping):
            _check_keys(value, fields[key], f"{prefix}{key}.")
