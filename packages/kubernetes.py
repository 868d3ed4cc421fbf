"""``--format kubernetes``: the folder of an image, and manifests that run it on a cluster.

Deployment, Service, HorizontalPodAutoscaler and PodDisruptionBudget, as one kustomization. The image's tag is
the bundle's digest, so that another bundle is another rollout.
"""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

from ..bundle.manifest import MANIFEST
from ..errors import UsageError
from ..files.hashing import sha256_file
from ..settings import Setting, text, whole
from . import docker
from .contract import File, Format, Job
from .docker import USER

FOLDER = "manifests"
GRACE = 90
"""Seconds from SIGTERM to SIGKILL: longer than the server drains (5) and a request may take (60)."""
_GIB = 1 << 30

REPOSITORY = Setting(
    "registry.example.org/team/name", "the image without its tag; else the package's name", text
)
REPLICAS = Setting("2, 1 or more", "least number of pods; else 2", whole(1), default=2)
MOST = Setting("8, 1 or more", "largest number of pods; else 8", whole(1), default=8)
CPUS = Setting("2, 1 or more", "CPU cores of a pod; else 2", whole(1), default=2)
MEMORY = Setting("8, 1 or more", "GiB of memory of a pod; else by the bundle's size", whole(1))

_README = """# {name}

{model} in {recipe} on Kubernetes.

```sh
docker build -t {image} .
docker push {image}
kubectl apply -k {folder}
kubectl rollout status deployment/{name}
```

Without keys all who reach the Service may use it: `kubectl create secret generic {name}-keys
--from-literal=key=...` before `apply` gives it one. The HorizontalPodAutoscaler follows the CPU and needs the
metrics server; `/metrics` of each pod is for Prometheus. {gpus}Pods get {grace} s to end: they are not ready
from SIGTERM on, and finish what they have.
"""


def files(job: Job) -> list[File]:
    """The image's folder and the manifests; UsageError for numbers that do not fit each other."""
    settings, name = job.settings, dns_label(job.name)
    if settings["max_replicas"] < settings["replicas"]:
        raise UsageError(
            f"-O max-replicas={settings['max_replicas']} is less than -O replicas={settings['replicas']}.",
            "The first is the largest number of pods.",
            "Give a larger one.",
        )
    tag = sha256_file(job.bundle.root / MANIFEST)[:12]
    image = f"{settings.get('repository') or name}:{tag}"
    manifest = job.bundle.manifest
    words = {
        "name": name,
        "model": manifest.model.name,
        "recipe": manifest.recipe,
        "image": image,
        "folder": FOLDER,
        "grace": GRACE,
        "gpus": "Each pod takes one GPU. " if settings["device"] == "cuda" else "",
    }
    objects = manifests(job, name, image)
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [f"{kind}.yaml" for kind in objects],
    }
    own = [
        File(f"{FOLDER}/{kind}.yaml", _yaml(data))
        for kind, data in {**objects, "kustomization": kustomization}.items()
    ]
    image_files = [file for file in docker.files(job) if file.path != "README.md"]
    return [*image_files, File("README.md", _README.format(**words)), *own]


