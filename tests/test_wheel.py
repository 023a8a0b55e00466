"""The wheel: its content, and that it works in an environment without this checkout."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support.videos import make_video

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path) -> str:
    # Neither this checkout nor this interpreter's packages may help.
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Built from a copy: setuptools leaves build folders beside what it packs.
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for name in ("xmem_core", "pipeline", "jobs", "xmem_pipeline", "tests", "infra"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--outdir", out, source, cwd=source)
    (built,) = out.glob("*.whl")
    return built


def test_it_holds_the_packages_and_the_checkpoint_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    folders = {n.split("/")[0] for n in names}
    (info,) = (f for f in folders if f.endswith(".dist-info"))
    assert folders == {"xmem_core", "pipeline", "jobs", "xmem_pipeline", info}
    expected = {
        str(p.relative_to(ROOT))
        for folder in ("xmem_core", "pipeline", "jobs", "xmem_pipeline")
        for p in (ROOT / folder).rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    assert {n for n in names if not n.startswith(info)} == expected
    assert "xmem_core/checkpoints/xmem-lite.safetensors" in names
    assert "xmem_core/checkpoints/xmem-click.safetensors" in names
    assert "pipeline/prompts/schema.json" in names
    assert wheel.stat().st_size < 20e6


def required(wheel: Path) -> dict[str, importlib.metadata.Distribution]:
    """The installed packages that the wheel requires, and their requirements, by name."""
    with zipfile.ZipFile(wheel) as file:
        (name,) = (n for n in file.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = importlib.metadata.PathDistribution(zipfile.Path(file, name.removesuffix("METADATA")))
        ahead = [(r, "") for r in metadata.requires or ()]
        found: dict[str, importlib.metadata.Distribution] = {}
        seen = set()
        while ahead:
            text, extra = ahead.pop()
            needed = Requirement(text)
            if (text, extra) in seen or (needed.marker and not needed.marker.evaluate({"extra": extra})):
                continue
            seen.add((text, extra))
            package = importlib.metadata.distribution(needed.name)
            assert needed.specifier.contains(package.version, prereleases=True), (text, package.version)
            found[canonicalize_name(needed.name)] = package
            ahead += [(r, e) for r in package.requires or () for e in ("", *needed.extras)]
    return found


def link(package: importlib.metadata.Distribution, target: Path) -> None:
    """Make an installed package importable from another folder, by links to its files and folders."""
    root = Path(str(package.locate_file("")))
    names = {file.parts[0] for file in package.files or () if file.parts[0] not in ("..", "__pycache__")}
    for name in names:
        there = target / name
        if not there.exists() and (root / name).exists():
            there.symlink_to(root / name)


def tracks_a_clip(bin_folder: Path, tmp_path: Path) -> None:
    make_video(tmp_path / "clip.mp4", 8)
    xmem = bin_folder / "xmem"
    run(
        xmem,
        "track",
        "clip.mp4",
        "--out",
        "out",
        "--box",
        "20,25,40,40:1:shape",
        "--threads",
        "1",
        cwd=tmp_path,
    )
    answer = run(
        xmem,
        "query",
        "out",
        "select count(*) as n, any_value(category) as c from tracks",
        "--format",
        "csv",
        cwd=tmp_path,
    )
    assert answer.splitlines() == ["n,c", "8,shape"]


def test_installed_into_a_clean_environment_it_tracks_a_clip(wheel: Path, tmp_path: Path) -> None:
    """The environment has the wheel and its requirements, linked from here, and nothing else."""
    clean = tmp_path / "clean"
    venv.create(clean)
    python = clean / "bin" / "python"
    site_packages = Path(
        run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=tmp_path).strip()
    )
    packages = required(wheel)
    assert {"torch", "ray", "duckdb", "fastapi", "starlette"} <= set(packages)
    assert not {"pytest", "mypy", "hypothesis", "xmem-pipeline"} & set(packages)
    for package in packages.values():
        link(package, site_packages)
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    run(*pip, "install", "--quiet", "--no-index", wheel, cwd=tmp_path)  # fails if a requirement is not there
    run(*pip, "check", cwd=tmp_path)
    where = run(python, "-c", "import pipeline, jobs, xmem_core as c; print(c.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(clean)
    tracks_a_clip(clean / "bin", tmp_path)


@pytest.mark.soak
@pytest.mark.timeout(1500)
def test_with_everything_installed_by_pip_it_tracks_a_clip(wheel: Path, tmp_path: Path) -> None:
    """The same with every requirement resolved and installed by pip, which takes minutes."""
    venv.create(tmp_path / "clean", with_pip=True)
    python = tmp_path / "clean" / "bin" / "python"
    constraints = ROOT / "constraints.txt"
    (torch_pin,) = (line for line in constraints.read_text().splitlines() if line.startswith("torch=="))
    install = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", constraints)
    run(*install, torch_pin, cwd=tmp_path)
    run(*install, wheel, cwd=tmp_path)
    tracks_a_clip(tmp_path / "clean" / "bin", tmp_path)
