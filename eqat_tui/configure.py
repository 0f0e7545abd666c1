"""From what was typed to a configuration that can run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from engine.config.calibration import text_setting
from engine.config.derived import resolve
from engine.config.loading import configuration_file, load, presets_dir
from engine.config.origins import located
from engine.config.overrides import apply_overrides
from engine.config.run import RunConfig
from engine.config.user import load_user_config
from engine.config.validation import validate
from engine.errors import UsageError


def build_config(
    target: str,
    *,
    model: str | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    data: str | None = None,
    device: str | None = None,
    gpus: int | None = None,
    settings: Sequence[str] = (),
    trust_remote_code: bool = False,
    here: bool = True,
) -> RunConfig:
    """The preset or file ``target`` with flags and then ``--set`` on top, complete and valid; of a run that
    is not made ``here``, without the device that the user has chosen on this machine."""
    overrides = typed_settings(
        model=model,
        bits=bits,
        group_size=group_size,
        data=data,
        device=device,
        gpus=gpus,
        settings=settings,
        trust_remote_code=trust_remote_code,
    )
    config = resolve(load_for_user(target, overrides) if here else load(target, overrides=overrides))
    try:
        validate(config)
    except UsageError as error:
        file = configuration_file(target)
        if file.parent == presets_dir():  # whose values work, until something else was typed beside them
            raise
        raise located(error, file, typed=overrides) from error
    return config


def load_for_user(target: str, overrides: Mapping[str, object]) -> RunConfig:
    """What ``target`` and ``overrides`` say, on the user's own device where neither of them names one."""
    config = load(target, overrides=overrides)
    return on_users_device(config, named="runtime.device" in overrides)


def on_users_device(config: RunConfig, *, named: bool) -> RunConfig:
    """``config`` on the device of the user's ``config.toml``, unless another one is ``named``."""
    device = load_user_config().device
    if not device or named or config.runtime.device != "auto":
        return config
    return apply_overrides(config, {"runtime.device": device})


def typed_settings(
    *,
    model: str | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    data: str | None = None,
    device: str | None = None,
    gpus: int | None = None,
    settings: Sequence[str] = (),
    trust_remote_code: bool = False,
) -> dict[str, object]:
    """What flags and then ``--set`` say, by field."""
    flags: dict[str, object] = {
        "model.source": model,
        "grid.bits": bits,
        "grid.group_size": group_size,
        **(dict([text_setting(data)]) if data is not None else {}),
        "runtime.device": device,
        "runtime.gpus": gpus,
        "model.trust_remote_code": True if trust_remote_code else None,
    }
    overrides = {name: value for name, value in flags.items() if value is not None}
    overrides.update(parse_settings(settings))
    return overrides


def parse_settings(settings: Sequence[str]) -> dict[str, str]:
    """``["block_ap.epochs=3", ...]`` as a mapping; the later one wins."""
    parsed = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not re.fullmatch(r"\s*[a-z0-9_]+(\.[a-z0-9_]+)*\s*", name):
            raise UsageError(
                f"{setting!r} is not of the form key=value",
                where="--set",
                hint="like --set block_ap.epochs=3",
            )
        parsed[name.strip()] = value.strip()
    return parsed
