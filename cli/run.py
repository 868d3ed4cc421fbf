"""``ivl-export run``: a bundle's engines on images. Imports no torch."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError, UsageError
from ..files.text import read_text
from ..settings import Setting, Table, read_settings, whole
from .command import Group, SettingsOpt, command
from .inputs import ImageFiles
from .options import ENGINE, FRAMES, SAMPLING, BackendOpt, BundleArg, JsonOpt
from .output import check_writable
from .run_features import features
from .session import Head, HeadOpt, ImagesArg, TemperatureOpt, save, session

app = typer.Typer(
    cls=Group, add_completion=False, no_args_is_help=True, help="Run a bundle's engines on images and texts."
)
app.command(cls=command(ENGINE))(features)

EMBED: Table = {**FRAMES, **ENGINE}
CAPTION: Table = {
    "min-new-tokens": Setting(
        "8, 0 or more", "least length in tokens, else 0 (published captions: 8)", whole(), default=0
    ),
    **SAMPLING,
    **ENGINE,
}
CHAT: Table = {**FRAMES, **SAMPLING, **ENGINE}


@app.command(cls=command(EMBED))
def embed(
    bundle: BundleArg,
    images: Annotated[
        list[Path] | None, typer.Argument(help="Image files and folders.", show_default=False)
    ] = None,
    text: Annotated[list[str] | None, typer.Option(help="A text to embed too; repeat for more.")] = None,
    video: Annotated[
        list[Path] | None, typer.Option(help="A video, or animated image, to embed too; repeat for more.")
    ] = None,
    mode: HeadOpt = Head.C,
    out: Annotated[Path | None, typer.Option(help="Save all embeddings [N, E] as this .npy file.")] = None,
    normalize: Annotated[bool, typer.Option("--normalize", help="Scale embeddings to length 1.")] = False,
    backend: BackendOpt = "onnxruntime",
    settings: SettingsOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Embed images, videos and texts: one row each, in this order."""
    if not images and not text and not video:
        raise UsageError("Nothing to embed.", "No images, --video or --text were given.", "Name some.")
    check_writable("--out", out)
    engine = read_settings(EMBED, settings or ())
    frames = engine.pop("frames")
    import numpy as np

    from ..runtime.zero_shot import l2

    with session(bundle, backend, engine, as_json) as (model, report):
        rows, names = [], []
        if images:
            files = ImageFiles.find(images)
            for piece, pixels in files.read(model.read_images):
                rows.append(model.encode_image(pixels, mode.mode))
                names += [{"file": str(f)} for f in piece]
            report["skipped"] = files.skipped
        if video:
            rows.append(model.encode_videos(video, frames, mode.mode))
            names += [{"video": str(v)} for v in video]
        if text:
            rows.append(model.encode_text(text))
            names += [{"text": t} for t in text]
        vectors = np.concatenate(rows)
        norms = np.linalg.norm(vectors, axis=1).tolist()
        if normalize:
            vectors = l2(vectors)
        report.update(mode=mode.mode, shape=list(vectors.shape))
        report["items"] = [{**name, "norm": norm} for name, norm in zip(names, norms, strict=True)]
        if out is not None:
            report["out"] = str(save(out, lambda file: np.save(file, vectors)))
        elif as_json:
            for item, vector in zip(report["items"], vectors, strict=True):
                item["embedding"] = [round(v, 7) for v in vector.tolist()]
        report["table"] = (
            f"{mode.mode} embeddings {list(vectors.shape)}" + (f", saved as {out}" if out else ""),
            ("item", "norm", "first values"),
            [
                (
                    name.get("file") or name.get("video") or f'"{name["text"]}"',
                    norm,
                    [f"{v:.3f}" for v in row[:4]] + ["…"],
                )
                for name, norm, row in zip(names, norms, vectors, strict=True)
            ],
        )


