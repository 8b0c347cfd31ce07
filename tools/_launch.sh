# Sourced by the scripts beside it: the Python of the project, and how several processes of a tool start.
tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python}
if [ -z "${PYTHON:-}${VIRTUAL_ENV:-}" ] && [ -x "$tools/../.venv/bin/python" ]; then
    python=$tools/../.venv/bin/python
fi

# start PROCESSES TOOL [arguments]: on this machine, or on this one of NNODES.
start() {
    # One machine finds a free port by itself, and need not know itself by its name.
    local meeting=(--standalone --local-addr 127.0.0.1)
    if [ -n "${PORT:-}" ] || [ "${NNODES:-1}" -gt 1 ]; then
        meeting=(--nnodes "${NNODES:-1}" --node-rank "${NODE_RANK:-0}"
            --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${PORT:-29500}")
    fi
    local processes=$1 tool=$2
    shift 2
    exec "$python" "$tools/_torchrun.py" "${meeting[@]}" --nproc-per-node "$processes" "$tools/$tool" "$@"
}
