"""A comparison by a YAML file, on a tiny CLIP and images in three colours."""

from __future__ import annotations

import importlib
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from compare_run import Budget, harden, make_trainer
from compare_transfer import Comparison, merge_choice
from comparison import paired_interval, stratified_interval
from margins import describe
from passes import Passes, passes_of, updates_for
from pretrain_photo_clip import HELD_OUT, hold_out
from transfer import Row, read_config
from transfer_data import Unseen
from transfer_page import make_transfer_page
from transfer_scores import accuracy, leads, left_by

from hf_robust_vision.towers.load import load_encoder
from tests.conftest import NAMES, picture


ROOT = Path(__file__).parents[2]
RESEARCH = ROOT / "recipes" / "research"
SIZES = {"train-set": 32, "low": 16, "high": 40}
CHOICE = {
    "learning_rates": [1e-3, 1e-2],
    "passes": 60,
    "protocol": "apgd-ce",
    "steps": 1,
    "eps": ["4/255"],
    "images": 8,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three data sets as folders of Parquet files; the images of one are smaller than the tower's."""
    root = tmp_path_factory.mktemp("photos")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(NAMES))})
    for start, (name, size) in enumerate(SIZES.items()):
        for split, count in (("train", 40), ("test", 8)):
            labels = [index % 3 for index in range(count)]
            rows = {
                "image": [picture(i + 100 * start, label, size) for i, label in enumerate(labels)],
                "label": labels,
            }
            file = root / name / f"{split}-00000-of-00001.parquet"
            file.parent.mkdir(exist_ok=True)
            datasets.Dataset.from_dict(rows, features=features).to_parquet(file)
    return root


@pytest.fixture
def small():
    """The settings of a comparison of nothing."""
    return {
        "name": "small",
        "title": "A small comparison",
        "about": "a tiny CLIP",
        "model": "some/clip",
        "templates": "demo",
        "train": {"name": "Train", "dataset": "train-set", "split": "train"},
        "validation_share": 0.2,
        "measured": [
            {"name": "Train", "dataset": "train-set", "terms": "own"},
            {"name": "Low", "dataset": "low", "resolution": 16, "terms": "none stated"},
        ],
        "training": {"passes": 60, "batch_size": 4, "attack_eps": "4/255", "options": {"attack_steps": 1}},
        "choice": CHOICE,
        "measuring": {"protocol": "robustvlm", "steps": 1, "eps": ["4/255", "64/255"], "images": 4, "seeds": [0, 1]},
        "sanity": {"samples": 1, "protocol": "apgd-ce", "steps": 1, "queries": 2},
        "cross_check": {"set": "Low", "eps": "64/255", "images": 8, "methods": ["tecoa", "ours"]},
        "methods": {
            "undefended": {"label": "undefended"},
            "tecoa": {"label": "TeCoA", "method": "tecoa", "learning_rates": [1e-2]},
            "tima": {"label": "TIMA", "method": "tima", "learning_rates": [1e-2], "on_request": True},
            "half": {"label": "half", "method": "agft", "options": {"label_weight": 0.5}, "ours": True},
            "between": {
                "label": "half, between", "method": "agft", "options": {"label_weight": 0.5}, "weights": [0.5, 1.0], "ours": True,
            },
        },
        "tables": {"small": {}, "small-long": {"methods": ["undefended", "tecoa", "tima", "ours"], "steps": 2, "seeds": [0]}},
    }  # fmt: skip


@pytest.fixture
def write(tmp_path):
    def write(values):
        file = tmp_path / "small.yaml"
        file.write_text(yaml.safe_dump(values, sort_keys=False))
        return file

    return write


@pytest.fixture
def compare(small, write, data, clip_folder, tmp_path, monkeypatch):
    """The command; its words may change."""
    recipe = importlib.import_module("compare")

    def run(*words, docs=tmp_path / "docs"):
        fixed = ["--config", write(small), "--data", data, "--model", clip_folder, *(["--docs", docs] if docs else [])]
        fixed += ["--output_dir", tmp_path / "runs", "--jobs", 1]
        monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, (*fixed, *words))])
        recipe.main()
        return docs

    return run


