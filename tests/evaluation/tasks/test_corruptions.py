"""Corruptions: the library's own functions, seeded per sample, and the accuracies that come of them."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version

import numpy as np
import pytest
import torch

from hf_robust_vision.data.corruptions import EXTRA_FAMILIES, FAMILIES, corrupt
from hf_robust_vision.evaluation.results import RobustnessResult
from hf_robust_vision.evaluation.samples import SampleStore
from hf_robust_vision.evaluation.tasks import corruptions
from hf_robust_vision.evaluation.tasks.corruptions import evaluate_corruptions
from tests.conftest import SIZE


RANDOM = {
    "gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "glass_blur", "motion_blur", "snow", "frost",
    "fog", "elastic_transform", "spatter",
}  # fmt: skip
TWO = ("gaussian_noise", "contrast")


@pytest.fixture(scope="module")
def library():
    """The extra `corruptions`; where it is not installed, what needs it is skipped."""
    return pytest.importorskip("imagecorruptions")


@pytest.fixture
def image():
    """Smooth, so that a blur does something else than noise."""
    coarse = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.interpolate(coarse, (SIZE, SIZE), mode="bilinear")[0]


@pytest.fixture
def measure(library, encoder, bank, labelled_by_model):
    def run(**settings):
        settings = {"model_name": "before", "families": TWO, "severities": (1, 5), "progress": False} | settings
        return evaluate_corruptions(encoder, bank, settings.pop("dataset", labelled_by_model), **settings)

    return run


def lines(folder, result):
    return [json.loads(line) for line in (folder / result.samples).read_text().splitlines()]


@pytest.mark.parametrize("family", [*FAMILIES, *EXTRA_FAMILIES])
def test_every_family_at_every_severity(library, image, family):
    """On the real functions: an image comes back, it belongs to its sample, and no global random state moves."""
    state, torch_state = np.random.get_state(), torch.get_rng_state()
    for severity in range(1, 6):
        found = corrupt(image, family, severity, seed=3, sample=7)
        assert found.shape == image.shape
        assert found.dtype == image.dtype
        assert found.min() >= 0
        assert found.max() <= 1
        assert (found - image).abs().mean() > 1 / 255
        np.random.seed(severity)
        assert torch.equal(corrupt(image, family, severity, seed=3, sample=7), found)
        np.random.set_state(state)
        others = [corrupt(image, family, severity, seed=seed, sample=sample) for seed, sample in ((3, 8), (4, 7))]
        assert all(torch.equal(other, found) != (family in RANDOM) for other in others)
        assert all(np.array_equal(now, then) for now, then in zip(np.random.get_state(), state))
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_the_strengths_are_those_of_the_benchmark(library, image):
    """Contrast and noise, worked out by hand from the benchmark's published constants."""
    flat = torch.full((3, 64, 64), 0.5)
    mean = image.mean((1, 2), keepdim=True)
    for severity, (share, spread) in enumerate(
        zip((0.4, 0.3, 0.2, 0.1, 0.05), (0.08, 0.12, 0.18, 0.26, 0.38)), start=1
    ):
        wanted = (image - mean) * share + mean
        assert (corrupt(image, "contrast", severity) - wanted).abs().max() <= 2 / 255  # 8 bits in, 8 bits out
        normal = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(0))
        clipped = (flat + spread * normal).clamp(0, 1)
        assert float(corrupt(flat, "gaussian_noise", severity).std()) == pytest.approx(float(clipped.std()), rel=0.03)


def test_accuracies_are_sums_over_the_samples_files(measure, encoder, bank, labelled_by_model, tmp_path):
    results = measure(samples_dir=tmp_path)
    assert [(r.task, r.norm, r.eps, r.severity, r.protocol) for r in results] == [
        ("corruption", "none", 0.0, severity, "imagenet-c") for severity in (1, 5)
    ]
    for result in results:
        rows = lines(tmp_path, result)
        assert [row["id"] for row in rows] == [f"{family}/{sample}" for family in TWO for sample in range(24)]
        assert result.num_samples == 24
        right = [row["adversarial"] == row["label"] for row in rows]
        assert [row["fooled_by"] is None for row in rows] == right
        assert all((row["score"] <= 0) == hit for row, hit in zip(rows, right))
        assert result.robust_accuracy == pytest.approx(sum(right) / 48)
        assert [attack["accuracy"] for attack in result.attacks] == [sum(right[:24]) / 24, sum(right[24:]) / 24]
        assert result.clean_accuracy == sum(row["clean"] == row["label"] for row in rows[:24]) / 24
        low, high = result.ci95["robust_accuracy"]
        assert low < result.robust_accuracy < high
        # By hand, through the model as a user would call it.
        for row in rows[20:28]:
            family, sample = row["id"].split("/")
            item = labelled_by_model[int(sample)]
            found = corrupt(item["images"], family, result.severity, sample=int(sample))
            with torch.no_grad():
                answer = int(bank.logits(encoder(found[None]).image_embeds).argmax())
            assert (row["label"], row["adversarial"]) == (item["labels"], answer)
    assert results[1].robust_accuracy < results[0].robust_accuracy


