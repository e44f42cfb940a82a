#!/usr/bin/env bash
# Make the environment in which this repository runs, or do nothing if it is
# there already.
#
#   bash tools/setup_env.sh [--family onedl|original]
#
# --family onedl     the maintained packages (onedl-mmengine, ...), in .venv;
#                    the default
# --family original  the original packages (mmengine, ...), in .venv-original
#
# A virtual or conda environment that is active (other than conda's base) is
# used in place of .venv, and a torch that it has is kept.
#
# For scripts: stdout is one line, the path of the environment's python, and
# everything else goes to stderr, so that this is all a caller needs:
#
#   python=$(bash tools/setup_env.sh)
#
# PYTHON names the interpreter that a new environment is made with, and
# MAX_JOBS the number of compilers that run at once.
set -euo pipefail

# tested together; the versions of everything else are in setup.py
torch_pair=(torch==2.11.0 torchvision==0.26.0)
# older ones cannot read onedl-mmcv's metadata, newer ones have no
# pkg_resources; psutil and packaging are what mmcv's own setup.py imports
build_tools=('pip>=24.1' 'setuptools>=77,<81' wheel ninja psutil packaging)

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

say() { printf '%s\n' "$*" >&2; }

die() {
    say "setup_env.sh: $1"
    shift
    [ $# -eq 0 ] || printf '  %s\n' "$@" >&2
    exit 1
}

# ---------------------------------------------------------------- arguments

family=onedl
while [ $# -gt 0 ]; do
    case $1 in
        --family)
            family=${2-}
            shift
            [ $# -eq 0 ] || shift
            ;;
        -h | --help)
            sed -n '2,/^set/{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}" >&2
            exit 0
            ;;
        *) die "unknown argument '$1'; known: --family onedl|original" ;;
    esac
done
case $family in
    onedl)
        venv=$root/.venv
        extra=onedl
        mmcv_name=onedl-mmcv
        other_family='mmengine|mmcv|mmcv-full|mmcv-lite|mmpretrain|mmdet'
        other_family+='|mmsegmentation'
        ;;
    original)
        venv=$root/.venv-original
        extra=openmmlab
        mmcv_name=mmcv
        other_family='onedl-.*|mmcv-full|mmcv-lite'
        ;;
    *) die "unknown family '$family'; known: onedl, original" ;;
esac
mmcv_pin=$(sed -n "s/^ *'\($mmcv_name==[^']*\)'.*/\1/p" "$root/setup.py")
[ -n "$mmcv_pin" ] || die "setup.py pins no version of $mmcv_name"

# ------------------------------------------------------- which environment

env=$venv
if [ -n "${VIRTUAL_ENV-}" ]; then
    env=$VIRTUAL_ENV
elif [ -n "${CONDA_PREFIX-}" ] && [ "${CONDA_DEFAULT_ENV-}" != base ]; then
    env=$CONDA_PREFIX
fi
python=$env/bin/python
ours=no
if [ "$env" = "$venv" ] || [ "$env" -ef "$venv" ]; then ours=yes; fi
stamp=$env/mmconv2former-setup.stamp
mmcv_record=$env/mmconv2former-mmcv-built-for
log=$env/mmconv2former-setup.log

# What the stamp holds: the inputs of this script and what they gave. Starts
# neither torch nor pip, so that a second run is quick.
fingerprint() {
    "$python" -I - "$root" "$family" "$mmcv_name" <<'PY'
import hashlib
import platform
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

root, family, mmcv_name = sys.argv[1:]
print(family, root, platform.python_version())
for name in 'setup.py', 'tools/setup_env.sh':
    print(name, hashlib.sha256(Path(root, name).read_bytes()).hexdigest())
for name in 'torch', 'torchvision', mmcv_name, 'mmconv2former':
    try:
        found = distribution(name)
        print(name, found.version, found.read_text('direct_url.json'))
    except PackageNotFoundError:
        print(name, 'missing')
PY
}

# version_of NAME: of the distribution in the environment; nothing if absent
version_of() {
    "$python" -I - "$1" <<'PY'
import sys
from importlib.metadata import PackageNotFoundError, version

try:
    print(version(sys.argv[1]))
except PackageNotFoundError:
    pass
PY
}

