#!/usr/bin/env bash
# Start a script of this folder in several processes, for dist_train.sh and
# dist_test.sh:
#     bash tools/torchrun.sh GPUS SCRIPT [arguments]
# On one machine a free port is taken, or PORT. On several, give each NNODES
# and its NODE_RANK, and the MASTER_ADDR and PORT of the first.
set -euo pipefail
gpus=$1
script=$2
shift 2

if [ "${NNODES:-1}" = 1 ] && [ -z "${PORT:-}" ]; then
    meet=(--standalone)
else
    meet=(--nnodes "${NNODES:-1}" --node-rank "${NODE_RANK:-0}"
        --master-addr "${MASTER_ADDR:-127.0.0.1}"
        --master-port "${PORT:-29500}")
fi
exec python -m torch.distributed.run "${meet[@]}" --nproc-per-node "$gpus" \
    "$(dirname "$0")/$script" "$@" --launcher pytorch
