#!/usr/bin/env bash
# tests/run_suites.sh JOBS PYTEST ARGUMENTS..: all tests, in two runs of pytest side by side. The Triton kernels run in their
# interpreter, which must be chosen before the start; they have one process, the others JOBS. With JOBS=0 one run follows the other.
set -uo pipefail
jobs=$1 pytest=$2
shift 2
kernels=tests/kernels/on_triton
# Files stay whole, since their tests share what a fixture made once; the long ones start first (LONG_FIRST in conftest.py).
others=($pytest -n "$jobs" --dist loadfile --no-loadscope-reorder --ignore="$kernels" "$@")
if [ "$jobs" = 0 ]; then
    "${others[@]}"
    first=$?
    TRITON_INTERPRET=1 $pytest "$kernels" "$@"
    second=$?
else
    output=$(mktemp)
    set -m # a process group of its own, which can be ended as one
    TRITON_INTERPRET=1 $pytest -n 1 "$kernels" "$@" >"$output" 2>&1 &
    beside=$!
    set +m
    trap 'kill -- -$beside 2>/dev/null; rm -f "$output"' EXIT
    "${others[@]}"
    first=$?
    [ $first -eq 2 ] && exit 2 # interrupted
    wait $beside
    second=$?
    cat "$output"
fi
none=5 # the arguments left no test
if [ $first -ne 0 ] && [ $first -ne $none ]; then exit $first; fi
if [ $second -ne $none ]; then exit $second; fi
exit $first
