# Sourced by dist_train.sh and dist_test.sh: check once in one process, then start all of them.
# Usage: launch SCRIPT NPROC ARGS...

launch() {
    local script=$1 nproc=$2
    shift 2
    local tools
    tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
    if ! [[ $nproc =~ ^[1-9][0-9]*$ ]]; then
        echo "error: the number of processes must be a positive integer, got '$nproc'" >&2
        exit 2
    fi
    export PYTHONPATH="$(dirname "$tools")${PYTHONPATH:+:$PYTHONPATH}"
    local python=${PYTHON:-python}

    # One clear error instead of one from every process.
    LOCAL_WORLD_SIZE=$nproc "$python" "$tools/$script" "$@" --launcher pytorch --dry-run || exit $?

    local rendezvous
    if [[ ${NNODES:-1} -gt 1 ]]; then
        : "${MASTER_ADDR:?NNODES is ${NNODES}, so MASTER_ADDR must name the first node}"
        rendezvous=(--nnodes "$NNODES" --node_rank "${NODE_RANK:?NNODES is ${NNODES}, so NODE_RANK must say which node this is}"
            --master_addr "$MASTER_ADDR" --master_port "${PORT:-29500}")
    else
        # Port 0: torchrun takes a free one.
        rendezvous=(--nnodes 1 --rdzv_backend c10d --rdzv_endpoint "127.0.0.1:${PORT:-0}"
            --local_addr 127.0.0.1)
    fi
    exec "$python" -m torch.distributed.run "${rendezvous[@]}" --nproc_per_node "$nproc" \
        "$tools/$script" "$@" --launcher pytorch
}
