"""Text from a language model that is larger than the memory it may take.

python examples/text_generation.py path/to/model --cap 8GiB --prompt "Once upon a time"
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from transformers import AutoTokenizer

import penstock
from penstock.integrations import transformers as streamed


def main(arguments: Sequence[str] | None = None) -> None:
    """Continue a prompt, and show what was moved for that."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", help="as save_pretrained writes it")
    parser.add_argument("--cap", default="8GiB", help="device memory for weights")
    parser.add_argument("--prompt", default="Once upon a time")
    parser.add_argument("--tokens", type=int, default=32)
    options = parser.parse_args(arguments)

    tokenizer = AutoTokenizer.from_pretrained(options.directory)
    model = streamed.load(options.directory, options.cap)
    inputs = tokenizer(options.prompt, return_tensors="pt").to(model.device)
    tokens = model.generate(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        max_new_tokens=options.tokens,
        do_sample=False,
    )
    print(tokenizer.decode(tokens[0], skip_special_tokens=True))
    print(penstock.manager_of(model).report())


if __name__ == "__main__":
    main()
