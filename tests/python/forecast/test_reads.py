"""Which tensors one operation is taken to read."""

from __future__ import annotations

import pytest
from torch import nn

from penstock.forecast.reads import find_reads


def reads_of(*names: str | tuple[str, ...], vectors: tuple[str, ...] = ()) -> list[list[str]]:
    tensors = [name if isinstance(name, tuple) else (name,) for name in (*names, *vectors)]
    shapes = [(2, 2)] * len(names) + [(2,)] * len(vectors)
    return [[tensors[index][0] for index in read.tensors] for read in find_reads(tensors, shapes)]


def reads_of_module(module: nn.Module) -> list[set[str]]:
    names = [name for name, _ in module.named_parameters()]
    shapes = [parameter.shape for parameter in module.parameters()]
    found = find_reads([(name,) for name in names], shapes)
    return [{names[index] for index in read.tensors} for read in found]


def test_a_matrix_is_read_with_the_vectors_of_its_module() -> None:
    found = reads_of("a.weight", "a.other", "b.weight", vectors=("a.bias", "norm.weight"))
    assert found == [
        ["a.weight", "a.bias"],
        ["a.other", "a.bias"],
        ["b.weight"],
        ["norm.weight"],
    ]


def test_a_tied_tensor_is_read_by_each_of_its_owners() -> None:
    found = reads_of(("embed.weight", "head.weight"), "layer.weight")
    assert found == [["embed.weight"], ["embed.weight"], ["layer.weight"]]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_read_whole(kind: type[nn.Module]) -> None:
    module = kind(4, 4, num_layers=2, bidirectional=True)
    assert reads_of_module(module) == [{name for name, _ in module.named_parameters()}]


def test_attention_and_encoder_layers_are_read_whole() -> None:
    attention = nn.MultiheadAttention(4, 2)
    assert reads_of_module(attention) == [{name for name, _ in attention.named_parameters()}]
    layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 4, batch_first=True), 2)
    found = reads_of_module(layers)
    assert [len(read) for read in found] == [12, 12]
    assert set().union(*found) == {name for name, _ in layers.named_parameters()}


def test_experts_are_read_together_as_their_stack_would_be() -> None:
    names = [
        f"mlp.experts.{expert}.{projection}.weight"
        for expert in range(2)
        for projection in ("gate_proj", "up_proj", "down_proj")
    ]
    found = [set(read) for read in reads_of(*names)]
    assert found == [
        {name for name in names if "down" not in name},
        {name for name in names if "down" in name},
    ]


def test_experts_that_are_indexed_are_read_one_by_one() -> None:
    names = [("experts.gate_up_proj",), ("experts.gate_up_proj_bias",), ("gate.weight",)]
    found = find_reads(names, [(4, 2, 2), (4, 2), (4, 2)], indexed=True)
    assert [(read.tensors, read.part, read.parts) for read in found] == [
        *(((0,), part, 4) for part in range(4)),
        *(((1,), part, 4) for part in range(4)),
        ((2,), 0, 1),
    ]
    assert found[2].extent(1000, 64) == (1032, 16)
    projections = ("w1", "w3", "w2")
    alone = [(f"experts.{each}.{name}.weight",) for each in range(2) for name in projections]
    found = find_reads(alone, [(2, 2)] * 6, indexed=True)
    assert [read.tensors for read in found] == [(0, 1), (2,), (3, 4), (5,)]


def test_scales_are_read_with_the_weights_that_they_belong_to() -> None:
    found = reads_of("a.weight", "a.weight_scale_inv", "b.qweight", "b.qzeros", "b.scales")
    assert found == [["a.weight", "a.weight_scale_inv"], ["b.qweight", "b.qzeros", "b.scales"]]