finish() {
    local activate="source $env/bin/activate"
    [ -f "$env/bin/activate" ] || activate="conda activate $env"
    say "environment ready ($family family): $activate"
    printf '%s\n' "$python"
    exit 0
}

if [ -x "$python" ] && [ -f "$stamp" ] &&
    [ "$(fingerprint)" = "$(cat "$stamp")" ]; then
    finish
fi

# ------------------------- what the machine lacks, before anything is begun

supported() {
    "$1" -I -c 'import sys
sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null
}

# the interpreter that a new environment is made with
find_python() {
    local name names=(python3 python3.12 python3.11 python3.10)
    [ -z "${PYTHON-}" ] || names=("$PYTHON")
    for name in "${names[@]}"; do
        if supported "$name"; then
            printf '%s\n' "$name"
            return
        fi
    done
    name=${names[0]}
    if command -v "$name" >/dev/null; then
        name="$name is $("$name" --version 2>&1)"
    else
        name="there is no $name"
    fi
    die "Python 3.10, 3.11 or 3.12 is needed, and $name" \
        'install one: apt-get install python3.11-venv python3.11-dev' \
        'or activate one: conda create -n mm python=3.11; conda activate mm' \
        'or name one: PYTHON=/path/to/python3.11 bash tools/setup_env.sh'
}

