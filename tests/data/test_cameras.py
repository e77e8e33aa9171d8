"""Images of recordings: stored once, cropped and jittered, seen by one encoder a camera, alone or as tokens."""

import json
import os
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from genkit.backbones import MLP
from genkit.backbones.cameras import CAMERA_ENCODERS, CameraResNet, load_camera_weights
from genkit.backbones.dit import DiT
from genkit.backbones.embed import FramesEmbed, FrameTokens, VectorEmbed, VectorTokens
from genkit.core import Draw, Frames, Spec, Vector, spec_from_dict, spec_to_dict
from genkit.data.codecs import Actions
from genkit.data.demonstrations.frames import FrameStore, cached_frames, color_jitter, random_crop
from genkit.data.demonstrations.replay import Replay
from tests.support.refusals import refuses

EVERYONE = torch.ones(4, dtype=torch.bool)


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path):
    monkeypatch.setenv("GENKIT_CACHE", str(tmp_path / "cache"))  # for mapped images


def images(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def seen(*shape):
    return torch.from_numpy(images(*shape))


# -------------------------------------------------------------------------------------------------------- stored
def test_a_store_gathers_the_images_of_its_episodes_from_memory_and_from_a_file(tmp_path):
    np.save(tmp_path / "a.npy", images(9, 3, 4, 5))
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    wrist = images(9, 1, 4, 5, seed=1)
    store = FrameStore([(mapped[:4], wrist[:4]), (mapped[4:], wrist[4:])])
    rows = torch.tensor([[0, 3], [4, 8], [3, 4]])
    both = torch.from_numpy(np.concatenate([mapped, wrist], 1))
    assert torch.equal(store.gather(rows), both[rows])
    assert (len(store), store.cameras, store.shape) == (9, (3, 1), (4, 4, 5))
    across = mapped[4:].swapaxes(2, 3)  # as the mirror image of pictures that are not square
    refuses(lambda: FrameStore([(mapped[:4],), (across,)]), "4x5 and 5x4", "one size")


def test_another_process_gets_the_place_of_mapped_images_and_not_the_images(tmp_path):
    np.save(tmp_path / "a.npy", images(90, 20, 21, 3))
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r").transpose(0, 3, 1, 2)  # as of recordings with channels last
    store = FrameStore([(mapped[:40],), (mapped[40:],)])
    sent = pickle.dumps(store)
    assert len(sent) < 2000
    again = pickle.loads(pickle.dumps(pickle.loads(sent)))
    rows = torch.tensor([0, 39, 40, 89])
    assert torch.equal(again.gather(rows), torch.from_numpy(np.ascontiguousarray(mapped))[rows])
    assert isinstance(again.episodes[1][0].base, np.memmap)
    assert len(pickle.dumps(again)) < 2000
    mirrored = mapped[:, :, ::-1, ::-1].swapaxes(2, 3)
    sent = pickle.dumps(FrameStore([(mirrored[:40],), (mirrored[40:],)]))
    assert len(sent) < 2000
    assert torch.equal(pickle.loads(sent).gather(rows), torch.from_numpy(np.ascontiguousarray(mirrored))[rows])
    in_memory = FrameStore([(images(4, 3, 5, 6),)])
    assert torch.equal(pickle.loads(pickle.dumps(in_memory)).gather(rows[:1]), in_memory.gather(rows[:1]))


def test_a_cached_file_is_there_whole_or_not_at_all_and_made_once(tmp_path, monkeypatch):
    monkeypatch.setenv("GENKIT_CACHE", str(tmp_path))
    truth, calls = images(5, 3, 4, 4), []

    def write(frames):
        calls.append(len(calls))
        frames[:] = truth
        if len(calls) == 1:
            raise ValueError("cut off")

    def open_cached(**key):
        return cached_frames(key, truth.shape, write, "top")

    with pytest.raises(ValueError, match="cut off"):
        open_cached(size=3)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
    for _ in range(2):
        frames = open_cached(size=3)
        assert isinstance(frames, np.memmap)
        assert np.array_equal(frames, truth)
    assert len(calls) == 2
    open_cached(size=4)  # of a file that has changed
    assert len(calls) == 3
    left, other = (tmp_path / f"frames/.{name}.npy-{2**22 + 1}.part" for name in "ab")  # no process has this id
    left.touch()
    other.touch()
    os.utime(left, (0, 0))
    open_cached(size=5)
    assert (left.exists(), other.exists()) == (False, True)  # killed long ago; perhaps running on another machine
    too_many = 2 * shutil.disk_usage(tmp_path).free // 48
    refuses(lambda: cached_frames({}, (too_many, 3, 4, 4), write, "top"), "are free", "GENKIT_CACHE")
    assert len(calls) == 4


# ----------------------------------------------------------------------------------------------------- augmented
def test_a_crop_is_at_one_random_place_for_all_images_of_a_sample():
    """Each pixel holds its own place, so a crop tells where it is from."""
    place = torch.arange(6 * 7, dtype=torch.uint8).view(1, 1, 1, 6, 7).expand(64, 2, 3, 6, 7)
    corners = random_crop(place, (4, 5), Draw((1,), 0, 64))
    assert corners.shape == (64, 2, 3, 4, 5)
    first = corners[:, 0, 0, 0, 0]
    assert (corners == first.view(-1, 1, 1, 1, 1) + place[:1, :1, :1, :4, :5]).all()
    assert set(first.tolist()) == {7 * t + u for t in range(3) for u in range(3)}  # all nine places, no other
    half = random_crop(place[32:], (4, 5), Draw((1,), 32, 64))
    assert torch.equal(half, corners[32:])


def test_jitter_multiplies_brightness_contrast_and_saturation():
    """Of one grey only brightness changes it, and by the drawn factor; without amount nothing changes."""
    brightness = 1 + 0.4 * (2 * Draw((2,), 0, 8).uniform(3)[:, 0] - 1)
    grey = torch.full((8, 2, 4, 3, 3), 100, dtype=torch.uint8)
    out = color_jitter(grey, (3, 1), 0.4, Draw((2,), 0, 8))
    assert torch.equal(out[:, 0, 0, 0, 0].float(), (100 * brightness).round())
    assert (out == out[:, :1, :1, :1, :1]).all()
    picture = seen(4, 2, 4, 5, 5)
    assert torch.equal(color_jitter(picture, (3, 1), 0.0, Draw((2,), 0, 4)), picture)
    other = color_jitter(picture, (3, 1), 0.4, Draw((2,), 0, 4))
    assert (other.float() - picture.float()).abs().amax((1, 2, 3, 4)).min() > 10


def test_training_sees_random_crops_and_everyone_else_the_centre(tmp_path):
    np.savez(tmp_path / "d.npz", img=images(40, 10, 12, 3), obs=np.random.default_rng(0).normal(size=(40, 2)),
             action=np.random.default_rng(1).normal(size=(40, 2)), episode_ends=[20, 40])  # fmt: skip
    source = Replay(root=str(tmp_path / "d.npz"), frames=("img",), crop=(8, 8), held_out=0.5, color_jitter=0.1)
    train, test = source.load("train"), source.load("test")
    kind = train.spec.cond["frames"]
    assert kind == Frames((2, 3, 10, 12), crop=(8, 8))
    assert spec_from_dict(json.loads(json.dumps(spec_to_dict(train.spec)))) == train.spec
    rows = torch.arange(4)
    cropped, whole = (d.batch(rows, Draw((0,), 0, 4)).cond["frames"] for d in (train, test))
    assert (cropped.shape, whole.shape) == ((4, 2, 3, 8, 8), (4, 2, 3, 10, 12))
    for value in (cropped, whole):
        train.spec.check({"frames": value}, 4)
    embed = FramesEmbed(kind, 16)
    assert torch.equal(embed(whole, EVERYONE), embed(whole[..., 1:9, 2:10], EVERYONE))
    plain = replace(source, color_jitter=0.0).load("train").batch(rows, Draw((0,), 0, 4)).cond["frames"]
    assert not torch.equal(plain, cropped)
    assert replace(source, color_jitter=0.0) == source.unaugmented()
    refuses(lambda: replace(source, crop=(8, 13)).load(), "crop: given 8x13 of images of 10x12")
    small = replace(source, image_size=(8, 6), crop=None).load("test").batch(rows, Draw((0,), 0, 4)).cond["frames"]
    assert small.shape == (4, 2, 3, 8, 6)
    assert (small.float().mean() - whole.float().mean()).abs() < 2


# ---------------------------------------------------------------------------------------------------- encoders
def test_each_camera_has_an_encoder_of_its_own():
    kind = Frames((2, 4, 16, 16), cameras=(3, 1))
    embed, value = FramesEmbed(kind, 8), seen(4, 2, 4, 16, 16)
    features = embed.features(value).unflatten(1, (2, 2))
    other = value.clone()
    other[:, :, 3] = 0
    changed = embed.features(other).unflatten(1, (2, 2))
    assert torch.equal(features[:, :, 0], changed[:, :, 0])
    assert not torch.allclose(features[:, :, 1], changed[:, :, 1])
    alone = embed.see[1](value[:, :, 3:].flatten(0, 1) / 127.5 - 1)
    assert torch.allclose(features[:, :, 1].flatten(0, 1), alone, atol=1e-5)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * name.startswith("resnet")) for name in CAMERA_ENCODERS]
)
def test_an_encoder_tells_places_apart_and_depends_on_no_other_sample(name):
    torch.manual_seed(0)
    encoder = CAMERA_ENCODERS[name](3, (40, 48), 8)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in encoder.modules())
    x = torch.zeros(2, 3, 40, 48)
    x[0, :, :8, :8] = 1
    x[1, :, -8:, -8:] = 1
    with torch.no_grad():
        y = encoder(x)
        assert y.shape == (2, 8)
        assert (y[0] - y[1]).abs().max() > 1e-3
        assert torch.allclose(encoder(x[:1]), y[:1], atol=1e-5)


