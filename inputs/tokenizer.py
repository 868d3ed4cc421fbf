"""Tokenizers of every checkpoint in one class: SentencePiece, and files of the ``tokenizers`` library.

A user's text stays text: :meth:`Tokenizer.encode` never gives the id of a special token for any
text. Special tokens come from prompts alone, as ids (:meth:`Tokenizer.markup`). No torch, no transformers.

    tokenizer.model                      SentencePiece: InternVL-C/G, InternLM2 and 3, Phi-3, Yi, LLaMA 2
    tokenizer.json                       LLaMA 3, GPT-OSS, transformers-native checkpoints
    vocab.json, merges.txt               Qwen 2, 2.5, 3
    added_tokens.json, tokenizer_config.json     special tokens of all three; the second wins
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from ..arrays import Array
from ..errors import CapabilityError, CheckpointError, InputError
from ..files.lfs import refuse_lfs_pointer
from ..files.text import decode_text
from ..forks import cached_property

BUCKETS = (16, 32, 48, 80)
MAX_LENGTH = 80
#: Contrastive texts are this plus the caption, without a space between (as published).
CONTRASTIVE_PREFIX = "summarize:"
#: The prompt of the caption decoder, by language. The English one is the published one.
CAPTION_PROMPT: dict[str, str] = {"en": "English caption:", "zh": "中文描述:"}

MODEL, JSON, VOCAB, MERGES = "tokenizer.model", "tokenizer.json", "vocab.json", "merges.txt"
CONFIG, ADDED, SPECIAL = "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"
_OWN = f"Take the {MODEL} of the checkpoint."
_MAX_BYTES = 256 << 20
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {"Qwen2Tokenizer": QWEN2_SPLIT}
"""How texts are split before byte-level BPE, for tokenizers of ``vocab.json`` and ``merges.txt``."""
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


class AddedToken(NamedTuple):
    """A token added to the trained vocabulary.

    ``special``: of prompts, never of texts. ``lstrip`` and ``rstrip``: it takes the white space on that side.
    """

    id: int
    content: str
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False


class Tokenizer(ABC):
    """Texts to ids and back.

    Attributes:
        eos: id of the token that ends an answer, unless the prompt's format names others.
        prefix: ids that every sequence begins with: bos, or nothing.
        specials: ids of the special tokens by their texts.
        plain: ids of added tokens that are not special; they are found in texts.
        files: names and contents from which :func:`load_tokenizer` makes the same one.
        reads_texts: False of :class:`NoTokenizer` alone.
    """

    reads_texts: ClassVar[bool] = True

    eos: int
    prefix: tuple[int, ...]
    files: Mapping[str, bytes]

    def __init__(self, name: str, added: Iterable[AddedToken]) -> None:
        self.name = name
        tokens = sorted(added)
        self.specials = {token.content: token.id for token in tokens if token.special}
        self.plain = {token.content: token.id for token in tokens if not token.special}
        self._special_ids = frozenset(self.specials.values())
        self._never_text = self._special_ids
        self._lstrips: set[str | int] = {token.id for token in tokens if token.lstrip}
        self._rstrips: set[str | int] = {token.id for token in tokens if token.rstrip}
        self._marks = _alternatives(self.specials)

    @abstractmethod
    def __len__(self) -> int:
        """One more than the highest id."""

    @abstractmethod
    def piece(self, token: int) -> bytes:
        """The bytes of an id, UTF-8, perhaps a part of a character; empty: special, or not an id."""

    @abstractmethod
    def _ids(self, text: str, first: bool) -> list[int]:
        """Ids of valid ``text``, in which plain added tokens are found; ``first``: nothing is before it."""

    @property
    def digest(self) -> str:
        """sha256 over its files, 64 hex digits."""
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in self.files.items()}
        return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()

    @property
    def leading_space(self) -> bool:
        """Whether a space in front of a text is the tokenizer's own, and is not given back."""
        return False

    def special(self, content: str) -> int:
        """The id of a special token.

        Raises:
            CheckpointError: there is none of that text: the tokenizer is of another model.
        """
        if content in self.specials:
            return self.specials[content]
        raise CheckpointError(
            f"{self.name} has no special token {content!r}.",
            "The prompt of this model needs it; the tokenizer is of another model.",
            "Copy the tokenizer's files of the published checkpoint there.",
        )

    def encode(self, text: str) -> list[int]:
        """Ids of ``text`` alone, without bos and eos. Special tokens that it spells are text.

        Raises:
            InputError: no text, or not valid Unicode.
        """
        if not isinstance(text, str):
            raise InputError(
                "A text is none.",
                f"It is of type {type(text).__name__}.",
                "Decode it: text.decode()." if isinstance(text, bytes) else "Give str.",
            )
        return self.encode_parts([text])

    def markup(self, text: str) -> list[str | int]:
        """Trusted ``text`` with its special tokens as ids, for :meth:`encode_parts`."""
        parts: list[str | int] = []
        for number, part in enumerate(self._marks.split(text)):
            if part:
                parts.append(self.specials[part] if number % 2 else part)
        return parts

    def encode_parts(self, parts: Iterable[str | int]) -> list[int]:
        """Ids of texts and of special tokens in order. Texts that meet are encoded as one."""
        joined: list[str | int] = []
        for part in parts:
            last = joined[-1] if joined else None
            if isinstance(part, str) and isinstance(last, str):
                joined[-1] = last + part
            else:
                joined.append(part)
        ids: list[int] = []
        for number, part in enumerate(joined):
            if isinstance(part, int):
                ids.append(part)
                continue
            if number and joined[number - 1] in self._rstrips:
                part = part.lstrip()
            if number + 1 < len(joined) and joined[number + 1] in self._lstrips:
                part = part.rstrip()
            if part:
                ids += self._text(part, number == 0)
        return ids

    def _text(self, text: str, first: bool) -> list[int]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(
                f"Cannot encode the text {text[:80]!r}.", str(error), "Use valid Unicode."
            ) from error
        ids = self._ids(text, first)
        if self._never_text.isdisjoint(ids):
            return ids
        # A trained piece has the id of a special token, and the text spells it: split after each letter.
        broken = [token for at, letter in enumerate(text) for token in self._ids(letter, first and at == 0)]
        if self._never_text.isdisjoint(broken):
            return broken
        raise InputError(f"Cannot encode the text {text[:80]!r}.", "A letter of it is a special token.")

    def decode(self, ids: Iterable[int] | Array, *, until_eos: bool = True) -> str:
        """Text of ``ids`` up to the first eos, without special tokens and ids that the tokenizer lacks.

        A character whose last bytes are missing at the end is left out.
        """
        stream, text = Pieces(self, until_eos), []
        for token in ids:
            text.append(stream.add(int(token)))
            if stream.ended:
                break
        return "".join(text)

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Text of ``ids`` in pieces, as they come: no character is given out before it is whole."""
        pieces = Pieces(self)
        return (piece for token in ids if (piece := pieces.add(token)))

    # --- InternVL-C and G ---

    def encode_contrastive(
        self,
        texts: Sequence[str],
        max_length: int = MAX_LENGTH,
        buckets: Sequence[int] = BUCKETS,
        prefix: str = CONTRASTIVE_PREFIX,
    ) -> tuple[Array, Array]:
        """Ids of ``prefix + text`` with bos and eos: (input_ids int64 [B, T], lengths int64 [B]).

        Padded on the right with 0 to the smallest bucket that holds the longest text. Text pieces are cut
        to leave room before bos and eos are put around them, as transformers' LlamaTokenizer does:
        eos, where the embedding is read, is always there.
        """
        room = max_length - len(self.prefix) - 1
        rows = [[*self.prefix, *self.encode(prefix + text)[:room], self.eos] for text in texts]
        return pad_ids(rows, [b for b in buckets if b < max_length] + [max_length])

    def encode_captions(
        self, prompts: Sequence[str], texts: Sequence[str], buckets: Sequence[int] = BUCKETS
    ) -> tuple[Array, Array, Array]:
        """Prompt, caption and eos, for training: (input_ids int64 [B, T], lengths, prompt lengths int64 [B]).

        The first ``prompt length`` ids of a row are :meth:`encode_prompt` of its prompt; ids from there to
        ``length`` (eos is the last) are the decoder's targets.
        """
        heads = [self.encode_prompt(prompt) for prompt in prompts]
        rows = [
            [*self.encode_prompt(prompt + text), self.eos]
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        for head, row, text in zip(heads, rows, texts, strict=True):
            if row[: len(head)] != head:
                raise InputError(
                    f"The caption {text!r} cannot be trained on.",
                    "Its first letters merge with the prompt's last ones into one token.",
                )
        ids, lengths = pad_ids(rows, buckets)
        return ids, lengths, np.array([len(head) for head in heads], np.int64)

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a caption prompt, ``English caption:``: bos, no eos."""
        return [*self.prefix, *self.encode(text)]


