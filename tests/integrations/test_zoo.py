"""Weights of other projects: the run is the same function as the peer's class on random weights."""

from __future__ import annotations

import pickle

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from genkit.cli import main as cli
from genkit.training.run import load_run

DEPTH, WIDTH, CLASSES = 2, 32, 10


def dit_peer():
    """diffusers' DiT with random weights, and its state dict in the authors' layout.

    Its sinusoids are set to those of the paper's code; diffusers divides by one less.
    """
    torch.manual_seed(0)
    net = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=DEPTH, sample_size=8,
        patch_size=2, num_embeds_ada_norm=CLASSES, activation_fn="gelu-approximate", norm_eps=1e-6,
        norm_elementwise_affine=False, attention_bias=True,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.2 * torch.randn_like(p))
    for block in net.transformer_blocks:
        block.norm1.emb.load_state_dict(net.transformer_blocks[0].norm1.emb.state_dict())
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    stored = net.state_dict()
    emb = "transformer_blocks.0.norm1.emb"
    pairs = {"x_embedder.proj": "pos_embed.proj", "t_embedder.mlp.0": f"{emb}.timestep_embedder.linear_1",
             "t_embedder.mlp.2": f"{emb}.timestep_embedder.linear_2", "final_layer.linear": "proj_out_2",
             "final_layer.adaLN_modulation.1": "proj_out_1"}  # fmt: skip
    for i in range(DEPTH):
        theirs = f"transformer_blocks.{i}"
        pairs |= {
            f"blocks.{i}.attn.proj": f"{theirs}.attn1.to_out.0",
            f"blocks.{i}.mlp.fc1": f"{theirs}.ff.net.0.proj",
            f"blocks.{i}.mlp.fc2": f"{theirs}.ff.net.2",
            f"blocks.{i}.adaLN_modulation.1": f"{theirs}.norm1.linear",
        }
    out = {f"{a}.{part}": stored[f"{b}.{part}"] for a, b in pairs.items() for part in ("weight", "bias")}
    for i in range(DEPTH):
        for part in ("weight", "bias"):
            qkv = [stored[f"transformer_blocks.{i}.attn1.to_{k}.{part}"] for k in "qkv"]
            out[f"blocks.{i}.attn.qkv.{part}"] = torch.cat(qkv)
    out["pos_embed"] = net.pos_embed.pos_embed.clone()
    out["y_embedder.embedding_table.weight"] = stored[f"{emb}.class_embedder.embedding_table.weight"]
    return net, {k: v.clone().contiguous() for k, v in out.items()}


def inputs():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 4, 8, 8, generator=generator), torch.tensor([7, 400, 999]), torch.tensor([0, 9, CLASSES])


@pytest.mark.parametrize("kind", ["dit", "sit"])
@torch.no_grad()
def test_transformers_are_the_same_function(kind, tmp_path, capsys):
    peer, stored = dit_peer()
    save_file(stored, tmp_path / "model.safetensors")
    args = ["import", kind, str(tmp_path / "model.safetensors"), str(tmp_path / "run"), "--head-size=16"]
    assert cli.main(args) == 0
    assert "its learned variance is left out" in capsys.readouterr().out
    run = load_run(tmp_path / "run", device="cpu")
    x, n, y = inputs()
    keep = y < CLASSES  # the last one is of the null class
    cond = {"label": y.clamp(max=CLASSES - 1), "keep": keep}
    if kind == "dit":
        theirs, t = peer(x, n, y).sample[:, :4], (n + 1) / 1000
    else:
        s = n / 1000  # data are at 1
        theirs, t = -peer(x, s, y).sample[:, :4], 1 - s
    ours = run.nets["net"](x, t, cond)
    assert float(theirs.std()) > 0.1
    assert float((ours - theirs).abs().max() / theirs.std()) < 1e-4
    assert float((run.nets["net"](x, t - 0.001, cond) - theirs).abs().max()) > 1e-3
    assert cli.main(["sample", str(tmp_path / "run"), "--n=2", "--steps=2", "--guidance=2", "--format=npz",
                     f"--out={tmp_path}/x.npz", "--device=cpu"]) == 0  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"use_scale_shift_norm": True, "class_cond": True, "num_classes": 5}])
