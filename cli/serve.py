"""``ivl-export serve``: bundles over HTTP. Imports no torch."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from ..files.text import read_text
from ..settings import Setting, Table, number, read_settings, switch, whole
from .command import SettingsOpt, command
from .options import ENGINE, BackendOpt

KEY_VARIABLE = "IVL_EXPORT_API_KEY"
LIMITS: Table = {
    "max-running": Setting("64, 1 or more", "items of a model that are read or computed", whole(1)),
    "max-queued": Setting("1024, 0 or more", "items of a model that wait", whole()),
    "max-batch": Setting("8, 1 or more", "items in a batch; else as the engines were tuned", whole(1)),
    "max-delay": Setting("0.02 or another", "seconds that a batch waits for others", number()),
}
SERVER: Table = {
    "timeout": Setting("60 or another", "seconds for a request; else 60", number()),
    "drain-delay": Setting("5 or another", "seconds in which requests are taken after SIGTERM", number()),
    "max-body": Setting("32, 1 or more", "MiB of a request's body", whole(1)),
    "max-held": Setting("512, 1 or more", "MiB of all bodies that are held", whole(1)),
    "max-pixels": Setting("67108864, 1 or more", "pixels of an image, from its header", whole(1)),
}
URLS: Table = {
    "url-http": Setting("nothing, true or false", "fetch http addresses, too", switch, default=False),
    "url-private": Setting("nothing, true or false", "fetch from private networks", switch, default=False),
    "url-timeout": Setting("10 or another", "seconds for an image that is fetched", number(), default=10.0),
}

app = typer.Typer(add_completion=False)


@app.command(cls=command({**LIMITS, **SERVER, **URLS, **ENGINE}))
def serve(
    bundles: Annotated[
        list[str],
        typer.Argument(metavar="BUNDLE...", help="Bundles' folders, or NAME=FOLDER.", show_default=False),
    ],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: any that is free.")] = 8000,
    api_keys: Annotated[
        Path | None,
        typer.Option(help=f"File of API keys, one a line; or one in ${KEY_VARIABLE}.", show_default="none"),
    ] = None,
    allow_url: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST",
            help="Fetch images from this host (.example.org: all below it; *: any); repeat.",
        ),
    ] = None,
    shadow: Annotated[
        str | None, typer.Option(metavar="BUNDLE", help="Repeat requests of the first model on this one.")
    ] = None,
    share: Annotated[float, typer.Option(min=0, max=100, help="Percent of requests repeated.")] = 5,
    swap_from: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where /admin/swap finds bundles.")
    ] = None,
    invariant: Annotated[
        bool, typer.Option("--invariant", help="Embeddings whose bits do not depend on other requests.")
    ] = False,
    backend: BackendOpt = "onnxruntime",
    settings: SettingsOpt = None,
) -> None:
    """Serve bundles over HTTP, until Ctrl-C or SIGTERM.

    Routes: OpenAI's /v1/embeddings and /v1/models, /health, /ready; /docs lists them.
    """
    from ..runtime import UrlPolicy
    from ..serve.context import Context
    from ..serve.models import load_models
    from ..serve.server import run
    from ..serve.settings import ServerSettings
    from ..serve.shadow import load_shadow
    from ..serve.swap import Swaps

    options = read_settings({**LIMITS, **SERVER, **URLS, **ENGINE}, settings or ())
    limits = {key: options.pop(key) for key in _arguments(LIMITS) if key in options}
    server = {key: options.pop(key) for key in _arguments(SERVER) if key in options}
    for key in ("max_body", "max_held"):
        if key in server:
            server[key] <<= 20
    http, private, seconds = (options.pop(key) for key in _arguments(URLS))
    urls = None
    if allow_url:
        hosts = () if "*" in allow_url else tuple(allow_url)
        schemes = ("https", "http") if http else ("https",)
        urls = UrlPolicy(hosts, schemes, timeout=seconds, private=private)
    plain = ServerSettings()
    chosen = replace(
        plain,
        host=host,
        port=port,
        keys=_keys(api_keys),
        urls=urls,
        limits=replace(plain.limits, invariant=invariant, **limits),
        **server,
    )
    models = load_models(bundles, chosen.limits, backend, options)
    if host not in ("127.0.0.1", "::1", "localhost") and not chosen.keys:
        typer.echo(f"note: all who reach {host} may use this server; --api-keys asks for keys.", err=True)
    names = ", ".join(models.by_name)
    context = Context(models, chosen)
    if shadow is not None:
        context.shadow = load_shadow(
            models, context.metrics, shadow, share / 100, chosen.limits, {"backend": backend, **options}
        )
    run(
        context,
        Swaps(swap_from, backend, options),
        lambda address: typer.echo(f"{names} on {address} (Ctrl-C ends it)"),
    )


def _arguments(table: Table) -> list[str]:
    return [key.replace("-", "_") for key in table]


def _keys(file: Path | None) -> tuple[str, ...]:
    """The API keys in ``file`` and in the environment; UsageError if ``file`` has none."""
    keys = [key for key in (os.environ.get(KEY_VARIABLE, "").strip(),) if key]
    if file is not None:
        try:
            lines = [line.strip() for line in read_text(file).splitlines()]
        except (OSError, ValueError) as error:
            raise UsageError(f"Cannot read {file}.", f"{error}.", "Write a key a line.") from error
        keys += (own := [line for line in lines if line and not line.startswith("#")])
        if not own:
            raise UsageError(f"{file} has no key.", "Its lines are empty or comments.", "Write a key a line.")
    return tuple(keys)
