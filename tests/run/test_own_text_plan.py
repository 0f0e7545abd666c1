"""What a plan says to the model's own text: it is written as far as memory allows, and takes what is said."""

from __future__ import annotations

import pytest
from plan_tools import machine

from engine.config.loading import load
from engine.config.run import RunConfig
from engine.plan.estimate import GIB
from engine.plan.own_text import (
    DOCUMENT_TOKENS,
    LEAST_DOCUMENTS,
    MOST_DOCUMENTS,
    document_bytes,
    own_text_windows,
)
from engine.plan.plan import Plan, described, make_plan


def wanted(llama: str, sequences: int = 2048) -> RunConfig:
    changes = {"model.source": llama, "data.source": "self", "lr_qat.sequences": sequences}
    return load("lr-qat", overrides=changes)


def planned(config: RunConfig, gpu_gib: float) -> Plan:
    gpu = {"gpu_name": "NVIDIA H200", "gpu_free": int(gpu_gib * GIB), "gpu_total": 141 * GIB}
    return make_plan(config, machine=machine(**gpu))


def test_all_that_is_wanted_is_written_at_once_where_it_fits(llama: str) -> None:
    config = wanted(llama, sequences=64)
    plan, model = planned(config, 140), described(config)
    [written] = own_text_windows(config).values()
    documents = sum(written) * (1024 // DOCUMENT_TOKENS)
    assert LEAST_DOCUMENTS < documents < MOST_DOCUMENTS
    each = document_bytes(model.architecture, 2)
    assert plan.phases[0].parts["text being written"] == documents * each
    assert plan.phases[0].peak_gpu_bytes >= documents * each


@pytest.mark.parametrize("gpu_gib", [24, 48, 140])
def test_otherwise_as_much_as_half_of_what_the_model_leaves(llama: str, gpu_gib: float) -> None:
    config = wanted(llama)
    parts = planned(config, gpu_gib).phases[0].parts
    half = (gpu_gib * GIB * 0.9 - parts["all blocks"]) / 2
    each = document_bytes(described(config).architecture, 2)
    written = parts["text being written"]
    assert half - each < written <= half or written == LEAST_DOCUMENTS * each > half


def test_more_at_a_time_takes_less_time(llama: str) -> None:
    little, much = (planned(wanted(llama), gpu_gib).phases[0].seconds for gpu_gib in (24, 140))
    assert much < little
