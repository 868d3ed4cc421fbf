"""InternVL on a bundle's engines: embeddings, zero-shot classification, retrieval, captions."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Literal, cast

import numpy as np

from ..arrays import Floats, Ids
from ..bundle import Bundle
from ..bundle.manifest import Manifest
from ..bundle.spec import FEATURES, ComponentSpec, block_number, feature_name
from ..engines.compatibility import build_line
from ..engines.device import to_host
from ..errors import CapabilityError, InputError, UsageError
from ..forks import cached_property
from ..inputs.preprocess import ResizeMode
from ..inputs.sources import ImageInput, sequence_of, text_sequence
from ..inputs.tokenizer import CAPTION_PROMPT, buckets_of
from ..inputs.video import FRAMES, Video, frames_of
from ..sampling import Sampling
from . import captions, matching, zero_shot
from .components import Components, fixed
from .image_batches import Images, Reading
from .loaded import Loaded, is_chat
from .matching import Ranking
from .serving.service import Service
from .templates import PLAIN

Mode = Literal["InternVL-C", "InternVL-G"]
MODES: tuple[Mode, ...] = ("InternVL-C", "InternVL-G")
_VISION_OUTPUTS = {"InternVL-C": ["image_embed"], "InternVL-G": ["image_embed", "tokens"]}
"""Outputs of the vision engine that each mode needs."""


class InternVL(Loaded):
    """A loaded bundle. All methods may be called from several threads at once.

    Wherever images are taken: a sequence of any number of paths, file contents, ``data:`` URLs, PIL images,
    [H, W, 3] arrays, tensors, or (where ``reading`` allows it) addresses; or ready ``pixel_values``, a
    float32 array [B, 3, S, S].
    ``resize`` says how an image is made square (``square``, ``center_crop``, ``pad``; None: as the
    checkpoint's preprocessor says). InputError names an image that cannot be read.
    """

    def __init__(self, bundle: Bundle, components: Components, reading: Reading | None = None) -> None:
        super().__init__(bundle, components, reading)
        if is_chat(bundle):
            raise CapabilityError(
                f"{bundle.root} holds a chat model.",
                "It gives no embeddings.",
                "Use InternVLChat.load, ivl-export run chat, or eval --task questions.",
            )

    def close(self) -> None:
        """Free the engines; the model cannot be used afterwards."""
        if "requests" in self.__dict__:
            self.requests.close()
        super().close()

    def encode_image(
        self, images: Images, mode: Mode = "InternVL-C", resize: ResizeMode | None = None
    ) -> Floats:
        """Embeddings [B, E] float32, not normalised: InternVL-C, or InternVL-G (with the queries' head)."""
        if mode not in MODES:
            raise UsageError(f"Unknown mode {mode!r}.", fix=f"Use {' or '.join(MODES)}.")
        outputs = _VISION_OUTPUTS[mode]
        parts: list[Floats] = []
        for pixels in self.pixel_batches(images, resize):
            out = self.components.run_device("vision", {"pixel_values": pixels}, outputs)
            embed = to_host(out["image_embed"])
            if mode == "InternVL-G":
                query = self.components.run("qllama_query", {"tokens": out["tokens"]}, ["query_embed"])
                embed = zero_shot.l2(embed) + zero_shot.l2(query["query_embed"])
            parts.append(embed)
        if not parts:
            return np.zeros((0, fixed(self._output("vision", "image_embed")[1])), np.float32)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def encode_video(
        self,
        video: Video,
        frames: int = FRAMES,
        mode: Mode = "InternVL-C",
        resize: ResizeMode | None = None,
    ) -> Floats:
        """The embedding [E] of one video, a file or a sequence of images; see :meth:`encode_videos`."""
        embedding: Floats = self.encode_videos([video], frames, mode, resize)[0]
        return embedding

    def encode_videos(
        self,
        videos: Sequence[Video],
        frames: int = FRAMES,
        mode: Mode = "InternVL-C",
        resize: ResizeMode | None = None,
    ) -> Floats:
        """Embeddings [V, E]: the mean over ``frames`` of each, every frame scaled to length 1 before.

        As the InternVL paper's zero-shot video classification. One video is in memory at a time. Errors as
        :func:`~ivl_export.inputs.video.frames_of`.
        """
        rows = [self.encode_image([], mode)]
        for video in sequence_of(videos, "video"):
            images = frames_of(video, frames)
            rows.append(zero_shot.l2(self.encode_image(images, mode, resize)).mean(0, keepdims=True))
        return np.concatenate(rows).astype(np.float32, copy=False)

    def encode_text(self, texts: Sequence[str]) -> Floats:
        """Embeddings [B, E] float32, not normalised; the same in InternVL-C and InternVL-G.

        Texts are cut to the engine's longest (80 tokens). Short ones run in shorter batches: padding on the
        right never changes an embedding.
        """
        texts = text_sequence(texts)
        with self.components.timings.measure("tokenize"):
            buckets = self._text_buckets
            ids, lengths = self.tokenizer.encode_contrastive(texts, buckets[-1], buckets)
        return self.encode_tokens(ids, lengths)

    def encode_tokens(self, ids: Ids, lengths: Ids) -> Floats:
        """As :meth:`encode_text` for texts that are tokens.

        Args:
            ids: int64 [B, T], as
                :meth:`~ivl_export.inputs.tokenizer.SentencePieceTokenizer.encode_contrastive` makes them;
                tokens after a row's length are ignored.
            lengths: int64 [B], tokens of each row with bos and eos.

        Raises:
            InputError: a row is empty, or longer than ``ids`` or than the engine takes.
        """
        if ids.ndim != 2 or lengths.shape != ids.shape[:1]:
            raise InputError(
                "These tokens are not texts.",
                f"ids have shape {list(ids.shape)}, lengths {list(lengths.shape)}.",
                "Use SentencePieceTokenizer.encode_contrastive, which gives both.",
            )
        if not len(lengths):
            return np.zeros((0, fixed(self._output("qllama_text", "text_embed")[1])), np.float32)
        buckets, per_row = self._text_buckets, lengths.tolist()
        limit = min(ids.shape[1], buckets[-1])
        if min(per_row) < 1 or max(per_row) > limit:
            raise InputError(
                "These tokens are not texts.",
                f"Their lengths are {min(per_row)} to {max(per_row)}; 1 to {limit} can be.",
                "Use SentencePieceTokenizer.encode_contrastive, which cuts long ones.",
            )
        padded = [buckets[bisect_left(buckets, length)] for length in per_row]
        sizes = sorted(set(padded))
        if len(sizes) == 1:
            return self._text_batch(ids, lengths, sizes[0])
        rows = {size: [row for row, own in enumerate(padded) if own == size] for size in sizes}
        parts = {size: self._text_batch(ids[own], lengths[own], size) for size, own in rows.items()}
        out = np.empty((len(lengths), parts[sizes[0]].shape[1]), np.float32)
        for size, own in rows.items():
            out[own] = parts[size]
        return out

    def _text_batch(self, ids: Ids, lengths: Ids, size: int) -> Floats:
        """Embeddings of rows that are cut or padded to ``size`` tokens."""
        ids = ids[:, :size]
        if ids.shape[1] < size:
            ids = np.pad(ids, ((0, 0), (0, size - ids.shape[1])))
        feeds = {"input_ids": np.ascontiguousarray(ids), "lengths": lengths}
        embeddings: Floats = self.components.run("qllama_text", feeds, ["text_embed"])["text_embed"]
        return embeddings

    @cached_property
    def _text_buckets(self) -> list[int]:
        """Lengths that texts are padded to."""
        axis = self.components.spec("qllama_text").axis("text")
        return buckets_of(axis.min, axis.max)

    @cached_property
    def requests(self) -> Service:
        """Single requests by many callers at once, in batches; the ``a...`` methods go through it.

        For other limits, make a :class:`~ivl_export.runtime.serving.service.Service` of your own.
        """
        return Service(self)

    async def aencode_image(
        self, image: ImageInput, mode: Mode = "InternVL-C", resize: ResizeMode | None = None
    ) -> Floats:
        """The embedding [E] of one image; as :meth:`encode_image`, for asyncio."""
        return (await self.requests.encode_image(image, mode, resize)).value

    async def aencode_text(self, text: str) -> Floats:
        """The embedding [E] of one text; as :meth:`encode_text`, for asyncio."""
        return (await self.requests.encode_text(text)).value

    async def aclassify(self, image: ImageInput, classes: Floats, mode: Mode = "InternVL-C") -> Floats:
        """Probabilities [L] of ``classes`` (:meth:`class_embeddings`); as :meth:`classify`, for asyncio."""
        return (await self.requests.classify(image, classes, mode)).value

    async def amatch(self, image: ImageInput, text: str) -> float:
        """The probability that ``text`` describes ``image``; as :meth:`match`, for asyncio."""
        return (await self.requests.match(image, text)).value

    async def arerank(self, query: str, images: Images, ranking: Ranking) -> Ranking:
        """One query's ``ranking`` (one row) in the order of both heads; as :meth:`rerank`, for asyncio."""
        return (await self.requests.rerank(query, images, ranking)).value

    async def acaption(
        self,
        image: ImageInput,
        prompt: str = CAPTION_PROMPT["en"],
        num_beams: int = 1,
        sampling: Sampling | None = None,
    ) -> str:
        """The caption of one image; as :meth:`caption`, for asyncio."""
        return (await self.requests.caption(image, prompt, num_beams, sampling=sampling)).value

    def astream_caption(
        self, image: ImageInput, prompt: str = CAPTION_PROMPT["en"], sampling: Sampling | None = None
    ) -> AsyncGenerator[str, None]:
        """The caption of one image in pieces; as :meth:`stream_caption`, for asyncio."""
        return self.requests.stream_caption(image, prompt, sampling=sampling)

    def dense(self, images: Images, resize: ResizeMode | None = None, block: int = -1) -> Floats:
        """Hidden state of the vision model after ``block`` [B, N, D]; see :meth:`features`."""
        (states,) = self.features(images, [block], resize).values()
        return states

    def features(
        self, images: Images, blocks: Sequence[int], resize: ResizeMode | None = None
    ) -> dict[int, Floats]:
        """Hidden states after each of ``blocks``: number of the block -> [B, N, D] float32.

        The class token comes first, then the patches by row. ``blocks`` are numbers from 1, or from the end
        backwards: -1 is the last.

        Raises:
            UsageError: the vision tower has no such block.
            CapabilityError: the bundle was built without its output.
        """
        spec = self.components.spec("vision")
        outputs = outputs_of(self.bundle.manifest, spec, blocks)
        shape = [fixed(d) for d in self._output("vision", "tokens")[1:]]
        parts: dict[int, list[Floats]] = {k: [np.zeros((0, *shape), np.float32)] for k in outputs}
        for pixels in self.pixel_batches(images, resize):
            states = self.components.run("vision", {"pixel_values": pixels}, list(outputs.values()))
            for block, name in outputs.items():
                parts[block].append(states[name].astype(np.float32, copy=False))
        return {block: np.concatenate(states) for block, states in parts.items()}

    def class_embeddings(self, labels: Sequence[str], templates: Sequence[str] = PLAIN) -> Floats:
        """One unit vector a label [L, E], averaged over ``templates``, texts with ``{}`` for the label.

        Published lists have names: :func:`~ivl_export.runtime.templates.templates`.
        """
        labels, templates = text_sequence(labels, "label"), text_sequence(templates, "template")
        if not labels or not templates:
            raise UsageError("Zero-shot classification needs labels and templates.", "One list is empty.")
        texts = [zero_shot.fill(template, label) for label in labels for template in templates]
        return zero_shot.ensemble(self.encode_text(texts), len(labels))

    def classify(
        self,
        images: Images,
        labels: Sequence[str] | Floats,
        templates: Sequence[str] = PLAIN,
        mode: Mode = "InternVL-C",
        resize: ResizeMode | None = "center_crop",
    ) -> Floats:
        """Probabilities [B, L] float32 of each label.

        ``labels`` may be :meth:`class_embeddings` of them, computed once for many calls.
        """
        if isinstance(labels, np.ndarray) and labels.dtype.kind == "f":  # not an array of texts
            classes = labels
        else:
            classes = self.class_embeddings(cast("Sequence[str]", labels), templates)
        scale = self.bundle.manifest.model.logit_scale
        return zero_shot.probabilities(self.encode_image(images, mode, resize), classes, scale)

    def retrieve(
        self,
        queries: Sequence[str],
        images: Images,
        top: int = 5,
        mode: Mode = "InternVL-C",
        resize: ResizeMode | None = "square",
    ) -> Ranking:
        """The ``top`` images for each query text.

        To ask often, keep :meth:`encode_image`'s result and use :func:`~ivl_export.runtime.zero_shot.rank`.
        """
        queries = text_sequence(queries, "query")
        images_embedded = self.encode_image(images, mode, resize)
        return Ranking(*zero_shot.rank(self.encode_text(queries), images_embedded, top))

    def rerank(
        self,
        queries: Sequence[str],
        images: Images,
        ranking: Ranking,
        resize: ResizeMode | None = "square",
    ) -> Ranking:
        """``ranking`` in the order of both heads; see :func:`~ivl_export.runtime.matching.rerank`."""
        return matching.rerank(self, queries, images, ranking, resize)

    def match(self, images: Images, texts: Sequence[str], resize: ResizeMode | None = "square") -> Floats:
        """The probability [B] that text i describes image i; see :mod:`~ivl_export.runtime.matching`."""
        return matching.match(self, images, texts, resize)

    def caption(
        self,
        images: Images,
        prompt: str | Sequence[str] = CAPTION_PROMPT["en"],
        num_beams: int = 1,
        max_new_tokens: int = 30,
        min_new_tokens: int = 0,
        resize: ResizeMode | None = "square",
        sampling: Sampling | None = None,
    ) -> list[str]:
        """One caption an image; ``prompt`` is one for all or one for each.

        Published captions were made with 5 beams and at least 8 tokens. ``sampling`` draws tokens, for
        each image as if it were alone.
        """
        stop = captions.stop_criteria(self, max_new_tokens, min_new_tokens)
        return captions.caption(self, images, prompt, stop, num_beams, sampling, resize)

    def stream_caption(
        self,
        image: ImageInput,
        prompt: str = CAPTION_PROMPT["en"],
        max_new_tokens: int = 30,
        min_new_tokens: int = 0,
        resize: ResizeMode | None = "square",
        sampling: Sampling | None = None,
    ) -> Iterator[str]:
        """The caption of one image in pieces, as they are decoded: those of :meth:`caption`, not stripped."""
        stop = captions.stop_criteria(self, max_new_tokens, min_new_tokens)
        return captions.stream_caption(self, image, prompt, stop, sampling, resize)

    def generate(
        self,
        pixel_values: Floats,
        input_ids: Ids,
        attention_mask: Ids | None = None,
        max_new_tokens: int = 30,
        num_beams: int = 1,
        min_new_tokens: int = 0,
        sampling: Sampling | None = None,
    ) -> Ids:
        """New token ids [B, <= max_new_tokens], padded after each row's EOS.

        Args:
            pixel_values: float32 [B, 3, S, S].
            input_ids: int64 [B, T], as :meth:`SentencePieceTokenizer.encode_prompt` makes them.
            attention_mask: int64 [B, T], 0 at padding (either side); None: no padding.
            max_new_tokens: at most this many.
            num_beams: beams kept; 1 is greedy, or as ``sampling`` says.
            min_new_tokens: EOS may not come before.
            sampling: how tokens are drawn, for each row as if it were alone; None: the likeliest.
        """
        stop = captions.stop_criteria(self, max_new_tokens, min_new_tokens)
        return captions.generate(self, pixel_values, input_ids, attention_mask, stop, num_beams, sampling)

    def _output(self, component: str, name: str) -> tuple[int | str, ...]:
        outputs = {t.name: t.shape for t in self.components.spec(component).outputs}
        return outputs[name]


def outputs_of(manifest: Manifest, spec: ComponentSpec, blocks: Sequence[int]) -> dict[int, str]:
    """Number of each of ``blocks`` -> the output of ``vision`` (contract ``spec``) that is its hidden state.

    Errors as :meth:`InternVL.features`.
    """
    depth = int(manifest.model.config["vision_config"]["num_hidden_layers"])
    blocks_built = [int(t.name.removeprefix(FEATURES)) for t in spec.outputs if t.name.startswith(FEATURES)]
    known = {**{k: feature_name(k) for k in blocks_built}, depth: "tokens"}
    numbers = [block_number(block, depth) for block in blocks]
    missing = [k for k in numbers if k not in known]
    if missing:
        again = build_line(manifest, features=sorted({*blocks_built, *missing}))
        raise CapabilityError(
            f"This bundle does not give the output of block {missing[0]}.",
            f"It was built to give {', '.join(map(str, known))}.",
            f"Build it again: {again}",
        )
    return {k: known[k] for k in numbers}
