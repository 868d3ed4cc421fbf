"""The functions of ``import ivl_export``: build, calibrate, embed many inputs, make a package of a bundle.

They take the command line's options as keywords, print nothing, and raise
:class:`~ivl_export.errors.IvlError`. Notes of the command line go to the logger ``ivl_export``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .progress import SILENT, Progress

if TYPE_CHECKING:
    from .bulk.embed import Result
    from .bundle import Bundle
    from .packages.write import Package
    from .pipeline.plan import BuildPlan
    from .quantization.ranges import ActivationRanges

LOG = logging.getLogger("ivl_export")
LOG.addHandler(logging.NullHandler())

Names = str | Iterable[str]
"""Names as they are, or joined by commas."""


def build(
    model: str | Path | None = None,
    out: str | Path | None = None,
    *,
    precision: str | Path = "fp8",
    budget: float | None = None,
    calib: str | Path | None = None,
    calib_samples: int = 256,
    calib_columns: Names | None = None,
    calib_seed: int = 0,
    algorithm: str | None = None,
    ranges: str | Path | None = None,
    targets: Names = "sm89",
    backend: Names | None = None,
    components: Names | None = None,
    itm: bool = False,
    features: int | Iterable[int] | None = None,
    split: int = 1,
    preset: str | None = None,
    shapes: str | Iterable[str] | None = None,
    engine_options: Mapping[str, object] | None = None,
    no_cache: bool = False,
    cache_size: str | int | None = None,
    allow_accuracy_loss: bool = False,
    require_proof: bool = False,
    progress: Progress = SILENT,
) -> Bundle:
    """Convert a checkpoint into a bundle: graphs, weights and engines, with proof of accuracy and precision.

    A stopped build resumes; a finished one is not repeated. The bundle
    appears whole or not at all.

    Example::

        bundle = ivl_export.build("InternVL-14B-224px", out="bundle", precision="fp8", calib="photos/")
        print(bundle.manifest.recipe, bundle.receipt("accuracy"))

    Args:
        model: a checkpoint: a folder of a published layout, or an older ``.pth`` file; or the name
            of a model that ships with the package: ``"nano"``, ``"nano-chat"``, ``"nano-tiles"``; None:
            ``"nano"``.
        out: the bundle's folder; None: ``bundles/MODEL-PRECISION``.
        precision: a recipe that ships (``"fp8"``, ``"int8"``, ...), a recipe file, or ``"mixed"``: the
            fastest one within ``budget`` is searched.
        budget: percentage points that a task may lose; None: the recipe's.
        calib: images and captions to measure activation ranges on: a folder, a JSONL, WebDataset shards or a
            Hugging Face folder. None: the checkpoint's own set, or drawn scenes for the shipped models.
        calib_samples: number of samples taken from ``calib``.
        calib_columns: names of the image and the caption column, where they are unusual.
        calib_seed: chooses the samples.
        algorithm: how ranges are picked: ``"max"``, ``"percentile"``, ``"percentile-99.99"``, ``"entropy"``
            or ``"mse"``; None: ``"max"``.
        ranges: a file that :func:`calibrate` wrote, instead of measuring ranges.
        targets: GPU generations that TensorRT-RTX engines are built for: ``"sm89,sm120"``.
        backend: engines to build, of ``"onnxruntime"``, ``"tensorrt-rtx"`` and ``"tensorrt"``; None: all that
            can be built here.
        components: only these; None: all that the checkpoint has.
        itm: build ``qllama_itm`` too, which re-ranks retrieval.
        features: vision blocks whose outputs are given too: ``[12, 24, -1]`` (-1 is the last).
        split: number of parts that each component is built in, which run as one: less memory.
        preset: shapes that engines are tuned for: ``"latency"``, ``"throughput"`` or ``"edge"``.
        shapes: sizes of axes, smallest:tuned for:largest: ``["batch=1:8:32", "qllama_step.text=1:8:32"]``.
        engine_options: settings of the engine builder: ``{"optimization_level": 5, "workspace": "2G"}``. An
            unknown key is answered with the list of all.
        no_cache: take no engine or kernel time of an earlier build.
        cache_size: the most disk for engines kept for later builds: ``"20G"``, or bytes; None:
            ``$IVL_EXPORT_CACHE_SIZE``, or 20 GiB.
        allow_accuracy_loss: log a loss over the budget instead of failing.
        require_proof: fail where an engine does not tell the types of a promised product.
        progress: receives the steps; by default nothing is shown.

    Returns:
        The bundle, which :func:`load` runs.

    Raises:
        UsageError: an argument that cannot be right.
        InputError: no usable calibration data.
        CheckpointError: the checkpoint is damaged, or not one of an InternVL.
        CapabilityError: this machine or a target cannot do it, or a package is not installed.
        BuildError: a step failed, an engine does not run what the recipe promises, or the disk is too small.
        AccuracyError: the loss exceeds the budget.
    """
    from .engines.tensorrt.options import BuildOptions
    from .files.cache_dir import parse_size
    from .pipeline import run
    from .pipeline.config import BuildConfig, default_out

    checkpoint = _path(model)
    config = BuildConfig(
        out=_path(out) or default_out(checkpoint, str(precision)),
        model=checkpoint,
        precision=str(precision),
        budget=budget,
        calib=_path(calib),
        calib_samples=calib_samples,
        calib_columns=_names(calib_columns),
        calib_seed=calib_seed,
        algorithm=algorithm,
        ranges=_path(ranges),
        targets=",".join(_names(targets)),
        backend=_names(backend),
        components=_names(components),
        itm=itm,
        features=(features,) if isinstance(features, int) else tuple(features or ()),
        split=split,
        preset=preset,
        shapes=(shapes,) if isinstance(shapes, str) else tuple(shapes or ()),
        engine_options=BuildOptions.of(engine_options or {}),
        no_cache=no_cache,
        cache_size=parse_size(cache_size, "cache_size") if isinstance(cache_size, str) else cache_size,
        allow_accuracy_loss=allow_accuracy_loss,
        require_proof=require_proof,
    )
    plan = run.open_plan(config, progress)
    _log_notices(plan)
    result = run.build(plan, progress)
    if result.over_budget:
        LOG.warning("%s (allowed)", result.over_budget)
    return result.bundle


def calibrate(
    model: str | Path | None = None,
    out: str | Path = "ranges.json",
    *,
    calib: str | Path | None = None,
    calib_samples: int = 256,
    calib_columns: Names | None = None,
    calib_seed: int = 0,
    algorithm: str = "max",
    precision: str | Path = "fp8",
    components: Names | None = None,
    progress: Progress = SILENT,
) -> ActivationRanges:
    """Measure the input range of every layer once, for builds that take ``ranges=out``.

    A recipe that folds factors into the weights also gets ``smoothing.safetensors`` next to the file: keep
    the two together. A stopped run resumes.

    Args:
        model: a checkpoint, as :func:`build` takes it.
        out: file that the ranges are written to.
        calib, calib_samples, calib_columns, calib_seed: images and captions, as :func:`build` takes them.
        algorithm: how ranges are picked, as in :func:`build`.
        precision: the recipe that will be built: ``"entropy"`` and ``"mse"`` pick ranges for its types.
        components: only these; None: all that the checkpoint has.
        progress: receives the steps; by default nothing is shown.

    Returns:
        The ranges: ``amax[component][layer]`` is the largest magnitude of a layer's input that its type
        represents; the other fields describe the calibration set.

    Raises:
        UsageError: an argument that cannot be right, or a recipe that rounds no inputs.
        InputError: no usable calibration data.
        CheckpointError: the checkpoint is damaged, or not one of an InternVL.
        BuildError: NaN, infinity, or nothing but zeros at a layer's input; too little disk.
    """
    from .pipeline import run
    from .pipeline.config import ORT, BuildConfig

    config = BuildConfig(
        out=Path(out),
        model=_path(model),
        precision=str(precision),
        calib=_path(calib),
        calib_samples=calib_samples,
        calib_columns=_names(calib_columns),
        calib_seed=calib_seed,
        algorithm=algorithm,
        backend=(ORT,),
        components=_names(components),
    )
    plan = run.open_plan(config, progress)
    _log_notices(plan)
    return run.calibrate(plan, progress)


def embed_folder(
    bundle: str | Path | Bundle,
    sources: str | Path | Iterable[str | Path],
    out: str | Path,
    *,
    mode: str = "InternVL-C",
    kinds: Names = ("image", "video"),
    tiles: bool = False,
    unit: bool = True,
    dtype: str = "float32",
    resize: str | None = None,
    max_tiles: int | None = None,
    frames: int = 8,
    approximate_jpeg: bool = False,
    image_column: str | None = None,
    text_column: str | None = None,
    key_column: str | None = None,
    shard_items: int = 16384,
    backend: str = "onnxruntime",
    target: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    batch: int | None = None,
    readers: int | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> Result:
    """Embed folders, lists and archives of any size into shards of Parquet.

    ``Index.open`` searches them. A stopped run resumes with the same call, and ends with the bytes of one
    that was not stopped. Inputs that cannot be read are listed in ``quarantine.jsonl``.

    Example::

        ivl_export.embed_folder("bundles/internvl-nano-int8", "photos/", "vectors/")
        index = ivl_export.runtime.Index.open("vectors/")

    Args:
        bundle: its folder, or the result of :func:`build`.
        sources: folders, images, videos, texts, ``.jsonl``, ``.tar`` or ``.parquet`` files; one or several.
        out: the folder of the shards.
        mode: ``"InternVL-C"`` or ``"InternVL-G"``.
        kinds: inputs that are taken: ``"image"``, ``"video"``, ``"text"``.
        tiles: one vector for each tile of an image, of chat models that tile.
        unit: scale vectors to length 1.
        dtype: of the numbers: ``"float32"`` or ``"float16"``.
        resize: how images are made square; None: as the checkpoint says.
        max_tiles: of an image; None: as the checkpoint says.
        frames: of a video.
        approximate_jpeg: decode large JPEGs smaller.
        image_column, text_column, key_column: of Parquet files; None: by usual names; rows are numbered.
        shard_items: inputs of a shard.
        backend, target, device, threads, batch: how the bundle is opened, see :func:`load`.
        readers: threads that read and decode; None: as many as there are cores.
        force: delete what is in ``out`` first, if it is of an earlier run.
        progress: receives the inputs that are done.

    Returns:
        Counts of inputs, vectors, inputs in quarantine and shards.

    Raises:
        UsageError: an argument that cannot be right; ``out`` was begun with other settings or inputs.
        InputError: a source that cannot be read, or no input of it.
        CapabilityError: the bundle cannot do it, or a package is not installed.
        IntegrityError: the bundle, or the plan in ``out``, is damaged.
        BuildError: the disk is full.
    """
    from .bulk.config import EmbedConfig, open_run
    from .bulk.embed import run

    several = [sources] if isinstance(sources, str | Path) else sources
    config = EmbedConfig(
        Path(bundle) if isinstance(bundle, str | Path) else bundle.root,
        tuple(map(Path, several)),
        Path(out),
        mode=mode,
        kinds=_names(kinds),
        tiles=tiles,
        unit=unit,
        dtype=dtype,
        resize=resize,
        max_tiles=max_tiles,
        frames=frames,
        approximate_jpeg=approximate_jpeg,
        image_column=image_column,
        text_column=text_column,
        key_column=key_column,
        shard_items=shard_items,
        backend=backend,
        target=target,
        device=device,
        threads=threads,
        batch=batch,
    )
    model, plan = open_run(config, force, progress)
    with model:
        return run(model, plan, config.out, force=force, readers=readers, progress=progress)


def package(
    bundle: str | Path | Bundle,
    out: str | Path | None = None,
    *,
    format: str,
    name: str | None = None,
    settings: Mapping[str, object] | Iterable[str] = (),
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = SILENT,
) -> Package:
    """Turn a bundle into a folder to deploy, which appears whole or not at all.

    Every file of the bundle is hashed before.

    Example::

        ivl_export.package("bundle", "image", format="docker", settings={"python": "3.12"})

    Args:
        bundle: the bundle, or its folder.
        out: the package's folder; None: ``packages/NAME-FORMAT``.
        format: ``"python"``, a small project; ``"docker"``, the folder of an OCI image that serves the
            bundle; ``"triton"``, a model repository; ``"wheelhouse"``, an installation without a network;
            ``"kubernetes"``, the image's folder with manifests.
        name: of the package, and of the model that it serves; None: that of the bundle's folder.
        settings: settings of the format, as a mapping or as texts: ``["python=3.12"]``. An unknown key is
            answered with the list of all.
        force: replace a package that is there; anything else is never replaced.
        dry_run: write nothing.
        progress: receives the steps; by default nothing is shown.

    Returns:
        The package's folder and its files with their sizes.

    Raises:
        UsageError: an unknown format, settings that do not fit, or a place where nothing may be written.
        IntegrityError: the bundle is damaged, or of an older schema.
        CapabilityError: the bundle, or this installation, lacks what the format needs.
        BuildError: the disk is too small, or a wheel could not be built or downloaded.
    """
    from .packages.write import write_package

    return write_package(bundle, format, _path(out), name, settings, force, dry_run, progress)


def _path(value: str | Path | None) -> Path | None:
    return None if value is None else Path(value)


def _names(value: Names | None) -> tuple[str, ...]:
    names = value.split(",") if isinstance(value, str) else value or ()
    return tuple(name.strip() for name in names if name.strip())


def _log_notices(plan: BuildPlan) -> None:
    for notice in plan.notices:
        LOG.warning("%s", notice)
