"""Chat prompts: the published formats, and turns to token ids in them. No torch.

    internvl2_5  <|im_start|>system\nSYSTEM<|im_end|>\n<|im_start|>user\n<image>\nwhat is this?<|im_end|>\n
                 <|im_start|>assistant\na ring<|im_end|>\n...
    vicuna       SYSTEM USER: <image>\nwhat is this? ASSISTANT: a ring</s>USER: and its color? ASSISTANT:

The template's own text is trusted: its special tokens become ids. Texts of users and models never do,
in any spelling (:meth:`.tokenizer.Tokenizer.encode`). Images are ids too: one placeholder (LLaVA's
layout), or ``<img>``, one ``<IMG_CONTEXT>`` for each visual embedding of each tile, and ``</img>``.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from ..errors import CapabilityError, CheckpointError, InputError
from ..files.text import read_text
from .tokenizer import Tokenizer

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
IMAGE_TOKEN = -200
"""Placeholder of an image in a prompt's ids; not an id of the tokenizer."""
IGNORE = -100
"""The label of a token that is not learnt."""
CONTEXT, START, END = "<IMG_CONTEXT>", "<img>", "</img>"
_OWN, _JINJA = "conversation.py", "chat_template.jinja"
_MAX_BYTES = 1 << 20


class Slot(Enum):
    """Place of an image in a question."""

    IMAGE = "<image>"


IMAGE = Slot.IMAGE
Question: TypeAlias = "str | tuple[str | Slot, ...]"


@dataclass(frozen=True)
class Turn:
    """A question and its answer.

    Args:
        question: the user's text; in a tuple :data:`IMAGE` marks the place of an image.
        answer: the assistant's text; None: open, for the model to answer; only the last turn may be.
        images: number of the user's images; before the text, unless ``question`` has their places.
    """

    question: Question
    answer: str | None = None
    images: int = 0

    def __post_init__(self) -> None:
        parts = self.question if isinstance(self.question, tuple) else (self.question,)
        for what, text in (*(("question", part) for part in parts), ("answer", self.answer)):
            if not (isinstance(text, str | Slot) or (what == "answer" and text is None)):
                raise InputError(
                    f"A {what} is not text.", f"It is of type {type(text).__name__}.",
                    "Decode it: text.decode()." if isinstance(text, bytes) else "Give str.",
                )  # fmt: skip
        if isinstance(self.question, tuple) and self.question.count(IMAGE) != self.images:
            raise InputError(
                f"A question has places for {self.question.count(IMAGE)} images.",
                f"It shows {self.images}.",
                "Put chat_template.IMAGE in place of each image.",
            )


class Encoded(NamedTuple):
    """Token ids, and their labels: of answers and of the token that ends each; else :data:`IGNORE`."""

    ids: list[int]
    labels: list[int]


class ImageTokens(NamedTuple):
    """The ids of an image: ``start``, ``per_tile`` times ``context`` for each of its tiles, ``end``."""

    context: int = IMAGE_TOKEN
    per_tile: int = 1
    start: int | None = None
    end: int | None = None

    def ids(self, tiles: int) -> list[int]:
        """Of an image of ``tiles`` tiles."""
        frame = ([] if i is None else [i] for i in (self.start, self.end))
        return [*next(frame), *[self.context] * (self.per_tile * tiles), *next(frame)]


ONE_PLACEHOLDER = ImageTokens()


def image_tokens(tokenizer: Tokenizer, per_tile: int) -> ImageTokens:
    """The ids of images in the InternVL family; CheckpointError: the tokenizer is of another model."""
    start, context, end = (tokenizer.special(text) for text in (START, CONTEXT, END))
    return ImageTokens(context, per_tile, start, end)


