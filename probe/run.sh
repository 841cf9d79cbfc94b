#!/bin/bash
# On a machine with an H200, from a checkout of the branch:  bash PROBE/run.sh [OLD_TREE] [flags of step.py]
# OLD_TREE: a checkout of the version before (57b5f19), to time in turns with this one. At most about five minutes.
here=$(cd "$(dirname "$0")" && pwd)
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
old=()
if [ -d "$1" ]; then old=(--old "$(cd "$1" && pwd)"); shift; fi
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm --format=csv,noheader 2>/dev/null
exec "${PYTHON:-python}" "$here/step.py" "${old[@]}" "$@"