@pytest.mark.slow
def test_an_independent_attack_of_some_rows(compare, small):
    pytest.importorskip("pyautoattack")
    small["methods"]["half"]["learning_rates"] = [1e-2]  # nothing is left to choose
    small["methods"].pop("between")
    docs = compare("--cross_check")
    checked = read(docs, "small-cross")
    assert [row["label"] for row in checked["rows"]] == ["TeCoA", "half"]
    for row in checked["rows"]:
        assert row["num_samples"] == 8
        assert row["theirs"] < row["clean"]
        assert row["ours"] <= row["clean"]
    assert "## Cross-check by another implementation: `small`" in (docs / "results-small.md").read_text()


def read(docs, name):
    return json.loads((docs / "results" / f"{name}.json").read_text())


@pytest.mark.slow
def test_chosen_on_validation_measured_on_test_and_read_back(compare, tmp_path, data):
    pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit):
        compare()  # nothing was chosen yet
    docs = compare("--choose")
    choice = read(docs, "small-choice")["4/255"]
    assert choice["about"]["split"] == "validation"
    assert {key: len(entry["tried"]) for key, entry in choice["rows"].items()} == {
        "undefended": 1, "tecoa": 1, "half": 2, "between": 3,
    }  # fmt: skip
    for entry in choice["rows"].values():
        best = max(entry["tried"], key=lambda tried: tried["score"])
        assert (entry["learning_rate"], entry["weight"]) == (best["learning_rate"], best["weight"])
    ours = max(("half", "between"), key=lambda key: choice["rows"][key]["score"])
    assert choice["rows"][choice["ours"]]["score"] == choice["rows"][ours]["score"]

    compare()
    content = read(docs, "small")
    assert [row["method"] for row in content["rows"]] == ["undefended", "tecoa", choice["ours"]]
    assert [(each["name"], each["resolution"]) for each in content["sets"]] == [("Train", 32), ("Low", 16)]
    assert {(row["other"], row["set"]) for row in content["paired"]} == {
        ("TeCoA", n) for n in ("mean", "Train", "Low")
    }
    tecoa = content["rows"][1]
    assert tecoa["learning_rate"] == choice["rows"]["tecoa"]["learning_rate"]
    assert tecoa["updates"] == 3  # 60 passes, 5 for each of 4 images
    assert len(tecoa["mean"]["clean"]["seeds"]) == 2
    assert tecoa["sanity"]["verdict"] in ("passed", "flagged")
    for name, radii in tecoa["left"].items():
        for eps, shares in radii.items():
            assert list(shares) == ["clean", "apgd-ce", "apgd-dlr-targeted"][: len(shares)]
            assert list(shares.values()) == sorted(shares.values(), reverse=True)
            assert shares["clean"] == pytest.approx(tecoa["sets"][name]["clean"]["value"])
            assert list(shares.values())[-1] == pytest.approx(tecoa["sets"][name][eps]["value"])
    page = (docs / "results-small.md").read_text()
    for path in (tmp_path, data):
        assert str(path) not in page + json.dumps(content)
    assert "none stated" in page
    assert (docs / "results" / "small.png").stat().st_size > 0

    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.*")}
    compare()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.*")} == written
    assert read(docs, "small") == content
    compare("--table", "small-long", "--images", "2")
    long = read(docs, "small-long")
    assert [row["method"] for row in long["rows"]] == ["undefended", "tecoa", "tima", choice["ours"]]
    assert (long["test"]["steps"], long["test"]["images"]) == (2, 2)
    assert [row["texts_kept"] is None for row in long["rows"]] == [True, True, False, True]
    assert long["rows"][2]["texts_kept"] < 1
    told = {(row["one"], row["other"], row["sets"]) for row in long["challenges"]}
    assert told == {("TIMA", "TeCoA", "all"), ("TIMA", "TeCoA", "unseen")}
    new = set((tmp_path / "runs").rglob("model.safetensors")) - set(written)
    assert [path.parts[-3].split("-")[0] for path in new] == ["TIMATrainer"]
    assert "## Fine-tuned at 4/255: `small-long`" in (docs / "results-small.md").read_text()
    assert "Similarities of the class texts after hardening" in (docs / "results-small.md").read_text()


