#!/bin/sh
# The C test of the CUDA device under compute-sanitizer: memcheck, then racecheck, at most four minutes each.
#
# Usage: sh tools/sanitize_cuda.sh BUILD [SANITIZER]
#   BUILD      a build folder: BUILD/tests/test_cuda is run
#   SANITIZER  compute-sanitizer, if it is not found in PATH or with the toolkit
# Exit status 0: both clean; 77: no compute-sanitizer or no card; else the first failure's, 124 being a timeout.
set -eu

build=${1:?"usage: sh tools/sanitize_cuda.sh BUILD [SANITIZER]"}
test=$build/tests/test_cuda
sanitizer=${2:-}
seconds=240

if [ ! -x "$test" ]; then
    echo "sanitize_cuda: $test is missing, build it first" >&2
    exit 2
fi
for candidate in "$sanitizer" "$(command -v compute-sanitizer || true)" \
    "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer" \
    "${CUDA_HOME:-/usr/local/cuda}/compute-sanitizer/compute-sanitizer"; do
    if [ -n "$candidate" ] && [ -x "$candidate" ]; then
        sanitizer=$candidate
        break
    fi
done
if [ -z "$sanitizer" ]; then
    echo "sanitize_cuda: compute-sanitizer is not installed" >&2
    exit 77
fi

# Without a card there is nothing to check, and no need to wait for the tool to say so.
status=0
"$test" --exact >/dev/null || status=$?
if [ "$status" -ne 0 ]; then
    echo "sanitize_cuda: the test itself ends with status $status" >&2
    exit "$status"
fi

for tool in memcheck racecheck; do
    echo "== $tool"
    status=0
    timeout "$seconds" "$sanitizer" --tool "$tool" --error-exitcode 9 --print-limit 20 "$test" --exact || status=$?
    if [ "$status" -ne 0 ]; then
        echo "sanitize_cuda: $tool ends with status $status" >&2
        exit "$status"
    fi
done
echo "sanitize_cuda: memcheck and racecheck are clean"
