"""The wheel: what it holds, and that it works in an environment that has never seen this checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
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
    assert "pipeline/prompts/schema.json" in names
    assert wheel.stat().st_size < 20e6


@pytest.mark.timeout(1500)
def test_installed_into_a_clean_environment_it_tracks_a_clip(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "clean", with_pip=True)
    python = tmp_path / "clean" / "bin" / "python"
    constraints = ROOT / "constraints.txt"
    (torch_pin,) = (line for line in constraints.read_text().splitlines() if line.startswith("torch=="))
    install = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", constraints)
    run(*install, torch_pin, cwd=tmp_path)
    run(*install, wheel, cwd=tmp_path)
    make_video(tmp_path / "clip.mp4", 8)
    xmem = tmp_path / "clean" / "bin" / "xmem"
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