def test_published_numbers_are_not_replaced_by_those_of_other_settings(compare, small, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Comparison, "measure", lambda *_: pytest.fail("something ran"))
    monkeypatch.setattr(Comparison, "choose", lambda *_: pytest.fail("something ran"))
    results = tmp_path / "docs" / "results"
    results.mkdir(parents=True)
    published = {"command": "the command", "rows": [], "training": {"passes": 61}, "test": {}}
    (results / "small.json").write_text(json.dumps(published))
    (results / "small-choice.json").write_text(
        json.dumps({"4/255": {"settings": {"passes": 61}, "rows": {}, "ours": None}})
    )
    for words, said in (([], "was made with passes 61, not 60"), (["--choose"], "holds what other settings chose")):
        with pytest.raises(SystemExit):
            compare(*words, docs=None)
        assert said in capsys.readouterr().err


def test_the_cost_is_said_before_and_nothing_is_trained(compare, tmp_path, capsys):
    docs = compare("--estimate")
    hours = read(docs, "small-estimate")["cpu_hours"]
    assert set(hours) == {"training", "measuring", "sanity checks", "choice"}
    assert all(value > 0 for value in hours.values())
    assert "training: at most about" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_margins_have_a_section(compare):
    docs = compare("--margins")
    found = read(docs, "small-margins")
    assert found["num_samples"] == 8
    assert "## TIMA's gate and margin" in (docs / "results-small.md").read_text()


@pytest.fixture
def comparison(table, tmp_path):
    return Comparison(table, tmp_path, 1)


@pytest.fixture
def table(small, write, data, clip_folder):
    return read_config(write(small)).table(None, {}, data, str(clip_folder))


class Counted(torch.nn.Linear):
    """A layer that counts the images or prompts that it works for: forward, to its input, to its weights."""

    passes = 0

    def forward(self, inputs):
        output = super().forward(inputs)
        Counted.passes += len(inputs)
        backward = len(inputs) * (inputs.requires_grad + self.weight.requires_grad)
        if output.requires_grad:
            output.register_hook(lambda gradient: Counted.count(backward))
        return output

    @staticmethod
    def count(passes):
        Counted.passes += passes


def passes_through(tower, trainer, inputs):
    """Of a layer of this tower and of the original's, in one update."""
    for encoder in (trainer.model, trainer.reference.encoder):
        for name, layer in encoder.named_modules():
            if name.endswith(("vision_model.encoder.layers.1.mlp.fc1", "text_model.encoder.layers.1.mlp.fc1")):
                layer.__class__ = Counted if tower in name else torch.nn.Linear
    Counted.passes = 0
    trainer.passes.start()
    trainer.compute_loss(trainer.model, inputs).backward()
    return Counted.passes


CASES = [
    ("control", {}),
    ("tecoa", {}),
    ("tecoa", {"attack_steps": 5}),
    ("pmg-aft", {}),
    ("fare", {}),
    ("fare", {"clean_drift_bound": 0.1}),
    ("sim-clip", {"form": "frozen"}),
    ("sim-clip", {"form": "frozen", "clean_drift_bound": 0.1}),
    ("sim-clip", {"form": "anchored"}),
    ("agft", {"label_weight": 0.5}),
    ("agft", {"label_weight": 0.5, "clean_drift_bound": 0.1}),
    ("tima", {"variant": "aaai"}),
    ("tima", {"variant": "v1"}),
    ("tima", {"variant": "v1", "takd_student": "clean"}),
    ("tima", {"text_params": "none"}),
]


