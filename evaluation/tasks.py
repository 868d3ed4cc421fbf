"""The benchmarks by name, run through :class:`ivl_export.runtime.InternVL` on the backend it was loaded with.

Those of chat bundles are in :mod:`.chat`.

Protocol: classes are ensembles of prompts; images are cropped for classification and made square for
retrieval and captions; the frames of a video are embedded one by one and their unit embeddings averaged;
captions come from 5 beams with 8 to 30 tokens. Images are decoded in pieces, only embeddings are kept.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..progress import SILENT, Progress
from ..runtime.matching import check_matching
from .datasets import imagenet, karpathy, videos, xtd
from .files import Reader, choose, fingerprint
from .runner import BEAMS, MAX_TOKENS, MIN_TOKENS, Runner
from .scores import Measure

if TYPE_CHECKING:
    from ..runtime import InternVL, Mode

_C, _G = "InternVL-C", "InternVL-G"
_RECALLS = tuple(f"{way} R@{k}" for way in ("image to text", "text to image") for k in (1, 5, 10))
_XTD_LANGUAGES = ("en", "es", "fr", "zh", "it", "ko", "ru", "jp")


def _retrieval(*values: float) -> dict[str, float]:
    return dict(zip(_RECALLS, values, strict=True))


@dataclass(frozen=True)
class Published:
    """``numbers[mode, variant][measure]``, the variant a language or class count; ``samples`` in all."""

    source: str
    samples: int | None
    numbers: dict[tuple[str, str], dict[str, float]]


PUBLISHED: dict[str, Published] = {
    "imagenet": Published(
        "Table 6",
        50_000,
        {
            (_C, language): {"top-1": value}
            for language, value in {"en": 83.2, "zh": 64.5, "jp": 61.5, "ar": 44.9, "it": 65.7}.items()
        },
    ),
    "flickr30k": Published(
        "Table 7",
        1_000,
        {
            (_C, "en"): _retrieval(94.7, 99.6, 99.9, 81.7, 96.0, 98.2),
            (_G, "en"): _retrieval(95.7, 99.7, 99.9, 85.0, 97.0, 98.6),
        },
    ),
    "coco-retrieval": Published(
        "Table 7",
        5_000,
        {
            (_C, "en"): _retrieval(70.6, 89.0, 93.5, 54.1, 77.3, 84.6),
            (_G, "en"): _retrieval(74.9, 91.3, 95.2, 58.6, 81.3, 88.0),
        },
    ),
    "coco-caption": Published("Table 10", 5_000, {(_G, "en"): {"CIDEr": 128.2}}),
    "xtd": Published(
        "Table 13",
        1_000,
        {
            (mode, language): {"image to text R@10": value}
            for mode, values in {
                _C: (97.3, 95.7, 95.1, 95.6, 96.0, 92.2, 93.3, 95.5),
                _G: (98.6, 97.7, 96.5, 96.7, 96.9, 95.1, 94.8, 96.1),
            }.items()
            for language, value in zip(_XTD_LANGUAGES, values, strict=True)
        },
    ),
    # 8 frames; the variant is the number of classes: Kinetics-400, -600 and -700
    "video": Published(
        "Table 8",
        None,
        {
            (_C, "400"): {"top-1": 69.1, "mean of top-1 and top-5": 79.4},
            (_C, "600"): {"top-1": 68.9, "mean of top-1 and top-5": 78.8},
            (_C, "700"): {"top-1": 60.6, "mean of top-1 and top-5": 71.5},
        },
    ),
}


FRAMES = 8  # a video, as published
LANGUAGES: dict[str, tuple[str, ...]] = {
    "imagenet": ("en", "zh", "jp", "ar", "it"),
    "xtd": ("en", "es", "fr", "zh", "it", "ko", "ru", "jp"),
}
QUESTIONS = "questions"
CHAT_TASKS = (QUESTIONS, "vqa", "choices", "captions")
"""The task of chat bundles, :func:`.chat.evaluate`."""
TASKS = (*PUBLISHED, *CHAT_TASKS)
RETRIEVAL = ("flickr30k", "coco-retrieval", "xtd")


@dataclass(frozen=True)
class Result:
    """Result of a task.

    ``samples`` images or videos of the ``available`` ones were used (of chat: scenes, or questions);
    ``questions`` is the hash of the questions; ``source`` is the paper's table, empty where it has none;
    ``whole`` says whether the set is as large as the paper's: if not, the paper's numbers answer other
    questions. Captions have the mode InternVL-G, whose queries they read.
    """

    task: str
    mode: str
    language: str
    samples: int
    available: int
    whole: bool
    questions: str
    source: str
    settings: dict[str, Any]
    measures: tuple[Measure, ...]
    skipped: tuple[dict[str, str], ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True)
class _Answers:
    """Results of one kind of task; ``variant`` is the paper's row, besides the mode."""

    samples: int
    available: int
    questions: list[str]
    variant: str
    settings: dict[str, Any]
    measures: list[Measure]
    skipped: list[dict[str, str]]


