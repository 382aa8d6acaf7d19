"""Saved adversarial images: lossless, complete after a kill, and they give the reported numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hf_robust_vision.attacks import get_protocol
from hf_robust_vision.data.datasets import LabelledImages
from hf_robust_vision.evaluation.images import AdversarialImages
from hf_robust_vision.evaluation.results import load_samples
from hf_robust_vision.evaluation.samples import SampleStore
from hf_robust_vision.evaluation.task import RobustnessProtocol
from hf_robust_vision.evaluation.tasks.zero_shot import evaluate_zero_shot, remeasure
from hf_robust_vision.pixels import PixelTransform


EPS = (0.0, 0.25 / 255, 1 / 255)
HOW = RobustnessProtocol(get_protocol("apgd-ce", steps=5), EPS, batch_size=7)


@pytest.fixture
def measure(encoder, bank, labelled_by_model, tmp_path):
    def run(dataset=labelled_by_model, how=HOW, **settings):
        settings = {"model_name": "before", "progress": False, "samples_dir": tmp_path} | settings
        return evaluate_zero_shot(encoder, bank, dataset, how, **settings)

    return run


def test_a_file_gives_back_what_was_written(tmp_path):
    images = AdversarialImages(tmp_path / "new")
    clean, small, large = torch.rand(3, 3, 4, 4).unbind()
    images.write(7, clean, {1 / 255: small, 2 / 255: large})
    images.write("fog/8 ~", clean, {})
    assert images.ids() == [7, "fog/8 ~"]
    assert torch.equal(images.read("fog/8 ~", 1.0)[1], clean)
    assert 7 in images
    assert 8 not in images
    for eps, wanted in ((0.0, clean), (1 / 255, small), (1.5 / 255, small), (2 / 255, large), (1.0, large)):
        got = images.read(7, eps)
        assert torch.equal(got[0], clean)
        assert torch.equal(got[1], wanted)
    with pytest.raises(FileNotFoundError, match="sample 8"):
        images.read(8, 0.0)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("batch_size", [1, 24])
def test_measured_again_from_disk_they_give_the_reported_numbers(
    measure, encoder, bank, labelled_by_model, tmp_path, norm, batch_size
):
    how = HOW if norm == "linf" else replace(HOW, norm="l2", eps=(0.0, 0.01, 0.05))
    results = measure(how=how, save_images=labelled_by_model.ids)
    assert 0 < results[-1].robust_accuracy < results[-1].clean_accuracy
    for result in results:
        again = remeasure(encoder, bank, result, tmp_path, batch_size=batch_size)
        assert again.num_samples == result.num_samples == 24
        assert (again.clean_accuracy, again.robust_accuracy) == (result.clean_accuracy, result.robust_accuracy)
        assert again.reported == result.robust_accuracy
        assert (again.changed, again.outside) == ([], [])
        assert again.farthest == pytest.approx(result.eps, rel=1e-3, abs=1e-7)


def test_images_are_the_floats_of_the_attack(measure, labelled_by_model, tmp_path):
    """Eight bits can not hold a perturbation of a quarter step."""
    (result,) = measure(how=replace(HOW, eps=(0.25 / 255,)), save_images=labelled_by_model.ids)
    images = AdversarialImages(tmp_path / result.images)
    attacked = [record.id for record in load_samples(tmp_path / result.samples) if record.clean_hit]
    clean, adversarial = images.read(attacked[0], result.eps)
    assert torch.equal(clean, labelled_by_model[labelled_by_model.ids.index(attacked[0])]["images"])
    assert 0 < (adversarial - clean).abs().max() <= 0.25 / 255 + 1e-7
    assert torch.equal((adversarial * 255).round(), (clean * 255).round())


def test_a_tampered_image_is_found(measure, encoder, bank, labelled_by_model, tmp_path):
    results = measure(save_images=labelled_by_model.ids)
    images = AdversarialImages(tmp_path / results[-1].images)
    records = load_samples(tmp_path / results[-1].samples)
    fallen = next(record.id for record in records if record.clean_hit and not record.robust_hit)
    standing = next(record.id for record in records if record.robust_hit)
    clean, _ = images.read(fallen, 1.0)
    images.write(fallen, clean, {EPS[-1]: clean})
    clean, _ = images.read(standing, 1.0)
    images.write(standing, clean, {EPS[-1]: (clean + 0.01).clamp(0, 1)})
    again = remeasure(encoder, bank, results[-1], tmp_path)
    assert fallen in again.changed
    assert again.outside == [standing]
    assert again.farthest == pytest.approx(0.01, abs=1e-6)
    images.write(standing, clean, {EPS[-1]: clean + 1})  # no image at all: it is counted, too
    assert remeasure(encoder, bank, results[-1], tmp_path).outside == [standing]


def test_some_samples_only(measure, encoder, bank, labelled_by_model, tmp_path):
    some = labelled_by_model.ids[1:4]
    result = measure(save_images=some)[-1]
    again = remeasure(encoder, bank, result, tmp_path)
    assert AdversarialImages(tmp_path / result.images).ids() == some
    assert again.num_samples == 3
    assert again.robust_accuracy == again.reported


def flags(path):
    return [(record.id, record.clean, record.adversarial, record.fooled_by) for record in load_samples(path)]


class Killed(BaseException):
    pass


def test_a_killed_run_saves_every_image(measure, encoder, bank, labelled_by_model, monkeypatch, tmp_path):
    """Killed between an image and its record: the sample is measured again, and every record has its image."""
    add, done = SampleStore.add, []

    def add_or_die(self, *progress):
        if len(done) == 8:
            raise Killed
        done.append(1)
        add(self, *progress)

    with monkeypatch.context() as patch:
        patch.setattr(SampleStore, "add", add_or_die)
        with pytest.raises(Killed):
            measure(save_images=labelled_by_model.ids)
    results = measure(save_images=labelled_by_model.ids)
    for result in results:
        assert remeasure(encoder, bank, result, tmp_path).changed == []
    assert not [path for path in (tmp_path / results[0].images).iterdir() if path.suffix != ".safetensors"]


def test_what_was_measured_without_images_is_measured_again_with_them(measure, labelled_by_model, tmp_path):
    before = measure()
    records = [flags(tmp_path / result.samples) for result in before]
    some = labelled_by_model.ids[:5]
    after = measure(save_images=some)
    assert AdversarialImages(tmp_path / after[0].images).ids() == some
    assert [flags(tmp_path / result.samples) for result in after] == records
    assert before[0].images is None
    assert measure()[0].images == after[0].images  # still there


def test_images_need_a_folder(measure):
    with pytest.raises(ValueError, match="samples_dir"):
        measure(save_images=[0], samples_dir=None)


def test_other_weights_or_prompts_are_refused(measure, encoder, bank, labelled_by_model, tmp_path):
    without, result = measure()[0], measure(save_images=labelled_by_model.ids)[0]
    with pytest.raises(ValueError, match="--save_adversarial"):
        remeasure(encoder, bank, without, tmp_path)
    with pytest.raises(ValueError, match="templates"):
        remeasure(encoder, replace(bank, templates=("a {}",)), result, tmp_path)
    with pytest.raises(ValueError, match="'vqa'"):
        remeasure(encoder, bank, replace(result, task="vqa"), tmp_path)
    with torch.no_grad():
        encoder.visual_projection.weight[0, 0] += 0.1
    with pytest.raises(ValueError, match="weights"):
        remeasure(encoder, bank, result, tmp_path)


def test_native_resolution(measure, labelled_by_model, encoder, bank, tmp_path):
    """Images of 16 pixels are attacked as such; the resize to the tower's 32 lies inside the attacked function."""
    small = PixelTransform(16, (16, 16))
    dataset = LabelledImages(labelled_by_model.rows, labelled_by_model.class_names, small, name="tiny", split="test")
    result = measure(dataset, save_images=dataset.ids)[-1]
    assert result.attacks[0]["resolution"] == 16
    clean, adversarial = AdversarialImages(tmp_path / result.images).read(dataset.ids[0], 1.0)
    assert clean.shape == adversarial.shape == (3, 16, 16)
    with torch.no_grad():
        by_hand = encoder(encoder.transform.fit(torch.stack([item["images"] for item in dataset]))).image_embeds
    hits = bank.logits(by_hand).argmax(1) == torch.tensor(dataset.labels())
    assert result.clean_accuracy == hits.double().mean().item()
    assert result.robust_accuracy < result.clean_accuracy
    assert remeasure(encoder, bank, result, tmp_path).changed == []
