"""What a release promises outside the code: one version, headers of recipes, changelog, workflows, the agents' skill."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from hf_robust_vision import __version__
from hf_robust_vision.cli.harden import METHODS


ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
# As PEP 723 writes it.
HEADER = re.compile(r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$")


def test_the_version_stands_in_one_place():
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert (ROOT / PROJECT["tool"]["hatch"]["version"]["path"]).read_text().count(f'"{__version__}"') == 1
    for name in ("pyproject.toml", "CITATION.cff", "docs/conf.py"):
        assert __version__ not in (ROOT / name).read_text(), name


def test_the_keywords_name_every_method():
    assert set(METHODS) <= {word.lower() for word in PROJECT["project"]["keywords"]}


def test_no_dependency_needs_a_newer_python_than_promised():
    """pip would find no version of it, and say so in a page of text."""
    oldest = PROJECT["project"]["requires-python"].removeprefix(">=")
    for line in PROJECT["project"]["dependencies"]:
        needs = metadata(Requirement(line).name)["Requires-Python"] or ""
        assert SpecifierSet(needs).contains(f"{oldest}.99"), f"{line} needs Python {needs}"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_uv_can_run_each_recipe(recipe):
    (match,) = HEADER.finditer(recipe.read_text())
    assert match["type"] == "script"
    lines = match["content"].splitlines()
    values = tomllib.loads("\n".join(line.removeprefix("#").removeprefix(" ") for line in lines))
    assert values["requires-python"] == PROJECT["project"]["requires-python"]
    requirements = [Requirement(line) for line in values["dependencies"]]
    (own,) = [one for one in requirements if one.name == PROJECT["project"]["name"]]
    assert own.extras <= set(PROJECT["project"]["optional-dependencies"])
    assert (recipe.parent / values["tool"]["uv"]["sources"][own.name]["path"]).resolve() == ROOT


def test_changelog_keeps_its_form():
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert versions[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", version) for version in versions[1:])
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.*)$", text, re.MULTILINE)) <= kinds


def test_citation():
    values = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(values)
    assert values["title"] == PROJECT["project"]["name"]
    assert values["license"] == PROJECT["project"]["license"]


@pytest.mark.parametrize("file", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda file: file.name)
def test_workflows_name_what_is_there(file):
    jobs = yaml.safe_load(file.read_text())["jobs"]
    for job in jobs.values():
        for step in job["steps"]:
            assert len({"uses", "run"} & set(step)) == 1
            assert all((ROOT / name).is_file() for name in re.findall(r"\.ci/\w+", step.get("run", "")))
    if file.name == "release.yml":
        assert set(jobs["publish"]["needs"]) == {"build", "tests"}
    if file.name == "ci.yml":
        tested = {
            python for job in jobs.values() for python in job.get("strategy", {}).get("matrix", {}).get("python", [])
        }
        named = {
            line.rsplit(" ", 1)[1] for line in PROJECT["project"]["classifiers"] if re.search(r":: 3\.\d+$", line)
        }
        assert tested == named


def test_the_sdist_holds_what_its_tests_read():
    kept = PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert {"/.agents", "/.ci", "/.github", "/SECURITY.md", "/tests", "/recipes", "/docs"} <= set(kept)
    assert all((ROOT / path.removeprefix("/")).exists() for path in kept)


@pytest.mark.parametrize(
    "file", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml")), ids=lambda file: file.name
)
def test_issue_forms(file):
    values = yaml.safe_load(file.read_text())
    assert values["name"]
    assert values["description"]
    assert all(field["attributes"]["label"] for field in values["body"])


def test_the_skill_of_coding_agents_is_well_formed():
    """Its commands are read by the tests of the docs."""
    (file,) = (ROOT / ".agents" / "skills").glob("*/SKILL.md")
    _, head, body = file.read_text().split("---\n", 2)
    values = yaml.safe_load(head)
    assert values["name"] == file.parent.name
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", values["name"])
    assert 0 < len(values["description"]) <= 1024
    assert len(body.splitlines()) < 500
    commands = re.search(r"## Five commands\n\n```bash\n(.*?)```", body, re.DOTALL)[1].splitlines()
    assert len(commands) == 5
    for name in re.findall(r"`(docs/[\w-]+\.md|[A-Z]+\.md)`", body):
        assert (ROOT / name).is_file(), name
