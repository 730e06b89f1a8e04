#!/usr/bin/env bash
# Several machines by torchrun: they agree on their numbers and start again when a rank is lost. Run the same line on every
# machine, in the checkout:
#
#     RDZV_HOST=host0 launch/recipes/torchrun_c10d.sh experiment=enwik8_hashed_2x8gpu
#
# When a process dies, torchrun ends all others and starts all again, at most MAX_RESTARTS times. The run continues from its
# newest complete checkpoint (train.save_every, train.save_minutes). The checkout has the same path everywhere, train.runs_dir is a
# folder that all machines share.
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${NODES:=2}"                                     # machines
: "${RANKS_PER_NODE:=8}"                            # processes on each machine: one for each GPU
: "${RDZV_HOST:?is the name or address of one of the machines, the same on all}"
: "${RDZV_PORT:=29400}"                             # a free port of that machine
: "${RUN_ID:=foreroute}"                            # the same on all machines, and another for every run
: "${MAX_RESTARTS:=3}"
: "${SAVE_S:=120}"                                  # on SIGTERM or Ctrl-C: for the ranks to save
: "${PYTHON:=.venv/bin/python}"

# Otherwise the new processes find the entries of the lost ones in the store through which they meet.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec "$PYTHON" -m torch.distributed.run \
    --nnodes="$NODES" --nproc-per-node="$RANKS_PER_NODE" --max-restarts="$MAX_RESTARTS" \
    --shutdown-timeout="$SAVE_S" \
    --rdzv-backend=c10d --rdzv-endpoint="$RDZV_HOST:$RDZV_PORT" --rdzv-id="$RUN_ID" \
    -m launch.train train.resume=true "$@"
