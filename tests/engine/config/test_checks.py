"""What sections check of their values, for those who make them in Python."""

import pytest

from foreroute.engine.config import Builder, MoEConfig, ParallelConfig, Router
from foreroute.engine.config.enums import ExchangeKind
from foreroute.engine.errors import UserError


def test_a_choice_may_be_given_by_its_name():
    assert MoEConfig(router="frozen") == MoEConfig(router=Router.frozen) != MoEConfig()
    assert MoEConfig(builder="random").builder is Builder.random
    assert ParallelConfig(exchange="gather").exchange is ExchangeKind.gather


@pytest.mark.parametrize("value", ["rnadom", "", None, 3, True])
def test_what_is_no_choice_is_one_line(value):
    with pytest.raises(UserError, match=r"^moe\.builder=.*: must be one of .*random"):
        MoEConfig(builder=value)
