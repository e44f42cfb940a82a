#!/usr/bin/env bash
# Run everything that needs a GPU, and write the results as files.
#
#   bash tools/gpu_checks.sh [--wheels DIR] [--out DIR] [--only STEP]...
#
# --wheels  folder of wheels, for a machine without a network
# --out     folder of the results; work_dirs/gpu_checks/results by default
# --only    one of the steps below; all but the last two by default
#
# Needs a python with a torch for the GPU (PYTHON names it) and installs the
# other packages beside it, in .venv-gpu. All but amp do without mmdet, mmseg
# and the compiled operators of mmcv; for amp these are compiled, for this GPU
# alone.
#
# tiny       T and the backbone of detection against the official order of
#            operations, ConvNeXt and Swin
# operators  the tests of the kernels
# digits     the Digits classifier in bf16, fused and plain, from one seed
# sizes      N, S, B and L against the official order, and the optimizer
# growth     time and memory from 224 to 1344 pixels
# compiled   T under torch.compile
# amp        the recipes of T in fp16 and bf16, on miniature data
#
# The kernels of what is timed are compiled before, in processes side by side;
# so run the steps that are not timed. A step that fails, or takes more than
# four minutes where neither amp nor compiled is asked for, does not stop the
# others; the exit status is then 1. The table of all steps is printed last, if
# the script is told to end early, too. Data and runs lie in
# work_dirs/gpu_checks.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
runs=$root/work_dirs/gpu_checks
out=$runs/results
known=(tiny operators digits sizes growth compiled amp)
base=$(command -v -- "${PYTHON:-python3}") || {
    echo "gpu_checks.sh: there is no ${PYTHON:-python3}; set PYTHON to a" \
        'python that has torch' >&2
    exit 1
}
[[ $base == /* ]] || base=$PWD/$base
only=()
while [ $# -gt 0 ]; do
    case $1 in
        --wheels)
            if [ ! -d "${2-}" ]; then
                echo "gpu_checks.sh: --wheels '${2-}' is no folder" >&2
                exit 2
            fi
            # As an address, for pip takes a space for the end of a path.
            PIP_FIND_LINKS=$("$base" -c '
import pathlib, sys
print(pathlib.Path(sys.argv[1]).resolve().as_uri())' "$2")
            export PIP_FIND_LINKS PIP_NO_INDEX=1
            shift 2
            ;;
        --out)
            if [ -z "${2-}" ]; then
                echo 'gpu_checks.sh: --out needs a folder' >&2
                exit 2
            fi
            out=$(realpath -m -- "$2")
            shift 2
            ;;
        --only)
            if [[ " ${known[*]} " != *" ${2-} "* ]]; then
                echo "gpu_checks.sh: unknown step '${2-}'; known:" \
                    "${known[*]}" >&2
                exit 2
            fi
            only+=("$2")
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

"$base" - <<'PY' || exit 1
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
mkdir -p "$out" "$runs"
summary=$out/summary.tsv
: >"$summary"
started=$runs/started
: >"$started"

[ ${#only[@]} -gt 0 ] || only=(tiny operators digits sizes growth)

wanted() {
    [[ " ${only[*]} " == *" $1 "* ]]
}

# step NAME COMMAND...: run it with a log, and note how it ended
step() {
    local name=$1 start=$SECONDS result=passed limit=240
    shift
    # One that hangs shall not take all of the time. These compile for long.
    if wanted amp || wanted compiled; then limit=0; fi
    printf '==> %s\n' "$name"
    # Traps wait for what runs in the foreground, not for a wait.
    timeout -k 5 "$limit" "$@" >"$out/$name.log" 2>&1 &
    wait $! || {
        result=FAILED
        tail -n 20 "$out/$name.log"
    }
    printf '%s\t%s\t%d s\n' "$name" $result $((SECONDS - start)) >>"$summary"
}

# stop PID...: end processes, and all that they have started
stop() {
    local pid
    for pid in "$@"; do
        # shellcheck disable=SC2046 # one word for each
        stop $(cat "/proc/$pid/task/"*/children 2>/dev/null)
        kill "$pid" 2>/dev/null || true
    done
}

