"""Environments in processes: the same results, one line for a process that ends, and none that stays behind."""

import gc
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

import numpy as np
import pytest

from genkit.envs import make, step_chunk
from genkit.envs.processes import ProcessEnv, join_infos
from tests.support.breaking import Breaking, Slow
from tests.support.refusals import refuses

ROOT = Path(__file__).parents[2]


def is_running(pid):
    """Whether there is such a process that has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    assert condition()


def test_rows_are_those_of_one_process_and_end_with_it():
    alone, env = make("four-ways", 5, max_steps=20), ProcessEnv(partial(make, "four-ways", max_steps=20), 5, 2)
    assert (env.num, env.obs_dim, env.action_dim, env.max_steps, env.modes) == (5, 2, 2, 20, 4)
    assert np.array_equal(env.reset(range(5)), alone.reset(range(5)))
    rng = np.random.default_rng(0)
    for t in range(24):
        actions = rng.normal(0.06, 0.05, (5, 2))
        for a, b in zip(env.step(actions), alone.step(actions), strict=True):
            pairs = [(a[k], b[k]) for k in b] if isinstance(b, dict) else [(a, b)]
            assert all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in pairs)
        if t % 5 == 4:
            assert np.array_equal(env.reset([t, 40], [4, 1]), alone.reset([t, 40], [4, 1]))
    chunk = rng.normal(0.06, 0.05, (5, 24, 2))  # rows end on the way
    for one, other in zip(step_chunk(env, chunk), step_chunk(alone, chunk), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one[:4], other[:4], strict=True))
        assert np.array_equal(one[4]["mode"], other[4]["mode"])
    assert np.array_equal(env.reset([7], [2]), alone.reset([7], [2]))
    assert np.array_equal(env.pixels((8, 8)), alone.pixels((8, 8)))
    assert np.array_equal(np.asarray(env.frame(3)), np.asarray(alone.frame(3)))
    assert not hasattr(ProcessEnv(Breaking, 1, 1), "frame")
    refuses(lambda: env.step(np.full((5, 2), np.nan)), "row 0 is not finite")
    refuses(lambda: ProcessEnv(Breaking, 2, 3), "workers: given 3", "0 … 2")
    # one that is killed is one line; the others end with it
    first, second = (p.pid for p in env.processes)
    os.kill(first, signal.SIGKILL)
    refuses(lambda: env.step(np.zeros((5, 2))), "environments 0 … 1 was ended by signal 9", "--workers 0")
    wait_until(lambda: not is_running(second))
    refuses(lambda: env.reset([0], [4]), "workers: a call before this one", "make them anew")
    # all end with the object
    env = ProcessEnv(partial(make, "four-ways"), 2, 2)
    pids = [p.pid for p in env.processes]
    del env
    gc.collect()  # errors keep it
    wait_until(lambda: not any(map(is_running, pids)))


@pytest.mark.parametrize("method", ["step", "reset"])
def test_an_interrupted_call_leaves_no_answer_for_a_later_one(method):
    env = ProcessEnv(Slow, 2, 2)
    env.reset([0, 1])

    def interrupt(*args):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        with pytest.raises(KeyboardInterrupt):
            env.step(np.zeros((2, 1)))
    finally:
        signal.signal(signal.SIGALRM, before)
    later = {"step": lambda: env.step(np.zeros((2, 1))), "reset": lambda: env.reset([0, 1])}
    refuses(later[method], "workers: a call before this one", "make them anew")
    assert not any(p.is_alive() for p in env.processes)


def test_errors_of_an_environment_are_told_as_they_are_in_one_process():
    env = ProcessEnv(Breaking, 2, 2)
    env.step(np.zeros((2, 1)))
    with pytest.raises(RuntimeError, match=r"environments 0 … 0:\n(.|\n)*breaking.py(.|\n)*the gripper is stuck"):
        env.step(np.zeros((2, 1)))
    refuses(lambda: ProcessEnv(partial(make, ""), 2, 1), "env: not given")


def test_a_process_that_ends_while_it_makes_its_environments_is_one_line():
    done = SimpleQueue()
    told = "environments 0 … 0 ended with exit code 1"
    Thread(target=lambda: done.put(refuses(lambda: ProcessEnv(os._exit, 1, 1), told)), daemon=True).start()
    done.get(timeout=20)  # queue.Empty: it waits for ever


def test_what_some_rows_have_not_reported_yet_is_zero():
    joined = join_infos([({}, 2), ({"success": np.array([1.0])}, 1)])
    assert joined["success"].tolist() == [0, 0, 1]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_no_process_outlives_the_one_that_made_it(tmp_path, number):
    script = tmp_path / "script.py"
    script.write_text(
        "import time\nfrom functools import partial\nfrom genkit.envs import make\n"
        "from genkit.envs.processes import ProcessEnv\n"
        "if __name__ == '__main__':\n"
        "    env = ProcessEnv(partial(make, 'four-ways'), 2, 2)\n"
        "    print(*(p.pid for p in env.processes), flush=True)\n    time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert process.stdout is not None
    pids = [int(v) for v in process.stdout.readline().split()]
    assert all(map(is_running, pids))
    process.send_signal(number)
    process.wait()
    wait_until(lambda: not any(map(is_running, pids)))
