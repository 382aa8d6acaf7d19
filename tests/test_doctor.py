"""What the doctor says of packages that are missing, too old, or broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from hf_robust_vision import doctor
from hf_robust_vision.cli import main


ROOT = Path(__file__).parents[1]
FOR_DEVELOPERS = {"test", "docs", "dev"}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package of a name, a version, and code."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(name, number, code="", requires=()):
        place = tmp_path / f"{name.replace('-', '_')}-{number}.dist-info"
        place.mkdir()
        needs = "".join(f"Requires-Dist: {one}\n" for one in requires)
        (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n{needs}")
        (tmp_path / f"{name.replace('-', '_')}.py").write_text(code)

    return install


def test_every_extra_of_users_is_explained():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(doctor.EXTRAS) == set(extras) - FOR_DEVELOPERS


def test_requirements_that_are_met_and_not(package):
    package("quiche", "1.2.0+local")
    assert doctor.unmet(Requirement("quiche>=1.2")) is None
    assert doctor.unmet(Requirement("quiche>=1.10")) == (
        'quiche is 1.2.0+local, wanted >=1.10; type pip install "quiche>=1.10"'
    )
    assert doctor.unmet(Requirement("no-such-pie>=2")) == 'no-such-pie is missing; type pip install "no-such-pie>=2"'


def test_what_does_not_load_is_named(package):
    """A torchvision of another torch is installed, and ends every import of transformers' CLIP."""
    package("quiche", "1.2", "raise RuntimeError('operator quiche::nms\\n does not exist')")
    assert doctor.broken("quiche") == (
        "quiche 1.2 does not load (RuntimeError: operator quiche::nms does not exist); "
        "type pip install --upgrade --force-reinstall quiche"
    )
    assert doctor.broken("no-such-pie") is None


def test_extras_are_told_from_what_is_needed(package, monkeypatch):
    """An extra may hold another one of the same package."""
    package("quiche", "1")
    package(
        "kitchen",
        "1",
        requires=["quiche", 'kitchen[vlm]; extra == "demo"', 'pan; extra == "demo"', 'no-such-pie>=2; extra == "vlm"'],
    )
    monkeypatch.setattr(doctor, "DISTRIBUTION", "kitchen")
    found = doctor.diagnose()
    assert found.packages == {"quiche": "1"}
    assert found.missing["demo"] == ["no-such-pie", "pan"]
    assert found.missing["vlm"] == ["no-such-pie"]
    assert found.missing["report"] == []
    assert 'for it type pip install "kitchen[vlm]"' in str(found)
    assert found.healthy  # an extra is no must


def test_the_verb(capsys):
    """Here all is well: the suite could not run otherwise."""
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["healthy"]
    assert found["problems"] == []
    assert found["packages"]["torch"]
    assert found["devices"][0].startswith("cpu (")
    assert main(["doctor"]) == 0
    assert f"torch {found['packages']['torch']}" in capsys.readouterr().out


def test_the_verb_where_nothing_is_installed():
    """It says so in an interpreter without a single package, and its status says it, too."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from hf_robust_vision.cli import main; sys.exit(main(['doctor']))"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], env=os.environ, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "problem: hf-robust-vision is on the path but not installed; type pip install -e ." in done.stdout
    assert "unknown without torch" in done.stdout