def test_a_resnet_takes_the_weights_of_torchvision(tmp_path):
    """With them its map is that of torchvision's network with the same norms, in ImageNet's units."""
    from safetensors.torch import save_file
    from torchvision.models import resnet18
    from torchvision.transforms.functional import normalize

    torch.manual_seed(1)
    file = tmp_path / "resnet18.safetensors"
    save_file({k: v.contiguous() for k, v in resnet18(weights=None).state_dict().items()}, file)
    peer = resnet18(weights=None, norm_layer=lambda c: nn.GroupNorm(c // 16, c))
    from safetensors.torch import load_file

    peer.load_state_dict({k: v for k, v in load_file(file).items() if k in peer.state_dict()}, strict=False)
    encoder = CAMERA_ENCODERS["resnet18"](3, (32, 32), 4)
    assert load_camera_weights({"net": nn.ModuleDict({"camera": encoder})}, file) == 1
    assert isinstance(encoder, CameraResNet)
    x, maps = torch.rand(2, 3, 32, 32), []
    peer.layer4.register_forward_hook(lambda *args: maps.append(args[2]))
    encoder.network.layer4.register_forward_hook(lambda *args: maps.append(args[2]))
    with torch.no_grad():
        peer(normalize(x, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
        encoder(2 * x - 1)
    assert torch.allclose(maps[0], maps[1], atol=1e-4)
    assert maps[0].abs().max() > 0.1
    refuses(lambda: load_camera_weights({"net": nn.Linear(1, 1)}, file), "no camera has a ResNet")
    save_file({"conv1.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    refuses(lambda: load_camera_weights({"n": encoder}, tmp_path / "other.safetensors"), "does not fit this ResNet")
    (tmp_path / "x.pth").write_bytes(b"no")
    refuses(lambda: load_camera_weights({"n": encoder}, tmp_path / "x.pth"), "cannot be read")


# ------------------------------------------------------------------------------------------------------- tokens
def test_tokens_are_one_for_each_step_and_camera():
    """A step that changes alters its own tokens alone; the null comes first."""
    frames, vector = Frames((2, 4, 16, 16), cameras=(3, 1), tokens=True), Vector((2, 3), tokens=True)
    see, read = FrameTokens(frames, 8), VectorTokens(vector, 8)
    value, obs = seen(4, 2, 4, 16, 16), torch.randn(4, 2, 3)
    for embed, given, changed in (
        (see, value, torch.cat([value[:, :1], 255 - value[:, 1:]], 1)),
        (read, obs, torch.cat([obs[:, :1], obs[:, 1:] + 1], 1)),
    ):
        tokens, others = embed(given, EVERYONE), embed(changed, EVERYONE)
        num = 4 if embed is see else 2
        assert tokens.shape == (4, 1 + num, 8)
        assert embed.token_mask(given).shape == (4, num)
        assert torch.equal(tokens[:, 0], embed.null.expand(4, -1))
        same = (tokens == others).all(2).all(0).tolist()
        assert same == [True] + [True] * (num // 2) + [False] * (num // 2)
    plain = VectorEmbed(replace(vector, shape=(3,), tokens=False), 8)
    plain.load_state_dict({k: v for k, v in read.state_dict().items() if k != "place"})
    assert torch.allclose(read(obs, EVERYONE)[:, 1] - read.place[0], plain(obs[:, 0], EVERYONE), atol=1e-6)


def test_a_transformer_reads_observation_tokens_and_an_mlp_averages_them():
    cond = {"obs": Vector((2, 3), tokens=True), "frames": Frames((2, 3, 16, 16), tokens=True)}
    spec = Spec((2, 8), cond)
    torch.manual_seed(0)
    net = DiT(width=16, depth=1, head_size=8, patch=1).denoiser(spec)
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    given = {"obs": torch.randn(4, 2, 3), "frames": seen(4, 2, 3, 16, 16)}
    x, t = torch.randn(4, 2, 8), torch.full((4,), 0.5)
    with torch.no_grad():
        out = net(x, t, given)
        for name, step in (("obs", 0), ("obs", 1), ("frames", 0), ("frames", 1)):
            changed = {k: v.clone() for k, v in given.items()}
            changed[name][:, step] = 255 - changed[name][:, step] if name == "frames" else 3
            assert not torch.allclose(net(x, t, changed), out, atol=1e-5), (name, step)
    assert MLP(width=16, depth=1).denoiser(spec)(x, t, given).shape == x.shape


# ------------------------------------------------------------------------------------------------ mixed actions
def test_some_dimensions_of_actions_stay_absolute(tmp_path):
    rng = np.random.default_rng(0)
    hand, gripper = rng.normal(size=(30, 2)) * 5, rng.uniform(size=(30, 1))
    np.savez(tmp_path / "d.npz", obs=hand, action=np.concatenate([hand[:, :1] + 1, gripper, hand[:, 1:] - 2], 1),
             episode_ends=[30])  # fmt: skip
    source = Replay(
        root=str(tmp_path / "d.npz"), relative_to="obs", absolute=(1,), obs_steps=1, pred_steps=1, act_steps=1
    )
    data = source.load()
    assert torch.allclose(data.x[:, 0], torch.ones(30, 1), atol=1e-5)
    assert torch.allclose(data.x[:, 1, 0], torch.from_numpy(gripper[:, 0]).float())
    assert torch.allclose(data.x[:, 2], torch.full((30, 1), -2.0), atol=1e-5)
    codec, obs = data.codec, data.cond["obs"]
    assert isinstance(codec, Actions)
    assert codec.reference == (0.0, -1.0, 1.0)
    true = torch.from_numpy(np.load(tmp_path / "d.npz")["action"]).float()[:, :, None]
    assert torch.allclose(codec.to_absolute(codec.from_absolute(true, obs), obs), true, atol=1e-4)
    refuses(
        lambda: replace(source, absolute=()).load(), "relative_to: given 2 numbers for actions of 3", "--data.absolute"
    )
    refuses(lambda: replace(source, absolute=(3,)).load(), "absolute: given dimension 3 of actions of 3")
