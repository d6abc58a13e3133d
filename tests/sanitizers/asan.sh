#!/usr/bin/env bash
# Builds the extension with AddressSanitizer and UndefinedBehaviorSanitizer into build/asan and runs the CPU tests of the ops under them.
# `make asan` calls it; PYTHON names the interpreter, arguments replace the tests. g++ only: the runtimes are preloaded, Python has none.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
cxx=${CXX:-g++}
# Freed memory is kept back by AddressSanitizer, so a process that leaves nothing behind grows.
[ $# -gt 0 ] || set -- -k "not leave_nothing_behind" \
  tests/ops/test_{linear,merge,bindings,bad_arguments,autograd,memory,threads,cuda_small}.py tests/adapter/test_adapter*.py

checks=address,undefined,float-cast-overflow
export CXX="$cxx" APT_WITH_CUDA=0
CXXFLAGS="-O1 -g -fno-wrapv -fno-omit-frame-pointer -fsanitize=$checks -fno-sanitize-recover=undefined,float-cast-overflow" \
  LDFLAGS="-fsanitize=$checks" \
  "$python" setup.py -q build_py --build-lib build/asan build_ext --build-lib build/asan --build-temp build/asan/objects

# libstdc++ as well: else the first C++ exception ends the process. What torch leaves at its end is not ours: no leak check.
preload=
for library in libasan.so libubsan.so libstdc++.so; do preload+="$("$cxx" -print-file-name=$library) "; done
run() {
  # -P: the current directory holds the ordinary build
  LD_PRELOAD="$preload" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH="$PWD/build/asan" OMP_NUM_THREADS=2 "$python" -P "$@"
}
run -c 'import apt_ext._C as C; assert "build/asan" in C.__file__ and b"__asan_report_load" in open(C.__file__, "rb").read(), C.__file__'
# Captured by file descriptor, a report would be lost with the process.
run -m pytest --capture=sys -q -m "not slow" "$@"
