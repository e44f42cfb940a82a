#!/usr/bin/env bash
# Train with one process per GPU, or with several processes on the CPU.
# PORT, NNODES, NODE_RANK and MASTER_ADDR: see torchrun.sh.
set -euo pipefail
if [ $# -lt 2 ] || ! [[ $2 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: bash $0 CONFIG GPUS [options of train.py]," \
        "with GPUS a number from 1" >&2
    exit 2
fi
exec bash "$(dirname "$0")/torchrun.sh" "$2" train.py "$1" "${@:3}"
