"""What sections check of their values, for those who make them in Python."""

import dataclasses
import math

import pytest

from foreroute.engine.config import Builder, MoEConfig, ParallelConfig
from foreroute.engine.config.enums import ExchangeKind
from foreroute.engine.config.option import check, option, required
from foreroute.engine.errors import UserError


def test_a_choice_may_be_given_by_its_name():
    assert MoEConfig(builder="random") == MoEConfig(builder=Builder.random) != MoEConfig()
    assert MoEConfig(builder="random").builder is Builder.random
    assert ParallelConfig(exchange="gather").exchange is ExchangeKind.gather


@pytest.mark.parametrize("value", ["rnadom", "", None, 3, True])
def test_what_is_no_choice_is_one_line(value):
    with pytest.raises(UserError, match=r"^moe\.builder=.*: must be one of .*random"):
        MoEConfig(builder=value)


@dataclasses.dataclass
class Paint:
    tin: str = required("Which one.")
    coats: list[int] = option([1], "Which coats.")
    layers: int | None = option(None, "How many.", at_least=1, at_most=4)
    share: float = option(0.0, "Of the wall.", at_least=0, below=1)
    litres: float = option(1.0, "In the tin.", above=0)

    def __post_init__(self):
        check("paint", self)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": 0}, "paint.layers=0: must be in 1 .. 4"),
        ({"layers": 5}, "paint.layers=5: must be in 1 .. 4"),
        ({"share": 1.0}, "paint.share=1.0: must be in [0, 1)"),
        ({"share": -0.1}, "paint.share=-0.1: must be in [0, 1)"),
        ({"litres": 0.0}, "paint.litres=0.0: must be above 0"),
        ({"litres": math.inf}, "paint.litres=inf: must be above 0"),
        ({"litres": math.nan}, "paint.litres=nan: must be above 0"),
    ],
)
def test_a_value_out_of_bounds_is_one_line(options, words):
    with pytest.raises(UserError) as error:
        Paint("blue", **options)
    assert str(error.value) == words


def test_values_at_the_bounds_are_allowed_and_lists_are_each_object_s_own():
    assert Paint("blue", layers=1, share=0.0).layers == 1
    assert Paint("blue", layers=4, share=math.nextafter(1, 0)).litres == 1.0
    Paint("blue").coats.append(2)
    assert Paint("blue").coats == [1] and Paint("blue").layers is None
    with pytest.raises(TypeError, match="tin"):
        Paint()
