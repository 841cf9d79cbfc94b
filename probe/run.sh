#!/bin/bash
# run.sh NEW OLD: NEW is the checkout with w4_int8_1, OLD one at 57b5f19 (one row by w4_int8_2). On a machine with an H200; at most
# 4 minutes. PYTHON: the interpreter that has torch with CUDA.
set -e
cd "$(dirname "$0")"
[ $# = 2 ] || { echo "usage: run.sh NEW OLD"; exit 2; }
exec timeout -k 5 240 "${PYTHON:-python3}" row.py "$(realpath "$1")" "$(realpath "$2")"
