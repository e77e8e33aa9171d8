"""Ranks stop at the same step, soon after one of them is asked to."""

import os
import signal
import threading
import time

from genkit.training.stopping import StopAgreement, steps_between, stop_signals
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


def test_a_signal_is_heard_by_all_trainings_of_a_study_the_running_one_and_later_ones():
    before = signal.getsignal(signal.SIGTERM)
    with stop_signals() as outer:
        with stop_signals() as inner:
            os.kill(os.getpid(), signal.SIGTERM)
        assert (inner, outer) == ([signal.SIGTERM], [signal.SIGTERM])
        with stop_signals() as later:
            assert later == outer
    assert signal.getsignal(signal.SIGTERM) is before
    with stop_signals() as other:
        assert other == []


def test_a_thread_of_its_own_hears_no_signals():
    heard = []

    def collect():
        with stop_signals() as received:
            heard.append(received)

    with stop_signals() as signals:
        thread = threading.Thread(target=collect)
        thread.start()
        thread.join()
        os.kill(os.getpid(), signal.SIGUSR1)
    assert (signals, heard) == ([signal.SIGUSR1], [[]])