@pytest.mark.parametrize(("method", "options"), CASES)
def test_passes_are_those_of_an_update(method, options, comparison):
    row = Row(method, method, method, options)
    comparison.methods[method] = row.make()
    shared = {"attack_steps": 2, "logging_steps": 1000}
    run = replace(comparison.run(row, 0, 1, 1e-3), budget=Budget(1, 4, 1e-3, tuple(shared.items())))
    trainer = make_trainer(run)
    trainer.state.global_step = 1  # not a step that is logged
    inputs = next(iter(trainer.get_train_dataloader()))
    wanted = passes_of(run.method.trainer, trainer.args)
    assert passes_through("vision", trainer, inputs) == wanted.image * len(inputs["images"])
    assert trainer.passes.total == wanted.image * len(inputs["images"])  # what the log would say
    assert passes_through("text", trainer, inputs) == wanted.text * len(comparison.prompts)


def test_the_rows_of_the_photos_are_among_the_counted(table, comparison):
    for row in read_config(RESEARCH / "photos.yaml").methods:
        if row.method:
            comparison.methods[row.key] = row.make()
            assert 3 * 4 <= comparison.cost(row) < 20 * 4


def test_a_budget_of_passes_is_updates():
    assert Passes(7).cost(64, 200, 0.5) == 7 * 64
    assert Passes(8, 4).cost(64, 200, 0.01) == 8 * 64 + 4 * 200 * 0.01
    assert updates_for(1000, 100) == 10
    with pytest.raises(ValueError, match="does not pay for one update, which costs 100"):
        updates_for(99, 100)


def test_validation_photos_are_never_trained_on_and_those_the_pretraining_held_out(table):
    encoder = load_encoder(table.benchmark.checkpoint)
    train = table.benchmark.training_images(encoder.transform)
    (validation,) = table.benchmark.measured("validation", encoder.transform).values()
    assert sorted(train.ids + validation.ids) == list(range(40))
    assert len(validation) == 8
    same = replace(table.benchmark, validation_share=HELD_OUT)
    (held,) = same.measured("validation", encoder.transform).values()
    # As the pre-training does, of several sets one after the other.
    _, wanted = hold_out([torch.arange(40), torch.arange(40, 90)], 0)
    assert held.ids == sorted(wanted[0].tolist())


def test_classes_held_out_of_a_choice_are_not_trained_on_and_measured_apart(table, tmp_path):
    names = ["one", "two", "three", "four", "five"]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    rows = {"image": [picture(i, i % 3, 32) for i in range(100)], "label": [i % 5 for i in range(100)]}
    (tmp_path / "five").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "five" / "train-00000-of-00001.parquet")
    whole = replace(table.benchmark, train=replace(table.benchmark.train, dataset="five", folder=str(tmp_path)))
    data = replace(whole, unseen=Unseen(0.4, 16))
    seen, unseen = data.unseen.split(names)
    assert (len(seen), len(unseen)) == (3, 2)
    assert sorted(seen + unseen) == sorted(names)
    assert data.identity != whole.identity

    transform = load_encoder(table.benchmark.checkpoint).transform
    train, all_photos = data.training_images(transform), whole.training_images(transform)
    assert list(train.class_names) == seen
    kept = {i for i, label in zip(all_photos.ids, all_photos.labels(), strict=True) if names[label] in seen}
    assert set(train.ids) == kept
    (validation,) = whole.measured("validation", transform).values()
    parts = data.measured("validation", transform)
    assert list(parts) == ["seen classes", "unseen classes", "unseen classes at 16 px"]
    assert [list(part.class_names) for part in parts.values()] == [seen, unseen, unseen]
    assert [part[0]["images"].shape[-1] for part in parts.values()] == [32, 32, 16]
    assert sorted(parts["seen classes"].ids + parts["unseen classes"].ids) == validation.ids
    assert parts["unseen classes"].ids == parts["unseen classes at 16 px"].ids
    assert data.measured("test", transform).keys() == whole.measured("test", transform).keys()


