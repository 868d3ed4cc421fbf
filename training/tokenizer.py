"""Tokenizers of the shipped models: LLaMA-style sentencepiece BPE, and Qwen 2's byte-level BPE.

Their pieces are whole words.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable

from ..inputs.tokenizer import QWEN2_SPLIT, byte_letters
from ..synthetic.captions import corpus

VOCAB_SIZE = 512
# Separates words for the trainer only: pieces never cross a word, so no two words ever share a token and a
# combination of attributes that was never trained on has the same kind of tokens as any other.
_DELIMITER = "\x1f"
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")
"""The special tokens of :func:`byte_level_tokenizer`."""


def train_tokenizer(texts: Iterable[list[str]] | None = None, vocab_size: int = VOCAB_SIZE) -> bytes:
    """A ``tokenizer.model`` from texts split in words (:func:`~..synthetic.captions.corpus` unless given).

    Settings are LLaMA's: unk 0, bos 1, eos 2, no pad piece (id 0 pads), no text normalisation, bytes as a
    fallback, so that id 0 is never text. Equal input gives equal bytes (one thread, no sampling).
    """
    import sentencepiece

    model = io.BytesIO()
    lines = [_DELIMITER.join(text) for text in (corpus() if texts is None else texts)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        character_coverage=1.0,
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        pretokenization_delimiter=_DELIMITER,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def byte_level_tokenizer(pieces: Iterable[str]) -> str:
    """A ``tokenizer.json`` of Qwen 2's kind: 256 bytes, ``pieces`` built byte by byte, :data:`SPECIALS`.

    Merges go from a piece's first byte on. So a text takes other tokens than single bytes only where it
    begins as a piece does; ids are bytes, then merges in order, then special tokens.
    """
    letters = {byte: letter for letter, byte in byte_letters().items()}
    vocabulary = {letters[byte]: byte for byte in range(256)}
    merges: list[list[str]] = []
    for piece in pieces:
        head, *rest = (letters[byte] for byte in piece.encode())
        for letter in rest:
            if head + letter not in vocabulary:
                vocabulary[head + letter] = len(vocabulary)
                merges.append([head, letter])
            head += letter
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": len(vocabulary) + i, "content": text, **flags} for i, text in enumerate(SPECIALS)]
    split = {"type": "Split", "pattern": {"Regex": QWEN2_SPLIT}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    data = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "post_processor": None,
        "decoder": {**level, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges, "byte_fallback": False},
    }
    return json.dumps(data, ensure_ascii=False)
