"""Progress of long work on stderr: a bar for the running step, a line for each finished one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import TaskID

    from ..training.trainer import TrainingProgress


class Bars:
    """A :class:`..progress.Progress` that draws bars; lines only, unless stderr is a terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._console = Console(stderr=True)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._task: TaskID | None = None
        self._step = self._label = ""

    def __enter__(self) -> Bars:
        if self._console.is_terminal:  # elsewhere rich would leave an empty line
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._progress.stop()

    def started(self, step: str, total: int | None, unit: str = "") -> None:
        """Show a bar for ``step``."""
        self._clear()
        self._step, self._label = step, f"{step} ({unit})" if unit else step
        self._task = self._progress.add_task(self._label, total=total, rate="")

    def advanced(self, done: int, total: int | None = None, detail: str = "") -> None:
        """Move the bar; ``total``: where its end is, if that is known only now."""
        if self._task is not None:
            speed = self._progress.tasks[self._progress.task_ids.index(self._task)].speed
            rate = f"{speed:.1f}/s" if speed else ""
            label = f"{self._label}: {detail}" if detail else self._label
            self._progress.update(self._task, completed=done, total=total, rate=rate, description=label)

    def finished(self, step: str, seconds: float, reused: bool = False) -> None:
        """A line for ``step``, in the place of its bar if it has one."""
        if step == self._step:
            self._clear()
        how = "reused" if reused else f"{seconds:.1f} s"
        self._console.print(f"[green]done[/] {step} [dim]{how}[/]", highlight=False)

    def _clear(self) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task, self._step = None, ""


@contextmanager
def step_bar(stage: str, total: int) -> Iterator[Callable[[TrainingProgress], None]]:
    """A bar for ``total`` training steps, with their rate and losses: call what it gives after every step."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} steps"),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(stage, total=total, rate="", loss="")

        def report(step: TrainingProgress) -> None:
            rate = f"{bar.tasks[0].speed or 0:.2f} steps/s"
            losses = " ".join(f"{k} {v:.3f}" for k, v in step.losses.items() if k != "grad_norm")
            bar.update(task, completed=step.done, description=step.stage, rate=rate, loss=losses)

        yield report
