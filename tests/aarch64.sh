#!/usr/bin/env bash
# fedq on the system of a 64-bit Raspberry Pi, emulated: bash tests/aarch64.sh [DIR]
#
# Debian 12 for ARM lies in DIR (default: build/aarch64; 3 GB) and stays there. fedq comes to it as
# to any device, by `fedq fleet enroll` from a wheelhouse. Then
#   1. it writes and reads the golden vectors, compiled and not;
#   2. it trains in a federation with a device of this machine, and holds the same model in the end;
#   3. it classifies, with the int8 model that is deployed to it, as this machine does.
# For Debian or Ubuntu on x86-64, as root, with binfmt_misc, a package index, and `pip install -e
# ".[dev]"` in PYTHON (default: python3). Emulated, it takes a quarter of an hour.
#   apt-get install qemu-user-static debootstrap
#   TORCH_INDEX=   builds of PyTorch for CPUs, if not PyTorch's own
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p "${1:-build/aarch64}"
dir=$(realpath "${1:-build/aarch64}")
root=$dir/root
python=$(command -v "${PYTHON:-python3}")
fedq() { "$python" -m fedq.cli "$@"; }
say() { printf '\n== %s\n' "$*"; }

if [ ! -e /proc/sys/fs/binfmt_misc/qemu-aarch64 ]; then
    echo 'this kernel does not run programs for ARM: mount binfmt_misc and restart' \
        'systemd-binfmt, or register qemu-aarch64-static there' >&2
    exit 2
fi
if [ ! -d "$root/home/me" ]; then
    say "Debian for ARM"
    debootstrap --arch=arm64 --variant=minbase --include=python3,python3-venv,ca-certificates \
        bookworm "$root" http://deb.debian.org/debian >"$dir/debootstrap.log"
    chroot "$root" useradd --create-home me
fi
mountpoint -q "$root/proc" || mount -t proc proc "$root/proc"
mountpoint -q "$root/dev" || mount --bind /dev "$root/dev"
mkdir -p "$root/src"
mountpoint -q "$root/src" || mount --bind "$PWD" "$root/src"
work=$(mktemp -d)
cleanup() {
    fedq fleet down >/dev/null 2>&1 || true
    # shellcheck disable=SC2046
    kill $(jobs -p) 2>/dev/null || true
    for process in /proc/[0-9]*; do
        [ "$(readlink "$process/root")" != "$root" ] || kill -9 "${process#/proc/}" || true
    done
    wait
    umount --lazy "$root/src" "$root/dev" "$root/proc"
    rm -rf "$work"
}
trap cleanup EXIT

# Not a network but a door: what ssh would run on the Pi.
mkdir "$work/bin"
cat >"$work/bin/ssh" <<EOF
#!/bin/sh
while [ "\$1" != -- ]; do shift; done
exec chroot "$root" su me -c "cd; export OMP_NUM_THREADS=1; \$3"
EOF
chmod +x "$work/bin/ssh"
export PATH="$work/bin:$PATH"
pi() { ssh -- pi-1 "$*"; }

say 'enrolment from a wheelhouse'
fedq fleet wheelhouse "$dir/wheels" --with ai-edge-litert \
    ${TORCH_INDEX:+--torch-index "$TORCH_INDEX"} | tail -1
export FEDQ_FLEET=$work/fleet
code=$(fedq fleet init --name emulated --server 127.0.0.1 --listen 127.0.0.1 --port 19443 \
    --json here | "$python" -c 'import json, sys; print(json.load(sys.stdin)["codes"]["here"])')
fedq fleet up
fedq fleet enroll pi-1 --wheels "$dir/wheels" --no-service --node data=mnist5k --node partition-id=0
fedq fleet join "$work/fleet/bundles/here.tar" --code "$code" --into "$work/here" \
    --node data=mnist5k --node partition-id=1 >/dev/null
pi uname -m

for jit in on off; do
    say "golden vectors, FEDQ_JIT=$jit"
    pi "cd /src; FEDQ_JIT=$jit ~/.fedq/venv/bin/python -B -m tests.golden --check"
done

say 'a federation of two architectures'
ssh -- pi-1 '.fedq/venv/bin/fedq fleet node' &
"$python" -m fedq.cli fleet node "$work/here" &
fedq fleet run data=mnist5k rounds=3 clients_per_round=2 local_epochs=1 batch_size=32 \
    baseline=false run_dir="$work/run"
model=$(cd "$work/here/state" && ls */model/000003.f32)
theirs=$root/home/me/.fedq/device/state/$model
timeout 300 sh -c "until [ -e '$theirs' ]; do sleep 1; done" # the last model comes after the run
cmp "$work/here/state/$model" "$theirs"
echo 'both hold the same model, bit by bit'

say 'the model comes home'
fedq fleet deploy "$work/run"
"$python" - "$work/here/test.npz" <<'EOF'
import sys

import numpy as np

from fedq.data import load
from fedq.registry import build

data = load(build("data", "mnist5k"))
np.savez(sys.argv[1], x=data.x_test, y=data.y_test)
EOF
install -m 644 "$work/here/test.npz" "$root/tmp/test.npz"
run="-m fedq.export.runner --json --data"
"$python" $run "$work/here/test.npz" "$work/here/artefacts/current/model.tflite" >"$work/here.json"
pi .fedq/venv/bin/python $run /tmp/test.npz .fedq/device/artefacts/current/model.tflite >"$work/pi.json"
"$python" - "$work/here.json" "$work/pi.json" <<'EOF'
import json
import sys

here, pi = (json.load(open(path)) for path in sys.argv[1:])
equal = sum(a == b for a, b in zip(here["classes"], pi["classes"], strict=True))
print(f"accuracy {here['accuracy']:.1%} here, {pi['accuracy']:.1%} there")
print(f"the same class for {equal} of {len(here['classes'])} images")
sys.exit(equal < 0.998 * len(here["classes"]))
EOF
