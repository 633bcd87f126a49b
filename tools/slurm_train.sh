#!/usr/bin/env bash
# Train under Slurm.
#
#   tools/slurm_train.sh PARTITION JOB_NAME CONFIG [options of tools/train.py]
#
# GPUS (8), GPUS_PER_NODE (8), CPUS_PER_TASK (5) and SRUN_ARGS may be set. PYTHON names the
# interpreter.
set -euo pipefail
if [[ $# -lt 3 ]]; then
    sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
partition=$1 job_name=$2 config=$3
shift 3
tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
gpus=${GPUS:-8}
gpus_per_node=${GPUS_PER_NODE:-8}
if [[ $gpus -lt $gpus_per_node ]]; then
    gpus_per_node=$gpus
fi
export PYTHONPATH="$(dirname "$tools")${PYTHONPATH:+:$PYTHONPATH}"
# One clear error instead of one from every task. Data and GPUs may be visible on the nodes alone.
"${PYTHON:-python}" -c '
import sys
from mmrla.engine.errors import exit_with_message
from mmrla.engine.run.config import read_config
with exit_with_message():
    read_config(sys.argv[1])
' "$config"

# SRUN_ARGS holds several words.
# shellcheck disable=SC2086
exec srun -p "$partition" --job-name "$job_name" --gres "gpu:$gpus_per_node" --ntasks "$gpus" \
    --ntasks-per-node "$gpus_per_node" --cpus-per-task "${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 \
    ${SRUN_ARGS:-} "${PYTHON:-python}" -u "$tools/train.py" "$config" --launcher slurm "$@"
