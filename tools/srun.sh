#!/usr/bin/env bash
# Start a script of this folder under Slurm, for slurm_train.sh and
# slurm_test.sh:
#     bash tools/srun.sh PARTITION JOB_NAME SCRIPT [arguments]
# One task per GPU. GPUS (default 8), GPUS_PER_NODE (8, or GPUS if that is
# less), CPUS_PER_TASK (8), and SRUN_ARGS for further options of srun. The
# tasks meet at the first machine, at MASTER_PORT, or else at a port drawn
# here, so that two jobs on one machine keep apart.
set -euo pipefail
gpus=${GPUS:-8}
if ! [[ "$gpus,${GPUS_PER_NODE:-1}" =~ ^[1-9][0-9]*,[1-9][0-9]*$ ]]; then
    echo "$0: expected numbers from 1, got GPUS=$gpus" \
        "GPUS_PER_NODE=${GPUS_PER_NODE:-}" >&2
    exit 2
fi
per_node=${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}
read -ra more <<<"${SRUN_ARGS:-}"
export MASTER_PORT=${MASTER_PORT:-$((20000 + RANDOM % 10000))}

exec srun --partition="$1" --job-name="$2" --gres="gpu:$per_node" \
    --ntasks="$gpus" --ntasks-per-node="$per_node" \
    --cpus-per-task="${CPUS_PER_TASK:-8}" --kill-on-bad-exit=1 "${more[@]}" \
    python -u "$(dirname "$0")/$3" "${@:4}" --launcher slurm
