#!/usr/bin/env bash
# Test on several GPUs of a machine, or with several processes on its CPU.
# Several machines: run it on each, with NNODES, NODE_RANK, MASTER_ADDR and PORT set.
set -euo pipefail
if [ $# -lt 3 ]; then
    echo "usage: [PORT=29500] $0 CONFIG CHECKPOINT PROCESSES [arguments of test.py]" >&2
    exit 2
fi
config=$1 checkpoint=$2 processes=$3
shift 3

tools=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python}
if [ -z "${PYTHON:-}${VIRTUAL_ENV:-}" ] && [ -x "$tools/../.venv/bin/python" ]; then
    python=$tools/../.venv/bin/python
fi
# One machine finds a free port by itself, and need not know itself by its name.
meeting=(--standalone --local-addr 127.0.0.1)
if [ -n "${PORT:-}" ] || [ "${NNODES:-1}" -gt 1 ]; then
    meeting=(--nnodes "${NNODES:-1}" --node-rank "${NODE_RANK:-0}"
        --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${PORT:-29500}")
fi
exec "$python" "$tools/_torchrun.py" "${meeting[@]}" --nproc-per-node "$processes" \
    "$tools/test.py" "$config" "$checkpoint" --launcher pytorch "$@"
