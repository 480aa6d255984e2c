#!/usr/bin/env bash
# Golden vectors on 64-bit ARM, emulated: bash tests/golden/aarch64.sh [DIR]
# For Debian or Ubuntu on x86-64, as root (debootstrap), with a package index. Takes some minutes,
# most of it the first time; DIR (default: build/aarch64) keeps the ARM system and wheels, 400 MB.
#   apt-get install qemu-user-static debootstrap
#   PYTHON=...   an interpreter with pip (default: python3); NUMPY=, NUMBA=   versions
set -euo pipefail
cd "$(dirname "$0")/../.."
mkdir -p "${1:-build/aarch64}"
dir=$(realpath "${1:-build/aarch64}")
suite=bookworm abi=3.11 # Debian 12 has Python 3.11

if [ ! -x "$dir/root/usr/bin/python$abi" ]; then
    # The second stage of debootstrap would run ARM programs as root; unpacking is enough.
    debootstrap --arch=arm64 --foreign --variant=minbase --include=python3 \
        "$suite" "$dir/root" http://deb.debian.org/debian
    for package in "$dir"/root/var/cache/apt/archives/*.deb; do
        dpkg -x "$package" "$dir/root"
    done
fi
if [ ! -d "$dir/site" ]; then
    "${PYTHON:-python3}" -m pip install --quiet --only-binary=:all: --target "$dir/site" \
        --implementation cp --python-version "$abi" \
        --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 \
        --platform manylinux2014_aarch64 "numpy==${NUMPY:-2.4.6}" "numba==${NUMBA:-0.68.1}"
fi

for jit in on off; do
    printf '\n== FEDQ_JIT=%s\n' "$jit"
    qemu-aarch64-static -L "$dir/root" -E PYTHONPATH="$dir/site:$PWD" -E FEDQ_JIT="$jit" \
        -E OMP_NUM_THREADS=1 -E NUMBA_CACHE_DIR="$dir/cache" \
        "$dir/root/usr/bin/python$abi" -B -m tests.golden --check
done
