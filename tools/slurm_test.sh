#!/usr/bin/env bash
# Test under Slurm with one task per GPU.
# GPUS, GPUS_PER_NODE, CPUS_PER_TASK and SRUN_ARGS: see srun.sh.
set -euo pipefail
if [ $# -lt 4 ] || [[ $4 == -* ]]; then
    echo "usage: [GPUS=8] bash $0 PARTITION JOB_NAME CONFIG CHECKPOINT \
[options of test.py]" >&2
    exit 2
fi
exec bash "$(dirname "$0")/srun.sh" "$1" "$2" test.py "${@:3}"
