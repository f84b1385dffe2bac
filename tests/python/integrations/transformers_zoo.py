"""Small models of transformers with random weights, and calls of them, for tests on any device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

IDS = torch.arange(1, 13).view(2, 6) * 7 % 97 + 1


@dataclass(frozen=True)
class Kind:
    """A kind of model, small, and calls of it."""

    model: str
    config: str
    options: dict[str, Any] = field(default_factory=dict)
    run: Callable[[Any], object] = lambda model: _generate(model)


def _generate(model: Any, **inputs: Any) -> object:
    """Return logits, and what is generated, greedily and by sampling."""
    ids = IDS.to(model.device)
    inputs = inputs or {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    extra = {}
    if model.config.is_encoder_decoder:
        extra["decoder_input_ids"] = ids[:, :4]
    found = [model(**inputs, **extra).logits]
    same = {"max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0}
    found.append(model.generate(**inputs, **same, do_sample=False))
    torch.manual_seed(5)
    found.append(model.generate(**inputs, **same, do_sample=True, top_k=40, temperature=1.5))
    return found


def _random(model: Any, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(model.device)


def _bert(model: Any) -> object:
    ids = IDS.to(model.device)
    return model(ids).logits, model(ids[:, :3]).logits


def _clip(model: Any) -> object:
    ids, images = IDS.to(model.device), _random(model, 2, 3, 32, 32)
    return (
        model(input_ids=ids, pixel_values=images).logits_per_text,
        model.get_text_features(input_ids=ids).pooler_output,
        model.get_image_features(pixel_values=images).pooler_output,
    )


def kinds(scale: int = 1) -> dict[str, Kind]:
    """List the kinds.

    Parameters
    ----------
    scale
        How many times as wide they are as for tests with small pages.
    """
    size = {
        "hidden_size": 128 * scale,
        "intermediate_size": 320 * scale,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    decoder = {**size, "num_key_value_heads": 2, "vocab_size": 100, "pad_token_id": 0}
    vision = {"image_size": 32, "patch_size": 8, **size}
    return {
        "llama": Kind("LlamaForCausalLM", "LlamaConfig", decoder),
        "llama, tied": Kind(
            "LlamaForCausalLM", "LlamaConfig", {**decoder, "tie_word_embeddings": True}
        ),
        "qwen2": Kind("Qwen2ForCausalLM", "Qwen2Config", decoder),
        "qwen3": Kind("Qwen3ForCausalLM", "Qwen3Config", {**decoder, "head_dim": 32}),
        "mistral": Kind("MistralForCausalLM", "MistralConfig", {**decoder, "sliding_window": 4}),
        "mixtral": Kind("MixtralForCausalLM", "MixtralConfig", {**decoder, "num_local_experts": 4}),
        "gemma": Kind("GemmaForCausalLM", "GemmaConfig", {**decoder, "head_dim": 32}),
        "gemma2": Kind("Gemma2ForCausalLM", "Gemma2Config", {**decoder, "head_dim": 32}),
        "gpt2": Kind(
            "GPT2LMHeadModel",
            "GPT2Config",
            {"n_embd": 128 * scale, "n_layer": 3, "n_head": 4, "vocab_size": 100},
        ),
        "t5": Kind(
            "T5ForConditionalGeneration",
            "T5Config",
            {
                "d_model": 128 * scale,
                "d_kv": 16,
                "d_ff": 320 * scale,
                "num_layers": 2,
                "num_heads": 4,
                "vocab_size": 100,
                "decoder_start_token_id": 0,
            },
        ),
        "bert": Kind(
            "BertForMaskedLM",
            "BertConfig",
            {**size, "vocab_size": 100},
            _bert,
        ),
        "whisper": Kind(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            {
                "d_model": 128 * scale,
                "encoder_layers": 2,
                "decoder_layers": 2,
                "encoder_attention_heads": 4,
                "decoder_attention_heads": 4,
                "encoder_ffn_dim": 320 * scale,
                "decoder_ffn_dim": 320 * scale,
                "vocab_size": 100,
                "num_mel_bins": 8,
                "max_source_positions": 16,
                "max_target_positions": 24,
                "pad_token_id": 0,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "decoder_start_token_id": 3,
            },
            lambda model: _generate(model, input_features=_random(model, 2, 8, 32)),
        ),
        "vit": Kind(
            "ViTForImageClassification",
            "ViTConfig",
            vision,
            lambda model: model(_random(model, 2, 3, 32, 32)).logits,
        ),
        "clip": Kind(
            "CLIPModel",
            "CLIPConfig",
            {
                "text_config": {**size, "vocab_size": 100, "eos_token_id": 2},
                "vision_config": vision,
                "projection_dim": 32,
            },
            _clip,
        ),
    }


def save(kind: Kind, directory: Path, *, deviation: float = 0.2, **options: Any) -> Path:
    """Write a model of random weights, and return where."""
    torch.manual_seed(0)
    config = getattr(transformers, kind.config)(**kind.options)
    model = getattr(transformers, kind.model)(config)
    with torch.no_grad():
        for parameter in model.parameters():  # far from what a constructor gives
            parameter.normal_(0, deviation)
    model.save_pretrained(directory, **options)
    return directory
