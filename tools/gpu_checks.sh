#!/usr/bin/env bash
# Run everything that needs a GPU, and write the results as files.
#
#   bash tools/gpu_checks.sh [--wheels DIR] [--out DIR] [--only STEP]...
#
# --wheels  folder of wheels, for a machine without a network
# --out     folder of the results; benchmarks/gpu by default
# --only    one of the steps below; the first four of them by default
#
# Needs a python with a torch for the GPU (PYTHON names it) and installs the
# other packages beside it, in .venv-gpu. mmcv is compiled for this GPU alone.
#
# operators  the tests of the kernels
# digits     the Digits classifier in bf16, fused and plain, from one seed
# speed      the classifiers and the backbone of detection against the official
#            order of operations, ConvNeXt and Swin
# growth     time and memory from 224 to 1344 pixels
# compiled   T under torch.compile
# amp        the recipes of T in fp16 and bf16, on miniature data
#
# Steps that are not timed run side by side, and before the others; with speed
# so do the compilers of its kernels. A step that fails does not stop the
# others; the exit status is then 1. The table of all steps is printed last.
# Data and runs lie in work_dirs/gpu_checks.
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
                operators | digits | speed | growth | compiled | amp)
                    only+=("$2")
                    ;;
                *)
                    echo "gpu_checks.sh: unknown step '${2-}'; known:" \
                        'operators, digits, speed, growth, compiled, amp' >&2
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

