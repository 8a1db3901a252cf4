#!/usr/bin/env bash
# Measures within 9 minutes what only a GPU can tell: python -m benchmarks gpu.
#
# It is for a bare machine with Python 3.12 or newer, jax with its plugin for CUDA, flax,
# optax and PyTorch. Other packages that are missing are named and installed; nothing
# that is there is replaced. This checkout itself needs no installation. Arguments are
# those of the command, such as --parts resnet50,pspnet or --rehearse.
#
#   OUT            folder of the results and of log.txt; a new one under runs/ if unset
#   WHEELS         folder to install missing packages from, where there is no network:
#                  pip wheel -w WHEELS NAMES, with the same version of Python
#   TFDS_DATA_DIR  folder of prepared datasets; it trains on cifar10 if that is there
#   PYTHON         the interpreter; python3 if unset
set -euo pipefail
cd "$(dirname "$0")/.."
limit=540
python=${PYTHON:-python3}
out=${OUT:-runs/gpu-$(date +%Y%m%d-%H%M%S)}
mkdir -p "$out"

install_missing() {
  local missing kept
  missing=$("$python" - <<'EOF'
import importlib.metadata, re, tomllib

with open("pyproject.toml", "rb") as file:
    needed = tomllib.load(file)["dependency-groups"]["train"]
there = {
    re.sub("[-_.]+", "-", found.name).lower()
    for found in importlib.metadata.distributions()
}
names = [re.match("[A-Za-z0-9_.-]+", each)[0] for each in needed]
print(*(n for n in names if re.sub("[-_.]+", "-", n).lower() not in there))
EOF
)
  [ -z "$missing" ] && return
  echo "missing packages: $missing"
  kept=$(mktemp)
  "$python" -m pip list --format=freeze 2>/dev/null |
    grep -iE '^(jax|jaxlib|flax|optax|numpy|torch)==' >"$kept" || true
  # shellcheck disable=SC2086
  "$python" -m pip install --quiet -c "$kept" \
    ${WHEELS:+--no-index --find-links "$WHEELS"} $missing
}

measure() {
  install_missing
  # JAX would take most of the memory, and PyTorch needs some too.
  export XLA_PYTHON_CLIENT_PREALLOCATE=false PYTHONUNBUFFERED=1
  # Rows are on disk as soon as they are known, so it may be killed at any moment.
  timeout --kill-after=5 $((limit - SECONDS)) "$python" -m benchmarks gpu \
    --run-dir "$out/gpu" --budget $((limit - SECONDS - 20)) "$@"
}

measure "$@" 2>&1 | tee "$out/log.txt"
