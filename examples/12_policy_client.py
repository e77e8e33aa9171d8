"""A client of `genkit serve RUN`: it needs numpy only. Copy it to the robot; docs/guide/policies.md has the protocol.

python examples/12_policy_client.py [--host 127.0.0.1] [--port 5750]     # acts on zeros, and prints the actions
"""

import argparse
import json
import socket
import struct

import numpy as np


class PolicyClient:
    def __init__(self, host="127.0.0.1", port=5750, timeout=30.0):
        self.stream = socket.create_connection((host, port), timeout).makefile("rwb")
        self.about, _ = self.ask({"type": "hello"})

    def ask(self, header, **tensors):
        described = [{"name": k, "dtype": v.dtype.name, "shape": list(v.shape)} for k, v in tensors.items()]
        text = json.dumps({**header, "tensors": described}).encode()
        self.stream.write(struct.pack(">I", len(text)) + text + b"".join(v.tobytes() for v in tensors.values()))
        self.stream.flush()
        reply = json.loads(self.stream.read(struct.unpack(">I", self.stream.read(4))[0]))
        if reply["type"] == "error":
            raise ValueError(reply["message"])
        received = {}
        for t in reply["tensors"]:
            count = int(np.prod(t["shape"])) * np.dtype(t["dtype"]).itemsize
            received[t["name"]] = np.frombuffer(self.stream.read(count), t["dtype"]).reshape(t["shape"])
        return reply, received

    def reset(self, seed=0):
        self.ask({"type": "reset", "seed": seed})

    def step(self, obs, frames=None):
        pictures = {} if frames is None else {"frames": np.ascontiguousarray(frames, np.uint8)}
        return self.ask({"type": "step"}, obs=np.ascontiguousarray(obs, "<f4"), **pictures)[1]["action"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Act on zeros.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=5750)
    policy = PolicyClient(**vars(parser.parse_args()))
    print(policy.about, *(policy.step(np.zeros(policy.about["obs_dim"])) for _ in range(3)), sep="\n")
