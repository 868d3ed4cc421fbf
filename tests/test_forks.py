"""A model that was used before its process forks: children answer, or say why they cannot."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ivl_export.forks import cached_property, fork_safe_lock, no_fork

pytestmark = [
    pytest.mark.numeric,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork"),
]

SCRIPT = """
import asyncio, os, sys, threading
import numpy as np
from PIL import Image
from ivl_export.errors import IvlError
from ivl_export.runtime import InternVL, InternVLChat
from ivl_export.runtime.serving.admission import ServiceLimits
from ivl_export.runtime.serving.service import Service

image = Image.fromarray(np.arange(60 * 60 * 3, dtype=np.uint8).reshape(60, 60, 3))

def same(a, b):
    return np.allclose(a, b, atol=1e-5) if isinstance(a, np.ndarray) else a == b

def in_child(call, want):
    '''Run call in a forked child; it must end within a minute, with the parent's result.'''
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if same(call(), want) else 2
        except IvlError as error:
            print(type(error).__name__, error, flush=True)
            code = 3
        finally:
            os._exit(code)
    timer = threading.Timer(60, os.kill, (child, 9))
    timer.start()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    timer.cancel()
    return status

def check(call):
    want = call()
    codes = [in_child(call, want), in_child(lambda: in_child(call, want), 0)]  # a child, and its own child
    print(call.__name__, codes, same(call(), want), flush=True)
"""

EMBED = """
model = InternVL.load(sys.argv[1], threads=int(sys.argv[2]))
service = Service(model, ServiceLimits(max_running=2))
def embed(): return asyncio.run(model.aencode_image(image))
def text(): return asyncio.run(model.aencode_text("a ring"))
def caption(): return asyncio.run(model.acaption(image))
def own_service(): return asyncio.run(service.encode_text("a ring")).value
def synchronous(): return model.encode_image([image])
for call in (embed, text, caption, own_service, synchronous):
    check(call)
"""

CHAT = """
model = InternVLChat.load(sys.argv[1], threads=int(sys.argv[2]))
def ask():
    async def run():
        chat = await model.achat([image])
        return await chat.aask("What is this?", max_new_tokens=4)
    return asyncio.run(run())
def synchronous(): return model.chat([image]).ask("What is this?", max_new_tokens=4)
for call in (ask, synchronous):
    check(call)
"""

BUSY = """
model = InternVL.load(sys.argv[1], threads=int(sys.argv[2]))
want = model.encode_text(["a ring"])
stop = threading.Event()
def work():
    while not stop.is_set():
        asyncio.run(model.aencode_text("a ring"))
others = [threading.Thread(target=work)]
[t.start() for t in others]
def text(): return asyncio.run(model.aencode_text("a ring"))
print("busy", [in_child(text, want[0]) for _ in range(8)], flush=True)
stop.set()
[t.join() for t in others]
"""

TORCH = """
model = InternVL.load(sys.argv[1], backend="torch", device="cpu")
def text(): return model.encode_text(["a ring"])
check(text)
"""


def run(code: str, bundle: Path, threads: int = 2) -> list[str]:
    args = [sys.executable, "-c", SCRIPT + code, str(bundle), str(threads)]
    process = subprocess.run(args, capture_output=True, text=True, timeout=240, check=False)
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.slow
def test_children_embed_and_caption(tiny_bundle: Path, threads: int) -> None:
    calls = ["embed", "text", "caption", "own_service", "synchronous"]
    assert run(EMBED, tiny_bundle, threads) == [f"{call} [0, 0] True" for call in calls]


@pytest.mark.slow
def test_children_chat(chat_bundle: Path) -> None:
    assert run(CHAT, chat_bundle) == ["ask [0, 0] True", "synchronous [0, 0] True"]


@pytest.mark.slow
def test_a_fork_while_others_ask(tiny_bundle: Path) -> None:
    assert run(BUSY, tiny_bundle) == [f"busy {[0] * 8}"]


@pytest.mark.slow
def test_an_engine_that_does_not_survive_says_so(tiny_bundle: Path) -> None:
    first, *_, last = run(TORCH, tiny_bundle)
    assert first.startswith("UsageError This model was used before the process was forked.")
    assert "torch do not survive os.fork()" in first
    assert last == "text [3, 2] True"


def test_a_lock_is_free_in_a_child() -> None:
    import os

    lock, contents, over = fork_safe_lock(), threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            contents.set()
            over.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    contents.wait()
    child = os.fork()
    if child == 0:
        os._exit(0 if lock.acquire(timeout=10) else 1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert not lock.acquire(blocking=False)
    over.set()
    thread.join()
    assert code == 0


def test_a_property_that_a_thread_computes_is_computed_anew_in_a_child() -> None:
    began, over = threading.Event(), threading.Event()

    class Owner:
        @cached_property
        def value(self) -> int:
            if threading.current_thread() is not threading.main_thread():
                began.set()
                over.wait()
            return 5

    owner = Owner()
    thread = threading.Thread(target=lambda: owner.value)
    thread.start()
    began.wait()
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # ends a child that waits for ever
        os._exit(owner.value)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    over.set()
    thread.join()
    assert (code, owner.value) == (5, 5)


def test_a_fork_waits_for_a_running_call() -> None:
    running, over = threading.Event(), threading.Event()
    events: list[str | int] = []

    def call() -> None:
        with no_fork:
            running.set()
            over.wait()
            events.append("call")

    def fork() -> None:
        child = os.fork()
        if child == 0:
            with no_fork:  # open in the child
                os._exit(0 if events == ["call"] else 1)
        events.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    threads = [threading.Thread(target=call), threading.Thread(target=fork)]
    threads[0].start()
    running.wait()
    threads[1].start()
    late = threading.Thread(target=call)
    while not no_fork.gate.locked():
        pass
    late.start()
    threads[1].join(timeout=0.1)
    assert events == []
    over.set()
    for thread in (*threads, late):
        thread.join()
    assert events[0] == "call"
    assert sorted(events[1:], key=str) == [0, "call"]