class Pieces:
    """The text of one sequence whose tokens come one by one."""

    def __init__(self, tokenizer: Tokenizer, until_eos: bool = True) -> None:
        self._tokenizer, self._until_eos = tokenizer, until_eos
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip, self.ended = tokenizer.leading_space, False

    def add(self, token: int) -> str:
        """The characters that are whole with ``token``; empty if there are none."""
        self.ended |= self._until_eos and token == self._tokenizer.eos
        raw = b"" if self.ended else self._tokenizer.piece(token)
        if self._strip and raw:
            raw, self._strip = raw.removeprefix(b" "), False
        return self._decoder.decode(raw)


class SentencePieceTokenizer(Tokenizer):
    """A ``tokenizer.model``. LLaMA's has bos 1, eos 2, and id 0 pads."""

    bos: int

    def __init__(
        self,
        model: str | os.PathLike[str] | bytes,
        added: Iterable[AddedToken] = (),
        eos: str | None = None,
        add_bos: bool = True,
        legacy: bool = True,
    ) -> None:
        """Read a ``tokenizer.model`` file, or its bytes.

        Args:
            model: the file.
            added: tokens added to its pieces, or in place of some.
            eos: the text of another end token.
            add_bos: sequences begin with bos.
            legacy: the model's own space is put before each text between special tokens, not only the first.

        Raises:
            CheckpointError: not a SentencePiece model, one without bos or eos, or no such ``eos``.
        """
        import sentencepiece

        name = "the tokenizer" if isinstance(model, bytes) else str(model)
        try:
            self.model = model if isinstance(model, bytes) else _bytes(Path(model))
            self._sp = sentencepiece.SentencePieceProcessor(model_proto=self.model)
        except (OSError, RuntimeError) as error:
            why = getattr(error, "strerror", None) or "It is not a SentencePiece model, or a damaged one."
            raise CheckpointError(f"Cannot read {name}.", why, _OWN) from error
        self.bos, own_eos = int(self._sp.bos_id()), int(self._sp.eos_id())
        if self.bos < 0 or own_eos < 0:
            raise CheckpointError(f"Cannot use {name}.", "It has no bos or no eos piece.", _OWN)
        tokens = {token.id: token for token in added}
        pieces = range(int(self._sp.vocab_size()))
        for token in pieces:
            if self._sp.is_control(token) and token not in tokens:
                tokens[token] = AddedToken(token, str(self._sp.id_to_piece(token)))
        super().__init__(name, tokens.values())
        self.prefix, self.files = (self.bos,) if add_bos else (), {MODEL: self.model}
        self._size = max([len(pieces), *(token + 1 for token in tokens)])
        self._never_text -= {self._sp.unk_id()}  # texts get it where the model lacks their letters
        self._added = {t.id: t.content for t in tokens.values()}
        self._plain = _alternatives(self.plain)
        self._space: bool = self._sp.encode("a", out_type=str)[:1] != ["a"]
        self._legacy = legacy
        self.eos = own_eos if eos is None else self.special(eos)

    def __len__(self) -> int:
        return self._size

    @property
    def leading_space(self) -> bool:
        """As of the class above: where the model puts a space before every text."""
        return self._space

    def piece(self, token: int) -> bytes:
        """As of the class above."""
        if token in self._added:
            return b"" if token in self._special_ids else self._added[token].encode()
        if not 0 <= token < self._sp.vocab_size():
            return b""
        text = str(self._sp.id_to_piece(token))
        if self._sp.is_byte(token):
            return bytes([int(text[3:-1], 16)])
        if self._sp.is_control(token) or self._sp.is_unknown(token) or self._sp.is_unused(token):
            return b""
        return text.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()

    def _ids(self, text: str, first: bool) -> list[int]:
        ids: list[int] = []
        for number, part in enumerate(self._plain.split(text) if self.plain else [text]):
            if number % 2:
                ids.append(self.plain[part])
            elif part:
                spaced = self._legacy or (first and number == 0)
                ids += self._sp.encode(part) if spaced or not self._space else self._continued(part)
        return ids

    def _continued(self, text: str) -> list[int]:
        """Ids of ``text`` without the model's own space: those after a byte that merges with nothing."""
        head, ids = self._sp.encode("\0"), self._sp.encode("\0" + text)
        return list(ids[len(head) :] if ids[: len(head)] == head else self._sp.encode(text))


