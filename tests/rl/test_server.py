"""A policy as a server: real sockets, messages by hand, refusals that leave it alive, chunks drawn while it acts."""

import json
import runpy
import socket
import struct
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from genkit.cli.main import main as cli
from genkit.core import Vector
from genkit.data.codecs import Actions
from genkit.rl.policies.asynchronous import AsynchronousPolicy
from genkit.rl.policies.messages import MAX_HEADER, pack_message, read_message
from genkit.rl.policies.policy import Policy
from genkit.rl.policies.server import open_server
from tests.support.refusals import refuses

CLIENT = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "12_policy_client.py"))["PolicyClient"]


@contextmanager
def serving(run, **settings):
    with open_server(run, port=0, **settings) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def test_the_client_gets_the_actions_of_the_policy(policy):
    with serving(policy, steps=2, act_steps=8) as server:
        assert server.address[0] == "127.0.0.1"
        client = CLIENT(*server.address)
        assert (client.about["obs_dim"], client.about["action_dim"], client.about["steps"]) == (2, 2, 2)
        direct, obs = Policy.load(policy, steps=2, act_steps=8), np.array([0.1, -0.2])
        for seed in (5, 6):
            client.reset(seed)
            direct.reset([seed])
            expected = direct.act(obs[None, None].repeat(1, 0))[0]
            assert np.array_equal(np.stack([client.step(obs) for _ in range(8)]), expected)
        client.stream.close()


# a request that is wrong, and what the error says; after each of them the same connection goes on
OBS = {"obs": np.zeros(2, np.float32)}
WRONG = {
    "type": ({"type": "jump"}, {}, "type: given 'jump'; allowed: hello, reset, step"),
    "list": ({"type": []}, {}, "type: given []; allowed: hello, reset, step"),
    "shape": ({"type": "step"}, {"obs": np.zeros(3, np.float32)}, "obs: given shape [3]; this policy needs [2]"),
    "dtype": ({"type": "step"}, {"obs": np.zeros(2)}, "obs: given float64; needs float32"),
    "name": ({"type": "step"}, {"state": np.zeros(2, np.float32)}, "tensors: given state; needs obs"),
    "missing": ({"type": "step"}, {}, "tensors: given none; needs obs"),
    "extra": ({"type": "step"}, {**OBS, "frames": np.zeros((3, 8, 8), np.uint8)}, "needs obs"),
    "finite": ({"type": "step"}, {"obs": np.array([np.nan, 0], np.float32)}, "obs: is not finite"),
    "seed": ({"type": "reset", "seed": -1}, {}, "seed: given -1"),
    "seed type": ({"type": "reset", "seed": True}, {}, "seed: given True"),
}  # fmt: skip
BROKEN = {  # bytes after which nothing can be read: an error, and the connection is closed
    "length": (struct.pack(">I", MAX_HEADER + 1), "header: given"),
    "json": (struct.pack(">I", 4) + b"{abc", "header: is not a JSON object"),
    "list": (struct.pack(">I", 2) + b"[]", "header: is not a JSON object"),
    "cut": (pack_message({"type": "step"}, OBS)[:-1], "the connection ended before"),
}


def exchange(stream, data):
    stream.write(data)
    stream.flush()
    return read_message(stream.read)


def test_mistakes_are_answered_and_the_server_lives_on(policy):
    with serving(policy, steps=1, clients=2) as server:
        with socket.create_connection(server.address, 10) as connection:
            stream = connection.makefile("rwb")
            for header, tensors, said in WRONG.values():
                reply, _ = exchange(stream, pack_message(header, tensors))
                assert reply["type"] == "error"
                assert said in reply["message"]
                reply, values = exchange(stream, pack_message({"type": "step"}, OBS))
                assert (reply["type"], values["action"].shape) == ("action", (2,))
            assert reply["step"] == len(WRONG) - 1  # wrong requests are no steps
        broken = dict(BROKEN)
        twice = [{"name": "obs", "dtype": "float32", "shape": [2]}] * 2
        huge = [{"name": "obs", "dtype": "float32", "shape": [2**20, 2**20]}]
        odd = [{"name": "obs", "dtype": "object", "shape": [1]}]
        negative = [{"name": "obs", "dtype": "float32", "shape": [-1]}]
        for tensors, said in ((huge, "tensors: given"), (odd, "dtype 'object'"), (negative, "shape [-1]")):
            text = json.dumps({"type": "step", "tensors": tensors}).encode()
            broken[said] = (struct.pack(">I", len(text)) + text, said)
        for data, said in broken.values():
            with socket.create_connection(server.address, 10) as connection:
                stream = connection.makefile("rwb")
                stream.write(data)
                stream.flush()
                connection.shutdown(socket.SHUT_WR)
                reply, _ = read_message(stream.read)
                assert said in reply["message"]
                assert stream.read(1) == b""
        with socket.create_connection(server.address, 10) as connection:
            text = json.dumps({"type": "step", "tensors": twice}).encode()
            reply, _ = exchange(connection.makefile("rwb"), struct.pack(">I", len(text)) + text + bytes(16))
            assert "'obs' twice" in reply["message"]
        client = CLIENT(*server.address)
        with pytest.raises(ValueError, match="needs"):
            client.step(np.zeros(5))
        assert client.step(np.zeros(2)).shape == (2,)


