"""Calibration sets: which images and captions a model's activation ranges are measured on.

A set is opened by :mod:`.sources`, split into a part to calibrate on and a part to measure accuracy on, and
read as batches of model inputs, one batch in memory at a time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from ..arrays import Array
from ..errors import InputError
from ..files.read import read_bytes as read_file
from ..inputs.chat_template import IGNORE, IMAGE_TOKEN, ChatFormat, Turn
from ..inputs.preprocess import ImageSettings, preprocess_images, sample_tiles
from ..inputs.tokenizer import CAPTION_PROMPT, Tokenizer
from ..models.calls import LONGEST_PROMPT, LONGEST_STEP, Dialogue, Texts

if TYPE_CHECKING:
    from ..synthetic.scenes import Scene
    from ..synthetic.sign_questions import SignDialogue
    from .tensor_cache import TensorCache

SMALL = 32
"""Fewer samples than this get a notice."""

QUESTION = "Describe this image."
"""The question about images that come with a caption, which is the answer."""
SCENE_TURNS = 3

FALLBACK_CAPTIONS = (
    "a photo of a person standing in front of a building",
    "two dogs playing on the grass in a park",
    "a plate of food on a wooden table",
    "a red car parked on the side of the street",
    "an aerial view of a city at night",
    "a close-up of a small white flower",
    "a group of people sitting around a table",
    "a train arriving at the station in the morning",
    "a cat sleeping on a sofa next to a window",
    "a sign with three large blue letters",
    "snow-covered mountains above a green lake",
    "a child holding a yellow umbrella in the rain",
    "a bowl of fruit, two apples and a banana",
    "a man riding a bicycle along the beach",
    "一只猫坐在窗边的沙发上",
    "街道上停着一辆红色的汽车",
)
"""Used for images that come without a caption; that it happened is recorded and said."""


@runtime_checkable
class Stored(Protocol):
    """An image inside another file: a member of an archive, a row of a table."""

    def read(self) -> bytes:
        """Its encoded bytes; InputError if they cannot be read."""
        ...


@dataclass(frozen=True)
class Sample:
    """One image and its caption.

    Args:
        name: path relative to the set, or the index of a drawn scene.
        digest: sha256 of the image's bytes (for a scene, of its description).
        caption: as given; None where the set has none.
        image: where to read it from, or the scene or sign to draw.
        turns: a conversation about it, whose last answer is the caption; empty: the set has none.
    """

    name: str
    digest: str
    caption: str | None
    image: Path | Stored | Scene | SignDialogue
    turns: tuple[Turn, ...] = ()

    @property
    def text(self) -> str:
        """The caption, or one of :data:`FALLBACK_CAPTIONS`, always the same for the same sample."""
        if self.caption is not None:
            return self.caption
        return FALLBACK_CAPTIONS[int(self.digest[:8], 16) % len(FALLBACK_CAPTIONS)]

    def pixels(self, settings: ImageSettings, cache: TensorCache | None = None) -> Array:
        """``pixel_values`` float32 [1, 3, S, S]; of a model that takes tiles two: a part and the whole.

        Which part is seen follows from the digest: over a set, parts from all places.

        Raises:
            InputError: the file changed since the set was opened.
        """
        image = self.image

        def read(data: Any) -> Array:
            if settings.tiling is None:
                return preprocess_images([data], settings)
            return sample_tiles(data, settings, int(self.digest[:8], 16))

        if not isinstance(image, Path | Stored):
            from ..synthetic import render, scenes, signs

            if isinstance(image, scenes.Scene):
                return read(render.render(image, settings.size))
            return read(signs.draw(image.signs[0]))

        def decode() -> Array:
            data = read_bytes(image)
            if hashlib.sha256(data).hexdigest() != self.digest:
                raise InputError(f"{self.name} changed while it was in use.", fix="Calibrate again.")
            return read(data)

        return decode() if cache is None else cache.get(self.digest, settings, decode)


@dataclass(frozen=True)
class Skipped:
    """A file of the set that cannot be used, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Samples:
    """Some samples of a set as a family's components read them (:class:`..models.calls.SampleBatch`).

    Args:
        number: which batch of the set.
        samples: its samples.
        tokenizer: of the model.
        chat: its prompt format, if it chats.
        scored: whether the logits after the first tokens of an answer are needed, too.
    """

    number: int
    samples: tuple[Sample, ...]
    tokenizer: Tokenizer
    chat: ChatFormat | None = None
    scored: bool = False

    @property
    def size(self) -> int:
        """How many samples."""
        return len(self.samples)

    @property
    def digests(self) -> tuple[str, ...]:
        """sha256 of each image, 64 hex digits."""
        return tuple(sample.digest for sample in self.samples)

    @cached_property
    def texts(self) -> Texts:
        """Captions as tokens."""
        texts = [sample.text for sample in self.samples]
        ids, lengths = self.tokenizer.encode_contrastive(texts)
        prompts = tuple(
            tuple(self.tokenizer.encode_prompt(prompt_for(text) + text)[:LONGEST_STEP]) for text in texts
        )
        others = [texts[(i + i % 2) % len(texts)] for i in range(len(texts))]
        return Texts(ids, lengths, prompts, *self.tokenizer.encode_contrastive(others, prefix=""))

    @cached_property
    def dialogues(self) -> tuple[Dialogue, ...]:
        """A conversation about each image."""
        return tuple(dialogue_of(sample, self.tokenizer, self.chat, self.scored) for sample in self.samples)


