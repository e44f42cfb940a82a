#!/usr/bin/env bash
# The whole path on Digits: make the environment and the data, train a
# classifier, carry its weights into Mask R-CNN and UperNet, train both, and
# evaluate all three.
#
#   bash tools/quickstart.sh [--compare] [--picture PNG]
#                            [--family onedl|original]
#
# --compare  also trains the two dense models from scratch, for the same
#            iterations, and adds them to the table
# --picture  also writes one picture of all three tasks
# --family   see tools/setup_env.sh
#
# Leaves the data in data/digits, the runs in work_dirs and the report in
# work_dirs/digits/report.html.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
classifier=configs/classification/conv2former_mini_digits.py
dense=(configs/detection/mask_rcnn_conv2former_mini_digits.py
    configs/segmentation/upernet_conv2former_mini_digits.py)

setup=()
report=()
compare=no
while [ $# -gt 0 ]; do
    case $1 in
        --compare)
            compare=yes
            report+=(--compare)
            shift
            ;;
        --family)
            setup=("$1" "${2-}")
            shift $(($# < 2 ? $# : 2))
            ;;
        --picture)
            if [ -z "${2-}" ] || [ -d "$2" ]; then
                echo "quickstart.sh: --picture needs a file, got '${2-}'" >&2
                exit 2
            fi
            report+=("$1" "$(realpath -m -- "$2")")
            shift 2
            ;;
        -h | --help)
            sed -n '2,/^set/{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        *)
            echo "quickstart.sh: unknown argument '$1'; known: --compare," \
                '--picture PNG, --family onedl|original' >&2
            exit 2
            ;;
    esac
done

# Jobs in the background do not hear Ctrl-C, so pass it on.
trap 'trap "" TERM; kill 0; exit 130' INT

python=$(bash "$root/tools/setup_env.sh" "${setup[@]}")
cd "$root"
mkdir -p work_dirs/digits
seconds=work_dirs/digits/seconds.tsv
: >"$seconds"

# step NAME COMMAND...: run it and note how long it took, or stop
step() {
    local name=$1 start=$SECONDS
    shift
    printf '\n==> %s\n' "$name"
    "$@" || {
        printf 'quickstart.sh: failed: %s\n  command: %s\n' "$name" "$*" >&2
        exit 1
    }
    printf '%s\t%d\n' "$name" $((SECONDS - start)) >>"$seconds"
}

name_of() { basename "$1" .py; }

# train CONFIG NAME [OPTIONS]
train() {
    local config=$1 name=$2
    shift 2
    step "train $name" "$python" tools/train.py "$config" \
        --work-dir "work_dirs/$name" "$@"
}

# evaluate CONFIG NAME: test the last checkpoint
evaluate() {
    local config=$1 name=$2 out=predictions.pkl
    case $config in configs/segmentation/*) out=predictions ;; esac
    step "test $name" "$python" tools/test.py "$config" \
        "$(cat "work_dirs/$name/last_checkpoint")" \
        --work-dir "work_dirs/$name/test" --out "work_dirs/$name/test/$out"
}

train_and_evaluate() {
    train "$@"
    evaluate "$1" "$2"
}

# beside FUNCTION CONFIG NAME [OPTIONS]: run the function while others run;
# each line of its output begins with the task
pids=()
beside() {
    "$@" > >(sed -u "s/^/[$(basename "$(dirname "$2")")] /") 2>&1 &
    pids+=($!)
}

wait_for_all() {
    local pid status=0
    for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
    pids=()
    [ $status -eq 0 ] || exit $status
}

# share_cores JOBS: two threads for each of so many at a time, if that leaves a
# core for others. The layers are small: two threads wait for each other all the
# time, and if one has to share its core, are slower than one alone.
share_cores() {
    local share=$(($(getconf _NPROCESSORS_ONLN) / $1))
    export OMP_NUM_THREADS=$((share > 2 ? 2 : 1))
}

begin=$SECONDS
step data "$python" tools/make_digits.py data/digits
share_cores 1
train "$classifier" "$(name_of "$classifier")"
share_cores 2
beside evaluate "$classifier" "$(name_of "$classifier")"
for config in "${dense[@]}"; do
    beside train_and_evaluate "$config" "$(name_of "$config")"
done
wait_for_all
printf 'total\t%d\n' $((SECONDS - begin)) >>"$seconds"
if [ $compare = yes ]; then
    # The scratch runs start as the classifier did, and learn at the full
    # rate in every layer: layer decay is meant for trained weights.
    for config in "${dense[@]}"; do
        beside train_and_evaluate "$config" "$(name_of "$config")_scratch" \
            --cfg-options \
            model.backbone.init_cfg._delete_=True \
            model.backbone.init_cfg.type=Kaiming \
            model.backbone.init_cfg.layer=Conv2d \
            model.backbone.init_cfg.mode=fan_in \
            model.backbone.init_cfg.nonlinearity=linear \
            optim_wrapper.paramwise_cfg.decay_rate=1.0
    done
    wait_for_all
fi
printf '\n'
"$python" tools/digits_report.py "${report[@]}"