def test_result_says_what_was_measured_and_what_was_not(measure):
    result = measure()[0]
    assert result.left_out == [name for name in (*FAMILIES, *EXTRA_FAMILIES) if name not in TWO]
    assert [(row["name"], row["severity"], row["resolution"]) for row in result.attacks] == [
        (name, 1, SIZE) for name in TWO
    ]
    assert result.versions["imagecorruptions-imaug"] == version("imagecorruptions-imaug")
    plain = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert RobustnessResult.from_dict(plain) == result


def test_by_default_what_the_library_lacks_is_left_out(library, measure, monkeypatch):
    short = {name: library.corruption_dict[name] for name in ("contrast", "fog", "saturate")}
    monkeypatch.setattr(library, "corruption_dict", short)
    result = measure(families=None, severities=(2,))[0]
    assert [row["name"] for row in result.attacks] == ["fog", "contrast"]
    assert set(result.left_out) == {*FAMILIES, *EXTRA_FAMILIES} - {"fog", "contrast"}
    with pytest.raises(ValueError, match=r"\['snow'\].*fog, contrast"):
        measure(families=["snow"])


def test_answers_do_not_depend_on_the_batch(measure, tmp_path):
    whole = measure(samples_dir=tmp_path / "a", batch_size=64)
    parts = measure(samples_dir=tmp_path / "b", batch_size=7)
    for one, other in zip(whole, parts):
        flags = [[(row["id"], row["clean"], row["adversarial"]) for row in lines(tmp_path / place, result)]
                 for place, result in (("a", one), ("b", other))]  # fmt: skip
        assert flags[0] == flags[1]


class Killed(BaseException):
    pass


def test_resumed_equals_unbroken(measure, monkeypatch, tmp_path):
    unbroken = measure(samples_dir=tmp_path / "a", batch_size=10)
    add, done, seen, real = SampleStore.add, [], [], corruptions.corrupt
    monkeypatch.setattr(corruptions, "corrupt", lambda *a, **k: seen.append(1) or real(*a, **k))

    def add_or_die(self, *progress):
        if len(done) == 6:
            raise Killed
        done.append(len(seen))
        add(self, *progress)

    with monkeypatch.context() as patch:
        patch.setattr(SampleStore, "add", add_or_die)
        with pytest.raises(Killed):
            measure(samples_dir=tmp_path / "b", batch_size=10)
    del seen[done[-1] :]  # those that died before they were written down
    resumed = measure(samples_dir=tmp_path / "b", batch_size=10)
    assert len(seen) == 2 * 48  # what was done is not done again
    assert [lines(tmp_path / "b", r) for r in resumed] == [lines(tmp_path / "a", r) for r in unbroken]


def test_without_the_library_the_error_is_the_line_to_type(encoder, bank, labelled_by_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "hf-robust-vision\[corruptions\]"'):
        evaluate_corruptions(encoder, bank, labelled_by_model, model_name="x", progress=False)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"families": ["rain"]}, "unknown corruption in .'rain'.; choose out of gaussian_noise"),
        ({"families": []}, "unknown corruption"),
        ({"severities": (0, 1)}, r"from 1 to 5, got \[0, 1\]"),
        ({"severities": ()}, "from 1 to 5"),
    ],
)
def test_bad_choice_is_refused_at_once(measure, settings, said):
    with pytest.raises(ValueError, match=said):
        measure(**settings)


def test_small_images_are_refused(library):
    with pytest.raises(ValueError, match=r"at least 32 pixels a side, got \(3, 31, 40\)|got \(31, 40\)"):
        corrupt(torch.rand(3, 31, 40), "fog", 1)
