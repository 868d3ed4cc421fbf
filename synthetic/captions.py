"""Captions of scenes, in English and Chinese: one right answer for each scene and language.

    a small red square                         一个红色的小正方形
    three large blue crosses                   三个蓝色的大十字形
    a small red cross above a small blue ring  一个红色的小十字形在一个蓝色的小圆环上方

Of two objects the one in the middle of the image is named last.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from ..inputs.tokenizer import CAPTION_PROMPT, CONTRASTIVE_PREFIX
from .scenes import COLORS, MAX_COUNT, RELATIONS, SHAPES, SIZES, Obj, Scene

Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, ...] = ("en", "zh")

_COUNT_EN = {1: "a", 2: "two", 3: "three"}
_COUNT_ZH = {1: "一个", 2: "两个", 3: "三个"}
_PLURAL_EN = {s: s + ("es" if s == "cross" else "s") for s in SHAPES}
_SIZE_ZH = {"small": "小", "large": "大"}
_COLOR_ZH = {
    "red": "红色",
    "orange": "橙色",
    "yellow": "黄色",
    "green": "绿色",
    "blue": "蓝色",
    "purple": "紫色",
    "white": "白色",
    "black": "黑色",
}
_SHAPE_ZH = {
    "square": "正方形",
    "triangle": "三角形",
    "cross": "十字形",
    "ring": "圆环",
}
_RELATION_ZH = {"left of": "左边", "right of": "右边", "above": "上方", "below": "下方"}


def caption(scene: Scene, lang: Language = "en") -> str:
    """The canonical caption: equal for scenes of equal meaning, different otherwise."""
    return "".join(words(scene, lang))


def words(scene: Scene, lang: Language = "en") -> list[str]:
    """The caption in words; an English word that follows another starts with its space."""
    first = _object_words(scene.objects[0], lang)
    if scene.relation is None:
        return _spaced(first, lang)
    second = _object_words(scene.objects[1], lang)
    if lang == "en":
        return _spaced([*first, *scene.relation.split(), *second], lang)
    return [*first, "在", *second, _RELATION_ZH[scene.relation]]


def class_prompts(shape: str, color: str, lang: Language = "en") -> list[str]:
    """Captions of one ``color`` ``shape``, one for each size: the prompt ensemble of that class."""
    return ["".join(_spaced(_object_words(Obj(shape, color, size), lang), lang)) for size in SIZES]


def corpus() -> Iterator[list[str]]:
    """Texts in words, for training the tokenizer: every word of the grammar, alone and after each prefix."""
    for lang in LANGUAGES:
        prompts = [[CONTRASTIVE_PREFIX], CAPTION_PROMPT[lang].split(" ")]
        if lang == "en":
            prompts[1] = _spaced(prompts[1], lang)
        for shape in SHAPES:
            for color in COLORS:
                for size in SIZES:
                    for count in range(1, MAX_COUNT + 1):
                        text = _spaced(_object_words(Obj(shape, color, size, count), lang), lang)
                        yield text
                        yield from ([*prompt, *text] for prompt in prompts)
        for relation in RELATIONS:
            pair = (Obj(SHAPES[0], "red", "small"), Obj(SHAPES[1], "blue", "small"))
            text = words(Scene(pair, relation, "noise", 0), lang)
            for _ in range(48):
                yield from ([*prompt, *text] for prompt in prompts)


def _object_words(obj: Obj, lang: Language) -> list[str]:
    if lang == "en":
        noun = obj.shape if obj.count == 1 else _PLURAL_EN[obj.shape]
        return [_COUNT_EN[obj.count], obj.size, obj.color, noun]
    return [_COUNT_ZH[obj.count], _COLOR_ZH[obj.color], "的", _SIZE_ZH[obj.size], _SHAPE_ZH[obj.shape]]


def _spaced(text: list[str], lang: Language) -> list[str]:
    return text if lang == "zh" else [text[0], *(" " + word for word in text[1:])]
