"""When two configurations are the same run: the hash of what decides the result, and the command that makes a
configuration again."""

from __future__ import annotations

import hashlib
import shlex

import msgspec

from engine.config.calibration import mixture
from engine.config.derived import resolve
from engine.config.lists import list_words
from engine.config.loading import load, preset_names
from engine.config.run import LABELS, RunConfig
from engine.config.writing import essential, flat, leave_out_defaults, to_dict


def config_hash(config: RunConfig) -> str:
    """SHA-256 of everything that decides the result, learning rates resolved.

    Left out: the labels, ``runtime`` except its seed and how many GPUs add up (where a run computes is not
    what it computes), and what versions before did not know and did as it is done by default. Two
    configurations with the same hash may continue each other's checkpoints.
    """
    tree = essential(resolve(config))
    for label in LABELS:
        del tree[label]
    leave_out_defaults(tree, config, lambda section: section.younger())
    gpus = {"gpus": config.runtime.gpus} if config.runtime.gpus > 1 else {}
    tree["runtime"] = {"seed": config.runtime.seed, **gpus}
    return hashlib.sha256(msgspec.json.encode(tree, order="deterministic")).hexdigest()


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
        and key not in LABELS
        and not (key == "data.source" and mixture(config.data))  # the mixture stands in its place
        and (not key.startswith("runtime.") or key in ("runtime.seed", "runtime.gpus"))
    ]
    return shlex.join(shlex.split(" ".join(["eqat run", config.name, *changes])))


def _flag_value(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return shlex.quote(list_words(value))
    return shlex.quote(str(value).lower() if isinstance(value, bool) else str(value))
