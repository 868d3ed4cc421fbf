"""Talks about images with the bundle next to this file.

python app.py photo.jpg --ask "What is this?"
python app.py photo.jpg          # asks for questions, until an empty line
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import ivl_export

BUNDLE = Path(__file__).resolve().parent / "bundle"


def questions(asked: list[str]) -> Iterator[str]:
    """The questions of the command line; without any, lines that are typed until an empty one."""
    yield from asked
    while not asked:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        yield line


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer questions about the images, each in pieces as it is decoded."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("images", nargs="*", help="image files that the conversation is about")
    parser.add_argument("--ask", action="append", default=[], help="a question (repeat)")
    parser.add_argument("--max-tokens", type=int, default=256, help="the longest answer")
    chosen = parser.parse_args(arguments)
    try:
        with ivl_export.load(BUNDLE) as model:
            chat = model.chat(chosen.images)
            for question in questions(chosen.ask):
                for piece in chat.stream(question, chosen.max_tokens):
                    print(piece, end="", flush=True)
                print()
    except ivl_export.IvlError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