@dataclass(frozen=True)
class ChatTemplate:
    """Strings around the texts of a conversation.

    Args:
        name: in the checkpoint.
        system: the message at the beginning; None: there is none, nor its surroundings.
        system_before, system_after: around it.
        user_before, user_after: around a question.
        answer_before: the start of an answer.
        answer_gap: between that and an answer that is given.
        answer_after: after an answer.
        stop: the special token that ends an answer.
        image_after: after each image that is shown before a question.
        image_label: before each of several images, ``{}`` for its number.
        image_shown: text in place of an image when the prompt is shown as text.
    """

    name: str
    system: str | None
    system_before: str
    system_after: str
    user_before: str
    user_after: str
    answer_before: str
    answer_gap: str
    answer_after: str
    stop: str
    image_after: str = "\n"
    image_label: str = "Image-{}: "
    image_shown: str = "<image>"

    @property
    def channels(self) -> bool:
        """Whether models write a header before an answer, as GPT-OSS (:class:`AnswerTokens`)."""
        return "<|start|>" in self.answer_before

    def with_system(self, system: str | None) -> ChatTemplate:
        """The same with another system message; None: none at all."""
        return replace(self, system=system)

    def check(self, tokenizer: Tokenizer) -> int:
        """The id of ``stop``; CheckpointError: the tokenizer lacks a special token that prompts need."""
        for text in asdict(self).values():
            for mark in re.findall(r"<\|[^|<>]+\|>", text or ""):
                tokenizer.special(mark)
        return tokenizer.special(self.stop)

    def to_json(self) -> dict[str, Any]:
        """Schema of :meth:`from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: object, source: str) -> ChatTemplate:
        """Inverse of :meth:`to_json`; CheckpointError if ``data`` does not fit."""
        names = {field.name for field in fields(cls)}
        if isinstance(data, dict) and data.keys() == names:
            texts = {key: value for key, value in data.items() if key != "system"}
            if all(isinstance(v, str) for v in texts.values()) and isinstance(data["system"], str | None):
                return cls(**data)
        raise CheckpointError(f"{source} is not a chat template.", fix="Build the bundle again.")


VICUNA = ChatTemplate(
    "vicuna", SYSTEM, "", " ", "USER: ", " ", "ASSISTANT:", " ", "</s>", "</s>", image_label=""
)
"""LLaVA 1.5's prompt for Vicuna v1.5."""
NATIVE = ChatTemplate(
    "native",
    None,
    "<|im_start|>system\n",
    "<|im_end|>\n",
    "<|im_start|>user\n",
    "<|im_end|>\n",
    "<|im_start|>assistant\n",
    "",
    "<|im_end|>\n",
    "<|im_end|>",
    image_label="",
    image_shown=CONTEXT,
)
"""Of transformers-native checkpoints: without a system message."""


