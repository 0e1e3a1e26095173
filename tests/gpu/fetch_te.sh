#!/usr/bin/env bash
# Put the Python of Transformer Engine, which tests run with emulated kernels, where no other program
# imports it: the wheel alone, without its compiled libraries, breaks whatever imports it.
# Usage: tests/gpu/fetch_te.sh VENV   (a folder VENV/te/VERSION for each version; skips what is there)
set -euo pipefail
venv=${1:?usage: tests/gpu/fetch_te.sh VENV}

for version in 2.14.0 2.20.2; do
  folder=$venv/te/$version
  if [ -d "$folder" ]; then continue; fi
  rm -rf "$folder.partial"
  # einops is what its attention imports.
  "$venv/bin/python" -m pip install --quiet --no-deps --no-compile --target "$folder.partial" \
    "transformer-engine==$version" einops==0.8.2
  mv "$folder.partial" "$folder"
done
