#!/usr/bin/env bash
# Several machines by torchrun, each told its number. Run this on every machine, in the checkout:
#
#     MASTER_ADDR=host0 NODE_RANK=0 launch/recipes/torchrun_static.sh experiment=enwik8_hashed_2x8gpu     # on host0
#     MASTER_ADDR=host0 NODE_RANK=1 launch/recipes/torchrun_static.sh experiment=enwik8_hashed_2x8gpu     # on host1
#
# The checkout has the same path everywhere, and train.runs_dir is a folder that all machines share.
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${NODES:=2}"                                     # machines
: "${RANKS_PER_NODE:=8}"                            # processes on each machine: one for each GPU
: "${NODE_RANK:?is the number of this machine, from 0 on}"
: "${MASTER_ADDR:?is the name or address of machine 0}"
: "${MASTER_PORT:=29500}"                           # a free port of machine 0
: "${SAVE_S:=120}"                                  # on SIGTERM or Ctrl-C: for the ranks to save
: "${PYTHON:=.venv/bin/python}"

exec "$PYTHON" -m torch.distributed.run \
    --nnodes="$NODES" --nproc-per-node="$RANKS_PER_NODE" --node-rank="$NODE_RANK" \
    --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" \
    --shutdown-timeout="$SAVE_S" \
    -m launch.train "$@"
