"""``--format docker``: the folder that an OCI image is built from, whose container serves the bundle."""

from __future__ import annotations

import json

from .. import __version__
from ..settings import Setting, text, whole
from .contract import BUNDLE, File, Format, Job
from .distribution import (
    PROJECT,
    WHEEL,
    constraint_lines,
    environment,
    requirement_lines,
    text_of,
    write_wheel,
)
from .project import DEVICE, EXTRAS, OLDEST, PYTHON

USER = 10001
"""Of the container's process: no user of the host has this number."""
IMAGE = Setting("python:3.11-slim-bookworm or another", "image that it starts from; else by format", text)
PORT = Setting("8000, 1024 or more", "port that the server listens on; else 8000", whole(1024), default=8000)

_DOCKERFILE = """# syntax=docker/dockerfile:1
# {model} in {recipe}, served over HTTP by {project} {version}.
FROM {image}
LABEL org.opencontainers.image.title="{name}" \\
      org.opencontainers.image.description="{model} in {recipe}, served over HTTP" \\
      org.opencontainers.image.version="{version}"
ENV {environment}
WORKDIR /srv
RUN groupadd --gid {user} ivl \\
    && useradd --no-log-init --create-home --uid {user} --gid {user} --shell /usr/sbin/nologin ivl
COPY requirements.txt constraints.txt ./
RUN pip install --no-cache-dir -r requirements.txt -c constraints.txt
COPY {wheel} ./
RUN pip install --no-cache-dir --no-deps ./{wheel}
COPY {bundle}/ ./{bundle}/
USER {user}:{user}
EXPOSE {port}
HEALTHCHECK --interval=30s --timeout=10s --start-period=10m --retries=3 CMD {check}
STOPSIGNAL SIGTERM
ENTRYPOINT {entry}
"""
_CHECK = "import urllib.request as r; r.urlopen('http://127.0.0.1:{port}/ready', timeout=9)"
_IGNORE = """# Only what the Dockerfile copies.
*
!requirements.txt
!constraints.txt
!*.whl
!{bundle}
"""
_README = """# {name}

An image that serves {model} in {recipe} over HTTP.

```sh
docker build -t {name} .
docker run --rm {gpus}-p {port}:{port} {name}
curl -s localhost:{port}/ready
```

What follows the image's name are further options of `{project} serve`. All who reach the port may use the
server unless it has keys: `docker run -e IVL_EXPORT_API_KEY=... ...`. SIGTERM (`docker stop --time 70`) lets
running requests finish.

The process is user {user}, not root. The root file system may be read-only with `--read-only --tmpfs /tmp`.
"""


def image_environment(device: str) -> dict[str, str]:
    """Environment variables of an image that runs bundles on ``device``."""
    nvidia = {"NVIDIA_VISIBLE_DEVICES": "all", "NVIDIA_DRIVER_CAPABILITIES": "compute,utility"}
    return {"PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1", **(nvidia if device == "cuda" else {})}


def command(job: Job, folder: str) -> list[str]:
    """The words that serve the bundle in ``folder`` to other machines."""
    words = [
        PROJECT,
        "serve",
        f"{job.name}={folder}",
        "--host",
        "0.0.0.0",
        "--port",
        str(job.settings["port"]),
    ]
    return [*words, "-O", f"device={job.settings['device']}"] if job.settings["device"] != "cpu" else words


def files(job: Job) -> list[File]:
    """The build's folder, without the bundle."""
    manifest, settings = job.bundle.manifest, job.settings
    python = settings.get("python", OLDEST)
    target = environment(python)
    variables = image_environment(settings["device"])
    words = {
        "model": manifest.model.name,
        "recipe": manifest.recipe,
        "project": PROJECT,
        "version": __version__,
        "name": job.name.lower(),
        "image": settings.get("image") or f"python:{python}-slim-bookworm",
        "environment": " \\\n    ".join(f"{key}={value}" for key, value in variables.items()),
        "user": USER,
        "wheel": WHEEL,
        "bundle": BUNDLE,
        "port": settings["port"],
        "check": json.dumps(["python", "-c", _CHECK.format(port=settings["port"])]),
        "entry": json.dumps(command(job, f"/srv/{BUNDLE}")),
        "gpus": "--gpus all " if settings["device"] == "cuda" else "",
    }
    extras = (EXTRAS[settings["device"]], "serve")
    head = f"What {PROJECT} {__version__} needs, in the versions that it was tested with."
    return [
        File("Dockerfile", _DOCKERFILE.format(**words)),
        File(".dockerignore", _IGNORE.format(**words)),
        File("README.md", _README.format(**words)),
        File("requirements.txt", text_of(requirement_lines(extras, target), head)),
        File("constraints.txt", text_of(constraint_lines(target), head)),
        File(WHEEL, write_wheel),
    ]


FORMAT = Format(
    "docker",
    "the folder of an image that serves the bundle",
    {"device": DEVICE, "python": PYTHON, "image": IMAGE, "port": PORT},
    files,
)
