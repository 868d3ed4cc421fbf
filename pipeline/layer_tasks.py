"""Task accuracy of the PyTorch model while one layer of it is quantised."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from ..calibration.simulate import attention_hook, rounding_hook
from ..models.config import ChatConfig
from ..quantization.attention import FP8_ATTENTION, core_attentions, operand_names
from ..quantization.quantize import dequantise, quantise
from ..quantization.ranges import Scales
from ..quantization.schemes import SCHEMES
from .evaluate import headlines

if TYPE_CHECKING:
    from torch import nn

    from .job import Job

QUESTIONS = 64
"""Questions of each task. One is 1.6 points: enough to see which layers break the model, and no more."""


class LayerTasks:
    """Task scores of a model with one layer quantised; the model is loaded once.

    Args:
        job: names the model and its questions.
        scales: input ranges; each pass through QLLaMA has its own.
        questions: of each task; of a chat model scenes, which get one or two.
    """

    model: nn.Module

    def __init__(self, job: Job, scales: Scales, questions: int = QUESTIONS) -> None:
        self.job, self.scales = job, scales
        self.chat = isinstance(job.checkpoint.model, ChatConfig)
        self.model, self._answers = (_chat if self.chat else _internvl)(job, questions)
        self._pass = "vision"
        self.reference = self._scores()

    def lost(self, layer: str, scheme: str) -> dict[str, float]:
        """Percentage points lost on each task when ``layer`` alone has ``scheme``."""
        with self._quantised(layer, scheme):
            scores = self._scores()
        return {task: round(100 * (self.reference[task] - value), 6) for task, value in scores.items()}

    def _scores(self) -> dict[str, float]:
        return headlines(self._answers())

    @contextmanager
    def _quantised(self, layer: str, scheme: str) -> Iterator[None]:
        import torch

        base, ranges = self.job.recipe.base, self.scales.amax
        hooks: Mapping[str, Callable[..., Any]]
        with ExitStack() as stack:
            if not self.chat:
                qllama = self.model.get_submodule("qllama")
                follow = qllama.register_forward_pre_hook(self._follow, with_kwargs=True)
                stack.callback(follow.remove)
            if scheme == FP8_ATTENTION:
                names = set(operand_names(layer))
                measured = {c: amax for c, amax in ranges.items() if names <= set(amax)}
                hooks = {c: attention_hook(layer, amax, base) for c, amax in measured.items()}
                core = core_attentions(self.model)[layer]
                stack.callback(core.register_forward_hook(self._by_component(layer, hooks)).remove)
            else:
                linear = self.model.get_submodule(layer)
                assert isinstance(linear, torch.nn.Linear)
                stack.callback(setattr, linear, "weight", linear.weight)
                values = dequantise(*quantise(linear.weight.detach(), scheme, base))
                linear.weight = torch.nn.Parameter(values, requires_grad=False)
                if kind := SCHEMES[scheme].activation:
                    tops = {c: amax[layer] for c, amax in ranges.items() if layer in amax}
                    hooks = {c: rounding_hook(top, kind, base) for c, top in tops.items()}
                    hook = self._by_component(layer, hooks)
                    stack.callback(linear.register_forward_pre_hook(hook).remove)
            yield

    def _by_component(self, layer: str, hooks: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
        """The hook of the component that is running; it changes nothing where there is none.

        A layer of a chat model runs in one component only.
        """
        only = next(iter(hooks.values()), None) if self.chat else None

        def hook(*given: Any) -> Any:
            own = only or hooks.get("vision" if layer.startswith("vision_model.") else self._pass)
            return own(*given) if own is not None else None

        return hook

    def _follow(self, _: object, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note which component a pass through QLLaMA belongs to, by the arguments it is called with."""
        given = dict(
            zip(("embeds", "positions", "visible", "vision", "num_queries", "past"), args, strict=False)
        )
        given.update(kwargs)
        if given.get("vision") is not None:
            self._pass = "qllama_query"
        else:
            self._pass = "qllama_step" if given.get("past") else "qllama_text"


def _internvl(job: Job, questions: int) -> tuple[nn.Module, Callable[[], dict[str, Any]]]:
    """The model, and what scores it as it is now."""
    import torch

    from ..models.load import load_model
    from ..synthetic import tasks
    from ..training.evaluate import TorchModel

    model = load_model(job.checkpoint, torch.float32)
    sizes: dict[str, Any] = {
        "n_classify": questions,
        "n_retrieve": questions,
        "n_galleries": 1,
        "n_caption": questions,
        "n_caption_zh": 0,
    }
    # An adapter remembers what it was asked: each score has its own.
    return model, lambda: tasks.evaluate(TorchModel(model, job.tokenizer, job.settings), **sizes)


def _chat(job: Job, scenes: int) -> tuple[nn.Module, Callable[[], dict[str, Any]]]:
    """As :func:`_internvl`, of a chat model."""
    import torch

    from ..models.load import load_chat
    from ..synthetic import chat_tasks
    from ..training.chat_model import TorchChat

    model = load_chat(job.checkpoint, torch.float32)
    return model, lambda: chat_tasks.evaluate(TorchChat(model, job.tokenizer, job.settings), scenes)