# check_compiler PYTHON: mmcv's operators are C++ that includes Python.h
check_compiler() {
    local compiler include version
    read -ra compiler <<<"${CXX:-c++}" # such as 'ccache g++'
    command -v "${compiler[0]}" >/dev/null ||
        die "no C++ compiler: '${compiler[0]}' is not in PATH, and mmcv's \
operators are compiled" \
            'install one, e.g. apt-get install build-essential'
    include=$("$1" -c 'import sysconfig
print(sysconfig.get_paths()["include"])')
    version=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    [ -f "$include/Python.h" ] ||
        die "no Python headers: $include/Python.h does not exist, and mmcv's \
operators are compiled with it" \
            "install them, e.g. apt-get install python$version-dev"
    printf '#include <Python.h>\n#include <vector>\n' |
        "${compiler[@]}" -std=c++17 -fsyntax-only -I "$include" -x c++ - >&2 ||
        die "${compiler[*]} cannot compile a C++17 file that includes Python.h \
(its message stands above)" \
            'install a newer one, e.g. apt-get install build-essential'
    if nvidia-smi -L >/dev/null 2>&1 && [ -n "${CUDA_VISIBLE_DEVICES-all}" ] &&
        ! [ -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ] &&
        ! command -v nvcc >/dev/null; then
        die "no nvcc: this machine has an NVIDIA GPU, and mmcv's operators \
are compiled for it" \
            'install the CUDA toolkit of the version that torch is built' \
            'with (torch 2.11.0: CUDA 13.0), or take operators that run on' \
            'the CPU only: CUDA_VISIBLE_DEVICES= bash tools/setup_env.sh'
    fi
}

# check_libraries PYTHON: what opencv-python leaves to the system
check_libraries() {
    local name
    [ "$(uname -s)" = Linux ] || return 0
    "$1" -c 'import cv2' 2>/dev/null && return 0
    for name in libGL.so.1 libgthread-2.0.so.0; do
        "$1" -c "import ctypes; ctypes.CDLL('$name')" 2>/dev/null ||
            die "no $name, which opencv-python needs" \
                'install it, e.g. apt-get install libgl1 libglib2.0-0'
    done
}

if [ -e "$python" ] || [ "$ours" = no ]; then
    "$python" -m pip --version >/dev/null 2>&1 ||
        die "the environment $env has no working python with pip" \
            'delete it, or deactivate it, and run this again'
    supported "$python" ||
        die "Python 3.10, 3.11 or 3.12 is needed, and $python is \
$("$python" --version 2>&1)" \
            'activate an environment with one of these, or none'
    [ -w "$env" ] || die "the environment $env is not writable" \
        'deactivate it and run this again'
    mixed=$("$python" -m pip list --format=freeze 2>/dev/null |
        grep -xE "($other_family)==.*" | tr '\n' ' ' || true)
    [ -z "$mixed" ] ||
        die "the environment $env holds ${mixed% }, which cannot be mixed \
with the $family family" \
            "take the other family with --family, or deactivate it"
    base=$python
else
    base=$(find_python)
    "$base" -c 'import ensurepip, venv' 2>/dev/null ||
        die "$base cannot make virtual environments" 'install what it lacks,'\
' e.g. apt-get install python3-venv'
    free=$(($(df -Pk "$root" | awk 'NR == 2 {print $4}') / 1048576))
    [ "$free" -ge 10 ] ||
        die "$root has $free GB of free space, and the environment needs 10" \
            'free some, or clone the repository to a larger disk'
fi
check_libraries "$base"
mmcv_installed=no
if [ -e "$python" ] &&
    [ "$mmcv_name==$(version_of "$mmcv_name")" = "$mmcv_pin" ]; then
    mmcv_installed=yes
else
    check_compiler "$base"
fi

# ------------------------------------------- running a step, showing it move

# Reads what a step prints and keeps one line of it current: in place on a
# terminal, else as a new line every five seconds. Knows pip's raw progress
# and ninja's counter.
follow() {
    local line text='' start=$SECONDS shown=$SECONDS part status
    local counter='^ *(\[[0-9]+/[0-9]+\]) .*/([A-Za-z0-9_]+)\.o'
    while true; do
        status=0
        IFS= read -r -t 1 line || status=$?
        if [ "$status" -eq 0 ]; then
            if [[ $line =~ ^Progress\ ([0-9]+)\ of\ ([0-9]+) ]]; then
                printf -v text '%s: %d of %d MB' "${part-}" \
                    $((BASH_REMATCH[1] / 1000000)) \
                    $((BASH_REMATCH[2] / 1000000))
            elif [[ $line =~ ^\ *Downloading\ ([^\ -]+) ]]; then
                part="downloading ${BASH_REMATCH[1]}"
                text=$part
            elif [[ $line =~ $counter ]]; then
                text="compiling ${BASH_REMATCH[1]} ${BASH_REMATCH[2]}"
            elif [[ $line =~ ^\ *((Collecting|Building)\ [^\(]*) ]]; then
                text=${BASH_REMATCH[1]}
            elif [[ $line == Installing\ collected* ]]; then
                text='installing what was downloaded'
            fi
        elif [ "$status" -le 128 ]; then # the end, not a timeout
            break
        fi
        if [ -t 2 ] && [ $((SECONDS - shown)) -ge 1 ]; then
            printf '\r\033[K    %4d s  %s' $((SECONDS - start)) \
                "${text:0:64}" >&2
            shown=$SECONDS
        elif [ $((SECONDS - shown)) -ge 5 ]; then
            printf '    %4d s  %s\n' $((SECONDS - start)) "${text:0:64}" >&2
            shown=$SECONDS
        fi
    done
    [ ! -t 2 ] || printf '\r\033[K' >&2
}

# what the log says about the reason of a failure, mostly at its end
hint() {
    case $(grep -m 1 'C++20 or later' "$log" || true; tail -n 60 "$log") in
        *'C++20 or later'*)
            echo "$mmcv_pin is older than torch $torch, which wants C++20:
  install an older torch, such as the tested ${torch_pair[*]}" ;;
        *'No space left'*)
            echo 'the disk is full: free some 10 GB (TMPDIR names the folder
  that pip builds in)' ;;
        *'Killed signal terminated program'*)
            echo 'the compiler ran out of memory: run this again with
  MAX_JOBS=1' ;;
        *'detected CUDA version'*)
            echo 'nvcc is of another CUDA version than torch: install the
  CUDA toolkit that the message asks for, or activate an environment with a
  torch built for yours' ;;
        *'libGL.so.1'* | *'libgthread-2.0.so'*)
            echo 'OpenCV needs a system library: apt-get install libgl1
  libglib2.0-0' ;;
        *'Max retries exceeded'* | *'Connection'*rror* | *'name resolution'* | \
            *'No matching distribution'*)
            echo 'the package index was not reached or lacks a version:
  check the network and pip config list, then run this again' ;;
        *) echo 'mend what the message names and run this again; what is
  installed already is kept' ;;
    esac
}