class NoTokenizer(Tokenizer):
    """In place of a tokenizer, where a model reads no texts or its tokenizer is not there.

    It encodes nothing.

    Args:
        size: number of the model's token ids, where it takes prompts as ids; 0: it takes none.
    """

    reads_texts = False

    def __init__(self, size: int = 0) -> None:
        super().__init__("no tokenizer", ())
        self.files, self.prefix, self.eos, self._size = {}, (), 0, size

    def __len__(self) -> int:
        return self._size

    @property
    def leading_space(self) -> bool:
        """False: it takes no texts."""
        return False

    def piece(self, token: int) -> bytes:
        """CapabilityError, always."""
        raise self._refused()

    def _ids(self, text: str, first: bool) -> list[int]:
        raise self._refused()

    def _refused(self) -> CapabilityError:
        if self._size:
            return CapabilityError(
                "This model reads no texts.",
                "Its checkpoint had no tokenizer.",
                "Give it token ids (generate), or build again with the tokenizer's files in the checkpoint.",
            )
        return CapabilityError("This model reads no texts.", "It has no tokenizer.", "Give it images alone.")

    def special(self, content: str) -> int:
        """CapabilityError, always."""
        raise self._refused()


class FastTokenizer(Tokenizer):
    """A tokenizer of the ``tokenizers`` library, from ``tokenizer.json`` or built as Qwen's."""

    def __init__(self, text: str, name: str, eos: str | None = None) -> None:
        """Read the content of a ``tokenizer.json``.

        Args:
            text: JSON.
            name: of the file in errors.
            eos: the text of the end token; None: ``<|endoftext|>`` or ``</s>``.

        Raises:
            CheckpointError: not such a file, of a kind that is not known here, or without end token.
        """
        data = _object(text, name)
        self.files = {JSON: text.encode()}
        self._tokenizer = _parsed(text, name)
        later = _without_first_space(data)
        self._later = self._tokenizer if later is None else _parsed(later, name)
        added = [
            AddedToken(number, token.content, token.special, token.lstrip, token.rstrip)
            for number, token in self._tokenizer.get_added_tokens_decoder().items()
        ]
        super().__init__(name, added)
        for tokenizer in (self._tokenizer, self._later):
            tokenizer.no_truncation()
            tokenizer.no_padding()
            tokenizer.encode_special_tokens = True  # of texts: as text
        self._added = {token.id: token for token in added}
        self._vocabulary: dict[int, str] = {i: t for t, i in self._tokenizer.get_vocab(True).items()}
        self._bytes, self._space = _decoding(data.get("decoder"), name)
        self.prefix = tuple(self._tokenizer.encode("", add_special_tokens=True).ids)
        ends = [end for end in ("<|endoftext|>", "</s>") if end in self.specials] if eos is None else [eos]
        if not ends:
            raise CheckpointError(f"{name} names no end token.", "", f"Put {CONFIG} next to it.")
        self.eos = self.special(ends[0])

    def __len__(self) -> int:
        return self._size

    @cached_property
    def _size(self) -> int:
        return 1 + max(self._vocabulary, default=-1)

    @property
    def leading_space(self) -> bool:
        """As of the class above: where the decoder strips one."""
        return self._space

    def piece(self, token: int) -> bytes:
        """As of the class above."""
        added = self._added.get(token)
        if added is not None:
            return b"" if added.special else added.content.encode()
        text = self._vocabulary.get(token, "")
        if self._bytes is not None:
            try:
                return bytes([self._bytes[letter] for letter in text])
            except KeyError:
                return text.encode()
        if re.fullmatch("<0x[0-9A-Fa-f]{2}>", text):
            return bytes([int(text[3:-1], 16)])
        return text.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()

    def _ids(self, text: str, first: bool) -> list[int]:
        tokenizer = self._tokenizer if first else self._later
        return list(tokenizer.encode(text, add_special_tokens=False).ids)


