"""Training of internvl-nano's tokenizer: LLaMA-style sentencepiece BPE whose pieces are whole words."""

from __future__ import annotations

import io
from collections.abc import Iterable

from ..synthetic.captions import corpus

VOCAB_SIZE = 512
# Separates words for the trainer only: pieces never cross a word, so no two words ever share a token and a
# combination of attributes that was never trained on has the same kind of tokens as any other.
_DELIMITER = "\x1f"


def train_tokenizer(texts: Iterable[list[str]] | None = None, vocab_size: int = VOCAB_SIZE) -> bytes:
    """A ``tokenizer.model`` from texts split in words (:func:`~..synthetic.captions.corpus` unless given).

    Settings are LLaMA's: unk 0, bos 1, eos 2, no pad piece (id 0 pads), no text normalisation, bytes as a
    fallback, so that id 0 never stands for text. Equal input gives equal bytes (one thread, no sampling).
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
