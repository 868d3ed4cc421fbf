"""The paper's numbers (arXiv 2312.14238), to stand beside a result."""

from __future__ import annotations

from dataclasses import dataclass

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