def manifests(job: Job, name: str, image: str) -> dict[str, dict[str, Any]]:
    """File without its suffix -> an object of Kubernetes."""
    settings = job.settings
    labels = {"app.kubernetes.io/name": name}
    head: dict[str, Any] = {"name": name, "labels": labels}
    target = {"apiVersion": "apps/v1", "kind": "Deployment", "name": name}
    return {
        "deployment": {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": head,
            "spec": {
                "selector": {"matchLabels": labels},
                # A new pod is ready before an old one ends.
                "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
                "template": {
                    "metadata": {"labels": labels, "annotations": _scrape(settings["port"])},
                    "spec": _pod(job, labels, image),
                },
            },
        },
        "service": {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": head,
            "spec": {"selector": labels, "ports": [{"name": "http", "port": 80, "targetPort": "http"}]},
        },
        "autoscaler": {
            "apiVersion": "autoscaling/v2",
            "kind": "HorizontalPodAutoscaler",
            "metadata": head,
            "spec": {
                "scaleTargetRef": target,
                "minReplicas": settings["replicas"],
                "maxReplicas": settings["max_replicas"],
                "metrics": [
                    {
                        "type": "Resource",
                        "resource": {
                            "name": "cpu", "target": {"type": "Utilization", "averageUtilization": 70}
                        },
                    }
                ],
                "behavior": {"scaleDown": {"stabilizationWindowSeconds": 300}},
            },
        },
        "disruption": {
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "metadata": head,
            "spec": {"maxUnavailable": 1, "selector": {"matchLabels": labels}},
        },
    }  # fmt: skip


def _pod(job: Job, labels: dict[str, str], image: str) -> dict[str, Any]:
    settings = job.settings
    memory = f"{settings.get('memory') or memory_gib(job)}Gi"
    resources: dict[str, Any] = {
        "requests": {"cpu": str(settings["cpus"]), "memory": memory}, "limits": {"memory": memory}
    }  # fmt: skip
    if settings["device"] == "cuda":
        resources["limits"]["nvidia.com/gpu"] = 1
    key = {"name": f"{labels['app.kubernetes.io/name']}-keys", "key": "key", "optional": True}
    container = {
        "name": "server",
        "image": image,
        "ports": [{"name": "http", "containerPort": settings["port"]}],
        "env": [{"name": "IVL_EXPORT_API_KEY", "valueFrom": {"secretKeyRef": key}}],
        "resources": resources,
        # Engines are opened and run once before /ready: of large bundles that takes minutes.
        "startupProbe": {"httpGet": {"path": "/ready", "port": "http"}, "periodSeconds": 5,
                         "timeoutSeconds": 5, "failureThreshold": 240},
        "readinessProbe": {"httpGet": {"path": "/ready", "port": "http"}, "periodSeconds": 5,
                           "timeoutSeconds": 5},
        "livenessProbe": {"httpGet": {"path": "/health", "port": "http"}, "periodSeconds": 10,
                          "timeoutSeconds": 5, "failureThreshold": 6},
        "securityContext": {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }  # fmt: skip
    return {
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True, "runAsUser": USER, "runAsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "terminationGracePeriodSeconds": GRACE,
        "topologySpreadConstraints": [
            {"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway",
             "labelSelector": {"matchLabels": labels}}
        ],
        "containers": [container],
        "volumes": [{"name": "tmp", "emptyDir": {}}],
    }  # fmt: skip


def memory_gib(job: Job) -> int:
    """GiB of a pod: twice the bundle, for weights as they are read and as they are packed, and 2."""
    size = sum(entry.size for entry in job.bundle.manifest.files.values())
    return 2 + -(-2 * size // _GIB)


def dns_label(name: str) -> str:
    """``name`` as Kubernetes names objects: at most 50 of a-z, 0-9 and hyphens, a letter first."""
    label = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:50].strip("-")
    if not label[:1].isalpha():  # a Service begins with a letter
        label = f"m-{label}".strip("-")
    return label


def _scrape(port: int) -> dict[str, str]:
    return {
        "prometheus.io/scrape": "true", "prometheus.io/path": "/metrics", "prometheus.io/port": str(port)
    }  # fmt: skip


def _yaml(data: dict[str, Any]) -> str:
    """As YAML, without the anchors of what occurs twice."""
    return yaml.safe_dump(json.loads(json.dumps(data)), sort_keys=False)


FORMAT = Format(
    "kubernetes",
    "an image's folder, and manifests of a cluster",
    {
        **docker.FORMAT.settings,
        "repository": REPOSITORY,
        "replicas": REPLICAS,
        "max-replicas": MOST,
        "cpus": CPUS,
        "memory": MEMORY,
    },
    files,
)