def evaluate(
    model: InternVL,
    task: str,
    data: Path,
    mode: Mode = "InternVL-C",
    language: str = "en",
    limit: int | None = None,
    frames: int = FRAMES,
    progress: Progress = SILENT,
    rerank: int | None = None,
) -> Result:
    """Run ``task`` (one of :data:`TASKS`, but :data:`CHAT_TASKS`) on the data set in the folder ``data``.

    ``rerank``: of retrieval, the best so many of each search are matched as well, and both orders measured.

    Raises:
        UsageError: no such task, not in this language, nothing in it to re-rank, or one of chat bundles.
        InputError: files are missing or wrong, or over a tenth of the images cannot be read.
        CapabilityError: the bundle lacks a component, or CIDEr cannot be computed here.
    """
    check_task(task, language, rerank)
    if task in CHAT_TASKS:
        raise UsageError(f"{task} are put to a chat bundle.", fix="Call evaluation.chat.evaluate.")
    if rerank is not None:
        check_matching(model)
    runner = Runner(model, mode, progress)
    if task in ("imagenet", "video"):
        answers = _classify(runner, task, data, language, limit, frames)
    else:
        answers = _pairs(runner, task, data, language, limit, rerank)
    shown = "InternVL-G" if task == "coco-caption" else mode
    published = PUBLISHED[task]
    numbers = published.numbers.get((shown, answers.variant), {})
    if task == "video" and frames != FRAMES:
        numbers = {}
    return Result(
        task,
        shown,
        language,
        answers.samples,
        answers.available,
        answers.samples == (published.samples or answers.available),
        fingerprint(answers.questions),
        published.source,
        answers.settings,
        tuple(replace(m, reference=numbers.get(m.name)) for m in answers.measures),
        tuple(answers.skipped),
    )


def check_task(task: str, language: str, rerank: int | None = None) -> None:
    """UsageError if there is no such task, not in this language, or nothing in it to re-rank."""
    if task not in TASKS:
        raise UsageError(f"Unknown task {task!r}.", "", f"Use one of {', '.join(TASKS)}.")
    known = LANGUAGES.get(task, ("en",))
    if language not in known:
        raise UsageError(f"{task} does not exist in {language!r}.", "", f"Use {' or '.join(known)}.")
    if rerank is not None and task not in RETRIEVAL:
        raise UsageError(f"{task} has nothing to re-rank.", "", f"Use {' or '.join(RETRIEVAL)}.")
    if rerank is not None and rerank < 1:
        raise UsageError(f"The best {rerank} of a search cannot be re-ranked.", "", "Give 1 or more.")


def _classify(
    runner: Runner, task: str, data: Path, language: str, limit: int | None, frames: int
) -> _Answers:
    classes = imagenet(data, language) if task == "imagenet" else videos(data, frames)
    items = choose(classes.items, limit)
    reader = Reader(len(items))
    readable, measures = runner.classify(classes, items, reader)
    questions = [*classes.names, *classes.templates, *(f"{item.name} {item.label}" for item in readable)]
    settings: dict[str, Any] = {"classes": len(classes.names), "templates": len(classes.templates)}
    variant = language
    if task == "video":
        variant, settings["frames"] = str(len(classes.names)), frames
    return _Answers(len(readable), len(classes.items), questions, variant, settings, measures, reader.skipped)


def _pairs(
    runner: Runner, task: str, data: Path, language: str, limit: int | None, rerank: int | None
) -> _Answers:
    pairs = xtd(data, language) if task == "xtd" else karpathy(data, task.split("-")[0])
    items = choose(pairs, limit)
    reader = Reader(len(items))
    captions = task == "coco-caption"
    readable, measures = runner.caption(items, reader) if captions else runner.retrieve(items, reader, rerank)
    questions = [text for item in readable for text in (item.name, *item.captions)]
    settings: dict[str, Any] = {"captions": sum(len(item.captions) for item in readable)}
    if captions:
        settings |= {"beams": BEAMS, "min_new_tokens": MIN_TOKENS, "max_new_tokens": MAX_TOKENS}
    if rerank is not None:
        settings["rerank"] = rerank
    return _Answers(len(readable), len(pairs), questions, language, settings, measures, reader.skipped)
