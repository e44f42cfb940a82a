#!/usr/bin/env bash
# Make the environment where there is none, then lint and run the test suite.
#
#   bash tools/run_tests.sh [--family onedl|original] [pytest arguments]
#
# Both always run; the exit status is that of the last one that failed. Without
# arguments the tests are shared out, file by file, between two processes, which
# together take up to 9 GB.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
setup=()
if [ "${1-}" = --family ]; then
    setup=(--family "${2-}")
    shift "$(($# < 2 ? $# : 2))"
fi
python=$(bash "$root/tools/setup_env.sh" "${setup[@]}")

cd "$root"
if [ $# -eq 0 ]; then
    set -- -n 2 --dist loadfile tests
    # Threads that wait for work in one process leave the cores to the other.
    export OMP_WAIT_POLICY=PASSIVE
fi
status=0
"$python" -m ruff check . || status=$?
"$python" -m pytest "$@" || status=$?
exit "$status"
