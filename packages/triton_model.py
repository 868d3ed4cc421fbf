"""A model of Triton's Python backend: reads images and texts, runs the bundle, answers.

It runs the bundle through ivl_export's runtime, instead of calling the models of the graphs: an answer is
decoded token by token over a cache that stays with the engine, and those of several requests are decoded
together. Parameters in config.pbtxt: ``task``, ``bundle`` (a folder, from this model's own on), ``backend``,
``target``, ``threads``, ``normalize``. It runs on the GPU of its instance group, or on the CPU.
"""

from __future__ import annotations

import asyncio
import json
import math
import sys
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

import ivl_export
from ivl_export.inputs.chat_template import Turn
from ivl_export.runtime import ChatService, Service, ServiceLimits
from ivl_export.runtime.serving.chat_service import Completion

Row = Mapping[str, list[Any]]
"""Inputs of one row of a request: name -> its elements; an input that was left out has none."""
Answer = Mapping[str, Any]
"""Outputs of one row: name -> a number, a text or a vector."""
Task = Callable[["TritonPythonModel", Row, frozenset[str]], Awaitable[Answer]]


class TritonPythonModel:
    """The class that Triton's Python backend looks for."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the bundle and run it once: Triton calls a model ready when this returns."""
        config = json.loads(args["model_config"])
        given = {key: value["string_value"] for key, value in config.get("parameters", {}).items()}
        self.task, self.outputs = TASKS[given["task"]], {t["name"]: t for t in config["output"]}
        self.inputs = [t["name"] for t in config["input"]]
        self.normalize = given.get("normalize", "true") == "true"
        engine: dict[str, Any] = {key: given[key] for key in ("backend", "target") if key in given}
        if args.get("model_instance_kind") == "GPU":
            engine["device"] = f"cuda:{args['model_instance_device_id']}"
        if "threads" in given:
            engine["threads"] = int(given["threads"])
        folder = Path(__file__).resolve().parent.parent / given.get("bundle", "../../bundle")
        self.model = ivl_export.load(folder, **engine)
        # Triton bounds the queue and the time of requests; it sends no more rows than max_batch_size.
        rows = max(1, int(config.get("max_batch_size", 1)))
        limits = ServiceLimits(max_running=rows, max_queued=rows, timeout=math.inf)
        chat = isinstance(self.model, ivl_export.InternVLChat)
        self.service: Any = ChatService(self.model, limits) if chat else Service(self.model, limits)
        self._loop = asyncio.new_event_loop()
        self._loop.run_until_complete(self.task(self, self._first_row(), frozenset(self.outputs)))

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """The answers to ``requests``, whose rows run together; one that fails spoils no other."""

        async def every() -> list[Any]:
            return list(await asyncio.gather(*map(self._response, requests)))

        return self._loop.run_until_complete(every())

    def finalize(self) -> None:
        """Free the engines."""
        self.service.close()
        self._loop.run_until_complete(self._ended())
        self._loop.close()
        self.model.close()

    async def _ended(self) -> None:
        """Let what was cancelled come to its end."""
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*rest, return_exceptions=True)
        await asyncio.get_running_loop().shutdown_asyncgens()

    async def _response(self, request: Any) -> Any:
        try:
            return pb_utils.InferenceResponse(output_tensors=await self._answered(request))
        except ivl_export.IvlError as error:
            return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(str(error)))
        except Exception as error:  # a fault of this code: the requests beside it go on
            traceback.print_exc(file=sys.stderr)
            said = pb_utils.TritonError(f"An unexpected {type(error).__name__}; see the server's log.")
            return pb_utils.InferenceResponse(output_tensors=[], error=said)

    async def _answered(self, request: Any) -> list[Any]:
        columns: dict[str, Any] = {}
        for name in self.inputs:
            tensor = pb_utils.get_input_tensor_by_name(request, name)
            if tensor is not None:
                columns[name] = tensor.as_numpy()
        count = len(next(iter(columns.values())))
        rows = [
            {name: list(columns[name][k].reshape(-1)) if name in columns else [] for name in self.inputs}
            for k in range(count)
        ]
        wanted = frozenset(request.requested_output_names()) & {*self.outputs}
        answers = await asyncio.gather(*(self._row(k, count, row, wanted) for k, row in enumerate(rows)))
        return [
            pb_utils.Tensor(name, self._column(name, [answer[name] for answer in answers]))
            for name in self.outputs
            if name in wanted
        ]

    async def _row(self, number: int, count: int, row: Row, wanted: frozenset[str]) -> Answer:
        try:
            return await self.task(self, row, wanted)
        except ivl_export.IvlError as error:
            if count > 1:
                error.args = (f"Row {number + 1} of {count}: {error}",)
            raise

    def _column(self, name: str, values: list[Any]) -> Any:
        kind = self.outputs[name]["data_type"]
        if kind == "TYPE_STRING":
            column = np.array([value.encode() for value in values], np.object_)
        else:
            column = np.array(values, {"TYPE_FP32": np.float32, "TYPE_INT32": np.int32}[kind])
        return column.reshape(len(values), -1)

    def _first_row(self) -> Row:
        """Inputs to warm up with."""
        image = np.zeros((8, 8, 3), np.uint8)
        values: dict[str, Any] = {"image": image, "text": b".", "question": b".", "max_tokens": 2}
        return {name: [values[name]] if name in values else [] for name in self.inputs}

    def unit(self, row: Any) -> Any:
        """``row`` in length 1, unless the model is not to normalize."""
        return row / np.linalg.norm(row) if self.normalize else row


