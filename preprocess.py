"""The name that :mod:`.inputs.preprocess` and :mod:`.inputs.tokenizer` had in version 0.1."""

from .inputs.images import load_image
from .inputs.preprocess import ImageSettings, preprocess_images
from .inputs.tokenizer import CAPTION_PROMPT
from .inputs.tokenizer import SentencePieceTokenizer as Tokenizer

__all__ = ["CAPTION_PROMPT", "ImageSettings", "Tokenizer", "load_image", "preprocess_images"]
