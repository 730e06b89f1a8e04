"""Where a process finds itself and the others, from the variables of each launcher, alone and beside one another."""

import os
import socket

import pytest

from foreroute.engine.errors import UserError
from foreroute.launch.start.rank_variables import (
    MPICH,
    OPEN_MPI,
    SLURM,
    TORCH,
    Place,
    find_address,
    find_device,
    find_node,
    find_place,
)


def torch(rank, ranks, local_rank="0", **more):
    return {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": local_rank, **more}


def open_mpi(rank, ranks, local_rank="0"):
    return {"OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_SIZE": ranks, "OMPI_COMM_WORLD_LOCAL_RANK": local_rank}


def mpich(rank, ranks):
    return {"PMI_RANK": rank, "PMI_SIZE": ranks}


def slurm(rank, ranks, local_rank="0"):
    """Of a task in a step, as Slurm 22.05 sets them."""
    return {
        "SLURM_PROCID": rank,
        "SLURM_STEP_NUM_TASKS": ranks,
        "SLURM_LOCALID": local_rank,
        "SLURM_NTASKS": ranks,
        "SLURM_JOB_ID": "4711",
        "SLURM_STEP_ID": "2",
    }


BATCH_SCRIPT = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "7"}
TORCHRUN = torch("5", "8", "1", TORCHELASTIC_RUN_ID="none")
DEEPSPEED = torch("5", "8", "1", CROSS_RANK="2", CROSS_SIZE="4")


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        ({}, Place()),
        ({"LOCAL_RANK": "0"}, Place()),  # DeepSpeed leaves it
        (BATCH_SCRIPT, Place()),
        (torch("5", "8", "1"), Place(5, 8, 1, TORCH)),
        (open_mpi("3", "4", "1"), Place(3, 4, 1, OPEN_MPI)),
        (mpich("1", "2") | {"MPI_LOCALRANKID": "1"}, Place(1, 2, 1, MPICH)),
        (mpich("0", "1"), Place(0, 1, 0, MPICH)),
        (slurm("3", "4", "1"), Place(3, 4, 1, SLURM)),
        # One launcher inside another.
        (TORCHRUN | slurm("2", "4"), Place(5, 8, 1, TORCH)),
        (DEEPSPEED | open_mpi("2", "4"), Place(5, 8, 1, TORCH)),
        (BATCH_SCRIPT | TORCHRUN, Place(5, 8, 1, TORCH)),
        (open_mpi("3", "4", "1") | slurm("1", "2"), Place(3, 4, 1, OPEN_MPI)),
        (mpich("3", "4") | {"MPI_LOCALRANKID": "1"} | slurm("1", "2"), Place(3, 4, 1, MPICH)),
        (mpich("3", "4") | slurm("3", "4", "1"), Place(3, 4, 1, SLURM)),
        (torch("5", "8", "1") | slurm("0", "1"), Place(5, 8, 1, TORCH)),
        (torch("5", "8", "1") | open_mpi("0", "1"), Place(5, 8, 1, TORCH)),
        # Set by hand as well, to the same; LOCAL_RANK may differ where a process sees only its GPU.
        (torch("3", "4") | slurm("3", "4", "1"), Place(3, 4, 0, SLURM)),
        ({"WORLD_SIZE": "4"} | open_mpi("3", "4", "1"), Place(3, 4, 1, OPEN_MPI)),
    ],
)
def test_places(environ, place):
    assert find_place(environ) == place


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "1", "LOCAL_RANK": "0"}, "WORLD_SIZE=: torchrun or deepspeed sets it"),
        ({"WORLD_SIZE": "2"}, "RANK=: torchrun or deepspeed sets it"),
        (torch("one", "2"), "RANK=one"),
        (torch("2", "2"), "RANK=2: must be below WORLD_SIZE=2"),
        ({"OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_SIZE=: Open MPI sets it"),
        (mpich("1", "2"), "MPI_LOCALRANKID=: MPICH or Intel MPI sets it"),  # all would take GPU 0
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_PROCID=: Slurm sets it"),
        (
            {"WORLD_SIZE": "2"} | open_mpi("3", "4"),
            "WORLD_SIZE=2: Open MPI started this process as rank 3 of 4; unset WORLD_SIZE",
        ),
        (torch("0", "1") | slurm("1", "4"), "RANK=0: Slurm started this process as rank 1 of 4; unset RANK"),
        (mpich("3", "8") | open_mpi("3", "4"), "PMI_SIZE=8: Open MPI started this process as rank 3 of 4"),
    ],
)
def test_places_that_cannot_be(environ, message):
    with pytest.raises(UserError, match=message):
        find_place(environ)


def test_the_cpu_on_request():
    assert find_device(Place(), {"DS_ACCELERATOR": "cpu"}).type == "cpu"


def test_addresses(tmp_path, monkeypatch):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames n[07-08]" ] && printf "n07\\nn08\\n"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    by_slurm = Place(1, 2, 0, SLURM)
    step = slurm("1", "2") | {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "n[07-08]"}
    port = find_address(by_slurm, step)[1]
    assert find_address(by_slurm, step) == ("n07", port) and 20000 <= int(port) < 30000
    assert find_address(by_slurm, step | {"SLURM_PROCID": "0"}) == ("n07", port)
    assert find_address(by_slurm, step | {"SLURM_STEP_ID": "3"})[1] != port
    assert find_address(by_slurm, step | {"SLURM_JOB_ID": "4712"})[1] != port
    assert find_address(by_slurm, step | {"SLURM_STEP_NUM_NODES": "1"}) == ("127.0.0.1", port)
    assert find_address(by_slurm, step | {"MASTER_ADDR": "h", "MASTER_PORT": "1"}) == ("h", "1")
    assert find_address(by_slurm, step | {"MASTER_PORT": "1"}) == ("n07", "1")
    with pytest.raises(UserError, match=r"`scontrol show hostnames \?` does not say where"):
        find_address(by_slurm, step | {"SLURM_STEP_NODELIST": "?"})
    with pytest.raises(UserError, match="MASTER_ADDR and MASTER_PORT: the launcher must set them"):
        find_address(Place(1, 2, 0, TORCH), {"MASTER_ADDR": "h"})


def test_a_node_is_a_machine_with_a_name(monkeypatch):
    here = find_node()
    assert here == find_node() and socket.gethostname() in here
    monkeypatch.setattr(socket, "gethostname", lambda: "another")
    assert find_node() != here
