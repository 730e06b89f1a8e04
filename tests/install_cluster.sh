#!/usr/bin/env bash
# Install the programs that the tests marked `cluster` need and that are not there. Nothing is set up: the tests make their
# own Slurm, beside one that the machine may have.
exec "$(dirname "$0")/install_missing.sh" "tests that need them" ip=iproute2 tc=iproute2 pdsh=pdsh munged=munge \
    slurmctld=slurmctld slurmd=slurmd sbatch=slurm-client buildah=buildah mmdebstrap=mmdebstrap
