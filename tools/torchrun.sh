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

if ! [[ ${NNODES:-1} =~ ^[1-9][0-9]*$ ]]; then
    echo "$0: NNODES must be a number from 1, got '$NNODES'" >&2
    exit 2
fi
if [ "${NNODES:-1}" != 1 ]; then
    # Otherwise each machine waits for the others to come to it.
    for name in NODE_RANK MASTER_ADDR; do
        if [ -z "${!name:-}" ]; then
            echo "$0: NNODES=$NNODES machines need $name: a NODE_RANK from 0" \
                "to $((NNODES - 1)) for each, and for all the MASTER_ADDR of" \
                'the first' >&2
            exit 2
        fi
    done
fi
rank=${NODE_RANK:-0}
if [ "${NNODES:-1}" = 1 ]; then rank=0; fi
if ! [[ $rank =~ ^[0-9]+$ ]] || ((10#$rank >= ${NNODES:-1})); then
    echo "$0: NODE_RANK must be a number from 0 to $((NNODES - 1)), got" \
        "'$rank'" >&2
    exit 2
fi
if [ "${NNODES:-1}" = 1 ] && [ -z "${PORT:-}" ]; then
    # By the address, for a name of this machine may not be known anywhere.
    meet=(--standalone --local-addr 127.0.0.1)
else
    meet=(--nnodes "${NNODES:-1}" --node-rank "$rank"
        --master-addr "${MASTER_ADDR:-127.0.0.1}"
        --master-port "${PORT:-29500}")
fi
exec python -m torch.distributed.run "${meet[@]}" --nproc-per-node "$gpus" \
    "$(dirname "$0")/$script" "$@" --launcher pytorch