# finish STATUS: print what was measured and how the steps ended
finish() {
    local file name status=$1
    trap - TERM INT
    # shellcheck disable=SC2046 # one word for each
    stop $(jobs -p)
    for file in "$out"/*.json; do
        # What is older comes from another run, or from another tool.
        if [ "$file" -nt "$started" ]; then
            "$python" tools/plot_benchmark.py "$file" || status=1
        fi
    done
    if [ -s "$out/digits.tsv" ] && [ "$out/digits.tsv" -nt "$started" ]; then
        cat "$out/digits.tsv"
    fi
    for name in environment "${only[@]}"; do
        grep -q "^$name$(printf '\t')" "$summary" ||
            printf '%s\tNOT FINISHED\n' "$name" >>"$summary"
    done
    column -t -s "$(printf '\t')" "$summary" || cat "$summary"
    if grep -qE 'FAILED|NOT FINISHED' "$summary"; then status=1; fi
    exit "$status"
}
trap 'finish 1' TERM INT

# interpreter PYTHON: which one that is, of an environment or not
interpreter() {
    "$1" -c 'import sys; print(sys.base_prefix, sys.version)' || echo unusable
}

environment() {
    local site pins
    # Of another python it would not find that one's torch.
    if [ ! -x .venv-gpu/bin/python ] ||
        [ "$(interpreter "$python")" != "$(interpreter "$base")" ]; then
        "$base" -m venv --clear .venv-gpu ||
            "$base" -m venv --clear --without-pip .venv-gpu
    fi
    site=$("$python" -c '
import sysconfig
print(sysconfig.get_paths()["purelib"])')
    mkdir -p "$site/transformers-0.dist-info"
    # Packages of that python, which may be one of an environment itself, and
    # this one.
    "$base" -c '
import sys
print(*(path for path in sys.path if path.endswith("-packages")), sep="\n")
' >"$site/packages_of_that_python.pth"
    printf '%s\n' "$root" >>"$site/packages_of_that_python.pth"
    # Hides a transformers 5 among them, beside which mmpretrain cannot be
    # imported.
    printf 'Metadata-Version: 2.1\nName: transformers\nVersion: 0\n' \
        >"$site/transformers-0.dist-info/METADATA"
    # mmcv asks for OpenCV by a name that the one without windows has not got.
    if "$base" -c 'import cv2' 2>/dev/null; then
        mkdir -p "$site/opencv_python-4.12.dist-info"
        printf 'Metadata-Version: 2.1\nName: %s\nVersion: 4.12\n' \
            opencv-python >"$site/opencv_python-4.12.dist-info/METADATA"
    fi
    if [ "$1" = with_ops ]; then
        TORCH_CUDA_ARCH_LIST=$("$base" -c '
import torch
print("%d.%d" % torch.cuda.get_device_capability())')
        MAX_JOBS=$(nproc)
        export TORCH_CUDA_ARCH_LIST MAX_JOBS FORCE_CUDA=1
        VIRTUAL_ENV=$root/.venv-gpu bash tools/setup_env.sh
        return
    fi
    pins=$("$python" -c '
import re, setup
from importlib.metadata import version
wanted = ("onedl-mmengine", "onedl-mmcv", "onedl-mmpretrain", "torchvision",
          "pytest", "pytest-xdist", "scikit-learn")
print("torch==" + version("torch"), "pycocotools",
      *(pin for pin in setup.EXTRAS["onedl"] + setup.EXTRAS["test"]
        if re.split("[<>=]", pin)[0] in wanted))')
    # Built where torch is not seen, mmcv leaves its operators out; that wheel
    # is not to be taken for one with them later.
    # shellcheck disable=SC2086 # one word for each
    "$python" -m pip install --no-cache-dir $pins
    "$python" -c 'import mmconv2former, mmpretrain.models, torchvision, xdist'
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
    # shellcheck disable=SC2046 # one word for each
    "$python" -m pytest -m gpu -rs -n "$(nproc)" --dist worksteal \
        $(grep -lw 'mark\.gpu' tests/test_*.py)
}

# Of stdin, each line names a file and has the options for what is written to
# it. In one process, which imports torch once, as long as nothing fails: after
# some errors of CUDA a process cannot go on.
benchmarks() {
    PYTHONPATH=$root/tools "$python" -c '
import gc, os, shlex, sys, traceback, torch, benchmark
folder, text, *failed = sys.argv[1:]
lines = text.replace("\\\n", "").splitlines()
while lines:
    file, *options = shlex.split(lines.pop(0))
    try:
        benchmark.main(["--device", "cuda", "--dtype", "bf16", "--json",
                        f"{folder}/{file}.json", *options])
    except (SystemExit, Exception):
        traceback.print_exc()
        failed.append(file)
        if lines:
            sys.stdout.flush()
            os.execv(sys.executable, [*sys.orig_argv[:3], folder,
                                      "\n".join(lines), *failed])
    gc.collect()
    torch.cuda.empty_cache()
sys.exit(f"failed: {failed}" if failed else 0)' "${1:-$out}" "$(cat)"
}

# compile_kernels NAME OPTION...: by a first run, which finds the kernels of
# those shapes; Triton keeps them on disk
compile_kernels() {
    benchmarks "$runs" <<END
kernels_$* --repeats 1 --no-memory
END
}

kernels_of_tiny() {
    together compile_kernels t --batch 128 --models conv2former-t -- \
        compile_kernels detection --task backbone --batch 2 \
        --size 800x1344 --mode train --models conv2former-t
}

kernels_of_sizes() {
    together compile_kernels n --batch 64 --models conv2former-n -- \
        compile_kernels s --batch 64 --models conv2former-s -- \
        compile_kernels b --batch 64 --models conv2former-b -- \
        compile_kernels l --batch 64 --models conv2former-l
}

kernels_of_growth() {
    compile_kernels growth --task backbone --batch 128 --same-pixels \
        --size 224 448 672 896 1120 1344 --mode train --models conv2former-t
}

tiny() {
    benchmarks <<'END'
tiny --batch 128 --mode train forward --repeats 9 --seconds 8 \
    --models conv2former-t@official conv2former-t conv2former-t@graphs \
    ConvNeXt:tiny SwinTransformer:tiny
detection --task backbone --batch 2 --size 800x1344 --mode train \
    --repeats 9 --seconds 8 --models conv2former-t@official conv2former-t \
    conv2former-t@graphs ConvNeXt:tiny
layout --batch 128 --mode train --channels-last --cudnn-benchmark \
    --repeats 5 --seconds 4 --models conv2former-t@graphs ConvNeXt:tiny \
    SwinTransformer:tiny
END
    # Last, and on its own: what was profiled once may be slower from then on.
    benchmarks "$runs" <<'END'
profile --batch 128 --mode train forward --repeats 1 --no-memory \
    --profile 40 --models conv2former-t ConvNeXt:tiny
END
}

sizes() {
    benchmarks <<'END'
optimizer --mode optimizer --models conv2former-t --no-memory
n --batch 64 --repeats 5 --seconds 3 --models conv2former-n@official \
    conv2former-n conv2former-n@graphs
s --batch 64 --repeats 5 --seconds 3 --models conv2former-s@official \
    conv2former-s conv2former-s@graphs
b --batch 64 --repeats 5 --seconds 3 --models conv2former-b@official \
    conv2former-b conv2former-b@graphs
l --batch 64 --repeats 5 --seconds 3 --models conv2former-l@official \
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
growth --batch 128 --same-pixels --size 224 448 672 896 1120 1344 \
    --mode train --task backbone --repeats 5 --seconds 3 \
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
    rm -rf "$runs"/digits_fused_*
    together train_digits 1 -- train_digits 0
    "$python" - "$runs" >"$out/digits.tsv" <<'PY'
import json, sys
from pathlib import Path

top1 = {}
for name, number in ('fused', 1), ('plain', 0):
    folder = Path(sys.argv[1], f'digits_fused_{number}')
    scalars, = folder.glob('*/vis_data/scalars.json')
    top1[name] = [record['accuracy/top1']
                  for record in map(json.loads, scalars.open())
                  if 'accuracy/top1' in record][-1]
    print(f'Digits in bf16, {name}: top-1 {top1[name]:.1f} %')
# Of 359 images; over seeds it is 96 to 98.
if min(top1.values()) < 94 or abs(top1['fused'] - top1['plain']) > 2:
    sys.exit(f'expected two of 94 and more that are alike, got {top1}')
PY
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
    local data=$runs/data
    [ -d "$data/imagenet" ] ||
        "$python" tools/make_mini_dataset.py imagenet "$data/imagenet"
    [ -d "$data/coco" ] ||
        "$python" tools/make_mini_dataset.py coco "$data/coco" --images 32
    [ -d "$data/ade" ] ||
        "$python" tools/make_mini_dataset.py ade20k "$data/ade" --images 32
    cd "$runs"  # where the configs look for data/
    together recipes fp16 -- recipes bf16
}

# run NAME [ARGUMENT]: as a step, in a shell of its own, which ends at the first
# command that fails
run() {
    step "$1" bash -euo pipefail -c "
        root=${root@Q} out=${out@Q} runs=${runs@Q} python=${python@Q}
        base=${base@Q}
        $(declare -f interpreter environment together operators benchmarks \
            compile_kernels kernels_of_tiny kernels_of_sizes \
            kernels_of_growth tiny sizes compiled growth train_digits digits \
            recipes amp)
        $*"
}

python=$root/.venv-gpu/bin/python
if wanted amp; then run environment with_ops; else run environment no_ops; fi
if grep -q FAILED "$summary"; then finish 1; fi
# More processes than cores; threads that wait for each other cost most.
(
    export OMP_NUM_THREADS=2
    for name in tiny sizes growth; do
        if wanted $name; then run kernels_of_$name & fi
    done
    wait
) &
wait $! || true
# First what matters most, for a machine may be lent for some minutes.
if wanted tiny; then run tiny; fi
(
    export OMP_NUM_THREADS=2
    for name in operators digits amp; do
        if wanted $name; then run $name & fi
    done
    wait
) &
wait $! || true
for name in sizes growth compiled; do
    if wanted $name; then run $name; fi
done
finish 0
