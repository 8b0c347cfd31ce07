#!/usr/bin/env bash
# Train on a Slurm cluster, one process a GPU.
set -euo pipefail
if [ $# -lt 3 ]; then
    echo "usage: [GPUS=8] [GPUS_PER_NODE=8] [CPUS_PER_TASK=5] [SRUN_ARGS=...] $0 PARTITION JOB_NAME CONFIG" \
        "[arguments of train.py]" >&2
    exit 2
fi
partition=$1 job_name=$2 config=$3
shift 3

# shellcheck source=tools/_launch.sh
source "$(dirname "$0")/_launch.sh"
gpus=${GPUS:-8}
per_node=${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}
# SRUN_ARGS is split into words on purpose.
# shellcheck disable=SC2086
exec srun --partition "$partition" --job-name "$job_name" --gres "gpu:$per_node" --ntasks "$gpus" \
    --ntasks-per-node "$per_node" --cpus-per-task "${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
    "$python" -u "$tools/train.py" "$config" --launcher slurm "$@"
