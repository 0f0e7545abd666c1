"""Deleting needs proof: only a run of ours goes, whatever it is called and wherever a link leads."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engine.config.derived import resolve
from engine.config.loading import load
from engine.config.writing import to_toml
from engine.errors import EqatError, PreflightError
from engine.run import contents, control, housekeeping, removal
from engine.run.directory import RunDirectory
from engine.run.finding import find_run, list_runs
from engine.run.proof import FolderIdentity, prove_removed, prove_run
from engine.run.redo import Origin
from engine.system import files

CONFIG = resolve(load("smoke"))


def snapshot(folder: Path) -> dict[str, object]:
    """Everything below ``folder``: content of files, targets of links, kinds of the rest."""
    found: dict[str, object] = {}
    for place, folders, names in os.walk(folder):
        for path in (Path(place, name) for name in (*folders, *names)):
            name = str(path.relative_to(folder))
            if path.is_symlink():
                found[name] = ("link", os.readlink(path))
            else:
                found[name] = path.read_bytes() if path.is_file() else path.lstat().st_mode
    return found


# -- what is a run -------------------------------------------------------------------------------------


def test_a_run_is_proven_in_every_state_of_its_life(run: RunDirectory) -> None:
    prove_run(run.path)
    for name in ("run.json", "lock", "status.json", "launch.json", "events.jsonl", "origin.json"):
        (run.path / name).write_text("")
        (run.path / f".{name}.4711.0123abcd.tmp").write_text("")
    (run.path / ".owner.4711.0123abcd.tmp").write_text("")
    (run.export_dir / "gptq_v2").mkdir()
    (run.export_dir / "gptq_v2" / "whatever the user likes").write_text("")
    prove_run(run.path)
    run.cache_dir.rmdir()  # done
    prove_run(run.path)
    renamed = run.path.rename(run.path.with_name("my best run"))
    prove_run(renamed)


def test_a_redone_run_is_proven(runs: Path) -> None:
    origin = Origin(path="/x", id="x", from_block=1)
    prove_run(RunDirectory.create(runs, CONFIG, files={"origin.json": origin}).path)


@pytest.mark.parametrize(("before", "now"), [("true", "on"), ("false", "off")])
def test_a_run_of_an_earlier_version_is_read_and_proven(run: RunDirectory, before: str, now: str) -> None:
    """Checkpointing of activations was once a choice of two."""
    text = run.config_toml.read_text()
    older = re.sub(r"activation_checkpointing = .*", f"activation_checkpointing = {before}", text)
    assert older != text
    run.config_toml.write_text(older)
    assert run.config().e2e_qp.activation_checkpointing == now
    prove_run(run.path)


def precious(folder: Path) -> None:
    (folder / "notes.txt").write_text("precious")


def rewrite(change: Callable[[str], str]) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        path = folder / "config.toml"
        path.write_text(change(path.read_text()))

    return do


def without_section(name: str) -> Callable[[str], str]:
    return lambda text: re.sub(rf"\[{name}\]\n(?:[^\[].*\n)*", "", text)


def link_away(name: str) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        elsewhere = folder.parent.parent / "elsewhere"
        elsewhere.mkdir()
        precious(elsewhere)
        place = folder / name
        if place.is_dir():
            place.rmdir()
        elif place.exists():
            place.rename(elsewhere / name)
            elsewhere = elsewhere / name
        place.symlink_to(elsewhere)

    return do


def file_for_folder(folder: Path) -> None:
    (folder / "logs").rmdir()
    (folder / "logs").write_text("precious")


def folder_for_file(folder: Path) -> None:
    (folder / "events.jsonl").mkdir()
    precious(folder / "events.jsonl")


def run_in(place: str) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        RunDirectory.create(folder / place, CONFIG)

    return do


UNPROVEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "a file of the user's": (precious, "notes.txt"),
    "a hidden file": (lambda folder: (folder / ".git").mkdir() or None, ".git"),
    "nearly a temporary file": (lambda folder: (folder / ".x.1.ab.tmp").touch(), ".x.1.ab.tmp"),
    "somebody's temporary file": (lambda folder: (folder / ".x.1.0123abcd.tmp").touch(), "0123abcd"),
    "another run inside": (run_in("."), "holds what no run has"),
    "another run in a folder": (run_in("cache"), "holds another run"),
    "another run deep inside": (run_in("export/gptq_v2/runs"), "holds another run"),
    "another run that was made there": (run_in("export"), "holds what no run has"),
    "a model in export": (lambda folder: (folder / "export" / "mine").mkdir(), "what no run has: mine"),
    "a file in export": (lambda folder: precious(folder / "export"), "what no run has: notes.txt"),
    "a file among the logs": (lambda folder: precious(folder / "logs"), "what no run has: notes.txt"),
    "a file among the checkpoints": (lambda folder: precious(folder / "checkpoints"), "notes.txt"),
    "a file among the requests": (lambda folder: precious(folder / "control"), "notes.txt"),
    "a file of an evaluation": (lambda folder: precious(folder / "eval"), "notes.txt"),
    "no configuration": (lambda folder: (folder / "config.toml").unlink(), "config.toml is missing"),
    "an empty configuration": (rewrite(lambda text: ""), "it has no section model"),
    "another program's configuration": (rewrite(lambda text: "[tool.x]\na = 1\n"), "no section model"),
    "no TOML": (rewrite(lambda text: "{"), "is not valid TOML"),
    "a preset": (rewrite(lambda text: 'extends = "demo"\n'), "no section model"),
    "a configuration that extends": (rewrite(lambda text: 'extends = "demo"\n' + text), "extends another"),
    "a newer version": (rewrite(lambda text: text + "\n[quantum]\nbits = 1\n"), "a newer version wrote it"),
    "a newer field": (
        rewrite(lambda text: text.replace("[grid]\n", "[grid]\nspin = 1\n")),
        "does not know, grid.spin",
    ),
    "a wrong value": (rewrite(lambda text: text.replace("bits = 4", 'bits = "four"')), "grid.bits"),
    "a linked configuration": (link_away("config.toml"), "link"),
    "linked logs": (link_away("logs"), "logs: is a link, which no run has"),
    "linked checkpoints": (link_away("checkpoints"), "checkpoints: is a link"),
    "a linked cache": (link_away("cache"), "cache: is a link"),
    "a linked log of events": (link_away("events.jsonl"), "events.jsonl: is a link"),
    "a file in a folder's place": (file_for_folder, "logs: is a file"),
    "a folder in a file's place": (folder_for_file, "events.jsonl: is a folder"),
    "a FIFO": (lambda folder: os.mkfifo(folder / "lock"), "lock: is a FIFO"),
    **{
        f"no {name}": (lambda folder, name=name: (folder / name).rmdir(), f"the folder {name} is missing")
        for name in ("control", "logs", "checkpoints", "eval", "export")
    },
    **{
        f"no section {name}": (rewrite(without_section(name)), f"it has no section {name}")
        for name in ("model", "grid", "data", "block_ap", "e2e_qp", "export", "runtime")
    },
}


@pytest.mark.parametrize("case", UNPROVEN)
def test_what_is_not_proven_is_refused_in_one_line_and_stays_as_it_is(
    case: str, run: RunDirectory, tmp_path: Path
) -> None:
    spoil, said = UNPROVEN[case]
    spoil(run.path)
    before = snapshot(tmp_path)
    with pytest.raises(EqatError, match=re.escape(said)) as refused:
        housekeeping.delete_run(run)
    assert "\n" not in str(refused.value)
    assert snapshot(tmp_path) == before


def test_an_empty_folder_in_a_files_place_is_no_reason_to_keep_a_run(run: RunDirectory) -> None:
    run.events_path.mkdir()
    housekeeping.delete_run(run)
    assert not run.path.exists()


def test_a_run_of_another_user_is_not_deleted(run: RunDirectory) -> None:
    if os.geteuid():
        pytest.skip("only root can give files away")
    os.chown(run.path, 12345, 12345)
    with pytest.raises(PreflightError, match="belongs to user 12345"):
        housekeeping.delete_run(run)
    assert run.path.is_dir()


def test_a_linked_run_is_never_deleted(run: RunDirectory, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(run.path)
    with pytest.raises(PreflightError, match=f"is a link to {run.path}"):
        prove_run(link)
    with pytest.raises(PreflightError, match="delete the run itself, or remove the link with rm"):
        housekeeping.delete_run(find_run(tmp_path, "link"))
    prove_run(run.path)


def test_a_project_with_a_config_and_folders_of_these_names_is_no_run(tmp_path: Path) -> None:
    for name in contents.FOLDERS:
        (tmp_path / name).mkdir()
    (tmp_path / "config.toml").write_text('[model]\nname = "x"\n[data]\npath = "y"\n')
    before = snapshot(tmp_path)
    with pytest.raises(PreflightError, match="is not the configuration of a run"):
        housekeeping.delete_run(RunDirectory(tmp_path))
    assert snapshot(tmp_path) == before


# -- deleting ------------------------------------------------------------------------------------------


def test_links_inside_a_run_are_removed_and_what_they_lead_to_stays(
    run: RunDirectory, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    precious(elsewhere)
    (run.export_dir / "mine").symlink_to(elsewhere)
    (run.cache_dir / "full.bin").symlink_to(elsewhere / "notes.txt")
    os.link(elsewhere / "notes.txt", run.logs_dir / "attempt-001.log")
    housekeeping.delete_run(run)
    assert snapshot(tmp_path) == {**snapshot(tmp_path), "elsewhere/notes.txt": b"precious"}
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_run_with_the_longest_of_names_is_deleted(run: RunDirectory) -> None:
    longest = run.path.rename(run.path.with_name("ä" * 127 + "x"))
    housekeeping.delete_run(RunDirectory(longest))
    assert list(longest.parent.iterdir()) == []


def test_what_takes_a_runs_name_after_the_proof_is_not_deleted(run: RunDirectory, tmp_path: Path) -> None:
    identity = prove_run(run.path)
    run.path.rename(tmp_path / "moved")
    run.path.mkdir()
    precious(run.path)
    before = snapshot(tmp_path)
    with pytest.raises(PreflightError, match="was exchanged"):
        removal.rename_proven(run.path, ".removed-x-00000000", identity)
    with pytest.raises(PreflightError, match="was exchanged"):
        removal.remove_proven(run.path, identity)
    assert snapshot(tmp_path) == before


def test_what_appears_in_a_run_while_it_is_deleted_stays_and_can_be_moved_away(run: RunDirectory) -> None:
    hidden = removal.rename_proven(run.path, f".removed-{run.id}-00000000", prove_run(run.path))
    precious(hidden)
    with pytest.raises(PreflightError, match=r"appeared just now: notes\.txt"):
        removal.remove_proven(hidden, FolderIdentity.of(hidden.stat()))
    assert (hidden / "notes.txt").read_text() == "precious"
    (hidden / "notes.txt").rename(hidden.parent / "notes.txt")
    assert housekeeping.clean_leftovers(hidden.parent).left_alone == ()
    assert not hidden.exists()


# -- deletions that were cut off -----------------------------------------------------------------------


class Killed(BaseException):
    """The process is gone."""


def test_a_deletion_that_is_cut_off_anywhere_is_finished(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call that removes something may be the last one."""
    allowed = 0
    while True:
        run = RunDirectory.create(runs, CONFIG)
        for folder in ("cache/inside", "export/gptq_v2", "checkpoints/objects"):
            (run.path / folder).mkdir()
            (run.path / folder / f"{'a' * 64}.safetensors").write_text("x")
        for number in range(1, 5):
            (run.logs_dir / f"attempt-{number:03d}.log").write_text("x")
        (run.path / ".status.json.1.0123abcd.tmp").touch()
        left = allowed

        def limited(real: Callable[..., None]) -> Callable[..., None]:
            def call(*args: object, **kwargs: object) -> None:
                nonlocal left
                if left == 0:
                    raise Killed
                left -= 1
                real(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in ("unlink", "rmdir", "rename"):
                patch.setattr(os, name, limited(getattr(os, name)))
            try:
                housekeeping.delete_run(run)
                break
            except Killed:
                pass
        if allowed == 0:  # it never lost its name
            shutil.rmtree(run.path)
        else:
            (leftover,) = runs.iterdir()
            assert list_runs(runs) == []
            prove_removed(leftover)
            size = housekeeping.clean_leftovers(runs, dry_run=True)
            assert leftover.exists()
            assert housekeeping.clean_leftovers(runs) == size == (size.freed, ())
        assert list(runs.iterdir()) == []
        allowed += 1
    assert allowed > 20
    assert list(runs.iterdir()) == []


def leftover(runs: Path) -> Path:
    run = RunDirectory.create(runs, CONFIG)
    return run.path.rename(runs / f".removed-{run.id}-0123abcd")


FOREIGN_LEFTOVERS: dict[str, Callable[[Path], object]] = {
    "a folder of the user's": lambda runs: precious_folder(runs / ".removed-precious"),
    "one whose name ends as ours": lambda runs: precious_folder(runs / ".removed-precious-0123abcd"),
    "a file": lambda runs: (runs / ".removed-x-0123abcd").write_text("precious"),
    "a link to a run": lambda runs: (runs / ".removed-x-0123abcd").symlink_to(
        RunDirectory.create(runs.parent / "elsewhere", CONFIG).path
    ),
    "a run that was never deleted": lambda runs: leftover(runs).rename(runs / ".removed-run"),
    "one with a file of the user's": lambda runs: precious(leftover(runs)),
    "one without its configuration": lambda runs: (leftover(runs) / "config.toml").unlink(),
    "one with another configuration": lambda runs: (leftover(runs) / "config.toml").write_text("a = 1"),
    "one with a linked folder": lambda runs: link_away("logs")(leftover(runs)),
}


def precious_folder(folder: Path) -> None:
    folder.mkdir()
    precious(folder)


@pytest.mark.parametrize("case", FOREIGN_LEFTOVERS)
def test_what_only_looks_like_a_deletion_is_left_alone_and_named(case: str, runs: Path) -> None:
    runs.mkdir()
    FOREIGN_LEFTOVERS[case](runs)
    before = snapshot(runs.parent)
    freed, left_alone = housekeeping.clean_leftovers(runs)
    assert freed == 0
    assert [".removed-" in error.where for error in left_alone] == [True]
    assert snapshot(runs.parent) == before


def test_an_empty_leftover_is_the_last_step_of_a_deletion(runs: Path) -> None:
    (runs / ".removed-x-0123abcd").mkdir(parents=True)
    assert housekeeping.clean_leftovers(runs) == (0, ())
    assert list(runs.iterdir()) == []


# -- any tree ------------------------------------------------------------------------------------------

NAMES = st.sampled_from(
    [*contents.FILES, *contents.FOLDERS, "notes.txt", ".x.1.0123abcd.tmp", ".lock.1.0123abcd.tmp", "src"]
)
CHANGES = st.tuples(NAMES, st.sampled_from(["file", "folder", "link", "gone", "empty"]))


@example(changes=[("lock", "empty")], name="run", whole=True)
@example(changes=[("lock", "empty")], name=".removed-run-0123abcd", whole=True)
@given(
    changes=st.lists(CHANGES, max_size=4),
    name=st.sampled_from(["run", ".removed-run-0123abcd", ".removed-run", "link"]),
    whole=st.booleans(),
)
def test_of_any_tree_only_proven_runs_are_deleted_and_the_rest_keeps_every_byte(
    tmp_path_factory: pytest.TempPathFactory,
    changes: list[tuple[str, str]],
    name: str,
    whole: bool,
) -> None:
    place = tmp_path_factory.mktemp("any")
    runs = place / "runs"
    elsewhere = place / "elsewhere"
    precious_folder(elsewhere)
    precious_folder(runs)
    folder = place / "run" if name == "link" else runs / name
    for inner in contents.FOLDERS:
        (folder / inner).mkdir(parents=True)
    (folder / "config.toml").write_text(to_toml(CONFIG) if whole else "[project]\n")
    for entry, change in changes:
        put(folder / entry, change, elsewhere)
    if name == "link":
        (runs / name).symlink_to(folder)
    removed = name == ".removed-run-0123abcd"
    proven = (name == "run" or removed) and whole
    proven = proven and all(is_as_in_a_run(folder / entry, removed=removed) for entry, _ in changes)
    before = snapshot(place)
    if name.startswith("."):
        assert bool(housekeeping.clean_leftovers(runs).left_alone) != proven
    else:
        try:
            housekeeping.delete_run(RunDirectory(folder, runs / name if name == "link" else None))
            assert proven
        except EqatError:
            assert not proven
    if proven:
        inside = f"{folder.relative_to(place)}/"
        before = {path: kept for path, kept in before.items() if not f"{path}/".startswith(inside)}
    assert snapshot(place) == before
    shutil.rmtree(place)


def put(path: Path, what: str, elsewhere: Path) -> None:
    """Let ``path`` be something else."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    if what == "file":
        path.write_text("precious")
    elif what == "folder":
        precious_folder(path)
    elif what == "empty":
        path.mkdir()
    elif what == "link":
        path.symlink_to(elsewhere)


def is_as_in_a_run(path: Path, *, removed: bool) -> bool:
    """The rule once more, in other words: a deletion that was cut off may have removed everything but the
    configuration."""
    if path.name in ("config.toml", "notes.txt", "src", ".x.1.0123abcd.tmp"):
        return path.name != "config.toml" and not os.path.lexists(path)
    if not os.path.lexists(path):
        return removed or path.name not in ("control", "logs", "checkpoints", "eval", "export")
    if path.is_symlink():
        return False
    if path.name in contents.FOLDERS:
        return path.is_dir() and (path.name == "cache" or not any(path.iterdir()))
    # A folder in the place of a file is in nobody's way while it is empty, but no lock can be taken on one.
    return path.is_file() or ((removed or path.name != "lock") and not any(path.iterdir()))


# -- names ---------------------------------------------------------------------------------------------


def test_names_are_those_that_are_written(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    real = os.replace

    def replace(source: str, target: str, **folders: int) -> None:
        written.append(source)
        real(source, target, **folders)

    monkeypatch.setattr(files.os, "replace", replace)
    files.atomic_write(run.status_path, b"{}")
    control.request(run, "stop")
    status, request = written
    assert contents.temporary_of(status) == "status.json"
    assert contents.belongs_at_top(status)
    assert contents.is_unfinished_request(request)
    assert {path.name for path in run.path.iterdir() if path.is_dir()} == set(contents.FOLDERS)