@app.command(cls=command(ENGINE, {"--prompts": "--template"}))
def classify(
    bundle: BundleArg,
    images: ImagesArg,
    labels: Annotated[
        str | None, typer.Option(help="Labels with commas between, or @FILE with one label a line.")
    ] = None,
    labels_file: Annotated[Path | None, typer.Option(hidden=True)] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(
            help="A text with {} for the label, or a published list: photo, imagenet, food101, ... (? lists "
            "them). Repeat to average.",
            show_default="the label alone",
        ),
    ] = None,
    mode: HeadOpt = Head.C,
    top: Annotated[int, typer.Option(min=1, help="Labels shown an image.")] = 3,
    backend: BackendOpt = "onnxruntime",
    settings: SettingsOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Zero-shot classification: which label fits each image."""
    if labels is not None and labels.startswith("@"):
        labels_file, labels = Path(labels[1:]), None
    names, files = _labels(labels, labels_file), ImageFiles.find(images)
    engine = read_settings(ENGINE, settings or ())
    from ..runtime.templates import PLAIN, templates

    texts = [text for name in template or PLAIN for text in ([name] if "{}" in name else templates(name))]
    with session(bundle, backend, engine, as_json) as (model, report):
        classes = model.class_embeddings(names, texts)
        items = []
        for piece, pixels in files.read(partial(model.read_images, resize="center_crop")):
            for file, row in zip(piece, model.classify(pixels, classes, mode=mode.mode), strict=True):
                best = row.argsort()[::-1][:top]
                pairs = [{"label": names[i], "probability": float(row[i])} for i in best]
                items.append({"file": str(file), "label": names[best[0]], "top": pairs})
        report.update(mode=mode.mode, labels=names, items=items, skipped=files.skipped)
        report["table"] = (
            f"Zero-shot classification, {mode.mode}, {len(names)} labels",
            ("image", "label", "probability", "next"),
            [
                (
                    item["file"],
                    item["label"],
                    item["top"][0]["probability"],
                    [f"{p['label']} {p['probability']:.3f}" for p in item["top"][1:]],
                )
                for item in items
            ],
        )


@app.command(cls=command(ENGINE))
def retrieve(
    bundle: BundleArg,
    images: ImagesArg,
    query: Annotated[list[str] | None, typer.Option(help="A text to look for; repeat for more.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Images shown a query.")] = 5,
    rerank: Annotated[
        int, typer.Option(min=0, help="Score the best N again, image and text together; 0: none.")
    ] = 0,
    mode: HeadOpt = Head.C,
    backend: BackendOpt = "onnxruntime",
    settings: SettingsOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Rank images by how well they fit a text."""
    if not query:
        raise UsageError("No query was given.", "", "Add --query TEXT.")
    if 0 < rerank < top:
        raise UsageError(f"--rerank {rerank} leaves less than --top {top}.", "", f"Give {top} or more.")
    files = ImageFiles.find(images)
    engine = read_settings(ENGINE, settings or ())
    import numpy as np

    from ..runtime import Ranking
    from ..runtime.zero_shot import rank

    with session(bundle, backend, engine, as_json) as (model, report):
        names, rows = [], []
        for piece, pixels in files.read(partial(model.read_images, resize="square")):
            names += [str(f) for f in piece]
            rows.append(model.encode_image(pixels, mode.mode))
        ranking = Ranking(*rank(model.encode_text(query), np.concatenate(rows), rerank or top))
        if rerank:
            ranking = model.rerank(query, names, ranking)
        score = "score" if rerank else "cosine"
        items: list[dict[str, Any]] = [
            {
                "query": q,
                "results": [
                    {"file": names[i], score: float(s)} for i, s in zip(best[:top], row[:top], strict=True)
                ],
            }
            for q, best, row in zip(query, ranking.indices, ranking.scores, strict=True)
        ]
        report.update(mode=mode.mode, images=len(names), reranked=rerank, items=items, skipped=files.skipped)
        second = f", the best {rerank} scored together with the query" if rerank else ""
        report["table"] = (
            f"Retrieval among {len(names)} images, {mode.mode}{second}",
            ("query", "rank", score, "image"),
            [
                (item["query"] if n == 1 else "", n, r[score], r["file"])
                for item in items
                for n, r in enumerate(item["results"], 1)
            ],
        )


