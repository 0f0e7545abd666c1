"""Settings that must be in place before any test imports torch."""

import glob
import os

# As in engine/__main__.py: tests run engines beside themselves, and spinning threads would starve them.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# The tensors of these tests are so small that a second thread only costs; engines set their own number.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Without a GPU, Triton's interpreter runs the kernels that are tested.
if not glob.glob("/dev/nvidia[0-9]*"):
    os.environ.setdefault("TRITON_INTERPRET", "1")
