"""Items that are taken ahead."""

from foreroute.engine.ahead import Ahead


def test_items_are_taken_ahead_in_their_order():
    taken = []
    ahead = Ahead((taken.append(number) or number for number in range(5)), 2)
    assert taken == []  # nothing before the first is asked for
    seen = [(number, list(taken), ahead.last) for number in ahead]
    assert [number for number, _, _ in seen] == [0, 1, 2, 3, 4]
    assert [len(items) for _, items, _ in seen] == [3, 4, 5, 5, 5]
    assert [last for _, _, last in seen] == [False, False, False, False, True]
    assert list(ahead) == [] == list(Ahead([], 2))


def test_without_depth_an_item_is_taken_when_it_is_asked_for():
    taken = []
    assert [(n, len(taken)) for n in Ahead((taken.append(n) or n for n in range(3)), 0)] == [(0, 1), (1, 2), (2, 3)]
