#!/usr/bin/env bash
# Train on several GPUs of a machine, or with several processes on its CPU.
# Several machines: run it on each, with NNODES, NODE_RANK, MASTER_ADDR and PORT set.
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "usage: [PORT=29500] $0 CONFIG PROCESSES [arguments of train.py]" >&2
    exit 2
fi
config=$1 processes=$2
shift 2

# shellcheck source=tools/_launch.sh
source "$(dirname "$0")/_launch.sh"
start "$processes" train.py "$config" --launcher pytorch "$@"