def test_ours_are_chosen_on_classes_held_out_and_stand_beside_others(table, tmp_path, monkeypatch):
    table = replace(table, choice=replace(table.choice, unseen=Unseen(0.34, None, ("tecoa",))))
    comparison = Comparison(table, tmp_path, 1)
    asked = []

    def perform(runs):
        asked.extend((run.method.label, run.budget.learning_rate, run.weight, run.benchmark.unseen) for run in runs)
        return {run: [Found(run.budget.learning_rate, run.weight)] for run in runs}

    class Found:
        dataset, split, num_samples, attacks, group, norm, eps, severity = (
            "T",
            "validation",
            8,
            (),
            "a",
            "linf",
            4 / 255,
            None,
        )

        def __init__(self, rate, weight):
            self.clean_accuracy, self.robust_accuracy = 0.5, 10 * rate * weight

    monkeypatch.setattr(comparison, "perform", perform)
    for name in ("_training_seconds", "_measuring_seconds"):
        monkeypatch.setattr(f"compare_transfer.{name}", lambda _: [3600.0])
    choices = comparison.choose({})
    usual, apart = table.choices
    assert list(choices) == [usual, apart] == ["4/255", "4/255, unseen classes"]
    assert list(choices[usual]["rows"]) == ["undefended", "tecoa"]
    assert list(choices[apart]["rows"]) == ["undefended", "tecoa", "half", "between"]
    assert {where for label, _, _, where in asked if label.startswith("half")} == {table.choice.unseen}
    assert [where for label, *_, where in asked if label == "TeCoA"] == [None, table.choice.unseen]
    assert (choices[usual]["ours"], choices[apart]["ours"]) == (None, "half")
    assert "unseen" not in choices[usual]["settings"]
    assert choices[apart]["settings"]["unseen"]["share"] == 0.34

    runs = comparison.runs(choices)
    assert [row.key for row in runs] == ["undefended", "tecoa", "half"]
    assert all(run.benchmark.unseen is None for each in runs.values() for run in each)
    assert comparison.settled(choices)["cpu_hours"] == 4
    choices[usual]["rows"]["half"] = choices[apart]["rows"].pop("half")  # chosen on something else
    with pytest.raises(ValueError, match="nothing was chosen for half"):
        comparison.runs(choices)


def test_a_set_is_attacked_at_its_own_resolution(table):
    encoder = load_encoder(table.benchmark.checkpoint)
    parts = table.benchmark.measured("test", encoder.transform)
    assert {name: part[0]["images"].shape[-1] for name, part in parts.items()} == {"Train": 32, "Low": 16}


def test_what_is_measured_lies_between_the_weights(table, comparison):
    run = comparison.run(table.rows[1], 0, 1, 1e-2, weight=0.25)
    harden(run)
    start, hardened = load_encoder(table.benchmark.checkpoint), load_encoder(run.tower)
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    first, last, between = (each.state_dict()[name] for each in (start, hardened, run.encoder()))
    assert not torch.equal(first, last)
    torch.testing.assert_close(between, 0.75 * first + 0.25 * last)
    assert run.folder != replace(run, weight=1.0).folder
    assert run.tower == replace(run, weight=1.0).tower


def test_a_folder_that_moved_is_the_same_data(table):
    moved = replace(table.benchmark, train=replace(table.benchmark.train, folder="elsewhere"))
    assert moved.identity == table.benchmark.identity
    for change in ({"validation_share": 0.1}, {"marks": ("a", "b")}, {"sets": table.benchmark.sets[:1]}):
        assert replace(table.benchmark, **change).identity != table.benchmark.identity


def test_rows_chosen_one_after_the_other_are_one_choice():
    def choice(rows, **more):
        entries = {key: {"score": score, "ours": True} for key, score in rows.items()}
        return {
            "settings": {"eps": [1]},
            "model_sha256": "a",
            "rows": entries,
            "ours": None,
            "towers": list(rows),
            "cpu_hours": 1.0,
            "commands": [f"--methods {key}" for key in rows],
        } | more

    both = merge_choice(choice({"a": 0.5}), choice({"b": 0.6}))
    assert set(both["rows"]) == {"a", "b"}
    assert (both["ours"], both["cpu_hours"]) == ("b", 2.0)
    assert both["commands"] == ["--methods a", "--methods b"]
    assert merge_choice(both, choice({"b": 0.6}))["commands"] == both["commands"]
    assert set(merge_choice(choice({"a": 0.5}, model_sha256="b"), choice({"b": 0.6}))["rows"]) == {"b"}