@dataclass(frozen=True)
class Batch(Samples):
    """Samples with their images: ``pixel_values`` float32 [B, 3, S, S], of tiled ones [2 B, 3, S, S]."""

    pixel_values: Array = field(kw_only=True)


@dataclass(frozen=True)
class CalibrationSet:
    """The chosen samples, in order.

    Args:
        source: as the user named it.
        samples: at least one.
        skipped: files that could not be used.
        synthetic: drawn scenes, no photographs.
        requested: number of samples that the caller requested.
        held_out: samples of the same source that another set has, to measure accuracy on.
        cache: keeps decoded images.
        chat: how the model is prompted that the conversations are worded for; None: as LLaVA.
        scored: see :class:`Samples`; of the part that accuracy is measured on.
    """

    source: str
    samples: tuple[Sample, ...]
    skipped: tuple[Skipped, ...] = ()
    synthetic: bool = False
    requested: int = 0
    held_out: int = 0
    cache: TensorCache | None = field(default=None, repr=False, compare=False)
    chat: ChatFormat | None = None
    scored: bool = False

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def hash(self) -> str:
        """sha256 over names, image digests and texts, 64 hex digits."""
        rows = [[s.name, s.digest, s.text, *map(asdict, s.turns)] for s in self.samples]
        return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()

    @property
    def without_caption(self) -> int:
        """How many samples use a fallback caption."""
        return sum(s.caption is None for s in self.samples)

    @property
    def notices(self) -> tuple[str, ...]:
        """Notices about this set, to show the user."""
        notices = [*set_notices(len(self), self.synthetic, self.without_caption)]
        usable = len(self) + len(self.skipped)
        if usable < self.requested:
            parts = f": {len(self)} to calibrate on, {self.held_out} held out" if self.held_out else ""
            notices.append(
                f"{self.requested} samples were requested, the set has {usable + self.held_out}{parts}."
            )
        if self.skipped:
            notices.append(
                f"{len(self.skipped)} files were skipped, the first: {self.skipped[0].name} "
                f"({self.skipped[0].reason})"
            )
        return tuple(notices)

    def split(self, held_out: int) -> tuple[CalibrationSet, CalibrationSet]:
        """(to calibrate on, to measure accuracy on), disjoint.

        The second part has ``held_out`` samples, at most a quarter of the set; a set of one sample is both.
        """
        if len(self) == 1:
            return self, self
        count = max(1, min(held_out, len(self) // 4))
        remaining = max(0, self.requested - count)
        first = replace(self, samples=self.samples[:-count], requested=remaining, held_out=count)
        return first, replace(self, samples=self.samples[-count:], requested=count, skipped=())

    def steps(self, batch_size: int = 8) -> int:
        """How many batches :meth:`batches` yields."""
        return -(-len(self) // batch_size)

    def sample_batches(self, tokenizer: Tokenizer, batch_size: int = 8) -> Iterator[Samples]:
        """The samples of each batch; no image is read, and a text only when it is used."""
        for number, samples in enumerate(self._parts(batch_size)):
            yield Samples(number, samples, tokenizer, self.chat, self.scored)

    def pixels(self, settings: ImageSettings, batch_size: int = 8) -> Iterator[Array]:
        """The images of each batch, float32 [B, 3, S, S], one batch in memory at a time."""
        import numpy as np

        for part in self._parts(batch_size):
            yield np.concatenate([sample.pixels(settings, self.cache) for sample in part])
        if self.cache is not None:
            self.cache.trim()

    def batches(self, settings: ImageSettings, tokenizer: Tokenizer, batch_size: int = 8) -> Iterator[Batch]:
        """Preprocessed batches, one in memory at a time."""
        pixels = self.pixels(settings, batch_size)
        for batch, images in zip(self.sample_batches(tokenizer, batch_size), pixels, strict=True):
            own = (batch.number, batch.samples, tokenizer, self.chat, self.scored)
            yield Batch(*own, pixel_values=images)

    def _parts(self, batch_size: int) -> Iterator[tuple[Sample, ...]]:
        for start in range(0, len(self), batch_size):
            yield self.samples[start : start + batch_size]

    def to_json(self) -> dict[str, Any]:
        """Description of the set for the manifest and ``ranges.json`` (no paths of this machine)."""
        return {
            "hash": self.hash,
            "samples": len(self),
            "synthetic": self.synthetic,
            "without_caption": self.without_caption,
            "skipped": [{"name": s.name, "reason": s.reason} for s in self.skipped],
        }


def set_notices(samples: int, synthetic: bool, without_caption: int) -> tuple[str, ...]:
    """Notices about a set of ``samples`` samples."""
    notices = []
    if synthetic:
        notices.append(
            "The calibration set is synthetic (drawn scenes): right for nano, not for photographs."
        )
    if samples < SMALL:
        notices.append(f"The calibration set is small: {samples} samples, {SMALL} or more are advised.")
    if without_caption:
        notices.append(
            f"{without_caption} of {samples} images have no caption: generic sentences are used instead, "
            "and text ranges are measured on them."
        )
    return tuple(notices)


def prompt_for(caption: str) -> str:
    """The caption prompt for the language of ``caption`` (Chinese if it has a Han character)."""
    return CAPTION_PROMPT["zh" if any("\u4e00" <= c <= "\u9fff" for c in caption) else "en"]


def read_bytes(image: Path | Stored) -> bytes:
    """The bytes of an image of at most 512 MiB; InputError otherwise."""
    return read_file(image) if isinstance(image, Path) else image.read()


def dialogue_of(
    sample: Sample, tokenizer: Tokenizer, chat: ChatFormat | None = None, scored: bool = False
) -> Dialogue:
    """A conversation about ``sample``, always the same: its own, or of its scene or caption."""
    if not tokenizer.reads_texts:
        return _random_dialogue(sample, len(tokenizer), scored)
    turns = list(sample.turns) or [Turn(QUESTION, sample.text, 1)]
    if not isinstance(sample.image, Path | Stored):
        import numpy as np

        from ..synthetic import dialogues, scenes, sign_questions

        rng = np.random.default_rng(int(sample.digest[:16], 16))
        if isinstance(sample.image, scenes.Scene):
            turns = dialogues.conversation(dialogues.dialogue(rng, sample.image, SCENE_TURNS))
        else:
            turns = sign_questions.conversation(sample.image)
    ids, labels = (chat or ChatFormat()).encode(turns, tokenizer)
    end = len(ids) - next(i for i, label in enumerate(reversed(labels)) if label != IGNORE)
    last = end - next(i for i, label in enumerate([*reversed(labels[:end]), IGNORE]) if label == IGNORE)
    cut = ids.index(IMAGE_TOKEN)
    answer = ids[last : end - 1][:LONGEST_STEP] or ids[last:end]
    after = ids[cut + 1 : last][-LONGEST_PROMPT:]
    return Dialogue(tuple(ids[:cut]), tuple(after), tuple(answer), scored)


def _random_dialogue(sample: Sample, ids: int, scored: bool) -> Dialogue:
    """Ids in place of a conversation, if there is no tokenizer."""
    import numpy as np

    rng = np.random.default_rng(int(sample.digest[:16], 16))
    before, after, answer = (tuple(rng.integers(0, ids, count).tolist()) for count in (8, 24, 16))
    return Dialogue(before, after, answer, scored)
