"""Sentences ranked by how near they are to a query, with the encoder under a cap.

python examples/embeddings.py path/to/encoder --cap 64MiB --query "what turns water into power"
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from transformers import AutoTokenizer

from penstock.integrations import transformers as streamed

SENTENCES = (
    "The turbine is driven by water that falls through a pipe.",
    "Knead the dough for ten minutes and let it rise.",
    "She tuned the violin before the second movement.",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Embed a query and some sentences, and rank them by the cosine between them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", help="as save_pretrained writes it")
    parser.add_argument("--cap", default="64MiB", help="device memory for weights")
    parser.add_argument("--query", default="what turns water into power")
    options = parser.parse_args(arguments)

    tokenizer = AutoTokenizer.from_pretrained(options.directory)
    model = streamed.load(options.directory, options.cap, model_class="AutoModel", strict=False)
    inputs = tokenizer([options.query, *SENTENCES], padding=True, return_tensors="pt")
    inputs = inputs.to(model.device)
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state  # (texts, tokens, width)
    weights = inputs.attention_mask.unsqueeze(-1).to(hidden.dtype)
    means = (hidden * weights).sum(1) / weights.sum(1)  # over the tokens of a text
    scores = torch.nn.functional.cosine_similarity(means[:1], means[1:])
    for score, sentence in sorted(zip(scores.tolist(), SENTENCES, strict=True), reverse=True):
        print(f"{score:.3f} {sentence}")


if __name__ == "__main__":
    main()
