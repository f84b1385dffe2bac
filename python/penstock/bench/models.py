"""A Llama-shaped checkpoint of random weights, and the model that reads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from penstock.loading.skeleton import build_skeleton

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM

__all__ = ["build", "llama_config", "resident_model", "write_checkpoint"]

SHARD_BYTES = 2 << 30


def llama_config(layers: int, hidden: int = 4096, vocabulary: int = 32000) -> LlamaConfig:
    """Return the configuration of Llama-3-8B with another depth, width and vocabulary."""
    from transformers import LlamaConfig

    heads = hidden // 128
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        vocab_size=vocabulary,
        rope_theta=500000.0,  # type: ignore[call-arg]
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


def build(config: LlamaConfig) -> LlamaForCausalLM:
    """Build the model as transformers does, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    from_config: Callable[..., LlamaForCausalLM] = AutoModelForCausalLM.from_config
    model = from_config(config, dtype=torch.bfloat16)
    model.eval()  # type: ignore[no-untyped-call]
    return model


def write_checkpoint(config: LlamaConfig, directory: Path, device: str) -> int:
    """Write random bf16 weights as sharded safetensors; return their bytes."""
    generator = torch.Generator(device).manual_seed(20)
    names: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    shard_bytes = total = 0

    def flush() -> None:
        nonlocal shard_bytes
        file = f"model-{len(set(names.values())) + 1:05d}.safetensors"
        save_file(shard, directory / file)
        names.update(dict.fromkeys(shard, file))
        shard.clear()
        shard_bytes = 0

    skeleton = build_skeleton(lambda: build(config))
    for name, parameter in skeleton.named_parameters():
        value = torch.randn(parameter.shape, generator=generator, device=device)
        scale = 1.0 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
        shard[name] = (value * scale).to(torch.bfloat16).cpu()
        nbytes = shard[name].nbytes
        shard_bytes += nbytes
        total += nbytes
        if shard_bytes >= SHARD_BYTES:
            flush()
    if shard:
        flush()
    index = {"metadata": {"total_size": total}, "weight_map": names}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def resident_model(
    config: LlamaConfig, directory: Path, device: str, *, private: bool = False
) -> LlamaForCausalLM:
    """Load the checkpoint the ordinary way, all of it on the device.

    Parameters
    ----------
    private
        Whether to copy the weights into memory of their own; on the CPU they are views of the
        mapped files otherwise.
    """
    model = build_skeleton(lambda: build(config))
    state: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        for name, tensor in load_file(file, device=device).items():
            state[name] = tensor.clone() if private else tensor
    model.load_state_dict(state, assign=True)
    for owner in model.modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[name] = buffer.to(device)
    return model  # type: ignore[return-value]
