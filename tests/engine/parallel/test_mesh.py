import pytest

from foreroute.engine.errors import UserError
from foreroute.engine.parallel.mesh import Mesh


def test_the_table_of_the_docstring():
    meshes = [Mesh(rank, 8, 4) for rank in range(8)]
    assert [mesh.ep_rank for mesh in meshes] == [0, 1, 2, 3] * 2
    assert [mesh.ep_ranks for mesh in meshes] == [range(4)] * 4 + [range(4, 8)] * 4
    experts = [mesh.local_experts(16) for mesh in meshes]
    assert experts == [range(0, 4), range(4, 8), range(8, 12), range(12, 16)] * 2


def test_one_rank_holds_everything():
    assert Mesh().local_experts(5) == range(5) and Mesh().ep_ranks == range(1)


def test_what_cannot_be_shared_out_is_refused():
    with pytest.raises(UserError, match=r"parallel\.expert_ranks=3: must divide the number of ranks, 8"):
        Mesh(0, 8, 3)
    with pytest.raises(UserError, match=r"moe\.experts=6: must be a multiple of parallel\.expert_ranks=4"):
        Mesh(0, 8, 4).local_experts(6)
