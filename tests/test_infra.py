"""The files of infra/: pinned versions, valid schemas, existing commands.

Nothing is started: no cluster and no container daemon is needed. Each check is tried on a broken copy too.
"""

from __future__ import annotations

import copy
import fnmatch
import json
import os
import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
INFRA = ROOT / "infra"
DOCKERFILE = INFRA / "container" / "Dockerfile"
CLUSTERS = ["ray-cluster.yaml", "on-prem.yaml"]
MANIFESTS = ["raycluster.yaml", "rayjob.yaml"]

PINS = dict(
    line.strip().split("==")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if "==" in line and not line.startswith("#")
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def cluster(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((INFRA / "cluster" / name).read_text())
    return loaded


def manifest(name: str) -> dict[str, Any]:
    """The single document of a file; tests may change it."""
    (loaded,) = yaml.safe_load_all((INFRA / "k8s" / name).read_text())
    return copy.deepcopy(loaded)  # anchors make parts of it the same object


def ray_spec(document: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = document["spec"]
    return dict(spec.get("rayClusterSpec", spec))


def pod_specs(document: dict[str, Any]) -> list[dict[str, Any]]:
    spec = ray_spec(document)
    return [g["template"]["spec"] for g in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


def values(node: Any, *names: str) -> Iterator[str]:
    """All values of fields of these names, wherever they are."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key in names and isinstance(value, str):
                yield value
            yield from values(value, *names)
    elif isinstance(node, list):
        for value in node:
            yield from values(value, *names)


# --- versions ------------------------------------------------------------------------------------

_TAG = re.compile(
    r"[\w.-]+(?:/[\w.-]+)*/xmem-pipeline:(?P<version>[\w.]+)-ray(?P<ray>[\w.]+)-(?P<kind>cpu|gpu)"
)


def wrong_images(images: Iterator[str] | list[str]) -> list[str]:
    """Images whose tag is not that of this version with the pinned Ray."""
    wrong = []
    for image in images:
        match = _TAG.fullmatch(image)
        if match is None or (match["version"], match["ray"]) != (PROJECT["version"], PINS["ray"]):
            wrong.append(image)
    return wrong


@pytest.mark.parametrize("name", CLUSTERS)
def test_cluster_images_have_the_pinned_ray(name: str) -> None:
    docker = cluster(name)["docker"]
    assert wrong_images([docker["head_image"], docker["worker_image"]]) == []
    assert "image" not in docker  # it would be one more place for the version
    assert (docker["head_image"][-4:], docker["worker_image"][-4:]) == ("-cpu", "-gpu")


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_have_the_pinned_ray(name: str) -> None:
    document = manifest(name)
    assert ray_spec(document)["rayVersion"] == PINS["ray"]
    images = list(values(document, "image"))
    assert len(images) == 2
    assert wrong_images(images) == []


@pytest.mark.parametrize(
    "image",
    [
        f"r.example.com/xmem-pipeline:{PROJECT['version']}-ray2.59.0-gpu",
        f"r.example.com/xmem-pipeline:9.9.9-ray{PINS['ray']}-gpu",
        f"r.example.com/xmem-pipeline:{PROJECT['version']}-ray{PINS['ray']}",
        "r.example.com/xmem-pipeline:latest",
        f"xmem-pipeline:{PROJECT['version']}-ray{PINS['ray']}-gpu",
    ],
)
def test_another_version_is_found(image: str) -> None:
    """Ray 2.60.0 and 2.59.0 are incompatible; an image without a registry cannot be pulled."""
    assert wrong_images([image]) == [image]


# --- Ray's cluster launcher ----------------------------------------------------------------------


def cluster_errors(config: dict[str, Any]) -> list[str]:
    """Errors found by Ray's schema and by the launcher's own preparation of the file."""
    import jsonschema
    import ray.autoscaler
    from ray.autoscaler._private.util import prepare_config, validate_config

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    found = [e.message for e in jsonschema.Draft7Validator(schema).iter_errors(config)]
    if not found:
        try:
            validate_config(prepare_config(config))
        except (Exception, SystemExit) as error:
            found.append(str(error) or type(error).__name__)
    return found


@pytest.mark.parametrize("name", CLUSTERS)
def test_cluster_files_are_valid(name: str) -> None:
    assert cluster_errors(cluster(name)) == []


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("ray-cluster.yaml", lambda c: c.update(max_worker=3)),
        ("ray-cluster.yaml", lambda c: c["docker"].update(img="x")),
        ("ray-cluster.yaml", lambda c: c.update(head_node_type="heads")),
        ("ray-cluster.yaml", lambda c: c["available_node_types"]["gpu"].update(min_workers=9)),
        ("ray-cluster.yaml", lambda c: c["available_node_types"]["gpu"].pop("node_config")),
        ("ray-cluster.yaml", lambda c: c.pop("provider")),
        ("on-prem.yaml", lambda c: c["provider"].pop("head_ip")),
        ("on-prem.yaml", lambda c: c.update(head_node={"a": 1})),
        ("on-prem.yaml", lambda c: c["docker"].pop("head_image")),
    ],
)
def test_broken_cluster_files_are_refused(name: str, change: Callable[[Any], Any]) -> None:
    config = cluster(name)
    change(config)
    assert cluster_errors(config)


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_cluster_is_behind_its_token(name: str) -> None:
    """Anybody who reaches an open cluster's ports can run code on it."""
    config = cluster(name)
    (mounted,) = config["file_mounts"]
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        stop, start = commands
        assert stop == "ray stop"
        assert "RAY_AUTH_MODE=token" in start
        assert f"RAY_AUTH_TOKEN_PATH={mounted}/auth_token;" in start
        assert "ray start " in start
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][1]
    assert "--port=6379" in config["head_start_ray_commands"][1]
    assert "--address=$RAY_HEAD_IP:6379" in config["worker_start_ray_commands"][1]


@pytest.mark.parametrize("name", CLUSTERS)
def test_options_of_ray_start_exist(name: str) -> None:
    from ray.scripts.scripts import start

    known = {flag for parameter in start.params for flag in parameter.opts}
    config = cluster(name)
    for line in (config["head_start_ray_commands"][1], config["worker_start_ray_commands"][1]):
        (command,) = (part for part in line.split(";") if part.strip().startswith("ray start"))
        options = [word.split("=")[0] for word in shlex.split(command)[2:]]
        assert options
        assert set(options) <= known


def test_gpu_machines_come_and_go() -> None:
    types = cluster("ray-cluster.yaml")["available_node_types"]
    assert (types["gpu"]["min_workers"], types["gpu"]["max_workers"] > 0) == (0, True)
    assert types["head"]["resources"] == {"CPU": 0}


# --- KubeRay -------------------------------------------------------------------------------------


@cache
def manifest_validator() -> Any:
    """Validator by infra/k8s/schema.json, which is checked itself."""
    import jsonschema

    schema = json.loads((INFRA / "k8s" / "schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def manifest_errors(document: dict[str, Any]) -> list[str]:
    """Errors found by infra/k8s/schema.json, and those that no schema can express."""
    found = [e.message for e in manifest_validator().iter_errors(document)]
    return found or [*_inconsistencies(document)]


def _inconsistencies(document: dict[str, Any]) -> Iterator[str]:
    if document["kind"] not in ("RayCluster", "RayJob"):
        return
    for group in ray_spec(document)["workerGroupSpecs"]:
        if not group["minReplicas"] <= group.get("replicas", 0) <= group["maxReplicas"]:
            yield f"group {group['groupName']}: minReplicas <= replicas <= maxReplicas is needed"
    for pod in pod_specs(document):
        volumes = {v["name"] for v in pod.get("volumes", ())}
        for container in pod["containers"]:
            mounts = {m["name"] for m in container.get("volumeMounts", ())}
            if mounts != volumes:
                yield f"container {container['name']} mounts {sorted(mounts)} of {sorted(volumes)}"
            limits, requests = container["resources"]["limits"], container["resources"].get("requests")
            if not {"cpu", "memory"} <= set(limits) or requests != limits:
                yield f"container {container['name']}: Ray plans with the limits, so requests must equal them"


@pytest.mark.parametrize("name", [*MANIFESTS, "access.yaml"])
def test_manifests_are_valid(name: str) -> None:
    assert manifest_errors(manifest(name)) == []


def _head(document: dict[str, Any]) -> dict[str, Any]:
    container: dict[str, Any] = pod_specs(document)[0]["containers"][0]
    return container


def _workers(document: dict[str, Any]) -> dict[str, Any]:
    group: dict[str, Any] = ray_spec(document)["workerGroupSpecs"][0]
    return group


@pytest.mark.parametrize("name", MANIFESTS)
@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(apiVersion="ray.io/v1alpha1"),
        lambda d: d.update(kind="RayCLuster"),
        lambda d: d["metadata"].pop("name"),
        lambda d: d["spec"].update(workerGroupSpec=[]),
        lambda d: ray_spec(d)["headGroupSpec"].update(replicas=1),
        lambda d: ray_spec(d)["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
        lambda d: ray_spec(d)["autoscalerOptions"].update(upscalingMode="Fast"),
        lambda d: ray_spec(d)["authOptions"].update(mode="none"),
        lambda d: _workers(d).update(maxReplicas="8"),
        lambda d: _workers(d).update(replicas=9),
        lambda d: _workers(d).pop("groupName"),
        lambda d: _head(d).update(readynessProbe={}),
        lambda d: _head(d)["livenessProbe"].update(httpGet={"port": 1}),
        lambda d: _head(d)["resources"].pop("limits"),
        lambda d: _head(d)["resources"]["limits"].update(memory="8GB"),
        lambda d: _head(d)["resources"]["limits"].update(memory="9Gi"),
        lambda d: _head(d)["resources"]["limits"].update({"nvidia/gpu": "1"}),
        lambda d: _head(d)["volumeMounts"].pop(),
        lambda d: _head(d)["env"].append({"name": "AWS_SECRET_ACCESS_KEY"}),
        lambda d: _head(d)["envFrom"].append({"secretRef": "xmem-s3"}),
    ],
)
def test_broken_manifests_are_refused(name: str, change: Callable[[Any], Any]) -> None:
    document = json.loads(json.dumps(manifest(name)))
    assert manifest_errors(document) == []
    change(document)
    assert manifest_errors(document)


def test_a_job_names_its_cluster_in_one_way() -> None:
    document = manifest("rayjob.yaml")
    document["spec"]["clusterSelector"] = {"ray.io/cluster": "xmem"}
    assert manifest_errors(document)


@pytest.mark.parametrize("name", MANIFESTS)
def test_what_the_issue_asks_of_the_manifests(name: str) -> None:
    document = manifest(name)
    spec = ray_spec(document)
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    group = _workers(document)
    assert (group["minReplicas"], group["maxReplicas"] >= 2) == (0, True)
    head, worker = pod_specs(document)
    assert worker["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert "nvidia.com/gpu" not in head["containers"][0]["resources"]["limits"]
    account = manifest("access.yaml")["metadata"]["name"]
    for pod in (head, worker):
        assert pod["serviceAccountName"] == account
        assert pod["securityContext"]["runAsNonRoot"] is True
        (container,) = pod["containers"]
        assert container["envFrom"] == [{"secretRef": {"name": "xmem-s3", "optional": True}}]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert {"readinessProbe", "livenessProbe"} <= set(container)
        shm = next(v for v in pod["volumes"] if v["name"] == "shm")
        assert shm["emptyDir"]["medium"] == "Memory"


@pytest.mark.parametrize("name", MANIFESTS)
def test_probes_ask_for_paths_that_ray_answers_without_a_token(name: str) -> None:
    import ray

    sources = Path(ray.__file__).parent / "dashboard" / "modules" / "reporter"
    answered = set(re.findall(r'@routes\.get\("([^"]+)"\)', (sources / "healthz_agent.py").read_text()))
    answered |= set(re.findall(r'@routes\.get\("([^"]+)"\)', (sources / "reporter_head.py").read_text()))
    asked = []
    for pod in pod_specs(manifest(name)):
        for probe in (pod["containers"][0]["readinessProbe"], pod["containers"][0]["livenessProbe"]):
            script = probe["exec"]["command"][-1]
            asked += re.findall(r"http://localhost:(\d+)(/\S+)", script)
            assert subprocess.run(["bash", "-n", "-c", script]).returncode == 0
    assert {path for _, path in asked} <= answered
    assert set(asked) == {("52365", "/api/local_raylet_healthz"), ("8265", "/api/gcs_healthz")}


@pytest.mark.parametrize("name", MANIFESTS)
def test_start_parameters_are_options_of_ray_start(name: str) -> None:
    from ray.scripts.scripts import start

    known = {flag for parameter in start.params for flag in parameter.opts}
    spec = ray_spec(manifest(name))
    given = {*spec["headGroupSpec"]["rayStartParams"], *_workers(manifest(name))["rayStartParams"]}
    assert {f"--{option}" for option in given} <= known


# --- commands ------------------------------------------------------------------------------------


def xmem_commands() -> dict[str, str]:
    """Every xmem command that a file of infra/ runs or tells its reader to run, with its position."""
    found = {"rayjob.yaml, entrypoint": manifest("rayjob.yaml")["spec"]["entrypoint"]}
    for path in sorted(INFRA.rglob("*")):
        if path.suffix in (".yaml", ".sh", ".py") or path.name == "Dockerfile":
            for number, line in enumerate(path.read_text().splitlines(), 1):
                if match := re.match(r"#\s{2,}(xmem .*?)(\s{2,}#.*)?$", line.strip()):
                    found[f"{path.name}:{number}"] = match[1]
    return found


def command_error(line: str) -> str | None:
    """The error of the command line's own parser; None if it is accepted."""
    import typer

    from jobs.cli.app import app
    from jobs.cli.batch import _checked

    program, *words = shlex.split(line)
    assert program == "xmem"
    command: Any = typer.main.get_command(app)
    context: Any = None
    try:
        context = command.make_context(program, list(words))
        while hasattr(command, "commands"):
            rest = [*context._protected_args, *context.args]
            name, command, rest = command.resolve_command(context, rest)
            context = command.make_context(name, rest, parent=context)
        if command.name == "submit":
            _checked([*context.params["videos"], *context.args])  # what it passes on to the batch
    except Exception as error:
        return str(error) or type(error).__name__
    return None


def actors_of(command: str) -> int:
    words = shlex.split(command)
    return int(words[words.index("--actors") + 1])


def test_a_batch_asks_for_the_gpus_that_may_come() -> None:
    """With no workers at the start, a cluster grows only for actors that wait."""
    from jobs.batch.run import BatchOptions, plan
    from jobs.cluster.connection import Resources
    from pipeline.tracking.settings import ModelSettings

    cuda = ModelSettings(device="cuda")
    grown = cluster("ray-cluster.yaml")["available_node_types"]["gpu"]["max_workers"]
    for where, command in xmem_commands().items():
        if command.startswith("xmem batch") and where.startswith(("ray-cluster", "raycluster", "rayjob")):
            assert "--device cuda" in command, where
            most = grown if where.startswith("ray-cluster") else None
            most = most or _workers(manifest(where.split(":")[0].split(",")[0]))["maxReplicas"]
            assert actors_of(command) == most, where
            options = BatchOptions(address="auto", actors=most)
            assert plan(1000, Resources(node_cpus=(0,)), cuda, options).actors == most


def test_commands_are_found() -> None:
    commands = xmem_commands()
    assert commands["rayjob.yaml, entrypoint"].startswith("xmem batch s3://")
    assert len(commands) >= 3


@pytest.mark.parametrize("where", sorted(xmem_commands()))
def test_commands_are_commands_of_xmem(where: str) -> None:
    assert command_error(xmem_commands()[where]) is None


@pytest.mark.parametrize(
    "line",
    [
        "xmem batches s3://b/v --out s3://b/t",
        "xmem batch s3://b/v",
        "xmem batch s3://b/v --out s3://b/t --gpus 3",
        "xmem batch run s3://b/v --out s3://b/t --actors many",
        "xmem batch submit s3://b/v --out s3://b/t --devise cuda",
        "xmem track a.mp4",
        "xmem track a.mp4 --out o --gpu",
        "xmem",
    ],
)
def test_commands_that_do_not_exist_are_found(line: str) -> None:
    assert command_error(line)


# --- the container -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Instruction:
    stage: str
    word: str
    rest: str


def instructions(text: str) -> list[Instruction]:
    """A Dockerfile's instructions, continued lines joined; stages by name."""
    joined = re.sub(r"^\s*#.*\n", "", text, flags=re.M)
    joined = re.sub(r"\\\n\s*", " ", joined)
    found, stage = [], ""
    for line in joined.splitlines():
        if line.strip():
            word, _, rest = line.strip().partition(" ")
            if word == "FROM":
                stage = rest.split(" AS ")[1]
            found.append(Instruction(stage, word, rest.strip()))
    return found


def copied(text: str) -> list[str]:
    """What a Dockerfile copies out of the checkout."""
    sources: list[str] = []
    for i in instructions(text):
        if i.word in ("COPY", "ADD") and "--from=" not in i.rest:
            sources += [w for w in i.rest.split() if not w.startswith("--")][:-1]
    return sources


def ignored(path: str, rules: str) -> bool:
    """Whether a .dockerignore excludes a path; the last matching rule decides."""
    out = False
    for rule in rules.splitlines():
        rule = rule.strip()
        if rule and not rule.startswith("#"):
            keep, pattern = rule.startswith("!"), rule.lstrip("!")
            parts = path.split("/")
            heads = ["/".join(parts[: n + 1]) for n in range(len(parts))]
            plain = pattern.removeprefix("**/")
            names = parts if pattern.startswith("**/") else heads
            if any(fnmatch.fnmatchcase(name, plain) for name in names):
                out = not keep
    return out


def test_everything_the_dockerfile_copies_exists_and_is_sent() -> None:
    rules = (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text()
    sources = copied(DOCKERFILE.read_text())
    assert {"pyproject.toml", "constraints.txt", "xmem_core", "pipeline", "jobs", "xmem_pipeline"} <= set(
        sources
    )
    for source in sources:
        assert (ROOT / source).exists(), source
        assert not ignored(source, rules), source
    assert not ignored("xmem_core/checkpoints/xmem-lite.safetensors", rules)
    for unwanted in (".git", ".venv", "runs", "tests", "pipeline/__pycache__", "jobs/x.pyc", "shared"):
        assert ignored(unwanted, rules), unwanted
    for name in PROJECT["license-files"]:
        assert any(name == s or name.startswith(f"{s}/") for s in sources), name


def test_the_wheel_can_be_built_from_what_is_copied() -> None:
    stage = [i for i in instructions(DOCKERFILE.read_text()) if i.stage == "wheel"]
    sources = copied("\n".join(f"FROM x AS wheel\n{i.word} {i.rest}" for i in stage if i.word == "COPY"))
    packages = {p.split("*")[0] for p in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"][
        "setuptools"]["packages"]["find"]["include"]}  # fmt: skip
    assert packages <= set(sources)
    assert PROJECT["readme"] in sources


def test_the_python_is_one_that_the_project_is_for() -> None:
    (argument,) = (i for i in instructions(DOCKERFILE.read_text()) if i.rest.startswith("PYTHON_VERSION="))
    version = argument.rest.split("=")[1]
    assert python_fits(version)
    assert f"Programming Language :: Python :: {version}" in PROJECT["classifiers"]
    for i in instructions(DOCKERFILE.read_text()):
        if i.word == "FROM" and i.stage in ("wheel", "base"):
            assert i.rest.startswith("python:${PYTHON_VERSION}-")


def python_fits(version: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(PROJECT["requires-python"]).contains(f"{version}.0")


def test_an_older_python_is_found() -> None:
    assert not python_fits("3.10")


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_a_target_has_the_pinned_packages_and_no_root(target: str) -> None:
    found = instructions(DOCKERFILE.read_text())
    (deps,) = (i for i in found if i.word == "RUN" and i.stage == f"deps-{target}")
    torch_first, the_rest = (
        deps.rest.index("pip install ${TORCH_INDEX_URL"),
        deps.rest.index("-r requirements"),
    )
    assert torch_first < the_rest
    assert "pip install -c constraints.txt -r requirements.txt" in deps.rest
    assert ('"${pin}+cpu"' in deps.rest) == (target == "cpu")
    assert f"torch.version.cuda is {'' if target == 'cpu' else 'not '}None" in deps.rest
    last = [i for i in found if i.stage == target]
    assert last[0].rest == f"deps-{target} AS {target}"
    assert any("--no-deps /tmp/wheel/*.whl" in i.rest and "pip check" in i.rest for i in last)
    (user,) = (i.rest for i in last if i.word == "USER")
    assert user.split(":")[0] == str(
        pod_specs(manifest("raycluster.yaml"))[0]["securityContext"]["runAsUser"]
    )
    assert int(user.split(":")[0]) > 0
    words = {i.word for i in found}
    assert not words & {"HEALTHCHECK", "ENTRYPOINT", "ADD"}


def test_shell_of_the_dockerfile_is_shell(tmp_path: Path) -> None:
    for i in instructions(DOCKERFILE.read_text()):
        if i.word == "RUN":
            assert subprocess.run(["sh", "-n", "-c", i.rest]).returncode == 0, i.rest


def test_the_requirements_are_the_projects(tmp_path: Path) -> None:
    """The line that creates them is run unchanged."""
    runs = [i.rest for i in instructions(DOCKERFILE.read_text()) if i.word == "RUN" and i.stage == "base"]
    (line,) = (r for r in runs if "requirements.txt" in r)
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    subprocess.run(["sh", "-c", line], cwd=tmp_path, check=True)
    assert (tmp_path / "requirements.txt").read_text().splitlines() == PROJECT["dependencies"]
    names = {re.split(r"[\[>=<]", d)[0].lower() for d in PROJECT["dependencies"]}
    assert names <= {pin.lower().replace("_", "-") for pin in PINS}  # nothing is installed unpinned


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_the_image_is_tagged_as_the_files_expect(tmp_path: Path, kind: str) -> None:
    docker = tmp_path / "docker"
    docker.write_text('#!/bin/sh\nfor a in "$@"; do echo "$a" >&2; done\n')
    docker.chmod(0o755)
    environment = dict(os.environ, DOCKER=str(docker), IMAGE="my-registry.example.com/xmem-pipeline")
    done = subprocess.run(
        [INFRA / "container" / "build.sh", kind, "--build-arg", "A=b c"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    tag = done.stdout.strip()
    assert wrong_images([tag]) == []
    assert tag in set(values(manifest("raycluster.yaml"), "image"))
    given = done.stderr.splitlines()
    assert given[given.index("--target") + 1] == kind
    assert given[given.index("--tag") + 1] == tag
    assert given[-3:] == ["--build-arg", "A=b c", "."]
    assert (ROOT / given[given.index("--file") + 1]).samefile(DOCKERFILE)


def test_the_image_is_of_one_kind_or_the_other() -> None:
    done = subprocess.run([INFRA / "container" / "build.sh", "tpu"], capture_output=True, text=True)
    assert (done.returncode, "cpu|gpu" in done.stderr) == (2, True)


# --- everything ----------------------------------------------------------------------------------


def test_no_file_holds_a_secret() -> None:
    secret = re.compile(
        r"(?i)(AKIA[0-9A-Z]{16}|-----BEGIN|(secret_access_key|password|token)\s*[:=]\s*[\"']?[a-z0-9/+]{12,})"
    )
    assert secret.search("AWS_SECRET_ACCESS_KEY=abcdefabcdef1234")
    for path in INFRA.rglob("*"):
        if path.suffix in (".yaml", ".json", ".sh", ".py", "") and path.is_file():
            assert not secret.search(path.read_text()), path
