"""A run that trains on text of the model's own: it is written once, and kept with the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine_runs import change, exported, failure, of, run_here
from safetensors.torch import load_file, save_file

from engine.config.validation import validate
from engine.errors import UsageError
from engine.phases import own_text
from engine.plan.own_text import own_text_windows
from engine.plan.plan import make_plan
from engine.run import events
from engine.run.directory import RunDirectory
from engine.run.housekeeping import clean_run, delete_run
from engine.run.proof import NotProven
from engine.run.shown import show_run

Make = Callable[..., RunDirectory]
OWN = {"data.mix": "builtin:0.5,self:0.5"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EQAT_CACHE_DIR", str(tmp_path / "own-cache"))
    return tmp_path / "own-cache" / "tokens"


def own(run: RunDirectory) -> Path:
    """The one file that it keeps."""
    (found,) = run.path.glob("own-text-*.safetensors")
    return found


@pytest.fixture
def nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def forbid() -> None:
        def written(*arguments: object, **options: object) -> None:
            raise AssertionError("text is written again")

        monkeypatch.setattr(own_text, "own_windows", written)

    return forbid


def test_it_is_written_once_and_every_stage_takes_the_first_of_it(
    make: Make, cache: Path, nothing_is_written: Callable[[], None]
) -> None:
    run = make(**OWN, **{"e2e_qp.sequences": 8})
    assert run_here(run) == 0
    kept = load_file(own(run))["windows"]
    # Of eight training sequences four, of two for validation one.
    assert kept.shape == (5, 16)
    assert own_text_windows(run.config()) == {16: (4, 1)}
    assert show_run(run)["calibration"] == "50 % builtin, 50 % the model's own text"
    nothing_is_written()

    # A second run of the same settings finds it in the user's cache, and makes the same model.
    again = make(**OWN, **{"e2e_qp.sequences": 8})
    assert run_here(again) == 0
    assert exported(again) == exported(run)

    # Without the cache a run goes on with what it kept; to be exported again, too.
    for path in cache.iterdir():
        path.unlink()
    assert run_here(run, "--task", "eval") == 0
    assert torch.equal(load_file(own(run))["windows"], kept)


def test_a_damaged_file_is_mended_from_the_cache_and_another_text_is_refused(
    make: Make, cache: Path, nothing_is_written: Callable[[], None]
) -> None:
    run = make(**OWN)
    assert run_here(run) == 0
    path = own(run)
    whole = path.read_bytes()
    path.write_bytes(whole[:-3] + b"\0\0\0")
    assert run_here(run, "--task", "eval") == 0
    assert any(w.code == "token-cache" and "own-text-" in w.message for w in of(run, events.Warning))
    assert path.read_bytes() == whole

    # Somebody's other windows are another text, and what was trained on it another model.
    kept = load_file(path)["windows"]
    path.unlink()
    for entry in cache.iterdir():
        entry.unlink()
    assert run_here(run, "--task", "eval") == 0  # this machine writes the same again
    assert torch.equal(load_file(path)["windows"], kept)
    save_file({"windows": kept}, path)  # without its checksum
    nothing_is_written()
    for entry in cache.iterdir():
        entry.unlink()
    assert run_here(run, "--task", "eval") != 0


def test_settings_that_were_changed_and_taken_back_find_the_text_again(
    make: Make, cache: Path, nothing_is_written: Callable[[], None]
) -> None:
    run = make(**OWN)
    assert run_here(run) == 0
    first = own(run)
    before = first.read_bytes()
    for other in ({"runtime.seed": 7}, {"block_ap.sequences": 8}):
        kept = run.config_toml.read_text()
        change(run, **other)
        code = run_here(run)
        assert code != 0, "another run's checkpoint"
        run.config_toml.write_text(kept)
    assert first.read_bytes() == before
    for entry in cache.iterdir():
        entry.unlink()
    nothing_is_written()
    assert run_here(run, "--task", "eval") == 0


def test_the_file_is_the_runs_own_for_whoever_cleans_and_deletes(make: Make) -> None:
    run = make(**OWN)
    assert run_here(run) == 0
    clean_run(run)
    assert own(run).is_file()
    (run.path / "own-text-mine.safetensors").touch()
    with pytest.raises(NotProven):
        delete_run(run)
    (run.path / "own-text-mine.safetensors").unlink()
    delete_run(run)
    assert not run.path.exists()


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"evaluation.data.source": "self"}, "evaluation.data.source"),
        ({"data.source": "self", "data.split": "train"}, "data.split"),
        ({"data.mix": "builtin:1,self?column=text:1"}, "data.mix"),
        ({"data.source": "self", "imported.enabled": True, "block_ap.enabled": False}, "data.source"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Make, settings: dict[str, object], where: str) -> None:
    with pytest.raises(UsageError) as refused:
        validate(make(**settings).config())
    assert refused.value.where == where


def test_the_plan_counts_the_writing(make: Make) -> None:
    plain = make_plan(make().config())
    own = make_plan(make(**OWN, **{"e2e_qp.sequences": 4000, "block_ap.sequences": 4000}).config())
    assert own.phases[0].seconds > plain.phases[0].seconds
    assert "all blocks" in own.phases[0].parts
    alone = make_plan(make(**{"data.source": "self"}).config())
    assert alone.calibration == "the model's own text"


def test_a_model_that_does_not_fit_as_a_whole_needs_another_text(make: Make) -> None:
    run = make(**{"data.source": "self", "runtime.host_memory_gib": 0.1})
    code = run_here(run)
    assert code != 0
    assert "memory" in failure(run, code).message
