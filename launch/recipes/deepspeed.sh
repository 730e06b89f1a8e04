#!/usr/bin/env bash
# Several machines by the deepspeed launcher. Run this on one machine, in the checkout:
#
#     HOSTFILE=hosts launch/recipes/deepspeed.sh experiment=enwik8_hashed_2x8gpu
#
# The file has one line for each machine: its name and the processes to start there, one for each GPU:
#
#     host0 slots=8
#     host1 slots=8
#
# It needs pdsh here, and ssh without a password to every machine, this one included. The checkout has the same path
# everywhere, and train.runs_dir is a folder that all machines share. Variables for the ranks go into a file
# .deepspeed_env here, one NAME=VALUE a line; those that begin with NCCL travel by themselves.
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${HOSTFILE:?is a file with lines such as: host0 slots=8}"
[ -f "$HOSTFILE" ] || { echo "HOSTFILE=$HOSTFILE: no such file" >&2; exit 2; }
: "${MASTER_PORT:=29500}"                           # a free port of the first machine; two runs need two
: "${PYTHON:=.venv/bin/python}"

exec "$PYTHON" -m deepspeed.launcher.runner \
    --hostfile="$HOSTFILE" --force_multi --master_port="$MASTER_PORT" \
    --module --no_local_rank launch.train "$@"