def tokenizer_files(folder: Path) -> tuple[str, ...]:
    """The names of the files in ``folder`` that :func:`load_tokenizer` reads; empty: there is none."""
    has = {name for name in (MODEL, JSON, VOCAB, MERGES) if (folder / name).is_file()}
    extra = [name for name in (CONFIG, ADDED, SPECIAL) if (folder / name).is_file()]
    if MODEL in has and not (JSON in has and _fast(folder)):
        return (MODEL, *extra)
    if JSON in has:
        return (JSON, *extra)
    return (VOCAB, MERGES, *extra) if {VOCAB, MERGES} <= has else ()


def load_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a checkpoint's folder, whichever files it has.

    Raises:
        CheckpointError: none there, or one that cannot be read, or of a kind that is not known here.
    """
    folder = Path(folder)
    files = tokenizer_files(folder)
    if not files:
        raise CheckpointError(
            f"There is no tokenizer in {folder}.",
            f"Looked for {MODEL}, {JSON}, and {VOCAB} with {MERGES}.",
            "Copy the tokenizer's files of the published checkpoint there.",
        )
    tokenizer = _loaded(folder, files[0])
    try:
        tokenizer.files = {name: _bytes(folder / name) for name in files}
    except OSError as error:
        raise CheckpointError(f"Cannot read the tokenizer in {folder}.", f"{error}.") from error
    return tokenizer


def _loaded(folder: Path, file: str) -> Tokenizer:
    config = _settings(folder)
    added, eos = _added_tokens(folder, config), _content(config.get("eos_token"))
    if file == MODEL:
        add_bos, legacy = (_flag(config, key, True, folder) for key in ("add_bos_token", "legacy"))
        return SentencePieceTokenizer(folder / MODEL, added, eos, add_bos, legacy)
    if file == JSON:
        return FastTokenizer(_text_of(folder / JSON), str(folder / JSON), eos)
    kind = str(config.get("tokenizer_class", "")).removesuffix("Fast")
    if kind not in _SPLITS:
        raise CheckpointError(
            f"Cannot use {folder / VOCAB}.",
            f"{CONFIG} names the tokenizer {kind or 'of no class'}; known are {', '.join(_SPLITS)}.",
            f"Save it as {JSON}: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)",
        )
    return FastTokenizer(_byte_level(folder, _SPLITS[kind], added), str(folder / VOCAB), eos)


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Compare a tokenizer with the rows of a model's embeddings.

    Fewer ids than rows are normal within 2% (tables are padded: Qwen 2.5's by 271 of 151936).

    Raises:
        CheckpointError: the tokenizer is of another model.
    """
    size = len(tokenizer)
    if size > vocab_size or vocab_size - size > max(64, vocab_size // 50):
        raise CheckpointError(
            f"{tokenizer.name} is not of this model.",
            f"It has {size} ids, the model knows {vocab_size}.",
            "Copy the tokenizer's files of the published checkpoint there.",
        )


def pad_ids(rows: Sequence[Sequence[int]], buckets: Sequence[int]) -> tuple[Array, Array]:
    """Pad on the right with 0 to the smallest bucket: (ids int64 [B, T], lengths int64 [B])."""
    lengths = np.array([len(row) for row in rows], np.int64)
    longest = int(lengths.max(initial=0))
    fits = [b for b in sorted(buckets) if b >= longest]
    if not fits:
        raise InputError(
            f"A text has {longest} tokens.", f"The longest bucket is {max(buckets)}.", "Shorten it."
        )
    ids = np.zeros((len(rows), fits[0]), np.int64)
    for row, values in zip(ids, rows, strict=True):
        row[: len(values)] = values
    return ids, lengths


def buckets_of(low: int, high: int) -> list[int]:
    """The lengths that texts are padded to for an engine that takes ``low`` to ``high`` tokens."""
    longest = min(MAX_LENGTH, high)
    return sorted({max(low, min(b, longest)) for b in (*BUCKETS, longest)})


# --- files ---


def _bytes(path: Path) -> bytes:
    refuse_lfs_pointer(path, CheckpointError)
    with path.open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise CheckpointError(f"{path} is refused.", f"It is larger than {_MAX_BYTES} bytes.")
    return data


def _text_of(path: Path) -> str:
    try:
        return decode_text(_bytes(path))
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read.", str(error), "Download it again.") from error


def _object(text: str, name: object) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} is not valid JSON.", f"{error}.", "Download it again.") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{name} cannot be read.", "It holds no JSON object.", "Download it again.")
    return data