@dataclass(frozen=True)
class ChatFormat:
    """How a model is prompted, and when its answers end. It travels in a bundle's manifest.

    Args:
        template: strings around questions and answers.
        images: the ids of an image in the published layout of prompts.
        eos: ids that end an answer, besides the template's ``stop``.
        pad: the id that fills rows that ended.
    """

    template: ChatTemplate = VICUNA
    images: ImageTokens = ONE_PLACEHOLDER
    eos: tuple[int, ...] = ()
    pad: int = 0

    @property
    def placeholder(self) -> ImageTokens:
        """As ``images``, with one :data:`IMAGE_TOKEN` for all visual embeddings of an image."""
        return self.images._replace(context=IMAGE_TOKEN, per_tile=1)

    def stops(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """The ids that end an answer, at least one; the template's first."""
        own = (tokenizer.special(self.template.stop),) if tokenizer.reads_texts else ()
        return tuple(dict.fromkeys((*own, *self.eos))) or (-1,)

    def encode(self, turns: Sequence[Turn], tokenizer: Tokenizer) -> Encoded:
        """A conversation, :attr:`placeholder` where it shows images; errors as :func:`encode`."""
        return encode(turns, tokenizer, self.template, self.placeholder)

    def to_json(self) -> dict[str, Any]:
        """What :meth:`from_json` reads."""
        images = self.images._asdict()
        return {
            "template": self.template.to_json(), "images": images, "eos": list(self.eos), "pad": self.pad,
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: object, source: str) -> ChatFormat:
        """Read what :meth:`to_json` gave; CheckpointError if it is not that."""
        try:
            if not isinstance(data, dict) or data.keys() != {"template", "images", "eos", "pad"}:
                raise ValueError
            images, eos = ImageTokens(**data["images"]), tuple(data["eos"])
            numbers = (images.context, images.per_tile, *eos, data["pad"])
            optional = (images.start, images.end)
            if {*map(type, numbers)} != {int} or not {*map(type, optional)} <= {int, type(None)}:
                raise ValueError
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{source} is not a chat format.", fix="Build the bundle again.") from error
        return cls(ChatTemplate.from_json(data["template"], source), images, eos, data["pad"])


class AnswerTokens:
    """Separates an answer's tokens from the headers that GPT-OSS writes: ``<|channel|>final<|message|>TEXT``.

    What it writes to other channels (``analysis``) is not part of the answer. Of other models every token is.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        self._tokenizer, self._shown = tokenizer, True
        self._header: list[int] | None = None
        marks = ("<|start|>", "<|channel|>", "<|message|>")
        ids = [tokenizer.special(mark) if template.channels else None for mark in marks]
        self._start, self._channel, self._message = ids

    def add(self, token: int) -> bool:
        """Whether ``token``, the next one, is part of the answer."""
        if token in (self._start, self._channel):
            self._header = []
        elif self._header is None:
            return self._shown
        elif token == self._message:
            # After <|start|> the header also names the role: assistant<|channel|>final.
            name = self._tokenizer.decode(self._header, until_eos=False)
            self._shown, self._header = name.strip().startswith("final"), None
        else:
            self._header.append(token)
        return False


# --- turns to ids ---


class _Markup(str):
    """Text of a format, whose special tokens are ids."""


class _Answer(str):
    """An answer."""


_Part: TypeAlias = "str | Slot"


def numbered(question: str, images: int) -> Turn:
    """``Image-1: <image>\\nImage-2: <image>\\n`` and the question: several images, as published."""
    return Turn(_labelled("Image-{}: ", images, question), None, images)


def framed(question: str, frames: int) -> Turn:
    """``Frame1: <image>\\nFrame2: <image>\\n`` and the question: a video, one tile a frame."""
    return Turn(_labelled("Frame{}: ", frames, question), None, frames)


def _labelled(label: str, images: int, question: str) -> tuple[str | Slot, ...]:
    rows = [part for n in range(1, images + 1) for part in (label.format(n), IMAGE, "\n")]
    return (*rows, question)


def _parts(template: ChatTemplate, turns: Sequence[Turn]) -> Iterator[_Part]:
    if not turns or any(turn.answer is None for turn in turns[:-1]):
        raise InputError(
            "This is not a conversation.", "It needs a question, and an answer to each but the last."
        )
    if template.system is not None:
        yield from (_Markup(template.system_before), template.system, _Markup(template.system_after))
    for turn in turns:
        yield _Markup(template.user_before)
        if isinstance(turn.question, tuple):
            yield from turn.question
        else:
            label = template.image_label if turn.images > 1 else ""
            for number in range(turn.images):
                yield from (label.format(number + 1), IMAGE, _Markup(template.image_after))
            yield turn.question
        yield from (_Markup(template.user_after), _Markup(template.answer_before))
        if turn.answer is not None:
            yield from (_Answer(template.answer_gap + turn.answer), _Markup(template.answer_after))


def encode(
    turns: Sequence[Turn],
    tokenizer: Tokenizer,
    template: ChatTemplate = VICUNA,
    images: ImageTokens = ONE_PLACEHOLDER,
    tiles: Sequence[int] | None = None,
) -> Encoded:
    """The ids of a conversation.

    Args:
        turns: questions and answers; the last may be open.
        tokenizer: of the checkpoint.
        template: of the checkpoint.
        images: the ids of one image.
        tiles: of each image, in the order in which they are shown; None: one each.

    Raises:
        InputError: no turn, an open turn before the last, another number of ``tiles`` than of images, or an
            answer that cannot be separated from its prompt.
        CheckpointError: the tokenizer has no such end token.
    """
    stop, total = tokenizer.special(template.stop), sum(turn.images for turn in turns)
    if tiles is not None and len(tiles) != total:
        raise InputError(f"The prompt shows {total} images.", f"Tiles of {len(tiles)} were given.")
    shown = iter(tiles or [1] * total)
    ids, labels = list(tokenizer.prefix), [IGNORE] * len(tokenizer.prefix)
    run, learnt, left, ends = "", -1, None, False

    def flush(right: int | None) -> None:
        """Encode the text between two special tokens; it is learnt from ``learnt`` on."""
        nonlocal run, learnt
        whole = _between(tokenizer, left, run, right)
        head = _between(tokenizer, left, run[:learnt], right) if learnt > 0 else []
        if learnt >= 0 and whole[: len(head)] != head:
            raise InputError(
                f"The answer {run[learnt:].strip()!r} cannot be separated from its prompt.",
                "Its first letters merge with the prompt's last ones into one token.",
            )
        ids.extend(whole)
        labels.extend([IGNORE] * len(whole) if learnt < 0 else [IGNORE] * len(head) + whole[len(head) :])
        run, learnt = "", -1

    for part in _parts(template, turns):
        if isinstance(part, Slot):
            tokens = images.ids(next(shown))
            flush(tokens[0])
            ids.extend(tokens)
            labels.extend([IGNORE] * len(tokens))
            left = tokens[-1]
            continue
        if isinstance(part, _Answer):
            learnt, ends = len(run), True
        for piece in tokenizer.markup(part) if isinstance(part, _Markup) else [part]:
            if isinstance(piece, str):
                run += piece
                continue
            flush(piece)
            ids.append(piece)
            labels.append(piece if ends and piece == stop else IGNORE)
            left, ends = piece, False
    flush(None)
    return Encoded(ids, labels)


def _between(tokenizer: Tokenizer, left: int | None, text: str, right: int | None) -> list[int]:
    """The ids of ``text`` between two special tokens, which may take its white space."""
    if not text:
        return []
    ids = tokenizer.encode_parts([part for part in (left, text, right) if part is not None])
    return ids[left is not None : len(ids) - (right is not None)]


def prompt_text(
    template: ChatTemplate, turns: Sequence[Turn], per_tile: int = 0, tiles: Sequence[int] | None = None
) -> str:
    """The prompt as text, to be looked at; images as the template shows them, or as their tokens."""
    shown = iter(tiles or [1] * sum(turn.images for turn in turns))

    def text(part: _Part) -> str:
        if not isinstance(part, Slot):
            return part
        return START + CONTEXT * per_tile * next(shown) + END if per_tile else template.image_shown

    return "".join(map(text, _parts(template, turns)))


# --- templates of checkpoints ---


def template_of(config: Mapping[str, Any], folder: Path | None = None) -> ChatTemplate:
    """The template of a checkpoint, from its own files.

    OpenGVLab's layout names it in ``config.json`` (``template``); it is read, never run, from the
    ``conversation.py`` next to it, else it is one of the published ones. ``system_message`` there is another
    system message, null means none. Transformers-native checkpoints have a ``chat_template`` in Jinja, which
    is rendered for a few conversations and becomes a template of the same kind. LLaVA's layout has Vicuna's.

    Raises:
        CheckpointError: an unknown template, or one that does not have the form of a :class:`ChatTemplate`.
        CapabilityError: a Jinja template, and jinja2 is not installed.
    """
    name = config.get("template")
    if str(config.get("model_type", "")).startswith("llava"):
        return VICUNA
    if name is None and config.get("model_type") != "internvl_chat":
        jinja = jinja_source(folder) if folder is not None else None
        return NATIVE if jinja is None else from_jinja(jinja)
    own = None if folder is None else _from_file(folder / _OWN, name)
    template = own or _published(name, config, folder)
    if "system_message" in config:
        message = config["system_message"]
        if message is not None and not isinstance(message, str):
            raise CheckpointError("system_message in config.json cannot be used.", f"It is {message!r}.")
        template = template.with_system(message)
    return template


@cache
def _known() -> dict[str, Any]:
    text = Path(__file__).with_name("chat_templates.json").read_text(encoding="utf-8")
    data: dict[str, Any] = json.loads(text)
    return data


def _published(name: object, config: Mapping[str, Any], folder: Path | None) -> ChatTemplate:
    templates, earlier = _known()["templates"], _known()["system_messages_of_1.2_and_1.5"]
    if not isinstance(name, str) or name not in templates:
        raise CheckpointError(
            f"The chat template {name!r} of config.json is not known.",
            f"Known are {', '.join(templates)}.",
            f"Put the published {_OWN} next to config.json.",
        )
    template = _from_fields(name, **templates[name])
    # Versions 1.2 and 1.5 had other messages under the same names; their configs hardly differ from 2's.
    old = "ps_version" not in config or "V1-5" in f"{config.get('_name_or_path')} {folder and folder.name}"
    return template.with_system(earlier[name]) if old and name in earlier else template


def _from_fields(
    name: str,
    style: str,
    system_template: str,
    system_message: str,
    roles: Sequence[str],
    sep: str,
    sep2: str | None,
) -> ChatTemplate:
    """From the fields of the published ``Conversation``."""
    before, place, after = system_template.partition("{system_message}")
    user, assistant = roles
    if not place:
        raise ValueError(f"{system_template!r} has no place for the system message")
    if style == "MPT":
        stop = (sep2 or sep).strip()
        return ChatTemplate(name, system_message, before, after + sep, user, sep, assistant, "", sep, stop)
    if style == "INTERNVL_ZH":
        first, second = (sep, sep2 or "") if not sep.strip() else (sep2 or "", sep)
        return ChatTemplate(
            name,
            system_message,
            before,
            after + first,
            f"{user}: ",
            first,
            f"{assistant}:",
            " ",
            second,
            second,
        )
    raise ValueError(f"its style, {style}, is not known here")


def _from_file(path: Path, name: object) -> ChatTemplate | None:
    """The template ``name`` in a published conversation.py; None: it is not there."""
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"it is larger than {_MAX_BYTES} bytes")
        tree = ast.parse(read_text(path, CheckpointError))
        for call in ast.walk(tree):
            if not isinstance(call, ast.Call) or getattr(call.func, "id", "") != "Conversation":
                continue
            values = {word.arg: word.value for word in call.keywords}
            if ast.literal_eval(values.get("name", ast.Constant(None))) != name:
                continue
            style = getattr(values.pop("sep_style"), "attr", "")
            plain = {key: ast.literal_eval(values[key]) for key in ("roles", "sep") if key in values}
            system = ast.literal_eval(values.get("system_message", ast.Constant("")))
            form = ast.literal_eval(values.get("system_template", ast.Constant("{system_message}")))
            sep2 = ast.literal_eval(values.get("sep2", ast.Constant(None)))
            return _from_fields(str(name), style, form, system, plain["roles"], plain["sep"], sep2)
    except (OSError, ValueError, TypeError, KeyError, SyntaxError, RecursionError, MemoryError) as error:
        raise CheckpointError(
            f"The chat template {name!r} in {path} cannot be read.", f"{error}.", "Download it again."
        ) from error
    return None


def jinja_source(folder: Path) -> str | None:
    """The ``chat_template`` of a checkpoint, from whichever of its files has it; None: none."""
    try:
        if (folder / _JINJA).is_file():
            return read_text(folder / _JINJA, CheckpointError)
        for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
            if (folder / name).is_file():
                source = json.loads(read_text(folder / name, CheckpointError)).get("chat_template")
                if isinstance(source, str):
                    return source
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"The chat template in {folder} cannot be read.", f"{error}.") from error
    return None


_QUESTIONS, _ANSWERS, _SYSTEM = ("\ue000aB\ue001", "\ue000bB\ue001"), ("\ue000cB\ue001",), "\ue000sB\ue001"
"""Probe texts to render a template with; they occur in no template."""


def from_jinja(source: str) -> ChatTemplate:
    """A Jinja ``chat_template`` as a :class:`ChatTemplate`, from its rendering of a few conversations.

    Raises:
        CheckpointError: it fails, or does more than put strings around the texts.
        CapabilityError: jinja2 is not installed.
    """
    if len(source) > _MAX_BYTES:
        raise CheckpointError("The chat template is refused.", f"It is larger than {_MAX_BYTES} bytes.")
    render = _renderer(source)
    try:
        return _probed(render)
    except CheckpointError:
        raise
    except Exception as error:  # a template may raise anything
        raise CheckpointError(
            "The chat template of this checkpoint cannot be followed.",
            f"{type(error).__name__}: {error}."[:300],
            "Put the chat_template.jinja of the published checkpoint next to config.json.",
        ) from error


def _renderer(source: str) -> Any:
    try:
        from jinja2.exceptions import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise CapabilityError(
            "The chat template of this checkpoint cannot be read here.",
            "It is written in Jinja, and jinja2 is not installed.",
            "pip install jinja2",
        ) from error

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = refuse

    def render(*turns: Turn, system: str | None = None) -> str:
        messages: list[dict[str, Any]] = []
        if system is not None:
            messages.append({"role": "system", "content": [{"type": "text", "text": system}]})
        for turn in turns:
            content: list[dict[str, str]] = [{"type": "image"}] * turn.images
            content = [*content, {"type": "text", "text": str(turn.question)}]
            messages.append({"role": "user", "content": content})
            if turn.answer is not None:
                answer = [{"type": "text", "text": turn.answer}]
                messages.append({"role": "assistant", "content": answer})
        text = environment.from_string(source).render(
            messages=messages, add_generation_prompt=True, bos_token="", eos_token=""
        )
        return str(text)

    return render


def _probed(render: Any) -> ChatTemplate:
    (one, two), (answer,) = _QUESTIONS, _ANSWERS
    before, opened = render(Turn(one)).split(one)
    _, after_question, closed, _ = re.split(
        f"{one}|{answer}|{two}", render(Turn(one, answer), Turn(two)), maxsplit=3
    )
    mark = re.match(r"\s*(<[^<>\s]+>)\s*", closed)
    if mark is None:
        raise ValueError(f"no special token ends an answer: {closed!r}")
    answer_after, user_before = mark[0], closed[mark.end() :]
    if not before.endswith(user_before) or not after_question.startswith(opened):
        raise ValueError("the strings before a question or an answer change")
    default = before[: len(before) - len(user_before)]
    system_before, rest = render(Turn(one), system=_SYSTEM).split(one)[0].split(_SYSTEM)
    system_after = rest[: len(rest) - len(user_before)]
    system = None
    if default:
        if not (default.startswith(system_before) and default.endswith(system_after)):
            raise ValueError(f"it begins with {default!r}, which is not a system message")
        system = default[len(system_before) : len(default) - len(system_after)]
    shown = render(Turn(one, None, 1)).split(one)[0].removeprefix(before)
    image = re.match(r"<[^<>\s]+>", shown)
    if image is None:
        raise ValueError(f"it shows an image as {shown!r}")
    end = re.match(r"\s*(<[^<>\s]+>)?\s*", opened)
    user_after = end[0] if end and end[1] else ""
    template = ChatTemplate(
        "chat_template", system, system_before, system_after, user_before, user_after,
        opened[len(user_after) :], after_question[len(opened) :], answer_after, mark[1],
        shown[image.end() :], "", image[0],
    )  # fmt: skip
    turns = (Turn(one, answer, 2), Turn(two, _SYSTEM), Turn(one))
    for chosen in (system, _SYSTEM):
        own = prompt_text(template.with_system(chosen), turns)
        if own != render(*turns, system=None if chosen == system else chosen):
            raise ValueError("it does more than put strings around the texts")
    return template