# attempt TITLE COMMAND...: run it with its output in the log; its status
attempt() {
    local start=$SECONDS
    say "==> $1"
    shift
    printf '\n+ %s\n' "$*" >>"$log"
    "$@" 2>&1 | tee -a "$log" | follow || return
    say "    done in $((SECONDS - start)) s"
}

# step TITLE COMMAND...: the same, and stop where it fails
step() {
    attempt "$@" || {
        tail -n 15 "$log" | cut -c -300 | sed 's/^/    | /' >&2
        die "failed: $1" "$(hint)" "full log: $log"
    }
}

# ------------------------------------------------------------- the work itself

if [ ! -e "$python" ]; then
    say "==> making $env with $("$base" --version)"
    "$base" -m venv "$env" >&2
fi
: >"$log"
export PATH="$env/bin:$PATH" # torch looks for ninja there
pip=("$python" -m pip --disable-pip-version-check)
install=("${pip[@]}" install --progress-bar raw)

step 'build tools' "${pip[@]}" install "${build_tools[@]}"

torch=$(version_of torch)
if [ "$ours" = yes ] || [ -z "$torch" ]; then
    step "${torch_pair[*]} (4.7 GB with what they need; about 2 minutes)" \
        "${install[@]}" "${torch_pair[@]}"
else
    say "==> keeping torch $torch of the active environment \
(tested: ${torch_pair[*]})"
    step 'the torchvision that fits it' \
        "${install[@]}" "torch==$torch" torchvision
fi
torch=$(version_of torch)

build_mmcv() {
    local memory jobs title="$mmcv_pin for torch $torch"
    title+=' (9 to 16 minutes on 2 cores, unless pip has it compiled)'
    # a compiler takes up to 2.5 GB
    memory=$(awk '/MemAvailable/ {print int($2 / 2500000)}' /proc/meminfo \
        2>/dev/null || echo 2)
    jobs=$(getconf _NPROCESSORS_ONLN)
    [ "$memory" -ge "$jobs" ] || jobs=$((memory > 0 ? memory : 1))
    step "$title" env MMCV_WITH_OPS=1 MAX_JOBS="${MAX_JOBS:-$jobs}" \
        "${install[@]}" -v --no-build-isolation --no-deps "$@" "$mmcv_pin"
    printf '%s\n' "$torch" >"$mmcv_record"
}
# pip keeps the wheel that it built under mmcv's version alone, whatever torch
# it was for, so that wheel has to be thrown away first.
rebuild_mmcv() {
    # fails where there is no such wheel or no cache: nothing to throw away
    "${pip[@]}" cache remove "${mmcv_name//-/_}" >>"$log" 2>&1 || true
    build_mmcv --force-reinstall
}
if [ "$mmcv_installed" = no ]; then
    build_mmcv
elif [ -f "$mmcv_record" ] && [ "$(cat "$mmcv_record")" != "$torch" ]; then
    say "mmcv was built for torch $(cat "$mmcv_record")"
    rebuild_mmcv
fi

cd "$root"
step "the $family family, the test tools and this checkout" \
    "${install[@]}" -e ".[$extra,test]"

step 'does OpenCV load' "$python" -c 'import cv2'
mmcv_check="
import torch
from mmcv.ops import nms
device = 'cuda' if torch.cuda.is_available() else 'cpu'
boxes = torch.tensor([[0., 0., 9., 9.], [0., 0., 9., 8.], [20., 20., 30., 30.]])
scores = torch.tensor([.9, .8, .7])
kept = nms(boxes.to(device), scores.to(device), 0.5)[1].tolist()
if kept != [0, 2]:
    raise SystemExit(f'nms kept {kept} where [0, 2] is right')
"
if ! attempt "do mmcv's operators work" "$python" -c "$mmcv_check"; then
    say "they do not: the wheel was built for another torch"
    rebuild_mmcv
    step "do mmcv's operators work now" "$python" -c "$mmcv_check"
fi
printf '%s\n' "$torch" >"$mmcv_record"
step 'do the libraries import' "$python" -c '
import mmdet.apis, mmpretrain.apis, mmseg.apis, torchvision'

fingerprint >"$stamp"
finish
