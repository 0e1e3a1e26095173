#!/usr/bin/env bash
# Make a virtual environment with the first Python >= 3.12 found on PATH, then in pyenv.
# Usage: tools/make_venv.sh DIRECTORY
set -euo pipefail
venv=${1:?usage: tools/make_venv.sh DIRECTORY}

good() { "$1" -c 'import sys, venv; sys.exit(not (3, 12) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; }

if [ -x "$venv/bin/python" ] && good "$venv/bin/python"; then exit 0; fi
candidates=(python3.12 python3.13 python3 python)
if command -v pyenv >/dev/null; then
  for version in $(pyenv versions --bare | grep -E '^3\.1[23]' || true); do
    candidates+=("$(pyenv prefix "$version")/bin/python")
  done
fi
for python in "${candidates[@]}"; do
  path=$(command -v "$python" || true)
  if [ -n "$path" ] && good "$path"; then
    echo "using $("$path" --version) for $venv"
    "$path" -m venv "$venv"
    exit 0
  fi
done
echo "error: no Python 3.12 or 3.13 on PATH or in pyenv: install one (for example python3.12-venv)" >&2
exit 1
