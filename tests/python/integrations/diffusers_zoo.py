"""Small pipelines of diffusers with random weights, and calls of them, for tests on any device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import tokenizers
import torch
import transformers
from torch import nn

WORDS = {"[UNK]": 0, "</s>": 1, **{f"w{number}": number for number in range(2, 100)}}


def tokenizer(length: int) -> Any:
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, "[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="[UNK]",
        pad_token="</s>",
        eos_token="</s>",
        model_max_length=length,
    )


def clip(cls: str = "CLIPTextModel") -> Any:
    config = transformers.CLIPTextConfig(
        hidden_size=32,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=100,
        projection_dim=32,
        bos_token_id=0,
        eos_token_id=2,
    )
    return getattr(transformers, cls)(config)


def t5(kind: str = "T5") -> Any:
    config = getattr(transformers, f"{kind}Config")(
        d_model=32, d_kv=8, d_ff=256, num_layers=3, num_heads=4, vocab_size=100
    )
    return getattr(transformers, f"{kind}EncoderModel")(config)


def kl_vae(channels: int = 4, **options: Any) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(32, 64),
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        sample_size=32,
        **options,
    )


def sdxl() -> Any:
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 1),
        projection_class_embeddings_input_dim=80,
        cross_attention_dim=64,
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=kl_vae(),
        text_encoder=clip(),
        text_encoder_2=clip("CLIPTextModelWithProjection"),
        tokenizer=tokenizer(77),
        tokenizer_2=tokenizer(77),
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(),
        add_watermarker=False,
    )


def flux() -> Any:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    )
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=kl_vae(1, shift_factor=0.1, scaling_factor=0.3),
        text_encoder=clip(),
        tokenizer=tokenizer(77),
        text_encoder_2=t5(),
        tokenizer_2=tokenizer(77),
        transformer=transformer,
    )


def wan() -> Any:
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=64,
        ffn_dim=256,
        num_layers=3,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    vae = diffusers.AutoencoderKLWan(
        base_dim=8,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )
    return diffusers.WanPipeline(
        tokenizer=tokenizer(64),
        text_encoder=t5("UMT5"),
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        transformer=transformer,
    )


def ltx() -> Any:
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        patch_size=1,
        patch_size_t=1,
        num_attention_heads=4,
        attention_head_dim=16,
        cross_attention_dim=64,
        num_layers=2,
        caption_channels=32,
    )
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    return diffusers.LTXPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=t5(),
        tokenizer=tokenizer(32),
        transformer=transformer,
    )


@dataclass(frozen=True)
class Kind:
    """A pipeline, and a call of it."""

    make: Callable[[], Any]
    call: dict[str, Any]


SMALL = {"height": 32, "width": 32, "num_inference_steps": 3}
VIDEO = {**SMALL, "num_frames": 9, "max_sequence_length": 16}
KINDS = {
    "sdxl": Kind(sdxl, SMALL),
    "flux": Kind(flux, {**SMALL, "max_sequence_length": 16, "guidance_scale": 0.0}),
    "wan": Kind(wan, VIDEO),
    "ltx": Kind(ltx, VIDEO),
}


def make(name: str) -> Any:
    """Make a pipeline with random weights in ordinary memory."""
    torch.manual_seed(0)
    pipeline = KINDS[name].make()
    for part in modules(pipeline).values():
        part.eval()
    return pipeline


def draw(pipeline: Any, name: str, **options: Any) -> torch.Tensor:
    """Call a pipeline with a seed."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(4)
    call = {**KINDS[name].call, "output_type": "pt", "generator": generator, **options}
    return pipeline(prompt="w3 w14 w15", **call)[0]


def modules(pipeline: Any) -> dict[str, nn.Module]:
    return {n: part for n, part in pipeline.components.items() if isinstance(part, nn.Module)}
