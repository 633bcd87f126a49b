#!/usr/bin/env bash
# Train with several processes, one for each GPU (nccl), or on the CPU where there is none (gloo).
#
#   tools/dist_train.sh CONFIG NPROC [options of tools/train.py]
#
# Several nodes: start it on each with NNODES, NODE_RANK, MASTER_ADDR and PORT set. On one node a
# free port is taken unless PORT is set. PYTHON names the interpreter.
set -euo pipefail
if [[ $# -lt 2 ]]; then
    sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
source "$(dirname "${BASH_SOURCE[0]}")/_dist.sh"
config=$1 nproc=$2
shift 2
launch train.py "$nproc" "$config" "$@"