def text_of(row: Row, name: str, default: str = "") -> str:
    """The text of an input; ``default`` where it was left out. InputError where it is not UTF-8."""
    if not row[name]:
        return default
    try:
        return str(bytes(row[name][0]), "utf-8")
    except UnicodeDecodeError as error:
        raise ivl_export.InputError(f"{name} is not UTF-8 text.", f"{error}.", "Send it in UTF-8.") from error


def whole(row: Row, name: str, default: int) -> int:
    """The number of an input; ``default`` where it was left out."""
    return int(row[name][0]) if row[name] else default


def image_of(row: Row) -> Any:
    """The bytes of an image file, never a path."""
    return _image(row["image"][0])


def _image(value: Any) -> Any:
    return value if isinstance(value, np.ndarray) else bytes(value)


async def embed_image(model: TritonPythonModel, row: Row, wanted: frozenset[str]) -> Answer:
    """``embedding`` of InternVL-C, ``embedding_g`` of InternVL-G: those that the request asks for."""
    heads: dict[str, Any] = {"embedding": "InternVL-C", "embedding_g": "InternVL-G"}
    answer = {}
    for name in sorted(wanted):
        answer[name] = model.unit((await model.service.encode_image(image_of(row), heads[name])).value)
    return answer


async def embed_text(model: TritonPythonModel, row: Row, wanted: frozenset[str]) -> Answer:
    """``embedding`` of ``text``."""
    return {"embedding": model.unit((await model.service.encode_text(text_of(row, "text"))).value)}


async def match(model: TritonPythonModel, row: Row, wanted: frozenset[str]) -> Answer:
    """``probability`` that ``text`` describes ``image``."""
    return {"probability": (await model.service.match(image_of(row), text_of(row, "text"))).value}


async def caption(model: TritonPythonModel, row: Row, wanted: frozenset[str]) -> Answer:
    """``caption`` of ``image``; ``prompt`` and ``max_tokens`` may be left out."""
    more: dict[str, Any] = {"prompt": text_of(row, "prompt")} if row["prompt"] else {}
    more["max_new_tokens"] = whole(row, "max_tokens", 30)
    return {"caption": (await model.service.caption(image_of(row), **more)).value}


async def chat(model: TritonPythonModel, row: Row, wanted: frozenset[str]) -> Answer:
    """``answer`` to ``question`` about ``image`` (any number), after the turns of ``history``."""
    images = [_image(value) for value in row["image"]]
    turns = history_of(text_of(row, "history"))
    left = len(images) - sum(turn.images for turn in turns)
    if left < 0:
        raise ivl_export.InputError(
            f"The history shows {len(images) - left} images.",
            f"{len(images)} were sent.",
            "Send all of them.",
        )
    turns.append(Turn(text_of(row, "question"), None, left))
    pieces: list[str] = []
    end = Completion("length", 0, 0, 0)
    longest = whole(row, "max_tokens", 256)
    if longest < 1:
        raise ivl_export.UsageError("max_tokens is too small.", f"It is {longest}.", "Give 1 or more.")
    async for piece in model.service.complete(turns, images, max_new_tokens=longest):
        if isinstance(piece, Completion):
            end = piece
        else:
            pieces.append(piece)
    return {
        "answer": "".join(pieces).strip(),
        "finish_reason": end.finish,
        "prompt_tokens": end.prompt,
        "completion_tokens": end.new,
    }


def history_of(text: str) -> list[Turn]:
    """Turns of a JSON list: ``[{"question": "What is it?", "answer": "A ring.", "images": 1}]``."""
    try:
        turns = json.loads(text or "[]")
        return [Turn(*_turn(**turn)) for turn in turns]
    except (ValueError, TypeError, RecursionError) as error:
        raise ivl_export.InputError(
            "The history cannot be read.", f"{error}.",
            'Send [{"question": "...", "answer": "...", "images": 0}].',
        ) from error  # fmt: skip


def _turn(question: str, answer: str, images: int = 0) -> tuple[str, str, int]:
    if not (isinstance(question, str) and isinstance(answer, str)):
        raise TypeError("a question or an answer is not text")
    if not isinstance(images, int) or isinstance(images, bool) or images < 0:
        raise TypeError("images is not a number")
    return question, answer, images


TASKS: dict[str, Task] = {
    "embed_image": embed_image, "embed_text": embed_text, "match": match, "caption": caption, "chat": chat,
}  # fmt: skip
