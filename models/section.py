"""Reading one section of a published ``config.json``: every value typed, every key accounted for.

A published config has a hundred keys, most of which change nothing. A reader reads those that do;
:meth:`Section.ignore` lists those that do not, and :meth:`Section.unknown` lists the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from ..errors import CapabilityError, CheckpointError

MAX_SIZE = 1 << 24
"""Largest size that a config may state: more is damage, and would be computed with for hours."""

# What transformers writes into every config: how to train, to generate or to display a model, never its
# computation.
# fmt: off
GENERAL = frozenset({
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_experts_implementation",
    "_name_or_path", "add_cross_attention", "architectures", "attn_implementation", "auto_map",
    "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward",
    "cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype",
    "early_stopping", "encoder_no_repeat_ngram_size", "eos_token_id",
    "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id",
    "fp16", "id2label", "initializer_factor", "initializer_range", "is_decoder", "is_encoder_decoder",
    "label2id", "length_penalty", "max_length", "min_length", "model_type", "no_repeat_ngram_size",
    "num_beam_groups", "num_beams", "num_return_sequences", "output_attentions", "output_hidden_states",
    "output_scores", "pad_token_id", "prefix", "problem_type", "pruned_heads", "remove_invalid_values",
    "repetition_penalty", "return_dict", "return_dict_in_generate", "sep_token_id", "suppress_tokens",
    "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder",
    "tie_word_embeddings", "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript",
    "transformers_version", "typical_p", "use_bfloat16", "use_cache", "use_flash_attn",
})
# fmt: on


class Section:
    """A JSON object of a config.

    Args:
        data: the object.
        where: its name in messages: ``config.json: llm_config``.
    """

    def __init__(self, data: Mapping[str, Any], where: str) -> None:
        self.data, self.where = data, where
        self._named: set[str] = set(GENERAL)

    def get(self, key: str) -> Any:
        """The value of ``key``; None where it is absent or null."""
        self._named.add(key)
        return self.data.get(key)

    def bad(self, key: str, need: str) -> NoReturn:
        """Refuse the value of ``key``; ``need`` is the value it should have."""
        value = self.data.get(key)
        shown = repr(value)
        raise CheckpointError(
            f"{self.where}.{key} is {shown if len(shown) < 80 else shown[:80] + '...'}.",
            f"Needed is {need}.",
            "Use the config.json that was published with these weights.",
        )

    def integer(self, key: str, default: int | None = None, least: int = 1, most: int = MAX_SIZE) -> int:
        """A whole number; CheckpointError where it is absent and has no ``default``."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if value is None:
            raise CheckpointError(
                f"{self.where} has no {key}.",
                "The model's size is read from it.",
                "Use the config.json that was published with these weights.",
            )
        if type(value) is not int or not least <= value <= most:
            self.bad(key, f"a whole number from {least} to {most}")
        return value

    def token(self, key: str) -> int | None:
        """A token id, or None."""
        return None if self.get(key) is None else self.integer(key, least=0)

    def tokens(self, key: str) -> tuple[int, ...]:
        """One token id, or a list of them, or none."""
        value = self.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(type(i) is int and -1 <= i < MAX_SIZE for i in ids):
            self.bad(key, "a token id or a list of them")
        return tuple(i for i in ids if i >= 0)

    def number(self, key: str, default: float, least: float = 0.0) -> float:
        """A finite number of at least ``least``."""
        value = self.get(key)
        if value is None:
            return default
        if type(value) not in (int, float) or not math.isfinite(value) or value < least:
            self.bad(key, f"a number of at least {least}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.get(key)
        if value is None:
            return default
        if type(value) is not bool:
            self.bad(key, "true or false")
        return value

    def text(self, key: str, default: str = "") -> str:
        """A text."""
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            self.bad(key, "a text")
        return value

    def choice(self, key: str, default: str, *others: str) -> str:
        """One of the texts that are implemented; CapabilityError naming the key for another one."""
        value = self.text(key, default)
        if value not in (default, *others):
            raise CapabilityError(
                f"{self.where}.{key} is {value!r}.",
                f"Implemented: {', '.join((default, *others))}.",
                "Use a model of the published family.",
            )
        return value

    def items(self, key: str) -> list[Any] | None:
        """A list, or None."""
        value = self.get(key)
        if value is not None and not isinstance(value, list):
            self.bad(key, "a list")
        return value

    def object(self, key: str) -> dict[str, Any] | None:
        """An object, or None."""
        value = self.get(key)
        if value is not None and not isinstance(value, dict):
            self.bad(key, "an object")
        return value

    def section(self, key: str) -> Section:
        """The section ``key``, which must be there."""
        value = self.object(key)
        if value is None:
            raise CheckpointError(
                f"{self.where} has no {key} section.",
                "A model's parts are described in separate sections.",
                "Use the config.json that was published with these weights.",
            )
        return Section(value, f"{self.where}: {key}")

    def only(self, key: str, *values: Any, why: str) -> None:
        """CapabilityError where ``key`` is there, and none of ``values``."""
        value = self.get(key)
        if value is not None and value not in values:
            raise CapabilityError(f"{self.where}.{key} is {value!r}.", why, "This form is not supported.")

    def ignore(self, keys: Iterable[str]) -> None:
        """Keys that change no number of a forward pass."""
        self._named.update(keys)

    def unknown(self) -> tuple[str, ...]:
        """Keys with a value that were neither read nor ignored, after the section's name."""
        prefix = self.where.partition(": ")[2].replace(": ", ".")
        names = sorted(k for k, v in self.data.items() if k not in self._named and v is not None)
        return tuple(f"{prefix}.{name}" if prefix else name for name in names)
