#!/usr/bin/env bash
# Train on the GPUs of this machine: launch/torchrun.sh CONFIG [section.field=value ...]
# PROCESSES: how many, by default one per GPU. RESTARTS: how often processes that fail are started again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# shared with the agent, the store of a failed start makes the restart fail more often than not
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# seconds to save in, from the signal to SIGKILL; torchrun waits 30 otherwise
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=120
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# an agent that does not handle SIGUSR1 is killed by it
exec torchrun --standalone --nproc-per-node="${PROCESSES:-gpu}" --max-restarts="${RESTARTS:-3}" \
    --signals-to-handle=SIGTERM,SIGUSR1 train.py "$@"
