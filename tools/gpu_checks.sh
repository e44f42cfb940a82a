#!/usr/bin/env bash
# Run everything that needs a GPU, and write the results as files.
#
#   bash tools/gpu_checks.sh [--wheels DIR] [--out DIR] [--only STEP]...
#
# --wheels  folder of wheels, for a machine without a network
# --out     folder of the results; benchmarks/gpu by default
# --only    operators, speed, growth, digits or amp; all of them by default
#
# Needs a python with a torch for the GPU (PYTHON names it) and installs the
# other packages beside it, in .venv-gpu. mmcv is compiled for this GPU alone.
#
# operators  the tests of the kernels
# speed      the classifiers and the backbone of detection against the official
#            order of operations, ConvNeXt and Swin
# growth     time and memory from 224 to 1344 pixels
# digits     the Digits classifier in bf16, fused and plain, from one seed
# amp        the recipes of T in fp16 and bf16, on miniature data
#
# A step that fails does not stop the others; the exit status is then 1. The
# table of all steps is printed last. Data and runs lie in
# work_dirs/gpu_checks.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=$root/benchmarks/gpu
only=()
while [ $# -gt 0 ]; do
    case $1 in
        --wheels)
            PIP_FIND_LINKS=$(realpath -- "${2:?--wheels needs a folder}")
            export PIP_FIND_LINKS PIP_NO_INDEX=1
            shift 2
            ;;
        --out)
            out=$(realpath -m -- "${2:?--out needs a folder}")
            shift 2
            ;;
        --only)
            case ${2-} in
                operators | speed | growth | digits | amp) only+=("$2") ;;
                *)
                    echo "gpu_checks.sh: unknown step '${2-}'; known:" \
                        'operators, speed, growth, digits, amp' >&2
                    exit 2
                    ;;
            esac
            shift 2
            ;;
        -h | --help)
            sed -n '2,/^set/{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        *)
            echo "gpu_checks.sh: unknown argument '$1'; known: --wheels DIR," \
                '--out DIR, --only STEP' >&2
            exit 2
            ;;
    esac
done

"${PYTHON:-python3}" - <<'PY' || exit 1
import sys

try:
    import torch
except ImportError:
    sys.exit('gpu_checks.sh: python has no torch; install one for this GPU, '
             'or set PYTHON to a python that has one')
if not torch.cuda.is_available():
    sys.exit('gpu_checks.sh: torch finds no GPU here; run it on a machine '
             'with one, or set PYTHON to a python whose torch is built for it')
PY

cd "$root"
mkdir -p "$out"
runs=$root/work_dirs/gpu_checks
mkdir -p "$runs"
summary=$out/summary.tsv
: >"$summary"
started=$runs/started
: >"$started"
status=0

