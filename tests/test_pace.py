"""Decode steps beside prefills: no more than keep the places full, spread over the prefill."""

import pytest

from offload_runtime.pace import Pace


def steps_beside(pace: Pace, chunks: int) -> list[int]:
    """The steps taken so far after each chunk, one at a time."""
    seen = []
    for chunk in range(chunks):
        pace.share = (chunk + 1) / chunks
        while pace.due:
            pace.taken += 1
        seen.append(pace.taken)
    return seen


def test_equal_sequences_leave_one_by_one() -> None:
    """Each decodes while the other places are filled once, so a place falls free with every prefill."""
    pace, left, waited = Pace(5), [], 0
    for _ in range(40):
        pace.begin(1000, 200, left)
        steps = steps_beside(pace, 10)[-1]
        left = [*(n - steps for n in left), 199]
        for n in [n for n in left if n <= 0]:
            left.remove(n)
            pace.ended(200, 200)
        waited += len(left) == 5
        assert steps <= 70
    assert waited == 0
    assert len(left) >= 3


def test_the_first_to_end_is_waited_for_when_no_place_is_left() -> None:
    pace = Pace(3)
    pace.begin(1000, 100, [80, 90])
    assert steps_beside(pace, 4) == [20, 40, 60, 80]
    pace.begin(1000, 100, [20])  # a place is free besides
    assert steps_beside(pace, 4) == [18, 35, 53, 70]


def test_answers_that_end_early_speed_the_prefills_up() -> None:
    pace = Pace(2)
    pace.begin(1000, 100, [])
    pace.ended(40, 100)
    pace.begin(1000, 100, [])
    assert pace.steps == pytest.approx(1.4 * 70)  # 40 and 100 tokens of two prompts


def test_one_place_needs_no_pace() -> None:
    pace = Pace(1)
    pace.begin(1000, 10, [])
    assert steps_beside(pace, 5)[-1] == 14