def _optional(path: Path) -> dict[str, Any]:
    return _object(_text_of(path), path) if path.is_file() else {}


def _settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json over special_tokens_map.json."""
    return {**_optional(folder / SPECIAL), **_optional(folder / CONFIG)}


def _fast(folder: Path) -> bool:
    kind = str(_optional(folder / CONFIG).get("tokenizer_class", ""))
    return kind.endswith("Fast") or kind == "TokenizersBackend"


def _content(token: object) -> str | None:
    """The text of a token, which is written as text or as an object."""
    value = token.get("content") if isinstance(token, dict) else token
    return value if isinstance(value, str) else None


def _flag(config: Mapping[str, Any], key: str, default: bool, folder: Path) -> bool:
    value = config.get(key)
    if value is None:
        return default
    if type(value) is not bool:
        raise CheckpointError(f"{folder / CONFIG} cannot be read.", f"{key} is {value!r}, no bool.")
    return value


def _added_tokens(folder: Path, config: Mapping[str, Any]) -> list[AddedToken]:
    """Of added_tokens.json (all special, unless the config says otherwise) and ``added_tokens_decoder``."""
    tokens: dict[int, AddedToken] = {}
    try:
        for content, number in _optional(folder / ADDED).items():
            tokens[number] = AddedToken(_id(number), content)
        for number, token in (config.get("added_tokens_decoder") or {}).items():
            flags = [token.get(key, False) for key in ("special", "lstrip", "rstrip")]
            if type(token["content"]) is not str or {type(flag) for flag in flags} != {bool}:
                raise ValueError(f"the added token {number} is {token!r}")
            tokens[int(number)] = AddedToken(_id(int(number)), token["content"], *flags)
        roles = {text for role in _ROLES if (text := _content(config.get(role)))}
        roles |= {text for t in config.get("additional_special_tokens") or () if (text := _content(t))}
        named = [token.content for token in tokens.values()]
        if len({*named}) != len(named) or "" in named:
            raise ValueError("an added token has no text, or two have the same")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"The added tokens in {folder} cannot be read.", f"{error}.", "Download the tokenizer again."
        ) from error
    return [token._replace(special=token.special or token.content in roles) for token in tokens.values()]


def _id(number: object) -> int:
    if type(number) is not int or not 0 <= number < 1 << 31:
        raise ValueError(f"{number!r} is not a token id")
    return number


def _alternatives(contents: Iterable[str]) -> re.Pattern[str]:
    """A pattern that finds the first, and of those the longest, of ``contents``."""
    longest = sorted(contents, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest)) + ")" if longest else "(?!)()")


def _parsed(text: str, name: str) -> Any:
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_str(text)
    except BaseException as error:  # the library panics on some damaged files, past Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit)):
            raise
        raise CheckpointError(
            f"Cannot read {name}.", f"{str(error)[:200]}.", "Download the tokenizer again."
        ) from error


def _without_first_space(data: dict[str, Any]) -> str | None:
    """The tokenizer for texts that are not the first, where only the first gets a leading space."""
    steps = data.get("pre_tokenizer") or {}
    for step in steps.get("pretokenizers", [steps]) if isinstance(steps, dict) else ():
        if (
            isinstance(step, dict)
            and step.get("type") == "Metaspace"
            and step.get("prepend_scheme") == "first"
        ):
            step["prepend_scheme"] = "never"
            return json.dumps(data)
    return None


def _decoding(decoder: object, name: str) -> tuple[dict[str, int] | None, bool]:
    """The byte of each letter (None: pieces are plain text), and whether one leading space is stripped."""
    steps = [decoder] if isinstance(decoder, dict) else []
    while any("decoders" in step for step in steps):
        steps = [inner for step in steps for inner in step.get("decoders", [step])]
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return byte_letters(), False
    if kinds and {*kinds} <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        strips = any(step.get("type") == "Strip" and step.get("start") for step in steps)
        prefixed = any(
            step.get("type") == "Metaspace" and step.get("prepend_scheme") != "never" for step in steps
        )
        return None, strips or prefixed
    raise CheckpointError(f"Cannot use {name}.", f"Its decoder {kinds} is not known here.")


def byte_letters() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones are themselves, the others follow from 256 on."""
    own = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + i): byte for i, byte in enumerate(rest)}


def _byte_level(folder: Path, split: str, added: Sequence[AddedToken]) -> str:
    """A tokenizer.json of vocab.json and merges.txt: NFC, a split of words, byte-level BPE."""
    vocabulary = _object(_text_of(folder / VOCAB), folder / VOCAB)
    lines = _text_of(folder / MERGES).split("\n")
    merges = [
        line.rstrip("\r").split(" ") for line in lines if line.strip() and not line.startswith("#version")
    ]
    if any(len(pair) != 2 for pair in merges) or any(type(i) is not int for i in vocabulary.values()):
        raise CheckpointError(f"Cannot read the tokenizer in {folder}.", f"{VOCAB} or {MERGES} is damaged.")
    tokens = [
        {**token._asdict(), "single_word": False, "normalized": False}
        for token in sorted(added, key=lambda token: token.id)
    ]
    pre = [
        {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ]
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": tokens,
            "normalizer": {"type": "NFC"},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre},
            "post_processor": None,
            "decoder": {
                "type": "ByteLevel",
                "add_prefix_space": False,
                "trim_offsets": True,
                "use_regex": True,
            },
            "model": {"type": "BPE", "vocab": vocabulary, "merges": merges, "byte_fallback": False},
        }
    )
