#!/usr/bin/env bash
# Run pieces on a machine with PyTorch and no network, a process on each of its GPUs, within ten minutes; README.md has
# what it must be given.
#
#   OUT=kept COMMIT=1a2b3c4 bash experiments/comparison/on_gpu.sh seed-0
#
# $OUT/results.tar has all records and pictures so far, anew every half minute: a call that is cut off leaves it too.
# Exit code 3: the time was over, the same goes on. Where less than ten minutes are left, SECONDS_LEFT says how many.
set -uo pipefail
: "${OUT:?give a folder for what comes back, OUT=kept}"
cd "$(dirname "$0")/../.."
export PYTHONPATH=src:.site PYTHONUNBUFFERED=1

if [ ! -d .site ]; then
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target .site .whl/*.whl || exit
fi
data=/tmp/fashion-mnist
if [ ! -d $data ] && [ -d .data ]; then
    mkdir $data
    python3 -c "import lzma, pathlib, sys
for path in pathlib.Path('.data').glob('*ubyte.xz'):
    pathlib.Path(sys.argv[1], path.stem).write_bytes(lzma.decompress(path.read_bytes()))" $data || exit
fi
if [ -d .features ] && [ ! -d /tmp/features ]; then
    python3 experiments/comparison/features.py .features/*.npz --out /tmp/features || exit
fi
options=(--seconds $((${SECONDS_LEFT:-600} - 45 - SECONDS)) --commit "${COMMIT:-unknown}")
[ -d $data ] && options+=(--data-folder $data)
[ -d .emoji ] && options+=(--emoji .emoji)
[ -d .cifar ] && options+=(--cifar .cifar)
[ -d /tmp/features ] && options+=(--features /tmp/features)
gpus=$(nvidia-smi -L | wc -l)
((gpus > 0)) || exit
export OMP_NUM_THREADS=$(($(nproc) / gpus))
mkdir -p experiments/comparison/results
keep() { tar -cf "$OUT/.results.tar" -C experiments/comparison results && mv "$OUT/.results.tar" "$OUT/results.tar"; }
while sleep 30; do keep; done > /dev/null 2>&1 &
keeper=$!
trap 'kill $keeper' EXIT
running=()
for ((gpu = 0; gpu < gpus; gpu++)); do
    CUDA_VISIBLE_DEVICES=$gpu python3 experiments/comparison/run.py "$@" "${options[@]}" > >(sed -u "s/^/$gpu: /") 2>&1 &
    running+=($!)
done
code=0
for process in "${running[@]}"; do
    wait "$process" || code=$?
done
keep
exit $code
