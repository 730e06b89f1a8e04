#!/usr/bin/env bash
# Tests whether an image (or any machine) can train: it lists the versions and trains two steps on two ranks (on one rank if there is one GPU).
#
#     docker run --rm --gpus all --ipc host foreroute launch/recipes/image_smoke.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${PYTHON:=.venv/bin/python}"
gpus=$("$PYTHON" -c "import torch; print(torch.cuda.device_count())")
: "${RANKS:=$((gpus == 1 ? 1 : 2))}"                # at most the GPUs, if there are any
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

"$PYTHON" - <<'END'
import os, platform, sys
import deepspeed, hydra, mpi4py.MPI, safetensors, torch, triton, wandb
import foreroute.engine, foreroute.kernels, foreroute.launch
print("python", platform.python_version(), "as user", os.geteuid())
for package in (torch, triton, deepspeed, hydra, safetensors, wandb):
    print(package.__name__, package.__version__)
print(mpi4py.MPI.Get_library_version().split(",")[0])
print("GPUs:", [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())])
END
"$PYTHON" -m torch.distributed.run --standalone --local-addr=127.0.0.1 --nproc-per-node="$RANKS" -m launch.train experiment=debug \
    train.steps=2 train.log_every=1 eval.max_symbols=512 parallel.expert_ranks="$RANKS" \
    train.runs_dir="$scratch" corpus.cache_dir="$scratch"
echo "this machine can train"
