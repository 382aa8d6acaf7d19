"""Import time, layers, file sizes, and what the repository must not hold."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hf_robust_vision


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_robust_vision"
FILES = sorted(PACKAGE.rglob("*.py"))
HEAVY = ("transformers", "datasets", "peft", "evaluate", "accelerate", "matplotlib", "PIL", "torch")

# Who may import whom. Nothing points back up.
MAY_IMPORT = {
    "attacks": set(),
    "pixels": set(),
    "files": set(),
    "processes": set(),
    "configs": set(),
    "terminal": set(),
    "doctor": {"processes"},
    "towers": {"files", "pixels"},
    "data": {"files", "processes", "pixels", "towers"},  # towers for class names only
    "swap": {"files", "towers", "pixels"},
    "evaluation": {"files", "processes", "attacks", "pixels", "towers", "data"},
    "sanity": {"attacks", "pixels", "towers", "data", "evaluation"},
    "report": {"files", "processes", "attacks", "pixels", "towers", "evaluation"},
    "hub": {"files", "attacks", "pixels", "towers", "data", "evaluation", "report"},
    "training": {"files", "processes", "attacks", "pixels", "towers", "data", "evaluation", "hub"},
    "methods": {"attacks", "towers", "data", "training"},
    "pipeline": {
        "files",
        "processes",
        "attacks",
        "pixels",
        "configs",
        "terminal",
        "towers",
        "swap",
        "data",
        "evaluation",
        "sanity",
        "report",
        "hub",
        "training",
        "methods",
    },
}
MAY_IMPORT["app"] = {"pixels", "terminal", "towers", "data", "evaluation", "report", "pipeline"}
MAY_IMPORT["cli"] = set(MAY_IMPORT)
LIGHT = {"attacks": {"torch"}, "pixels": {"torch"}}
NARROW = {"training": {"evaluation": {"results", "task", "tasks"}, "hub": {"card", "push"}}}


def imports(file):
    """Absolute names of everything that a file imports, wherever in it."""
    inside = file.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(inside[: -node.level]) + "." if node.level else ""
            module = f"{start}{node.module or ''}".rstrip(".")
            yield from (f"{module}.{alias.name}" for alias in node.names)


def room(parts):
    return parts[1].removesuffix(".py")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_layers(file):
    mine = room(file.relative_to(ROOT).parts)
    if mine == "__init__":
        return
    assert mine in MAY_IMPORT, f"{mine} is no room of the package"
    for name in imports(file):
        parts = name.split(".")
        if parts[0] == "hf_robust_vision" and len(parts) > 1 and parts[1] not in (mine, "__version__"):
            assert parts[1] in MAY_IMPORT[mine], f"{mine} must not import {name}"
            narrow = NARROW.get(mine, {}).get(parts[1])
            assert narrow is None or parts[2] in narrow, f"{mine} must not import {name}"
        elif parts[0] != "hf_robust_vision" and mine in LIGHT:
            allowed = LIGHT[mine] | set(sys.stdlib_module_names)
            assert parts[0] in allowed, f"{mine} must not import {name}"


def test_layers_see_relative_imports():
    """The reader of imports itself: a relative one is resolved."""
    names = set(imports(PACKAGE / "methods" / "sim_clip.py"))
    assert {"hf_robust_vision.training.base.Batch", "hf_robust_vision.towers.load.Encoder", "torch.nn"} <= names


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_files_can_be_read_in_one_sitting(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 400


def test_import_is_lazy_and_fast():
    code = (
        "import sys, time; start = time.time(); import hf_robust_vision; spent = time.time() - start\n"
        f"print(spent, [name for name in {HEAVY!r} if name in sys.modules])"
    )
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    out = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout
    spent, loaded = out.split(maxsplit=1)
    assert loaded.strip() == "[]"
    assert float(spent) < 0.3


@pytest.mark.parametrize("name", ["attacks", "pixels"])
def test_the_attack_core_needs_torch_only(name):
    code = f"import sys, hf_robust_vision.{name}; print([n for n in ('transformers', 'datasets') if n in sys.modules])"
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names():
    assert hf_robust_vision.__all__ == sorted(hf_robust_vision.__all__)
    assert set(hf_robust_vision.__all__) == set(hf_robust_vision._homes())
    for name in hf_robust_vision.__all__:
        assert getattr(hf_robust_vision, name).__name__ == name
        assert name in dir(hf_robust_vision)
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        _ = hf_robust_vision.nope


def test_recipe_is_short():
    assert len((ROOT / "recipes" / "sim_clip.py").read_text().splitlines()) < 100