@torch.no_grad()
def test_the_unet_of_torchcfm_is_the_same_function(options, tmp_path):
    pytest.importorskip("torchcfm")
    from torchcfm.models.unet.unet import UNetModelWrapper

    torch.manual_seed(0)
    peer = UNetModelWrapper(dim=(3, 8, 8), num_channels=128, num_res_blocks=2, channel_mult=[1, 2], num_heads=4,
                            num_head_channels=64, attention_resolutions="4", **options).eval()  # fmt: skip
    for p in peer.parameters():
        p.add_(0.02 * torch.randn_like(p))
    torch.save({"net_model": {}, "ema_model": peer.state_dict(), "step": 3}, tmp_path / "model.pt")
    args = ["import", "torchcfm", str(tmp_path / "model.pt"), str(tmp_path / "run"), "--size=8"]
    assert cli.main(args) == 0
    run = load_run(tmp_path / "run", device="cpu")
    x, s = torch.randn(2, 3, 8, 8), torch.tensor([0.2, 0.9])
    y = torch.tensor([1, 4])
    cond, labels = ({"label": y}, (y,)) if options else ({}, ())
    theirs = -peer(s, x, *labels)
    ours = run.nets["net"](x, 1 - s, cond)
    assert float((ours - theirs).abs().max() / theirs.std()) < 1e-4
    assert float((run.nets["net"](x, 1 - s - 0.05, cond) - theirs).abs().max()) > 1e-3


def test_pickles_and_files_of_other_kinds_are_refused_in_one_line(tmp_path, capsys):
    _, stored = dit_peer()
    (tmp_path / "edm.pkl").write_bytes(pickle.dumps({"ema": 1}))
    torch.save({"model": stored, "args": object()}, tmp_path / "objects.pt")
    save_file(stored, tmp_path / "good.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "good.safetensors").read_bytes()[:-9])
    save_file({k: v for k, v in stored.items() if "blocks.1.mlp.fc2.bias" not in k}, tmp_path / "less.safetensors")
    save_file({**stored, "more": torch.zeros(1)}, tmp_path / "more.safetensors")
    moved = {**stored, "pos_embed": stored["pos_embed"].flip(1).contiguous()}
    save_file(moved, tmp_path / "moved.safetensors")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "a").write_text("")
    cases = [
        ("dit", "edm.pkl", (), "is a pickle of Python objects, which runs code"),
        ("dit", "objects.pt", (), "holds Python objects, which genkit does not load"),
        ("dit", "cut.safetensors", ("--head-size=16",), "cannot be read"),
        ("dit", "none.pt", (), "there is no"),
        ("dit", "model.onnx", (), "allowed: .safetensors"),
        ("dit", "less.safetensors", ("--head-size=16",), "has no blocks.1.mlp.fc2.bias"),
        ("dit", "more.safetensors", ("--head-size=16",), "has more, which dit does not have"),
        ("sit", "moved.safetensors", ("--head-size=16",), "positions are not the fixed ones"),
        ("dit", "good.safetensors", (), "give --head-size"),
        ("torchcfm", "good.safetensors", (), "is it of another kind?"),
        ("edm", "good.safetensors", (), "is it of another kind?"),
        ("vdm", "good.safetensors", (), "allowed: dit, edm, sit, torchcfm"),
    ]
    for kind, name, more, words in cases:
        capsys.readouterr()
        assert cli.main(["import", kind, str(tmp_path / name), str(tmp_path / "run"), *more]) == 2, name
        error = capsys.readouterr().err
        assert words in error, error
        assert error.count("\n") == 1
        assert not (tmp_path / "run").exists()
    good = str(tmp_path / "good.safetensors")
    assert cli.main(["import", "dit", good, str(tmp_path / "there"), "--head-size=16"]) == 2
    assert "is there already" in capsys.readouterr().err
