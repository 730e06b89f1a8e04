from dataclasses import dataclass
from enum import Enum

import pytest

from foreroute.engine.config import MoEConfig
from foreroute.engine.config.option import option
from foreroute.engine.errors import UserError
from foreroute.engine.routing.method_options import read_options


class Colour(Enum):
    red = "red"


@dataclass
class Options:
    number: int = option(3, "A whole number.", at_least=0)
    share: float = option(0.5, "A number.")
    on: bool = option(False, "A switch.")
    name: str | None = option(None, "A name.")
    sizes: list[int] = option([1], "Sizes.")
    colour: Colour = Colour.red


def read(**options):
    return read_options(MoEConfig(options=options), Options)


def test_values_of_the_declared_types_are_read():
    assert read() == Options()
    given = {"number": 1, "share": 2, "on": True, "name": "x", "sizes": [2], "colour": "red"}
    assert read(**given) == Options(1, 2, True, "x", [2], Colour.red)
    assert read(name=None, share=0.25) == Options(share=0.25)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"number": 0.5}, "moe.options.number=0.5: must be a whole number"),
        ({"number": True}, "moe.options.number=True: must be a whole number"),
        ({"number": -1}, "moe.options.number=-1: must be at least 0"),
        ({"number": None}, "moe.options.number=None: must be a whole number"),
        ({"share": "half"}, "moe.options.share=half: must be a number"),
        ({"on": 1}, "moe.options.on=1: must be true or false"),
        ({"name": 7}, "moe.options.name=7: must be text or null"),
        ({"sizes": 2}, "moe.options.sizes=2: must be a list"),
        ({"colour": "blue"}, "moe.options.colour=blue: must be one of red"),
        ({"colours": "red"}, "moe.options.colours: no such option of moe.router=hashed; it has number, share,"),
    ],
)
def test_other_values_are_refused(options, words):
    with pytest.raises(UserError) as error:
        read(**options)
    assert words in str(error.value) and "\n" not in str(error.value)