@app.command(cls=command(CAPTION))
def caption(
    bundle: BundleArg,
    images: ImagesArg,
    prompt: Annotated[
        str | None, typer.Option(help="Text before the caption.", show_default="English caption:")
    ] = None,
    beams: Annotated[
        int, typer.Option(min=1, help="Width of the beam search; 1 is greedy (published captions: 5).")
    ] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length limit in tokens.")] = 30,
    temperature: TemperatureOpt = 0.0,
    backend: BackendOpt = "onnxruntime",
    settings: SettingsOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Write a caption for each image: the likeliest one (--beams), or a random one (--temperature)."""
    from ..inputs.tokenizer import CAPTION_PROMPT
    from ..sampling import Sampling

    engine = read_settings(CAPTION, settings or ())
    shortest, draws = engine.pop("min_new_tokens"), _draws(engine)
    sampling = Sampling(temperature, **draws) if temperature else None
    files, prompt = ImageFiles.find(images), CAPTION_PROMPT["en"] if prompt is None else prompt
    with session(bundle, backend, engine, as_json) as (model, report):
        items = []
        for piece, pixels in files.read(partial(model.read_images, resize="square")):
            texts = model.caption(pixels, prompt, beams, max_new_tokens, shortest, sampling=sampling)
            items += [{"file": str(f), "caption": t} for f, t in zip(piece, texts, strict=True)]
        report.update(prompt=prompt, beams=beams, items=items, skipped=files.skipped)
        report["table"] = ("Captions", ("image", "caption"), [(i["file"], i["caption"]) for i in items])


@app.command(cls=command(CHAT))
def chat(
    bundle: BundleArg,
    images: Annotated[list[Path] | None, typer.Argument(help="Image files.", show_default=False)] = None,
    question: Annotated[
        list[str] | None,
        typer.Option(help="A question; repeat for more. Without it, questions are read from the keyboard."),
    ] = None,
    video: Annotated[
        list[Path] | None, typer.Option(help="A video, or animated image, shown after the images.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length limit of an answer in tokens.")] = 256,
    temperature: TemperatureOpt = 0.0,
    backend: BackendOpt = "onnxruntime",
    settings: SettingsOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Answer questions about images and videos with the bundle of an InternVL-Chat."""
    from ..sampling import Sampling
    from .run_chat import chat as run_chat

    engine = read_settings(CHAT, settings or ())
    shown, sampling = (
        (images or [], video or [], engine.pop("frames")),
        Sampling(temperature, **_draws(engine)),
    )
    run_chat(bundle, shown, question or [], max_new_tokens, sampling, {"backend": backend, **engine}, as_json)


def _draws(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of :data:`.options.SAMPLING`, taken out of ``settings``."""
    return {name: settings.pop(name) for name in ("top_k", "top_p", "seed")}


def _labels(text: str | None, file: Path | None) -> list[str]:
    if (text is None) == (file is None):
        raise UsageError("Labels must be given once.", "", "Give --labels cat,dog or --labels @FILE.")
    if file is not None:
        try:
            lines = read_text(file).splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"Cannot read the labels in {file}.", str(error), "Use a UTF-8 text.") from error
    else:
        lines = (text or "").split(",")
    labels = [line.strip() for line in lines if line.strip()]
    if not labels:
        raise InputError(
            "The list of labels is empty.", f"{file or '--labels'} has none.", "Give at least one."
        )
    if len(set(labels)) != len(labels):
        twice = next(label for label in labels if labels.count(label) > 1)
        raise InputError(f"The label {twice!r} is given twice.", "", "Remove one.")
    return labels
