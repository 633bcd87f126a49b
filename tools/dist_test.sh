#!/usr/bin/env bash
# Evaluate with several processes, one for each GPU (nccl), or on the CPU where there is none (gloo).
#
#   tools/dist_test.sh CONFIG CHECKPOINT NPROC [options of tools/test.py]
#
# Several nodes: start it on each with NNODES, NODE_RANK, MASTER_ADDR and PORT set. On one node a
# free port is taken unless PORT is set. PYTHON names the interpreter.
set -euo pipefail
if [[ $# -lt 3 ]]; then
    sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
source "$(dirname "${BASH_SOURCE[0]}")/_dist.sh"
config=$1 checkpoint=$2 nproc=$3
shift 3
launch test.py "$nproc" "$config" "$checkpoint" "$@"
