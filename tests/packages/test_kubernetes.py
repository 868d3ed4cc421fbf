"""The manifests fit Kubernetes' schemas, each other, and the server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from ivl_export.errors import UsageError
from ivl_export.packages.docker import USER
from ivl_export.packages.kubernetes import dns_label
from ivl_export.serve.settings import ServerSettings
from ivl_export.tests.packages.conftest import Pack
from ivl_export.tests.packages.test_docker import instructions


def objects(root: Path) -> dict[str, Any]:
    """Kind -> the object, of all that the kustomization lists."""
    folder = root / "manifests"
    listed = yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
    assert {*listed} == {path.name for path in folder.iterdir()} - {"kustomization.yaml"}
    read = [yaml.safe_load((folder / name).read_text()) for name in listed]
    return {one["kind"]: one for one in read}


@pytest.mark.parametrize(
    "settings",
    [{}, {"device": "cuda", "port": 9000, "replicas": 1, "memory": 40, "repository": "r.example/x"}],
)
def test_they_fit_the_schemas(settings: dict[str, Any], pack: Pack, tiny_bundle: Path) -> None:
    validator = pytest.importorskip("kubernetes_validate")
    root = pack(tiny_bundle, "kubernetes", name="Tiny_Model.v1", settings=settings).root
    for one in objects(root).values():
        validator.validate(one, "1.37", strict=True)
        assert one["metadata"]["name"] == "tiny-model-v1"


def test_the_validator_sees_faults(pack: Pack, tiny_bundle: Path) -> None:
    validator = pytest.importorskip("kubernetes_validate")
    deployment = objects(pack(tiny_bundle, "kubernetes").root)["Deployment"]
    pod = deployment["spec"]["template"]["spec"]
    for place, key, value in ((pod, "terminationGraceSeconds", 3), (pod["containers"][0], "ports", "8000")):
        before = dict(place)
        place[key] = value
        with pytest.raises(validator.ValidationError):
            validator.validate(deployment, "1.37", strict=True)
        place.clear()
        place.update(before)
    validator.validate(deployment, "1.37", strict=True)


def test_objects_fit_each_other_the_image_and_the_server(pack: Pack, tiny_bundle: Path) -> None:
    root = pack(tiny_bundle, "kubernetes", name="tiny", settings={"device": "cuda", "port": 9000}).root
    read = objects(root)
    template = read["Deployment"]["spec"]["template"]
    pod, labels = template["spec"], template["metadata"]["labels"]
    (container,) = pod["containers"]
    assert read["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert read["Service"]["spec"]["selector"] == labels
    assert read["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert read["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"] == "tiny"
    assert read["Service"]["spec"]["ports"][0]["targetPort"] == container["ports"][0]["name"]
    said = instructions(root / "Dockerfile")
    assert [str(container["ports"][0]["containerPort"])] == said["EXPOSE"] == ["9000"]
    assert said["USER"] == [f"{USER}:{USER}"]
    assert pod["securityContext"]["runAsUser"] == USER
    plain = ServerSettings()
    assert pod["terminationGracePeriodSeconds"] > plain.timeout + plain.drain_delay + 5
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    paths = {probe["httpGet"]["path"] for name, probe in container.items() if name.endswith("Probe")}
    assert paths == {"/ready", "/health"}
    image = container["image"]
    assert image.startswith("tiny:")
    assert f"docker build -t {image} ." in (root / "README.md").read_text()


def test_the_server_has_the_routes_of_the_probes() -> None:
    app = Path(__file__).parent.parent.parent / "serve" / "app.py"
    assert all(f'"{path}"' in app.read_text() for path in ("/ready", "/health", "/metrics"))


@pytest.mark.parametrize(
    ("name", "label"),
    [("A_b.C", "a-b-c"), ("3b", "m-3b"), ("x" * 60, "x" * 50), ("a" * 49 + "-b", "a" * 49), ("9", "m-9")],
)
def test_names_are_those_of_kubernetes(name: str, label: str) -> None:
    assert dns_label(name) == label


def test_numbers_that_do_not_fit(pack: Pack, tiny_bundle: Path) -> None:
    with pytest.raises(UsageError, match="max-replicas=2 is less"):
        pack(tiny_bundle, "kubernetes", settings=["replicas=4", "max-replicas=2"])
    for setting in ("replicas=0", "cpus=x", "memory=0"):
        with pytest.raises(UsageError):
            pack(tiny_bundle, "kubernetes", settings=[setting])
