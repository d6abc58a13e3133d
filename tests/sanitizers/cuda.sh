#!/usr/bin/env bash
# The four tools of compute-sanitizer over the kernels in tests/ops/test_cuda_small.py; `make cuda-sanitize` calls it.
# PYTHON names an interpreter with torch and a CUDA build of apt_ext, arguments choose among the tools. An error of any tool ends it.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
[ $# -gt 0 ] || set -- memcheck racecheck initcheck synccheck

sanitizer=$(PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin" command -v compute-sanitizer) || {
  echo "compute-sanitizer was not found: it is part of the CUDA toolkit; put it on the PATH or set CUDA_HOME" >&2
  exit 1
}
"$python" -c '
import sys, torch, apt_ext
if not torch.cuda.is_available(): sys.exit("no CUDA device was found, so nothing would be checked")
if not apt_ext.ops.build_info()["cuda"]: sys.exit("apt_ext was built without CUDA, so nothing would be checked")'

export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # in a pool, what lies beyond a tensor is somebody's memory as well
for tool; do
  printf '== %s (%ss)\n' "$tool" "$SECONDS"
  # Ours alone, but initcheck has to see all writes. It misses those of cuBLAS on Hopper (a plain torch.mm(x, w) * 2 is
  # reported), so what reads the result of a product is left to the tests that fill fresh memory with NaN. racecheck
  # ends in an internal error of its own at the first launch of apt_low_rank (CUDA 13.0).
  options=(--kernel-name kns=apt_) chosen=()
  [ "$tool" != initcheck ] || options=() chosen=(-k "not test_linear and not test_kept")
  [ "$tool" != racecheck ] || chosen=(-k "not padded and not spans and not shared")
  "$sanitizer" --tool "$tool" --error-exitcode 99 --launch-timeout 120 "${options[@]}" \
    "$python" -m pytest -q -m cuda -p no:cacheprovider "${chosen[@]}" tests/ops/test_cuda_small.py
done
printf '== no errors (%ss)\n' "$SECONDS"
