"""Tiny random pipelines of diffusers, one of each family, made by diffusers itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import diffusers
import torch
import transformers
from torch import nn

SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def shaken(net: nn.Module, by: float = 0.05) -> nn.Module:
    """``net`` with all weights moved, because many of them start at zero."""
    with torch.no_grad():
        for p in net.parameters():
            p.add_(by * torch.randn_like(p))
    return net.eval()


def clip_tokenizer(folder: Path) -> transformers.CLIPTokenizer:
    """A vocabulary of bytes."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    chars = {b: chr(b) for b in kept}
    chars |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in kept)}
    vocab = {"<|startoftext|>": 0, "!": 1, "<|endoftext|>": 2}
    for token in [*chars.values(), *(c + "</w>" for c in chars.values())]:
        vocab.setdefault(token, len(vocab))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


def clip(projection: bool = False) -> nn.Module:
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return shaken(
        kind(
            transformers.CLIPTextConfig(
                bos_token_id=0, eos_token_id=2, pad_token_id=1, hidden_size=32, intermediate_size=37,
                num_attention_heads=4, num_hidden_layers=3, vocab_size=600, max_position_embeddings=77,
                projection_dim=32, hidden_act="gelu",
            )
        )
    )  # fmt: skip


def t5() -> nn.Module:
    return shaken(
        transformers.T5EncoderModel(
            transformers.T5Config(
                vocab_size=400, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
            )
        )
    )


def t5_tokenizer() -> transformers.T5Tokenizer:
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocab += [(c, -3.0 - i / 100) for i, c in enumerate("abcdefghijklmnopqrstuvwxyz0123456789,.")]
    return transformers.T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=512)


def kl(latent: int = 4, **settings: object) -> nn.Module:
    net = diffusers.AutoencoderKL(
        block_out_channels=[16, 32], in_channels=3, out_channels=3, down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=latent, norm_num_groups=8, **settings,
    )  # fmt: skip
    return shaken(net, 0.02)


def stable_diffusion(folder: Path, **scheduler: object) -> diffusers.DiffusionPipeline:
    """Stable Diffusion 1.x or 2.x."""
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, attention_head_dim=8, norm_num_groups=8,
    )  # fmt: skip
    ddim = {**SD_BETAS, "set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False, **scheduler}
    return diffusers.StableDiffusionPipeline(
        unet=shaken(unet), vae=kl(scaling_factor=0.18215), text_encoder=clip(), tokenizer=clip_tokenizer(folder),
        scheduler=diffusers.DDIMScheduler(**ddim), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


PIPELINES: Mapping[str, Callable[[Path], diffusers.DiffusionPipeline]] = {
    "sd": stable_diffusion,
    "sd-v": lambda folder: stable_diffusion(folder, prediction_type="v_prediction"),
}


def save_pipeline(name: str, folder: Path) -> Path:
    """Write the pipeline ``name`` into a new folder ``name`` of ``folder``, and return it."""
    torch.manual_seed(0)
    PIPELINES[name](folder / "vocabulary").save_pretrained(folder / name)
    return folder / name
