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

# shellcheck source=tools/_launch.sh
source "$(dirname "$0")/_launch.sh"
start "$processes" test.py "$config" "$checkpoint" --launcher pytorch "$@"
