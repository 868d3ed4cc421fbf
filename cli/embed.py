"""``ivl-export embed``: folders, lists and archives of any size to shards of embeddings."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..settings import Setting, Table, choice, number, read_settings, switch, text, whole
from .command import SettingsOpt, command
from .inputs import names
from .options import ENGINE, FRAMES, BackendOpt, BundleArg, JsonOpt
from .output import human_bytes, print_json, print_table
from .session import Head, HeadOpt

EMBED: Table = {
    **FRAMES,
    "shard-items": Setting("16384, 1 or more", "inputs of a shard; else 16384", whole(1)),
    "max-tiles": Setting("6, 1 or more", "tiles of an image; else as the checkpoint says", whole(1)),
    "resize": Setting(
        "square, center_crop or pad",
        "how images are made square; else as the checkpoint says",
        choice(("square", "center_crop", "pad")),
    ),
    "approximate-jpeg": Setting("nothing, true or false", "decode large JPEGs smaller", switch),
    "image-column": Setting("image or another", "the images of Parquet files; else by usual names", text),
    "text-column": Setting("caption or another", "the texts of Parquet files; else by usual names", text),
    "key-column": Setting("id or another", "the keys of Parquet files; else rows are numbered", text),
    "readers": Setting("2, 1 or more", "threads that read and decode; else all cores", whole(1)),
    "batch": Setting("8, 1 or more", "images computed at once; else as the engines were tuned", whole(1)),
    "tolerance": Setting(
        "0.001 or another", "difference that --verify allows, of a vector's length", number()
    ),
    **ENGINE,
}
app = typer.Typer(add_completion=False)


@app.command(cls=command(EMBED))
def embed(
    bundle: BundleArg,
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="SRC...",
            help="Folders, images, videos, .jsonl, .tar (also train-{000..011}.tar) or .parquet files.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder of the shards.", show_default=False)],
    mode: HeadOpt = Head.C,
    kinds: Annotated[str, typer.Option(help="What is embedded: image, video, text.")] = "image,video",
    tiles: Annotated[
        bool, typer.Option("--tiles", help="One vector for each tile of an image (chat models).")
    ] = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="Vectors as the model gives them, not normalised.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="Type of the numbers: float32 or float16.")] = "float32",
    verify: Annotated[
        str | None,
        typer.Option(
            metavar="N|SHARE",
            help="Compare finished shards with their checksums, and this many inputs (100, or 1%) "
            "with vectors computed again.",
        ),
    ] = None,
    index: Annotated[
        bool, typer.Option("--index", help="Make a FAISS structure for Index.open(OUT, 'faiss') at the end.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, embed nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Delete earlier shards in --out first.")] = False,
    backend: BackendOpt = "onnxruntime",
    settings: SettingsOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Embed folders, lists and archives of any size into shards of Parquet.

    A stopped run resumes with the same command, and ends with the bytes of one that was not stopped. Inputs
    that cannot be read are listed in quarantine.jsonl. Index.open searches the folder.
    """
    from ..bulk.config import EmbedConfig, open_run, sample_of
    from ..bulk.embed import run
    from ..bulk.plan import QUARANTINE
    from ..bulk.verify import verify as run_verify
    from ..runtime import Index
    from .progress import Bars

    options = read_settings(EMBED, settings or ())
    readers, tolerance = options.pop("readers", None), options.pop("tolerance", None)
    config = EmbedConfig(
        bundle,
        tuple(sources),
        out,
        mode.mode,
        names(kinds),
        tiles,
        not raw,
        dtype,
        backend=backend,
        **options,
    )
    with Bars() as bars:
        model, plan = open_run(config, force, bars)
        with model:
            if dry_run:
                width = plan.embedding.width * (4 if plan.embedding.dtype == "float32" else 2)
                report: dict[str, object] = {
                    "plan": plan.digest,
                    "files": len(plan.files),
                    "inputs": plan.items,
                    "shards": plan.shards,
                    "embedding": asdict(plan.embedding),
                    "bytes_of_vectors": None if tiles else plan.items * width,
                }
                rows: list[tuple[str, object]] = [
                    ("files", len(plan.files)),
                    ("inputs", plan.items),
                    ("shards", plan.shards),
                    ("vector", f"{plan.embedding.dtype} [{plan.embedding.width}]"),
                    ("vectors", "as many as tiles" if tiles else human_bytes(plan.items * width)),
                    ("plan", plan.digest[:16]),
                ]
                title = f"Would be embedded into {out}"
            elif verify is not None:
                sample = sample_of(verify, plan.items)
                checked = run_verify(
                    model, plan, out, sample, readers=readers, tolerance=tolerance, progress=bars
                )
                report = {"plan": plan.digest, **asdict(checked)}
                rows = [
                    ("checksums", f"{checked.rows} vectors in {checked.shards} shards: right"),
                    ("computed again", f"{checked.items} inputs, {checked.vectors} vectors"),
                    ("equal bits", checked.equal),
                    ("largest difference", checked.furthest),
                ]
                title = f"Verified: {out}"
            else:
                result = run(model, plan, out, force=force, readers=readers, progress=bars)
                if index:
                    Index.build(out, progress=bars)
                kept = f", {result.reused} of them from before" if result.reused else ""
                rate = result.embedded / result.seconds if result.embedded else None
                report = {
                    **asdict(result),
                    "out": str(out),
                    "plan": plan.digest,
                    "quarantine": str(out / QUARANTINE),
                    "inputs_per_second": rate,
                }
                rows = [
                    ("inputs", result.items),
                    ("vectors", f"{result.rows} x {plan.embedding.width}, {plan.embedding.dtype}"),
                    ("in quarantine", result.quarantined),
                    ("shards", f"{result.shards}{kept}"),
                    ("seconds", result.seconds),
                    ("inputs a second", rate),
                ]
                title = f"Embedded into {out}"
    if as_json:
        print_json(report)
    else:
        print_table(title, ("", ""), rows)
