"""What blocks are given besides hidden states: cut wrongly, targets would be sought at other positions."""

from __future__ import annotations

from typing import Any

import torch

from coachhook_plugin.block_arguments import has_rows, of_rows, of_tokens

ROWS, WIDTH = 3, 5


def second_token(value: torch.Tensor) -> torch.Tensor:
    assert value.shape[:2] == (ROWS, WIDTH)
    return value[:, 1]


def taken(value: Any) -> Any:
    return of_tokens(value, ROWS, WIDTH, second_token, lambda places: places + 100)


def test_what_has_an_entry_for_each_token_is_changed_at_its_tokens() -> None:
    own = torch.arange(ROWS * WIDTH * 2).view(ROWS, WIDTH, 2)
    assert taken(own).tolist() == [[2, 3], [12, 13], [22, 23]]


def test_what_all_rows_share_is_given_to_each_of_them() -> None:
    shared = torch.arange(WIDTH * 2).view(1, WIDTH, 2)
    assert taken(shared).tolist() == [[2, 3]] * ROWS


def test_pairs_of_rotary_angles_stay_pairs_and_places_are_told_from_tokens() -> None:
    cosine, sine = torch.rand(1, WIDTH, 4), torch.rand(ROWS, WIDTH, 4)
    angles, places = taken((cosine, sine)), taken([torch.arange(WIDTH)])
    assert isinstance(angles, tuple)
    assert torch.equal(angles[0], cosine[:, 1].expand(ROWS, -1))
    assert torch.equal(angles[1], sine[:, 1])
    assert isinstance(places, list)
    assert places[0].tolist() == [100, 101, 102, 103, 104]


def test_what_has_no_entry_for_tokens_stays_as_it_is() -> None:
    for other in (None, True, 7, "eager", torch.tensor(3), torch.rand(WIDTH, ROWS), torch.rand(2, WIDTH), {"a": 1}):
        assert taken(other) is other


def test_rows_are_taken_from_all_that_has_as_many_also_within_containers() -> None:
    mask, shared = torch.rand(ROWS, 1, WIDTH, WIDTH), torch.rand(1, 1, WIDTH, WIDTH)
    found = of_rows({"mask": mask, "pair": (mask, shared), "flag": True}, torch.tensor([2, 0]), ROWS)
    assert torch.equal(found["mask"], mask[[2, 0]])
    assert torch.equal(found["pair"][0], mask[[2, 0]])
    assert found["pair"][1] is shared
    assert found["flag"] is True


def test_an_argument_is_named_as_one_of_rows_exactly_where_rows_would_be_taken_of_it() -> None:
    one = torch.rand(ROWS, 2)
    for value, expected in [
        (one, True), ({"a": [1, (one,)]}, True), (one[0], False), (one[:2], False), ({"a": None}, False), (7, False)
    ]:  # fmt: skip
        assert has_rows(value, ROWS) is expected
        changed = of_rows(value, torch.tensor([0]), ROWS)
        assert (str(changed) != str(value)) is expected