[ ${#only[@]} -gt 0 ] || only=(operators digits speed growth)

wanted() {
    [[ " ${only[*]} " == *" $1 "* ]]
}

# step NAME COMMAND...: run it with a log, and note how it ended
step() {
    local name=$1 start=$SECONDS result=passed
    shift
    printf '==> %s\n' "$name"
    "$@" >"$out/$name.log" 2>&1 || {
        result=FAILED
        tail -n 20 "$out/$name.log"
    }
    printf '%s\t%s\t%d s\n' "$name" $result $((SECONDS - start)) >>"$summary"
}

environment() {
    local site
    if [ ! -x .venv-gpu/bin/python ]; then
        "${PYTHON:-python3}" -m venv .venv-gpu ||
            "${PYTHON:-python3}" -m venv --clear --without-pip .venv-gpu
    fi
    site=$(.venv-gpu/bin/python -c '
import sysconfig
print(sysconfig.get_paths()["purelib"])')
    mkdir -p "$site/transformers-0.dist-info"
    # Packages of that python, which may be one of an environment itself.
    "${PYTHON:-python3}" -c '
import sys
print(*(path for path in sys.path if path.endswith("-packages")), sep="\n")
' >"$site/packages_of_that_python.pth"
    # Hides a transformers 5 among them, beside which mmpretrain cannot be
    # imported.
    printf 'Metadata-Version: 2.1\nName: transformers\nVersion: 0\n' \
        >"$site/transformers-0.dist-info/METADATA"
    TORCH_CUDA_ARCH_LIST=$("${PYTHON:-python3}" -c '
import torch
print("%d.%d" % torch.cuda.get_device_capability())')
    export TORCH_CUDA_ARCH_LIST FORCE_CUDA=1 MAX_JOBS
    MAX_JOBS=$(nproc)
    VIRTUAL_ENV=$root/.venv-gpu bash tools/setup_env.sh
}

# together COMMAND... -- COMMAND...: at a time; the last status that is not 0
together() {
    local command=() jobs=() word job status=0
    for word in "$@" --; do
        if [ "$word" != -- ]; then
            command+=("$word")
        else
            "${command[@]}" &
            jobs+=($!)
            command=()
        fi
    done
    for job in "${jobs[@]}"; do
        wait "$job" || status=$?
    done
    return $status
}

operators() {
    # Most of the time goes to compilers, one in each process.
    "$python" -m pytest -m gpu -n "$(nproc)" tests
}

# In one process, which imports torch once. Of stdin, each line names a file
# and has the options for what is written to it.
benchmarks() {
    PYTHONPATH=$root/tools "$python" -c '
import gc, shlex, sys, traceback, torch, benchmark
failed = []
for line in sys.stdin.read().replace("\\\n", "").splitlines():
    file, *options = shlex.split(line)
    try:
        benchmark.main(["--device", "cuda", "--dtype", "bf16", "--json",
                        f"{sys.argv[1]}/{file}.json", *options])
    except (SystemExit, RuntimeError):
        traceback.print_exc()
        failed.append(file)
    gc.collect()
    torch.cuda.empty_cache()
sys.exit(f"failed: {failed}" if failed else 0)' "${1:-$out}"
}

# Compiles the kernels of an arch, which Triton keeps on disk.
compile_kernels() {
    benchmarks "$runs" <<END
kernels_$1 --batch 8 --repeats 1 --no-memory --models conv2former-$1
END
}

kernels() {
    together compile_kernels t -- compile_kernels n -- compile_kernels s -- \
        compile_kernels b -- compile_kernels l
}

speed() {
    benchmarks <<'END'
tiny --batch 128 --repeats 9 --seconds 8 --profile 40 \
    --models conv2former-t@official conv2former-t conv2former-t@graphs \
    ConvNeXt:tiny SwinTransformer:tiny
detection --task backbone --batch 2 --size 800x1344 --mode train \
    --repeats 9 --seconds 8 --models conv2former-t@official conv2former-t \
    conv2former-t@graphs ConvNeXt:tiny
optimizer --mode optimizer --models conv2former-t --no-memory
n --batch 64 --repeats 5 --seconds 4 --models conv2former-n@official \
    conv2former-n conv2former-n@graphs
s --batch 64 --repeats 5 --seconds 4 --models conv2former-s@official \
    conv2former-s conv2former-s@graphs
b --batch 64 --repeats 5 --seconds 4 --models conv2former-b@official \
    conv2former-b conv2former-b@graphs
l --batch 64 --repeats 5 --seconds 4 --models conv2former-l@official \
    conv2former-l conv2former-l@graphs
END
}

compiled() {
    benchmarks <<'END'
compiled --batch 128 --repeats 5 --seconds 6 \
    --models conv2former-t@official conv2former-t@compiled
END
}

growth() {
    benchmarks <<'END'
growth --batch 16 --size 224 448 672 896 1120 1344 --mode train \
    --task backbone --repeats 5 --seconds 4 \
    --models conv2former-t@graphs ConvNeXt:tiny
END
}

# train_digits 1|0: with the fused operators or without
train_digits() {
    MMCONV2FORMER_FUSED=$1 "$python" tools/train.py \
        configs/classification/conv2former_mini_digits.py --amp bf16 \
        --work-dir "$runs/digits_fused_$1" \
        --cfg-options randomness.seed=0 default_hooks.logger.interval=10
}

digits() {
    [ -d data/digits ] || "$python" tools/make_digits.py data/digits
    together train_digits 1 -- train_digits 0
    grep -h 'accuracy/top1' "$runs"/digits_fused_*/*/*.log | tail -n 2
}

# recipes fp16|bf16
recipes() {
    local classifier
    "$python" "$root/tools/train.py" \
        "$root/configs/classification/conv2former_t_in1k.py" \
        --amp "$1" --work-dir "classification_$1" \
        --cfg-options train_cfg.max_epochs=6 train_cfg.val_interval=6 \
        train_dataloader.batch_size=128
    classifier=$(cat "classification_$1/last_checkpoint")
    "$python" "$root/tools/train.py" \
        "$root/configs/detection/mask_rcnn_conv2former_t_coco.py" \
        --amp "$1" --work-dir "detection_$1" \
        --cfg-options train_cfg.max_epochs=4 train_cfg.val_interval=4 \
        "model.backbone.init_cfg.checkpoint=$classifier"
    "$python" "$root/tools/train.py" \
        "$root/configs/segmentation/upernet_conv2former_t_ade20k.py" \
        --amp "$1" --work-dir "segmentation_$1" \
        --cfg-options train_cfg.max_iters=60 train_cfg.val_interval=60 \
        default_hooks.checkpoint.interval=60 \
        "model.backbone.init_cfg.checkpoint=$classifier"
}

amp() {
    if [ ! -d "$runs/data" ]; then
        "$python" tools/make_mini_dataset.py imagenet "$runs/data/imagenet"
        "$python" tools/make_mini_dataset.py coco "$runs/data/coco" \
            --images 32
        "$python" tools/make_mini_dataset.py ade20k "$runs/data/ade" \
            --images 32
    fi
    cd "$runs"  # where the configs look for data/
    together recipes fp16 -- recipes bf16
}

# run NAME: as a step, in a shell of its own, which ends at the first command
# that fails
run() {
    step "$1" bash -euo pipefail -c "
        root='$root' out='$out' runs='$runs' python='$python'
        $(declare -f together operators benchmarks compile_kernels kernels \
            speed growth compiled train_digits digits recipes amp)
        $1"
}

table() {
    column -t -s "$(printf '\t')" "$summary" || cat "$summary"
}

step environment environment
if grep -q FAILED "$summary"; then
    table
    exit 1
fi
python=$root/.venv-gpu/bin/python
(
    # More processes than cores; threads that wait for each other cost most.
    export OMP_NUM_THREADS=2
    for name in operators digits amp; do
        if wanted $name; then run $name & fi
    done
    if wanted speed; then run kernels & fi
    wait
)
for name in speed growth compiled; do
    if wanted $name; then run $name; fi
done
status=0
if grep -q FAILED "$summary"; then status=1; fi
for file in "$out"/*.json; do
    # What is older comes from another run, or from another tool.
    if [ "$file" -nt "$started" ]; then
        "$python" tools/plot_benchmark.py "$file" || status=1
    fi
done
table
exit $status
