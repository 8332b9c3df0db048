"""The tokenizer of a model with a closed vocabulary: one word, one token, in the file format of the published ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from wanloom.durable import write_atomic

SPECIAL = ("<pad>", "</s>", "<unk>")  # 0, 1, 2; padding and end of sentence as UMT5 has them


def write_tokenizer(words: Sequence[str], folder: Path, length: int) -> None:
    """`folder`/tokenizer.json: lower case, cut at spaces and marks, `</s>` at the end, other words are `<unk>`."""
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "tokenizer.json", tokenizer.to_str(pretty=True).encode())
    about = f'{{"model_max_length": {length}, "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}}\n'
    write_atomic(folder / "tokenizer_config.json", about.encode())
