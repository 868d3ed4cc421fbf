"""Arguments of ``ivl-export embed``, and the model and the plan that they name."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import cast

from .. import __version__
from ..bundle.manifest import MANIFEST
from ..errors import CapabilityError, UsageError
from ..files.hashing import sha256_file
from ..inputs.preprocess import MODES as RESIZE_MODES
from ..inputs.tiles import MAX_TILES
from ..inputs.video import FRAMES
from ..progress import SILENT, Progress
from ..runtime.chat import InternVLChat
from ..runtime.components import fixed, visual_shape
from ..runtime.image_batches import Reading
from ..runtime.load import load
from ..runtime.model import MODES, InternVL
from ..runtime.shards import DTYPES, Dtype, Embedding
from .embed import Model
from .plan import SHARD_ITEMS, Plan, Work, load_plan, make_plan
from .sources import Choice, Kind

LIBRARIES = {"onnxruntime": ("onnxruntime", "onnxruntime-gpu"), "torch": ("torch",)}
"""Backend -> packages, one of which computes; of TensorRT the engine's own release is in the bundle."""


@dataclass(frozen=True)
class EmbedConfig:
    """Arguments of a bulk embedding; see :func:`ivl_export.embed_folder`."""

    bundle: Path
    sources: tuple[Path, ...]
    out: Path
    mode: str = "InternVL-C"
    kinds: tuple[str, ...] = ("image", "video")
    tiles: bool = False
    unit: bool = True
    dtype: str = "float32"
    resize: str | None = None
    max_tiles: int | None = None
    frames: int = FRAMES
    approximate_jpeg: bool = False
    image_column: str | None = None
    text_column: str | None = None
    key_column: str | None = None
    shard_items: int = SHARD_ITEMS
    backend: str = "onnxruntime"
    target: str | None = None
    device: str | None = None
    threads: int | None = None
    batch: int | None = None


def open_run(config: EmbedConfig, force: bool = False, progress: Progress = SILENT) -> tuple[Model, Plan]:
    """The loaded bundle, and the plan of the sources as they are now.

    Args:
        config: the arguments.
        force: take no counts of an earlier plan in the output folder.
        progress: receives the files that are counted.

    Raises:
        UsageError: a setting that cannot be right.
        InputError: a source that cannot be read.
        CapabilityError: the bundle, or this installation, cannot do it.
        IntegrityError: the bundle, or an earlier plan, is damaged.
    """
    _check(config)
    model: Model = load(
        config.bundle,
        config.backend,
        threads=config.threads,
        target=config.target,
        device=config.device,
        batch=config.batch,
        reading=Reading(threads=1),
    )
    try:
        embedding, work = _embedding(config, model), _work(config, model)
        earlier = None if force else load_plan(config.out)
        plan = make_plan(
            embedding, work, config.sources, config.out, _versions(config.backend), earlier, progress
        )
    except BaseException:
        model.close()
        raise
    return model, plan


def _check(config: EmbedConfig) -> None:
    for name, value, known in (
        ("mode", config.mode, MODES),
        ("dtype", config.dtype, DTYPES),
        ("resize", config.resize or RESIZE_MODES[0], RESIZE_MODES),
    ):
        if value not in known:
            raise UsageError(
                f"Unknown {name} {value!r}.", f"Known: {', '.join(known)}.", "Name one of these."
            )
    if not config.kinds:
        raise UsageError("No kinds of input were given.", "", "Name some of image, video and text.")
    if config.shard_items < 1 or config.frames < 1:
        raise UsageError(
            f"Shards of {config.shard_items} inputs, {config.frames} frames: both must be 1 or more."
        )
    if config.max_tiles is not None and not 1 <= config.max_tiles <= MAX_TILES:
        raise UsageError(f"max_tiles is {config.max_tiles}.", "", f"Give 1 to {MAX_TILES}.")


def _embedding(config: EmbedConfig, model: Model) -> Embedding:
    chat = isinstance(model, InternVLChat)
    if chat and ("text" in config.kinds or config.mode != MODES[0]):
        raise CapabilityError(
            f"{config.bundle} holds a chat model.",
            "It embeds images and videos, in one way; its texts are not aligned with them.",
            "Leave out text and the mode, or use the bundle of an InternVL-C or InternVL-G.",
        )
    if isinstance(model, InternVL) and (config.tiles or config.max_tiles):
        raise CapabilityError(
            f"{config.bundle} does not cut images into tiles.",
            "An image is one square of it.",
            "Leave out the tiles, or use the bundle of a chat model that tiles.",
        )
    if chat and config.resize:
        raise UsageError("A chat model's images are read as its checkpoint says.", "", "Leave out resize.")
    manifest = model.bundle.manifest
    if isinstance(model, InternVL):
        outputs = {t.name: t.shape for t in model.components.spec("vision").outputs}
        width = fixed(outputs["image_embed"][1])
    else:
        width = visual_shape(model.components)[1]
    return Embedding(
        sha256_file(model.bundle.root / MANIFEST),
        manifest.model.name,
        manifest.recipe,
        config.backend,
        model.components.target or "",
        width,
        cast("Dtype", config.dtype),
        "" if chat else config.mode,
        config.unit,
        config.tiles,
        config.resize or "",
        config.max_tiles or 0,
        config.frames,
        config.approximate_jpeg,
    )


def _work(config: EmbedConfig, model: Model) -> Work:
    kinds = cast("tuple[Kind, ...]", config.kinds)
    choice = Choice(kinds, config.image_column, config.text_column, config.key_column)
    tiling = model.image_settings.tiling
    if tiling is not None and config.max_tiles:
        tiling = tiling.limited(config.max_tiles)
    return Work(
        choice,
        config.shard_items,
        model.components.batch,
        1 if tiling is None else tiling.most,
        config.threads or 0,
        config.device or "",
    )


def _versions(backend: str) -> dict[str, str]:
    """Releases that may change bits: of this package, the backend's library, and what decodes and writes."""
    packages = (*LIBRARIES.get(backend, ()), "numpy", "pillow", "pyarrow")
    releases = {package: _installed(package) for package in packages}
    return {"ivl-export": __version__, **{name: r for name, r in releases.items() if r is not None}}


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def sample_of(text: str, items: int) -> int:
    """The number of inputs that ``--verify`` names: ``100``, or a share: ``1%``.

    Raises:
        UsageError: it is neither.
    """
    share = text.endswith("%")
    try:
        value = float(text.removesuffix("%")) / 100 * items if share else int(text)
        if not 0 <= value < float("inf") or (share and value > items):
            raise ValueError(text)
    except (ValueError, OverflowError):
        raise UsageError(
            f"--verify {text} is neither a number nor a share.", "", "Give --verify 100, or --verify 1%."
        ) from None
    return min(items, max(1, round(value))) if value else 0
