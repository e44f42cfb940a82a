#!/usr/bin/env bash
# Test with one process per GPU, or with several processes on the CPU.
# PORT, NNODES, NODE_RANK and MASTER_ADDR: see torchrun.sh.
set -euo pipefail
if [ $# -lt 3 ] || ! [[ $3 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: bash $0 CONFIG CHECKPOINT GPUS [options of test.py]," \
        "with GPUS a number from 1" >&2
    exit 2
fi
exec bash "$(dirname "$0")/torchrun.sh" "$3" test.py "$1" "$2" "${@:4}"