wanted() {
    [ ${#only[@]} -eq 0 ] || [[ " ${only[*]} " == *" $1 "* ]]
}

# step NAME COMMAND...: run it with a log, and note how it ended
step() {
    local name=$1 start=$SECONDS result=passed
    shift
    printf '==> %s\n' "$name"
    "$@" >"$out/$name.log" 2>&1 || {
        result=FAILED
        status=1
        tail -n 20 "$out/$name.log"
    }
    printf '%s\t%s\t%d s\n' "$name" $result $((SECONDS - start)) >>"$summary"
}

environment() {
    local site
    if [ ! -x .venv-gpu/bin/python ]; then
        "${PYTHON:-python3}" -m venv --system-site-packages .venv-gpu
    fi
    # Hides a transformers 5 of that python, beside which mmpretrain cannot be
    # imported.
    site=$(.venv-gpu/bin/python -c '
import sysconfig
print(sysconfig.get_paths()["purelib"])')/transformers-0.dist-info
    mkdir -p "$site"
    printf 'Metadata-Version: 2.1\nName: transformers\nVersion: 0\n' \
        >"$site/METADATA"
    TORCH_CUDA_ARCH_LIST=$("${PYTHON:-python3}" -c '
import torch
print("%d.%d" % torch.cuda.get_device_capability())')
    export TORCH_CUDA_ARCH_LIST FORCE_CUDA=1 MAX_JOBS
    MAX_JOBS=$(nproc)
    VIRTUAL_ENV=$root/.venv-gpu bash tools/setup_env.sh
}

operators() {
    # Most of the time goes to compilers, one in each process.
    "$python" -m pytest -m gpu -n "$(nproc)" tests
}

# benchmark FILE OPTIONS...
benchmark() {
    local file=$1
    shift
    "$python" tools/benchmark.py --device cuda --json "$out/$file.json" "$@"
}

speed() {
    local arch
    benchmark tiny --batch 128 --mode train forward --dtype bf16 --repeats 15 \
        --seconds 15 --profile 40 \
        --models conv2former-t@official conv2former-t conv2former-t@graphs \
        ConvNeXt:tiny SwinTransformer:tiny
    benchmark detection --task backbone --batch 2 --size 800x1344 \
        --mode train --dtype bf16 --repeats 10 --seconds 10 \
        --models conv2former-t@official conv2former-t conv2former-t@graphs \
        ConvNeXt:tiny
    benchmark optimizer --batch 128 --mode optimizer --dtype bf16 \
        --models conv2former-t --no-memory
    for arch in n s b l; do
        benchmark "$arch" --batch 64 --mode train forward --dtype bf16 \
            --repeats 7 --seconds 6 \
            --models "conv2former-$arch@official" "conv2former-$arch" \
            "conv2former-$arch@graphs"
    done
    benchmark compiled --batch 128 --mode train --dtype bf16 --repeats 15 \
        --seconds 10 --models conv2former-t@official conv2former-t@compiled
}

growth() {
    benchmark growth --batch 16 --size 224 448 672 896 1120 1344 --mode train \
        --task backbone --dtype bf16 --repeats 7 --seconds 8 \
        --models conv2former-t@graphs ConvNeXt:tiny
}

digits() {
    local fused
    [ -d data/digits ] || "$python" tools/make_digits.py data/digits
    for fused in 1 0; do
        MMCONV2FORMER_FUSED=$fused "$python" tools/train.py \
            configs/classification/conv2former_mini_digits.py --amp bf16 \
            --work-dir "$runs/digits_fused_$fused" \
            --cfg-options randomness.seed=0 default_hooks.logger.interval=10
    done
    grep -h 'accuracy/top1' "$runs"/digits_fused_*/*/*.log | tail -n 2
}

amp() {
    local precision classifier
    if [ ! -d "$runs/data" ]; then
        "$python" tools/make_mini_dataset.py imagenet "$runs/data/imagenet"
        "$python" tools/make_mini_dataset.py coco "$runs/data/coco" \
            --images 32
        "$python" tools/make_mini_dataset.py ade20k "$runs/data/ade" \
            --images 32
    fi
    cd "$runs"  # where the configs look for data/
    for precision in fp16 bf16; do
        "$python" "$root/tools/train.py" \
            "$root/configs/classification/conv2former_t_in1k.py" \
            --amp $precision --work-dir "classification_$precision" \
            --cfg-options train_cfg.max_epochs=6 train_cfg.val_interval=6 \
            train_dataloader.batch_size=128
        classifier=$(cat "classification_$precision/last_checkpoint")
        "$python" "$root/tools/train.py" \
            "$root/configs/detection/mask_rcnn_conv2former_t_coco.py" \
            --amp $precision --work-dir "detection_$precision" \
            --cfg-options train_cfg.max_epochs=4 train_cfg.val_interval=4 \
            "model.backbone.init_cfg.checkpoint=$classifier"
        "$python" "$root/tools/train.py" \
            "$root/configs/segmentation/upernet_conv2former_t_ade20k.py" \
            --amp $precision --work-dir "segmentation_$precision" \
            --cfg-options train_cfg.max_iters=60 train_cfg.val_interval=60 \
            default_hooks.checkpoint.interval=60 \
            "model.backbone.init_cfg.checkpoint=$classifier"
    done
}

step environment environment
python=$root/.venv-gpu/bin/python
for name in operators speed growth digits amp; do
    # In a shell of its own, which ends at the first command that fails.
    if wanted $name; then step $name bash -euo pipefail -c "
        root='$root' out='$out' runs='$runs' python='$python'
        $(declare -f benchmark operators speed growth digits amp)
        $name"; fi
done
for file in "$out"/*.json; do
    # What is older comes from another run, or from another tool.
    if [ "$file" -nt "$started" ]; then
        "$python" tools/plot_benchmark.py "$file" || status=1
    fi
done
column -t -s "$(printf '\t')" "$summary" || cat "$summary"
exit $status
