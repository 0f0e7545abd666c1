"""Settings that must be in place before any test imports torch."""

import glob
import os
import signal
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

# As in engine/__main__.py: tests run engines beside themselves, and spinning threads would starve them.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# The tensors of these tests are so small that a second thread only costs; engines set their own number.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The defaults of whoever runs the tests change nothing in them.
os.environ["EQAT_CONFIG_DIR"] = "/nonexistent/eqat"
os.environ["EQAT_STATE_DIR"] = "/nonexistent/eqat"
# Without a GPU, Triton's interpreter runs the kernels that are tested.
if not glob.glob("/dev/nvidia[0-9]*"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from hypothesis import HealthCheck, settings

# Other tests run beside: how long one example takes says nothing. Where a failure would stop others' work,
# the examples are the same every time; everywhere else they are new ones.
settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("shared"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "shared")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    """Undo what is ignored: by whoever runs the tests (nohup, the shell of a CI), and by an engine that ran
    in this process (a terminal that hangs up is none of its business).

    Every process that a test starts would inherit it, and is to hear what it hears at a user's prompt.
    """
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGQUIT):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def interpreted() -> None:
    """Triton's kernels work on tensors in host memory: where its interpreter runs them."""
    if find_spec("triton") is None or not os.environ.get("TRITON_INTERPRET"):
        pytest.skip("there is no Triton, or it compiles for the GPU here")


@pytest.fixture
def no_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a machine that has no command of Slurm's."""
    from engine.run import slurm

    slurm.forget()
    slurm.cluster.cache_clear()
    empty = tmp_path / "no-programs"
    empty.mkdir()
    monkeypatch.setenv("PATH", str(empty))
    yield
    slurm.forget()
    slurm.cluster.cache_clear()
