#!/usr/bin/env bash
# Train under Slurm with one task per GPU.
# GPUS, GPUS_PER_NODE, CPUS_PER_TASK and SRUN_ARGS: see srun.sh.
set -euo pipefail
if [ $# -lt 4 ] || [[ $4 == -* ]]; then
    echo "usage: [GPUS=8] bash $0 PARTITION JOB_NAME CONFIG WORK_DIR \
[options of train.py]" >&2
    exit 2
fi
exec bash "$(dirname "$0")/srun.sh" "$1" "$2" train.py "$3" --work-dir "$4" \
    "${@:5}"
