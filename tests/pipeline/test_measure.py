"""`hf-robust-vision evaluate`, `report` and `remeasure` on folders of this machine."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

from hf_robust_vision.attacks import get_protocol
from hf_robust_vision.cli import main
from hf_robust_vision.data.templates import get_templates
from hf_robust_vision.evaluation.images import AdversarialImages
from hf_robust_vision.evaluation.results import add_results, load_results, load_samples
from hf_robust_vision.evaluation.samples import SampleStore
from hf_robust_vision.evaluation.task import RobustnessProtocol
from hf_robust_vision.evaluation.tasks import corruptions
from hf_robust_vision.evaluation.tasks.zero_shot import ZeroShot
from hf_robust_vision.pipeline.measure import EvaluationSet, measure_model
from hf_robust_vision.pixels import PixelTransform
from hf_robust_vision.sanity import rivals
from tests.conftest import NAMES


HOW = RobustnessProtocol(get_protocol("quick", steps=2), (1 / 255,), batch_size=4)


@pytest.fixture
def evaluate(clip_folder, image_folder, tmp_path):
    def run(*words, model=clip_folder):
        settings = ["--dataset", str(image_folder), "--steps", "2", "--batch_size", "4"]
        return main(["evaluate", str(model), *settings, "--output_dir", str(tmp_path / "out"), *words])

    return run


def test_evaluate_report_and_remeasure(evaluate, clip_folder, tmp_path, capsys):
    assert evaluate("--eps", "1/255", "0.5/255", "--save_examples", "2") == 0
    results = load_results(tmp_path / "out")
    assert [result.eps for result in results] == [0.5 / 255, 1 / 255]
    assert {(r.model, r.dataset, r.split, r.num_samples) for r in results} == {("tiny-clip", "tiny-images", "test", 6)}
    assert results[0].class_names == sorted(NAMES)
    said = capsys.readouterr().out
    assert "1. apgd-ce: APGD on cross-entropy, 2 steps, 5 restarts\n  linf, eps 0.5/255, 1/255\n" in said
    assert "left out, not defined for so few classes: apgd-dlr-targeted" in said
    assert "\n  linf, eps 0.5/255, 1/255\n" in said
    assert f"\nlinf 0.5/255  {100 * results[0].clean_accuracy:.1f} % (" in said
    ids = AdversarialImages(tmp_path / "out" / results[0].images).ids()
    assert len(ids) == 2
    assert ids[1] - ids[0] == 3  # spread over the classes, which a folder holds one after the other
    assert {path.name for path in (tmp_path / "out").glob("report.*")} == {"report.html", "report.md"}

    assert main(["report", f"mine={tmp_path / 'out'}", "--output_dir", str(tmp_path / "r"), "--title", "Mine"]) == 0
    assert "# Mine" in (tmp_path / "r" / "report.md").read_text()
    assert "| mine | " in (tmp_path / "r" / "report.md").read_text()
    capsys.readouterr()
    assert main(["remeasure", str(clip_folder), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.count("of 2 saved") == 2
    # A result of another task in the same folder is for another function.
    add_results([replace(results[0], task="retrieval", metric="image_to_text_recall@1")], tmp_path / "out")
    assert main(["remeasure", str(clip_folder), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.count("of 2 saved") == 2
    # An image that was changed on disk no longer gives the reported number, and the exit status says so.
    images = AdversarialImages(tmp_path / "out" / results[0].images)
    clean, _ = images.read(ids[0], 1.0)
    images.write(ids[0], clean, {results[0].eps: 1 - clean})
    assert main(["remeasure", str(clip_folder), str(tmp_path / "out" / "robustness.json")]) == 1
    assert f"outside the ball: [{ids[0]}]" in capsys.readouterr().out


def test_queries_are_those_of_the_command_line(evaluate, tmp_path):
    assert evaluate("--eps", "4/255", "--protocol", "autoattack", "--steps", "1", "--queries", "3") == 0
    (result,) = load_results(tmp_path / "out")
    assert {attack["name"]: attack["steps"] for attack in result.attacks}["square"] == 3


def test_sanity_and_corruptions_from_the_command_line(evaluate, tmp_path, capsys, monkeypatch):
    pytest.importorskip("imagecorruptions")
    monkeypatch.setattr(corruptions, "FAMILIES", ("contrast", "pixelate"))
    monkeypatch.setattr(rivals, "square", lambda objective, images, *_, **__: images)  # a thousand queries otherwise
    assert evaluate("--eps", "1/255", "0.5/255", "--sanity", "--corruptions") == 0
    assert "sanity checks, tiny-clip on tiny-images: " in capsys.readouterr().out
    results = load_results(tmp_path / "out")
    attacked = [result for result in results if result.task == "zero_shot"]
    assert [len(result.sanity["checks"]) for result in attacked] == [11, 11]
    damaged = [result for result in results if result.task == "corruption"]
    assert [(result.severity, result.eps) for result in damaged] == [(severity, 0) for severity in range(1, 6)]
    assert all(result.sanity is None for result in damaged)
    page = (tmp_path / "out" / "report.md").read_text()
    assert "tiny-clip, same answer twice: **passed**" in page
    assert "mean corruption accuracy" in page
    assert "they were not asked for: gaussian_blur, saturate" in page


def test_a_surrogate_from_the_command_line(evaluate, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rivals, "square", lambda objective, images, *_, **__: images)
    assert evaluate("--eps", "1/255", "--surrogate", "demo-clip") == 1
    assert "--sanity" in capsys.readouterr().err
    verdicts = []
    for words in ([], ["--surrogate", "demo-clip"]):
        assert evaluate("--eps", "1/255", "--sanity", *words) == 0
        assert capsys.readouterr().out.count("sanity checks, ") == 1  # the surrogate itself is not checked
        (result,) = load_results(tmp_path / "out")
        verdicts.append(result.sanity["checks"][-1]["verdict"])
    assert verdicts[0] == "not run"
    assert verdicts[1] != "not run"


def test_results_of_other_models_stay(evaluate, clip_folder, tmp_path):
    evaluate("--eps", "1/255")
    evaluate("--eps", "2/255", "--name", "other")
    evaluate("--eps", "1/255", "--seed", "1")  # takes the first one's place
    found = [
        (result.model, round(255 * result.eps), result.attacks[0]["seed"]) for result in load_results(tmp_path / "out")
    ]
    assert sorted(found) == [("other", 2, 0), ("tiny-clip", 1, 1)]


class Killed(BaseException):
    pass


def test_a_killed_evaluation_goes_on(evaluate, tmp_path, monkeypatch):
    add, met, strike = SampleStore.add, [], ZeroShot.strike
    monkeypatch.setattr(ZeroShot, "strike", lambda t, s, batch, n: met.extend(batch.places) or strike(t, s, batch, n))

    def add_or_die(self, progress, seconds):
        add(self, progress, seconds)
        if any(state.done for state in progress.values()):
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(SampleStore, "add", add_or_die)
        with pytest.raises(Killed):
            evaluate("--eps", "1/255")
    evaluate("--eps", "1/255")
    assert len(met) == len(set(met))  # what was attacked is not attacked again
    (result,) = load_results(tmp_path / "out")
    evaluate("--eps", "1/255", "--output_dir", str(tmp_path / "unbroken"))
    (unbroken,) = load_results(tmp_path / "unbroken")
    records = [load_samples(tmp_path / place / r.samples) for place, r in (("out", result), ("unbroken", unbroken))]
    assert records[0] == records[1]


def test_files_of_the_dataset(clip_folder, image_folder, tmp_path):
    """Class names and templates may lie with the data, as CLIP_benchmark keeps them."""
    folder = tmp_path / "data"
    shutil.copytree(image_folder, folder)
    (folder / "classnames.txt").write_text("the blue\nthe green\nthe red\n")
    (folder / "prompts.txt").write_text("a photo of {c}.\na {c}\n")
    data = EvaluationSet(
        str(folder), name="mine", class_names="classnames.txt", templates="prompts.txt", max_samples=4
    )
    (result,) = measure_model(str(clip_folder), [data], HOW, tmp_path / "out")
    assert result.class_names == ["the blue", "the green", "the red"]
    assert result.templates == ["a photo of {}.", "a {}"]
    assert (result.dataset, result.num_samples) == ("mine", 4)
    assert get_templates(str(folder / "prompts.txt")) == ("a photo of {}.", "a {}")


def test_resolution_of_the_attack(clip_folder, image_folder, tmp_path):
    data = EvaluationSet(str(image_folder), resolution=16)
    (result,) = measure_model(str(clip_folder), [data], HOW, tmp_path, save_adversarial=True)
    assert result.attacks[0]["resolution"] == 16
    images = AdversarialImages(tmp_path / result.images)
    assert len(images.ids()) == 6
    assert images.read(0, 1.0)[1].shape == (3, 16, 16)


def test_corrupt_images(clip_folder, image_folder, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(image_folder, folder)
    next((folder / "test" / "red").iterdir()).write_bytes(b"no image")
    with pytest.raises(ValueError, match="--skip_corrupt"):
        measure_model(str(clip_folder), [EvaluationSet(str(folder))], HOW, tmp_path / "a")
    with pytest.warns(UserWarning, match="skipped 1 corrupt"):
        (result,) = measure_model(
            str(clip_folder), [EvaluationSet(str(folder), skip_corrupt=True)], HOW, tmp_path / "b"
        )
    assert result.num_samples == 5


@pytest.mark.parametrize(
    "given",
    [
        {"class_names": "names.txt"},
        {"config": "plain"},
        {"revision": "main"},
        {"image_column": "img"},
        {"label_column": "x"},
    ],
)
def test_settings_that_the_demo_would_not_heed(given):
    """findings-reliability 8: --class_names had no effect without a data set."""
    (name,) = given
    with pytest.raises(ValueError, match=f"{name}: settings of a dataset, but none is named"):
        EvaluationSet(**given).load(PixelTransform(64, (64, 64)))


@pytest.mark.parametrize("count", [0, -1, 2.5])
def test_a_subset_of_nothing(count):
    """findings-reliability 8: -1 took all but one image, 0 left a NaN on disk."""
    with pytest.raises(ValueError, match=f"max_samples must be a whole number of at least 1, got {count}"):
        EvaluationSet(max_samples=count)


def test_everything_is_opened_before_anything_is_measured(clip_folder, image_folder, tmp_path):
    sets = [EvaluationSet(str(image_folder)), EvaluationSet(str(image_folder), split="nope")]
    with pytest.raises(ValueError, match="nope"):
        measure_model(str(clip_folder), sets, HOW, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--protocol", "nope"], "unknown protocol"),
        (["--eps", "4"], "4/255"),
        (["--eps", "four"], "fraction"),
        (["--dataset", "no/such"], "neither a folder nor"),
        (["--class_names", "nope.txt"], "nope.txt"),
        (["--templates", "nope"], "nope"),
    ],
)
def test_bad_input_is_one_line(evaluate, tmp_path, capsys, words, said):
    assert evaluate(*words) == 1
    error = capsys.readouterr().err
    assert said in error.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_no_such_model(evaluate, tmp_path, capsys):
    assert evaluate(model=tmp_path / "nothing") == 1
    assert "no such folder: " in capsys.readouterr().err
    assert main(["report", str(tmp_path / "nothing")]) == 1
    assert main(["remeasure", "demo-clip", str(tmp_path)]) == 1
