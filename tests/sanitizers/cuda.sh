#!/usr/bin/env bash
# The four tools of compute-sanitizer over the kernels in tests/test_cuda_small.py; `make cuda-sanitize` calls it.
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
tests=("$python" -m pytest -q -m cuda -p no:cacheprovider tests/test_cuda_small.py)
for tool; do
  printf '== %s (%ss)\n' "$tool" "$SECONDS"
  options=(--tool "$tool" --launch-timeout 120)
  if [ "$tool" != initcheck ]; then
    "$sanitizer" "${options[@]}" --error-exitcode 99 --kernel-name kns=apt_ "${tests[@]}" # ours alone
    continue
  fi
  # It has to see the writes of all kernels to know what was written, and some of cuBLAS read what nobody wrote (a plain
  # torch.mm of float16 with odd widths does): the reads of ours count.
  log=$(mktemp)
  "$sanitizer" "${options[@]}" --show-backtrace no --print-limit 1000000 "${tests[@]}" >"$log" || { tail -n 40 "$log"; exit 1; }
  grep -v '^=========' "$log" || true
  sed -n 's/^========= *at \(.*\)+0x.*/\1/p' "$log" | sort | uniq -c
  if grep -q '^========= *at .*apt_' "$log"; then
    echo "initcheck: a kernel of apt_ext reads what nobody wrote, see $log" >&2
    exit 1
  fi
  rm "$log"
done
printf '== no errors (%ss)\n' "$SECONDS"