def test_no_more_clients_than_allowed_and_addresses_that_are_taken(policy, capsys):
    with serving(policy, steps=1, clients=1) as server:
        first = CLIENT(*server.address)
        with pytest.raises(ValueError, match="clients: 1 are connected"):
            CLIENT(*server.address)
        assert first.step(np.zeros(2)).shape == (2,)
        assert cli(["serve", str(policy), "--port", str(server.address[1])]) == 2
        assert "cannot be had" in capsys.readouterr().err
    refuses(lambda: open_server(policy, port=0, delay=9, execution="real-time", act_steps=8), "delay: given 9", "0 … 8")
    for idle in ({"delay": 2}, {"guidance_limit": 3.0}):
        refuses(lambda idle=idle: open_server(policy, port=0, **idle), "has no effect without --execution real-time")


def vanish(connection):
    """Close a socket without telling the other side, as a machine does that loses its power."""
    try:
        connection.setsockopt(socket.IPPROTO_TCP, 19, 1)  # TCP_REPAIR of Linux, for the administrator alone
    except OSError as e:
        connection.close()
        pytest.skip(f"a socket cannot be closed silently here: {e}")
    connection.close()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="TCP_REPAIR is Linux's")
def test_a_client_that_vanished_gives_up_its_place_and_one_that_pauses_keeps_it(policy):
    with serving(policy, steps=1, clients=2, keepalive=1) as server:
        paused = CLIENT(*server.address)
        connection = socket.create_connection(server.address)
        connection.sendall(pack_message({"type": "hello"}))
        assert connection.recv(4)
        vanish(connection)
        with pytest.raises(ValueError, match="clients: 2 are connected"):
            CLIENT(*server.address)
        deadline = time.monotonic() + 20
        while server.places._value == 0 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert CLIENT(*server.address).step(np.zeros(2)).shape == (2,)
        assert paused.step(np.zeros(2)).shape == (2,)


def gated(policy, act_steps):
    """A policy whose chunk n has the actions 100 n + i, and is ready when ``gates`` have been opened n + 1 times."""
    actor = Policy.load(policy, steps=1, act_steps=act_steps)
    actor.run.spec.cond["obs"] = Vector((1, 2))
    object.__setattr__(actor.run, "codec", Actions((0.0, 0.0), (1.0, 1.0)))
    gates, count = threading.Semaphore(0), iter(range(99))

    def generate(z, cond, noise=None):
        gates.acquire()
        return (100.0 * next(count) + torch.arange(16.0)).expand(len(z), 2, 16)

    actor.generate = generate
    return actor, gates


def test_actions_go_on_while_the_next_chunk_is_drawn(policy):
    actor, gates = gated(policy, act_steps=4)
    acting = AsynchronousPolicy(actor, "naive")
    obs = np.zeros(2)
    gates.release()
    taken = [acting.step(obs)[0] for _ in range(7)]  # the second chunk is begun at step 4, and not ready
    gates.release()
    acting.drawing.exception()  # waits for it
    taken += [acting.step(obs)[0] for _ in range(2)]  # it was drawn for step 4, so it is carried out from action 3 on
    assert taken == [0, 1, 2, 3, 4, 5, 6, 103, 104]
    assert (list(acting.delays), acting.waited) == ([3], 0)
    gates.release(20)
    acting.drawing.exception()
    # without a chunk in time the step waits: 4 actions a chunk of 16, and a decision begun at step 8
    assert acting.step(obs)[0] == 201
    acting.reset(0)
    assert acting.step(obs)[0] % 100 == 0
    assert acting.time == 1


def test_a_step_waits_when_the_actions_have_run_out(policy):
    actor, gates = gated(policy, act_steps=4)
    acting = AsynchronousPolicy(actor, "naive")
    gates.release()
    for _ in range(16):
        acting.step(np.zeros(2))
    threading.Timer(0.05, gates.release).start()
    assert acting.step(np.zeros(2))[0] == 112
    assert acting.waited == 1


def test_real_time_continues_what_is_under_way_for_the_longest_delay_seen(policy):
    acting = AsynchronousPolicy(Policy.load(policy, steps=2, act_steps=4), "real-time", delay=2)
    for _ in range(12):
        acting.step(np.zeros(2, np.float32))
        if acting.drawing is not None:
            acting.drawing.exception()
    acting.delays.extend([1, 3, 2])
    conditions = acting.underway(np.zeros((1, 1, 2), np.float32), None)
    weights = next(v for k, v in conditions.items() if k.endswith("weight"))[0, 0]
    assert (weights == 1).sum() == 3
