#!/usr/bin/env bash
# Several machines by Open MPI's mpirun. Run this on one machine, in the checkout:
#
#     HOSTFILE=hosts launch/recipes/mpirun.sh experiment=enwik8_hashed_2x8gpu
#
# The file has one line for each machine: its name and the processes to start there, one for each GPU:
#
#     host0 slots=8
#     host1 slots=8
#
# It needs ssh without a password to every machine. The checkout has the same path everywhere, and train.runs_dir is a
# folder that all machines share. Ctrl-C and SIGTERM save a checkpoint and stop the run.
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${HOSTFILE:?is a file with lines such as: host0 slots=8}"
[ -f "$HOSTFILE" ] || { echo "HOSTFILE=$HOSTFILE: no such file" >&2; exit 2; }
: "${PYTHON:=.venv/bin/python}"
: "${MPIRUN:=.venv/bin/mpirun}"                     # or the cluster's own, with which its mpi4py was built
: "${EXPORT:=OMP_NUM_THREADS OMP_WAIT_POLICY GOMP_SPINCOUNT DS_ACCELERATOR NCCL_DEBUG NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME}"    # variables that the ranks get

exports=()
for name in $EXPORT; do
    [ -z "${!name:-}" ] || exports+=(-x "$name")
done
# mpi4py's runner ends all ranks when one fails. On Ctrl-C or SIGTERM mpirun would leave them a second, too little for a
# checkpoint; it passes SIGUSR1 on and waits. In a session of its own it does not see the terminal's Ctrl-C.
setsid "$MPIRUN" --hostfile "$HOSTFILE" --bind-to none "${exports[@]}" \
    "$PYTHON" -u -m mpi4py -m launch.train "$@" &
mpirun=$!
trap 'kill -USR1 "$mpirun"' INT TERM
code=0
wait "$mpirun" || code=$?
while kill -0 "$mpirun" 2>/dev/null; do             # a signal came: wait again
    code=0
    wait "$mpirun" || code=$?
done
exit "$code"
