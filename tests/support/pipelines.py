"""Tiny random pipelines of diffusers, one of each family, made by diffusers itself."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import diffusers
import torch
import transformers
from torch import Tensor, nn

from genkit.data import text
from genkit.diffusion.samplers import Seeds
from genkit.training.run import Run
from genkit.training.sampling import Sampling

PROMPTS = ["a red square, 7", "blue"]
STEPS = 8
QUICK = ["--lr=1e-12", "--steps=2", "--batch=2", "--sample-every=0", "--workers=0", "--no-tensorboard", "--device=cpu",
         "--precision=fp32", "--data.held-out=0"]  # fmt: skip
CAPTIONS = "--data.captions=files"
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


def sdxl(folder: Path) -> diffusers.DiffusionPipeline:
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(16, 32), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, transformer_layers_per_block=(1, 2), cross_attention_dim=64, norm_num_groups=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
    )  # fmt: skip
    euler = diffusers.EulerDiscreteScheduler(**SD_BETAS, steps_offset=1, timestep_spacing="leading")
    return diffusers.StableDiffusionXLPipeline(
        unet=shaken(unet), vae=kl(scaling_factor=0.13025), text_encoder=clip(), text_encoder_2=clip(True),
        tokenizer=clip_tokenizer(folder), tokenizer_2=clip_tokenizer(folder), scheduler=euler,
    )  # fmt: skip


SHIFTED_KL = {"shift_factor": 0.0609, "use_quant_conv": False, "use_post_quant_conv": False}


def sd3(folder: Path) -> diffusers.DiffusionPipeline:
    net = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        caption_projection_dim=32, joint_attention_dim=32, pooled_projection_dim=64, out_channels=16,
        pos_embed_max_size=16,
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        transformer=shaken(net), vae=kl(16, scaling_factor=1.5305, **SHIFTED_KL), text_encoder=clip(True),
        tokenizer=clip_tokenizer(folder), text_encoder_2=clip(True), tokenizer_2=clip_tokenizer(folder),
        text_encoder_3=t5(), tokenizer_3=t5_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip


def flux(folder: Path, dev: bool = True) -> diffusers.DiffusionPipeline:
    net = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8], guidance_embeds=dev,
    )  # fmt: skip
    shift = (
        {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15} if dev else {"shift": 1.0}
    )
    return diffusers.FluxPipeline(
        transformer=shaken(net), vae=kl(4, scaling_factor=0.3611, **SHIFTED_KL), text_encoder=clip(),
        tokenizer=clip_tokenizer(folder), text_encoder_2=t5(), tokenizer_2=t5_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**shift),
    )  # fmt: skip


DIT = {
    "sample_size": 8, "num_layers": 2, "patch_size": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8,
    "attention_bias": True, "activation_fn": "gelu-approximate", "num_embeds_ada_norm": 1000,
    "norm_elementwise_affine": False,
}  # fmt: skip


def pixart(folder: Path) -> diffusers.DiffusionPipeline:
    """PixArt-Sigma."""
    net = diffusers.PixArtTransformer2DModel(
        **DIT, num_attention_heads=3, caption_channels=32, cross_attention_dim=24, norm_type="ada_norm_single",
        norm_eps=1e-6, use_additional_conditions=False,
    )  # fmt: skip
    return diffusers.PixArtSigmaPipeline(
        transformer=shaken(net), vae=kl(scaling_factor=0.13025), text_encoder=t5(), tokenizer=t5_tokenizer(),
        scheduler=diffusers.DPMSolverMultistepScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02),
    )  # fmt: skip


def gemma() -> tuple[nn.Module, transformers.GemmaTokenizer]:
    settings = transformers.Gemma2Config(
        head_dim=16, hidden_size=8, intermediate_size=64, max_position_embeddings=8192, num_attention_heads=2,
        num_hidden_layers=1, num_key_value_heads=2, vocab_size=400, attn_implementation="eager",
    )  # fmt: skip
    vocab = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "▁": 4}
    for c in "abcdefghijklmnopqrstuvwxyz0123456789,.'-:\"!?()ABCDEFGHIJKLMNOPQRSTUVWXYZ\n":
        vocab[c] = len(vocab)
    tokenizer = transformers.GemmaTokenizer(vocab=vocab, merges=[], model_max_length=300)
    tokenizer.padding_side = "right"
    return shaken(transformers.Gemma2Model(settings)), tokenizer


def sana(folder: Path) -> diffusers.DiffusionPipeline:
    net = diffusers.SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=4,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8,
        sample_size=16, timestep_scale=0.5,
    )  # fmt: skip
    vae = diffusers.AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=[1, 1], downsample_block_type="conv",
        upsample_block_type="interpolate", decoder_norm_types="rms_norm", decoder_act_fns="silu",
        scaling_factor=0.41407,
    )  # fmt: skip
    encoder, tokenizer = gemma()
    return diffusers.SanaPipeline(
        transformer=shaken(net), vae=shaken(vae, 0.02), text_encoder=encoder,
        tokenizer=tokenizer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip


def chroma(folder: Path) -> diffusers.DiffusionPipeline:
    net = diffusers.ChromaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 4, 8), approximator_num_channels=8, approximator_hidden_dim=16,
        approximator_layers=1,
    )  # fmt: skip
    return diffusers.ChromaPipeline(
        transformer=shaken(net), vae=kl(4, scaling_factor=0.3611, **SHIFTED_KL), text_encoder=t5(),
        tokenizer=t5_tokenizer(), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0),
    )  # fmt: skip


def auraflow(folder: Path) -> diffusers.DiffusionPipeline:
    net = diffusers.AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32, pos_embed_max_size=64,
    )  # fmt: skip
    config = transformers.UMT5Config(
        vocab_size=400, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    return diffusers.AuraFlowPipeline(
        transformer=shaken(net), vae=kl(scaling_factor=0.13025), tokenizer=t5_tokenizer(),
        text_encoder=shaken(transformers.UMT5EncoderModel(config)),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73),
    )  # fmt: skip


def lumina2(folder: Path) -> diffusers.DiffusionPipeline:
    net = diffusers.Lumina2Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1,
        num_attention_heads=3, num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 2, 2), axes_lens=(300, 64, 64),
        cap_feat_dim=8,
    )  # fmt: skip
    encoder, tokenizer = gemma()
    return diffusers.Lumina2Pipeline(
        transformer=shaken(net), vae=kl(4, scaling_factor=0.3611, **SHIFTED_KL), text_encoder=encoder,
        tokenizer=tokenizer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0),
    )  # fmt: skip


def dit(folder: Path) -> diffusers.DiffusionPipeline:
    net = diffusers.DiTTransformer2DModel(**DIT, num_attention_heads=2, norm_type="ada_norm_zero")
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    return diffusers.DiTPipeline(transformer=shaken(net), vae=kl(), scheduler=scheduler)


def ddim(folder: Path) -> diffusers.DiffusionPipeline:
    """A U-Net on pixels, without conditions."""
    net = diffusers.UNet2DModel(
        sample_size=16, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(16, 32),
        norm_num_groups=8, attention_head_dim=8, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return diffusers.DDIMPipeline(shaken(net), diffusers.DDIMScheduler(clip_sample=False))


PIPELINES: Mapping[str, Callable[[Path], diffusers.DiffusionPipeline]] = {
    "sd": stable_diffusion,
    "sd-v": lambda folder: stable_diffusion(folder, prediction_type="v_prediction"),
    "sdxl": sdxl,
    "sd3": sd3,
    "flux-dev": flux,
    "flux-schnell": lambda folder: flux(folder, dev=False),
    "pixart": pixart,
    "sana": sana,
    "chroma": chroma,
    "auraflow": auraflow,
    "lumina2": lumina2,
    "dit": dit,
    "ddim": ddim,
}


def save_pipeline(name: str, folder: Path) -> Path:
    """Write the pipeline ``name`` into a new folder ``name`` of ``folder``, and return it."""
    torch.manual_seed(0)
    PIPELINES[name](folder / "vocabulary").save_pretrained(folder / name)
    return folder / name


# ------------------------------------------------------------------------------------------------------------- pictures
def their_picture(
    folder: Path,
    guidance: float = 5.0,
    scheduler: Callable[[object], object] | None = None,
    lora: Path | None = None,
    **settings: object,
) -> Tensor:
    """Pictures in [0, 1] of a pipeline, from the noise of seeds 0 and 1."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = scheduler(pipe.scheduler.config) if scheduler else pipe.scheduler
    if lora:
        pipe.load_lora_weights(str(lora))
    known = inspect.signature(pipe.__call__).parameters
    usual = {"prompt": PROMPTS, "guidance_scale": guidance, "use_resolution_binning": False,
             "cfg_normalization": False}  # fmt: skip
    given = {k: v for k, v in {**usual, "batch_size": 2, **settings}.items() if k in known}
    seeds = [torch.Generator().manual_seed(i) for i in range(2)]
    return torch.as_tensor(pipe(generator=seeds, num_inference_steps=STEPS, output_type="pt", **given).images)


def our_picture(
    run: Run, prompts: Sequence[str] = PROMPTS, guidance: float = 5.0, cond: Mapping[str, Tensor] | None = None,
    **sampling: object,
) -> Tensor:  # fmt: skip
    """The same of genkit, before they become bytes."""
    z = Seeds(range(2))(run.spec.shape)
    with torch.no_grad():
        cond = text.encode_prompts(run.spec, prompts) if cond is None else cond
        x = run.generator(Sampling(steps=STEPS, guidance=guidance, **sampling))(z, cond)
        stage = getattr(run.codec, "stage", None)
        x = stage.nets["net"].decode(run.codec.scaling.decode(x)).sample if stage else x
    return (x / 2 + 0.5).clamp(0, 1)


def largest(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())
