"""Ranks stop at the same step, soon after one of them is asked to."""

import time

from genkit.training.stopping import StopAgreement, steps_between
from tests.support.ranks import on_two_ranks


def test_slow_steps_are_compared_one_by_one_and_fast_ones_each_tenth():
    assert [steps_between(s) for s in (60.0, 1.0, 0.5, 0.24, 0.01, 0.0)] == [1, 1, 2, 4, 10, 10]


def test_both_stop_where_one_was_asked_to():
    def last_steps(accelerator):
        found = []
        for seconds in (0.0, 0.3):  # of a step: up to ten fast ones, or three slow ones, pass unheard
            agreement, step = StopAgreement(accelerator), 0
            while True:
                step += 1
                time.sleep(seconds)
                if agreement.is_reached(step, accelerator.process_index == 1 and step >= 3):
                    break
            found.append(step)
        return found

    both = on_two_ranks(last_steps)
    assert both[0] == both[1]
    assert 3 <= both[0][0] <= 12
    assert 3 <= both[0][1] <= 5