def test_data_sets_count_alike_whatever_their_size():
    one, many = torch.ones(2, 10, dtype=torch.double), torch.zeros(2, 1000, dtype=torch.double)
    assert stratified_interval([one, many]) == pytest.approx((0.5, 0.5, 0.5))
    alone = torch.randn(3, 200, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    assert stratified_interval([alone]) == paired_interval(alone)
    _, low, high = stratified_interval([alone, alone.flip(1)])
    _, low1, high1 = paired_interval(alone)
    assert high - low < high1 - low1


@pytest.mark.parametrize(
    ("mean", "low", "one_set", "lead"),
    [(0.03, 0.01, 0.0, True), (0.019, 0.01, 0.0, False), (0.03, -0.001, 0.0, False), (0.03, 0.01, -0.02, False)],
)
def test_a_lead_is_on_the_mean_over_every_rival_and_on_no_set_far_below(mean, low, one_set, lead):
    far = [{"one": "ours", "other": "far", "set": name, "difference": 0.2, "low": 0.1} for name in ("mean", "A")]
    near = [{"one": "ours", "other": "near", "set": "mean", "difference": mean, "low": low}]
    near += [{"one": "ours", "other": "near", "set": "A", "difference": one_set, "low": -1.0}]
    (found,) = leads(far + near)
    assert found["leads"] is lead
    assert found["nearest"]["other"] == "near"


def test_an_accuracy_of_nothing_has_an_interval():
    found = accuracy([torch.zeros(1, 100, dtype=torch.double)] * 2)
    assert (found["value"], found["low"], found["seeds"]) == (0, 0, [0])
    assert found["high"] == pytest.approx(1.96**2 / (200 + 1.96**2), rel=1e-3)  # Wilson's upper end at none of 200
    apart = accuracy([torch.tensor([[1.0] * 100, [0.0] * 100], dtype=torch.double)])
    assert apart["low"] < 0.01
    assert apart["seeds"] == [1, 0]


def test_margins_by_hand():
    """Two classes at right angles and a third between them; each image lies on its class."""
    texts = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    labels = torch.tensor([0, 1, 2])
    found = describe(texts @ texts.T, texts, labels, 10.0)
    # Gaps: 1, 0.4 of the first, 1, 0.2 of the second, 0.4, 0.2 of the third; required 0.1 (1 - cosine).
    assert found["clean_accuracy"] == 1
    assert found["met"] == {"distance": 1.0, "similarity": 1.0, "constant": 1.0}
    assert found["correlation"]["pearson"] == pytest.approx(-1)
    assert found["correlation"]["spearman"] == pytest.approx(-1)
    assert found["required"]["distance"]["5 %"] == pytest.approx(0.02)
    assert found["had"]["the nearest wrong class"]["50 %"] == pytest.approx(0.2)
    opens = {row["eta"]: row["class"] for row in found["gate_open"]}
    assert opens[0.9] == 0
    assert opens[0.7] == pytest.approx(2 / 6)  # the cosines of 0.8
    assert opens[0.5] == pytest.approx(4 / 6)
    assert {row["share"]: row["eta"] for row in found["eta_for_share"]}[0.2] == pytest.approx(0.8)


@pytest.mark.parametrize("file", sorted(RESEARCH.glob("photos*.yaml")), ids=lambda file: file.stem)
def test_the_published_files_are_read(file, tmp_path):
    config = read_config(file)
    assert (config.name.replace("-", "_"), config.choice.eps[0]) == (file.stem, 1 / 255)
    for name in config.tables:
        table = config.table(name, {"seeds": [3], "passes": 5000}, None, "some/clip")
        assert table.test.seeds == (3,)
        assert table.training.passes == table.choice.passes == 5000
        for row in (row for row in table.rows if row.method):
            method = row.make()
            defaults = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True}
            method.trainer.args_class(**{**defaults, **table.training.options, **method.options})
    usual = {row.key for row in config.table(None, {}, None, "some/clip").rows}
    rivals = {"control", "sim-clip", "sim-clip-anchored", "fare", "tecoa", "pmg-aft", "tima-v1", "tima", "agft"}
    assert usual - {row.key for row in config.methods if row.ours} == {"undefended", *rivals}
    assert any(row.ours for row in config.methods)
    assert all(each.terms for each in config.measured)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"measured": [{"name": "A"}]}, "measured: dataset is missing"),
        ({"titel": "x"}, "the file: unknown 'titel'; there are name,"),
        ({"methods": {"a": {"label": "A", "method": "b"}}}, "methods: a: no method 'b'; there are control,"),
        ({"methods": {"a": {"label": "A", "weights": [0.5]}}}, "weights must lie above 0, up to 1.0 among them"),
        ({"tables": {"t": {"step": 1}}}, "tables: t: unknown 'step'; a table may set methods,"),
        ({"validation_share": 1.5}, "validation_share must lie between 0 and 1, got 1.5"),
        ({"templates": "none"}, "'none' is neither a file nor one of the templates"),
        (
            {"sanity": {"samples": 0, "protocol": "apgd-ce", "steps": 1, "queries": 1}},
            "samples must be a number of at least 1",
        ),
        (
            {"cross_check": {"set": "A", "eps": "1/255", "images": 2, "methods": ["tecoa"]}},
            "cross_check: no set 'A' is measured; there are Train, Low",
        ),
        (
            {"cross_check": {"set": "Low", "eps": "1/255", "images": 2, "methods": ["fare"]}},
            "cross_check: no method 'fare'",
        ),
        (
            {"choice": CHOICE | {"unseen": {"share": 0.2, "beside": ["half"]}}},
            "choice: unseen: beside: 'half' is no method that is not ours",
        ),
        ({"choice": CHOICE | {"unseen": {"share": 2}}}, "unseen: share must lie between 0 and 1, got 2"),
        ({"choice": CHOICE | {"unseen": {"part": 0.2}}}, "choice: unseen: unknown 'part'"),
        ({"training": 3}, "training: wanted entries NAME: VALUE, got 3"),
    ],
)
def test_a_wrong_file_is_one_line(change, said, small, write):
    with pytest.raises(ValueError, match=rf"small\.yaml: .*{re.escape(said)}"):
        read_config(write(small | change))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--table", "none"], "no table 'none'; there are small, small-long"),
        (
            ["--methods", "none"],
            "no method 'none'; there are undefended, tecoa, tima, half, between, and ours for the one",
        ),
        (["--steps", "3"], "--steps is not for a comparison of --config"),
    ],
)
def test_a_wrong_line_is_told(words, said, compare, capsys):
    with pytest.raises(SystemExit):
        compare(*words)
    assert said in capsys.readouterr().err


def test_what_each_attack_leaves(tmp_path):
    class Run:
        folder = tmp_path

    class Result:
        group, samples, norm, eps, severity = "Low", "s.jsonl", "linf", 4 / 255, None
        attacks = ({"name": "apgd-ce"}, {"name": "other"})

    lines = [{"fooled_by": name} for name in ("clean", "apgd-ce", "other", None)]
    (tmp_path / "s.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert left_by([(Run, [Result])], "Low") == {"4/255": {"clean": 0.75, "apgd-ce": 0.5, "other": 0.25}}
    assert left_by([(Run, [Result])], "High") == {}


def test_the_page_is_what_its_numbers_say():
    """Of the files that are there."""
    for file in RESEARCH.glob("photos*.yaml"):
        config = read_config(file)
        page = ROOT / "docs" / f"results-{config.name}.md"
        if page.is_file():
            assert page.read_text() == make_transfer_page(ROOT / "docs", config)
