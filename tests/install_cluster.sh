#!/usr/bin/env bash
# Install the programs that the tests marked `cluster` need and that are not there. Nothing is set up: the tests make their
# own Slurm, beside one that the machine may have.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
declare -A package=(
    [ip]=iproute2 [tc]=iproute2 [pdsh]=pdsh [munged]=munge [slurmctld]=slurmctld [slurmd]=slurmd [sbatch]=slurm-client
)
missing=()
for program in "${!package[@]}"; do
    command -v "$program" >/dev/null || missing+=("${package[$program]}")
done
if [ ${#missing[@]} -eq 0 ]; then
    exit
elif [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    echo "not installed, and only root can, with apt-get: ${missing[*]}; tests that need them are skipped" >&2
    exit
fi
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
