"""Every Python block of README and docs runs; every shell block names flags that exist."""

from __future__ import annotations

import json
import re
import shlex
import statistics
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from comparison import make_page
from towers_page import towers_page
from transfer import read_config
from transfer_page import make_transfer_page

from hf_robust_vision import pipeline
from hf_robust_vision.cli import VERBS, make_parser
from hf_robust_vision.evaluation.results import load_results
from hf_robust_vision.methods.sim_clip import SimCLIPTrainer
from tests.cli.next_lines import read


ROOT = Path(__file__).parents[1]
PHOTOS = "photos"  # the table that README shows
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / ".agents").rglob("*.md")])
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[object]:
    return [
        pytest.param(code, id=f"{page.relative_to(ROOT)}:{place}")
        for page in PAGES
        for place, (kind, code) in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")))
        if kind == language
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """In their order and one namespace, as a reader would paste them."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for kind, code in BLOCK.findall(page.read_text(encoding="utf-8")):
        if kind == "python":
            exec(compile(code, str(page), "exec"), namespace)


def test_the_published_settings_are_those_of_their_files():
    """The table of the page on settings has a row for each file of a published setting, with what it says."""
    page = (ROOT / "docs" / "how-to-choose-settings.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if "_vit" in line]
    wanted = []
    for file in sorted((ROOT / "hf_robust_vision" / "configs").glob("*_vit*.yaml")):
        said = yaml.safe_load(file.read_text())
        tower = said["model_name_or_path"].rpartition("/")[2].removeprefix("clip-")
        attack = f"{said['attack_steps']} steps at {said['attack_eps']}"
        learns = f"{said['optim']}, {float(said['learning_rate']):g}"
        wanted.append([f"`{file.name}`", tower, str(said["global_batch_size"]), attack, learns])
    assert rows == wanted


def test_every_verb_is_named_in_python():
    """The table of verbs and names: each verb once, and each name is one."""
    table = (ROOT / "docs" / "which-tool.md").read_text().partition("## The same in Python")[2]
    rows = [line.split("|")[1:3] for line in table.splitlines() if line.startswith("| `")]
    verbs = [verb for row in rows for verb in re.findall("`([^`]+)`", row[0])]
    assert sorted(verbs) == sorted(verb.__name__.rpartition(".")[2].replace("_", "-") for verb in VERBS)
    for name in (name for row in rows for name in re.findall("`([^`]+)`", row[1])):
        module, _, attribute = f"hf_robust_vision.{name}".rpartition(".")
        if module != "hf_robust_vision.app.serve" or find_spec("gradio"):
            assert callable(getattr(import_module(module), attribute)), name


def trainer_of(recipe: str) -> type:
    """The trainer class that a recipe runs, by the name it imports."""
    name = re.search(r"import (?:\w+, )*(\w+Trainer)\b", (ROOT / recipe).read_text())
    assert name, f"{recipe} names no trainer"
    import hf_robust_vision

    return getattr(hf_robust_vision, name[1])


@pytest.mark.parametrize("code", blocks("bash"))
def test_recipe_commands_parse(code, tmp_path, monkeypatch):
    """A flag that was renamed would leave the docs with a command that fails."""
    monkeypatch.chdir(ROOT)
    for line in code.replace("\\\n", " ").splitlines():
        match = re.search(
            r"(?:accelerate launch|python) (?:--config_file \S+ )?(recipes/(?:research/)?\w+\.py)(.*)",
            line.split("#")[0],
        )
        if match is None:
            continue
        recipe, words = match[1], shlex.split(match[2])
        assert (ROOT / recipe).is_file(), f"{recipe} does not exist"
        source = (ROOT / recipe).read_text()
        if "pipeline import main" not in source:
            shared = (
                (ROOT / "hf_robust_vision" / "cli" / "evaluate.py").read_text() if "add_measuring" in source else ""
            )
            for word in words:
                if word.startswith("--"):
                    assert f'"{word}"' in source + shared, f"{recipe} has no {word}"
            continue
        pipeline.parse(trainer_of(recipe), [*words, "--output_dir", str(tmp_path)])


@pytest.mark.parametrize("code", blocks("bash"))
def test_cli_commands_parse(code, tmp_path):
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:2] == ["hf-robust-vision", "harden"]:
            recipe = f"recipes/{words[2].replace('-', '_')}.py"
            pipeline.parse(trainer_of(recipe), [*words[3:], "--output_dir", str(tmp_path)])
        if words[:1] == ["hf-robust-vision"] and words[1] not in ("harden", "harden-vlm"):  # whose recipes read them
            make_parser().parse_args(words[1:])


def test_commands_in_the_tables_of_wishes_parse():
    """Each as it stands there, with its words in capitals."""
    text = (ROOT / "docs" / "which-tool.md").read_text(encoding="utf-8")
    tables = "".join(line for line in text.splitlines(keepends=True) if line.startswith("|"))
    lines = re.findall(r"`hf-robust-vision ([^`]+)`", tables)
    assert len(lines) > 15
    for line in lines:
        read(shlex.split(line))


@pytest.mark.parametrize(
    "config", sorted((ROOT / "hf_robust_vision" / "configs").glob("*.yaml")), ids=lambda path: path.stem
)
def test_configs_set_what_trainer_would_choose(config):
    """A published setting that leaves `max_grad_norm` to Trainer is not the published setting."""
    values = yaml.safe_load(config.read_text(encoding="utf-8"))
    missing = {"max_grad_norm", "learning_rate", "weight_decay", "lr_scheduler_type", "warmup_steps"} - set(values)
    assert not missing


def test_demo_config_is_read_only_for_the_demo(tmp_path):
    _, with_demo = pipeline.parse(SimCLIPTrainer, ["--output_dir", str(tmp_path)])
    words = ["--output_dir", str(tmp_path), "--model_name_or_path", "some/clip"]
    _, without = pipeline.parse(SimCLIPTrainer, words)
    assert with_demo.learning_rate == 2e-3
    assert with_demo.attack_eps == 8 / 255
    assert without.learning_rate == 1e-5
    assert without.attack_eps == 4 / 255


@pytest.mark.parametrize("code", blocks("bash"))
def test_commands_name_flags_that_exist(code):
    source = "".join(file.read_text() for file in (ROOT / "hf_robust_vision" / "cli").glob("*.py"))
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["hf-robust-vision"] and words[1] not in ("harden", "harden-vlm"):  # whose recipes read them
            stray = [word for word in words[1:] if word.startswith("--") and f'"{word}"' not in source]
            assert f'"{words[1]}"' in source
            assert not stray


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_resolve(page):
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("log", sorted((ROOT / "docs" / "results").glob("*.log")), ids=lambda log: log.name)
def test_logs_are_what_their_recipe_printed(log):
    """Neither warnings of a library nor its progress bars."""
    assert not re.findall(r"^\[transformers\].*|.*(?:it/s|s/it)\].*", log.read_text(encoding="utf-8"), re.MULTILINE)


def test_results_page_is_what_its_numbers_say():
    assert (ROOT / "docs" / "results.md").read_text() == make_page(ROOT / "docs")


def cell(row, kind):
    low, high = row["ci95"][f"{kind}_accuracy"]
    return f"{100 * row[f'{kind}_accuracy']:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


@pytest.mark.parametrize(
    ("name", "page"), [("sim_clip_demo", "README.md"), ("sim_clip_demo_siglip", "docs/quickstart.md")]
)
def test_tables_of_the_demo_are_runs_of_their_commands(name, page):
    results = json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text())["results"]
    readme = (ROOT / page).read_text()

    before, after = ([row for row in results if row["model"] == model] for model in ("before", "after"))
    assert f"| clean | {cell(before[0], 'clean')} | {cell(after[0], 'clean')} |" in readme
    for one, other in zip(before, after, strict=True):
        trained = " (trained)" if one["eps"] == 8 / 255 else ""
        name = f"{255 * one['eps']:g}/255{trained}"
        assert f"| {name} | {cell(one, 'robust')} | {cell(other, 'robust')} |" in readme
    (count,) = {row["num_samples"] for row in results}
    assert f"over {count} images" in readme
    assert {row["protocol"] for row in results} == {"robustvlm"}
    (steps,) = {attack["steps"] for row in results for attack in row["attacks"]}
    assert f"(test images, `robustvlm` with {steps} steps" in readme


def test_readme_has_the_table_of_the_report():
    page, readme = (ROOT / "docs" / "report" / "report.md").read_text(), (ROOT / "README.md").read_text()
    table = page[page.index("| model | clean |") :].split("\n\n")[0]
    assert len(table.splitlines()) == 2 + 5
    assert table in readme
    results = load_results(ROOT / "docs" / "report")
    left = {
        (row.model, round(255 * row.eps)): [attack["robust_accuracy"] for attack in row.attacks] for row in results
    }
    for model, *cells in (line.strip("| ").split(" | ") for line in table.splitlines()[2:]):
        assert [float(cell.split(" %")[0]) for cell in cells[1:]] == [
            pytest.approx(100 * left[model, eps][-1]) for eps in (4, 8, 16)
        ]
    assert {row.sanity["verdict"] for row in results} == {"passed"}
    # What cross-entropy alone would have said, here and in concepts.md.
    assert (left["FARE", 16], left["TeCoA", 16]) == ([0.40, 0.23], [0.32, 0.27])
    assert (left["undefended", 8], left["Sim-CLIP", 16]) == ([0.41, 0.28], [0.37, 0.23])


def test_swap_table_is_what_was_measured():
    """docs/how-to-swap-llava.md and README.md against the files of the recipe, and those against each other."""
    folder, page = ROOT / "docs" / "results", (ROOT / "docs" / "how-to-swap-llava.md").read_text()
    results = json.loads((folder / "swap_llava.json").read_text())["results"]
    report = json.loads((folder / "swap_llava_report.json").read_text())
    by = {(row["group"].strip(), round(255 * row["eps"]), row["model"]): row for row in results}
    assert all(row["num_samples"] == 300 for row in results)

    def pair(group, eps, kind):
        return [cell(by[group, eps, model], kind) for model in ("before", "after")]

    for name, group, eps, kind in (
        ("colour and shape, clean", "colour/shape", 8, "clean"),
        ("colour and shape, attacked at 8/255", "colour/shape", 8, "robust"),
        ("colour and shape, attacked at 16/255", "colour/shape", 16, "robust"),
    ):
        assert f"| {name} | {' | '.join(pair(group, eps, kind))} |" in page
    for name, group in {
        "the same on a blank image": "blank image",
        "yes/no, clean": "yes/no",
        "yes/no on a blank image": "yes/no, blank",
    }.items():
        values = [value.split(" (")[0] for value in pair(group, 0, "clean")]
        assert f"| {name} | {' | '.join(values)} |" in page
    assert f"is {report['towers'][0]['drift']:.3f}" in page
    clip = json.loads((folder / "sim_clip_demo_llava.json").read_text())["results"][-1]
    told = " ".join(page.split())
    assert f"right about {100 * clip['clean_accuracy']:.1f} % of {clip['num_samples']} clean test images" in told
    told = " ".join((ROOT / "README.md").read_text().split())
    shares = [by["colour/shape", eps, model]["robust_accuracy"] for eps in (8, 16) for model in ("before", "after")]
    low, high, far_low, far_high = (f"{100 * share:.1f}" for share in shares)
    assert f"from {low} to {high} % at 8/255 and from {far_low} to {far_high} % at 16/255" in told


def test_towers_page_is_what_its_numbers_say():
    content = json.loads((ROOT / "docs" / "results" / "towers.json").read_text())
    assert (ROOT / "docs" / "results" / "towers.md").read_text() == towers_page(content)
    row = next(row for row in content["paired"] if row["eps"] == "8/255")
    mean, low, high = (100 * row[key] for key in ("difference", "low", "high"))
    readme = (ROOT / "README.md").read_text()
    assert f"keeps {mean:.1f} points more answers" in " ".join(readme.split())
    assert f"paired interval {low:+.1f} to {high:+.1f}]" in readme


@pytest.mark.parametrize(
    "file", sorted((ROOT / "docs" / "results").glob("hardening-*.json")), ids=lambda file: file.stem
)
def test_pages_of_hardening_are_what_their_numbers_say(file):
    assert file.with_suffix(".md").read_text() == towers_page(json.loads(file.read_text()), file.stem)


@pytest.mark.parametrize(("name", "place"), [("llava", 0), ("smolvlm", 1)])
def test_what_moves_the_hardening_of_a_vlm_is_what_was_measured(name, place):
    content = json.loads((ROOT / "docs" / "results" / f"hardening-{name}.json").read_text())
    page = (ROOT / "docs" / "how-to-harden-a-vlm.md").read_text().split("## What moves it")[1].split("\n## ")[0]
    header, _, *table = re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE)[place].splitlines()
    radii = [word for word in header.strip("| ").split(" | ") if "/255" in word]
    measured = []
    for row in content["rows"]:
        shares = [row["answers_clean"], *(row["answers"][eps] for eps in radii), row["zero_shot_clean"]]
        seconds = f"{row['cpu_seconds'][0]:.0f} |" if row["learning_rate"] else "|"
        measured.append(" | ".join([*(f"{100 * share[0]:.0f} %" for share in shares if share), seconds]))
    assert sorted(line.split(" | ", 1)[1] for line in table) == sorted(measured)


def test_the_table_of_the_llava_hardened_in_place_is_that_of_its_file():
    """docs/how-to-harden-a-vlm.md and README.md against what was measured."""
    page, readme = ((ROOT / file).read_text() for file in ("docs/how-to-harden-a-vlm.md", "README.md"))
    results = json.loads((ROOT / "docs" / "results" / "harden_vlm_llava.json").read_text())["results"]
    columns = []
    for model in ("before", "after"):
        own = [result for result in results if result["model"] == model]
        columns.append([cell(own[0], "clean"), *(cell(result, "robust") for result in own)])
        assert f"{100 * own[0]['robust_accuracy']:.1f}" in readme
    for words in zip(("clean", "8/255 (trained)", "16/255"), *columns):
        assert f"| {' | '.join(words)} |" in page


def of_seeds(name, page, seeds=3):
    """Before and after of a `compare_towers.py` with one row, in percent: single values, and (mean, deviation)."""
    content = json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text())
    assert f"results/{name}.md" in page
    original, hardened = ({"clean": row["answers_clean"], **row["answers"]} for row in content["rows"])
    assert len(hardened["clean"]) == seeds
    before = {key: 100 * value for key, (value,) in original.items()}
    deviation = statistics.stdev if seeds > 1 else lambda values: 0.0
    return before, {key: (100 * statistics.mean(of), 100 * deviation(of)) for key, of in hardened.items()}


def test_the_claims_of_three_seeds_are_those_of_their_files():
    page, readme = (ROOT / "docs" / "how-to-harden-a-vlm.md").read_text(), (ROOT / "README.md").read_text()
    told = " ".join(readme.split())
    before, low = of_seeds("hardening-llava-8", page)
    _, high = of_seeds("hardening-llava-16", page)
    for key, value in before.items():
        cells = [f"{mean:.1f} ± {deviation:.1f} %" for mean, deviation in (low[key], high[key])]
        assert f"| {key} | {value:.1f} % | {' | '.join(cells)} |" in page
        assert f"{value:.1f} to {low[key][0]:.1f} %" in told
    assert f"to {high['8/255'][0]:.1f} and {high['16/255'][0]:.1f} %, clean {high['clean'][0]:.1f} %" in told
    before, after = of_seeds("hardening-smolvlm-9", page)
    for key, (mean, deviation) in after.items():
        assert f"| {key} | {before[key]:.1f} % | {mean:.1f} ± {deviation:.1f} % |" in page
    for key in ("clean", "10/255"):
        assert f"{before[key]:.1f} to {after[key][0]:.1f} %" in told
    before, after = of_seeds("hardening-transfer", page, seeds=1)
    assert all(f"| {key} | {before[key]:.1f} % | {mean:.1f} % |" in page for key, (mean, _) in after.items())


def test_the_page_of_the_photos_is_what_its_numbers_say():
    config = read_config(ROOT / "recipes" / "research" / "photos.yaml")
    assert (ROOT / "docs" / "results-photos.md").read_text() == make_transfer_page(ROOT / "docs", config)


def test_the_photos_of_the_readme_are_those_of_their_file():
    """Its table; `PHOTOS` names the file."""
    content = json.loads((ROOT / "docs" / "results" / f"{PHOTOS}.json").read_text())
    readme = (ROOT / "README.md").read_text()
    blocks = re.findall(r"(?:^\|.*\n)+", readme, re.MULTILINE)
    table = next(block.splitlines()[2:] for block in blocks if "| score |" in block)
    rows = {row["label"]: row for row in content["rows"]}
    assert "undefended" in rows
    assert len(table) >= 6
    for line in table:
        label, *cells = line.strip("| ").split(" | ")
        row = rows[label.strip("*")]
        shares = [row["mean"][eps] for eps in ("clean", "1/255", "2/255", "4/255")] + [row["score"]]
        assert cells == [f"{100 * share['value']:.1f}" for share in shares], label
