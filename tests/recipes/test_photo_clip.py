"""The pre-training on photos, on a few random images in the layout of the real sets."""

from __future__ import annotations

import sys

import datasets
import numpy as np
import pretrain_photo_clip as recipe
import pytest
import torch
from small_clip import build_tokenizer, contrastive_loss
from transformers import CLIPModel, CLIPProcessor

from hf_robust_vision.data.datasets import LabelledImages
from hf_robust_vision.towers.load import load_encoder
from tests.conftest import picture


NAMES = {
    "tiny-imagenet": ["Egyptian cat", "potter's wheel", "pizza"],
    "cifar10": ["cat", "pay-phone", "dog"],
    "caltech101": ["pizza", "Dog", "barrel"],
}


@pytest.fixture
def data(tmp_path):
    """Folders of Parquet files with 10 photos for training and 6 to test, of 32, 64 and 96 pixels."""
    for size, (name, classes) in zip((64, 32, 96), NAMES.items()):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=classes)})
        for split, count in (("train", 10), ("test", 6)):
            labels = [index % 3 for index in range(count)]
            rows = {"image": [picture(i, label, size) for i, label in enumerate(labels)], "label": labels}
            file = tmp_path / "photos" / name / f"{split}-00000-of-00001.parquet"
            file.parent.mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_dict(rows, features=features).to_parquet(file)
    return tmp_path / "photos"


@pytest.fixture
def run(data, monkeypatch):
    """Run the recipe into a folder."""

    def run(folder, *words):
        small = ["--data", data, "--output_dir", folder, "--max_steps", 5, "--batch_size", 8, "--width", 16]
        small += ["--checkpoint_minutes", 0, *words]
        monkeypatch.setattr(sys, "argv", ["pretrain_photo_clip.py", *map(str, small)])
        recipe.main()
        return folder / "model"

    return run


def interrupt(monkeypatch, step):
    """Have the update of one step fail as a kill would, once."""
    update = recipe.Pretraining.update

    def interrupted(self):
        if self.step == step:
            monkeypatch.setattr(recipe.Pretraining, "update", update)
            raise KeyboardInterrupt
        return update(self)

    monkeypatch.setattr(recipe.Pretraining, "update", interrupted)


def test_a_killed_run_goes_on_to_the_same_weights_as_an_unbroken_one(run, tmp_path, monkeypatch, capsys):
    unbroken = run(tmp_path / "unbroken")
    interrupt(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed")
    (tmp_path / "killed" / "state.partial").write_bytes(b"half a checkpoint")
    capsys.readouterr()
    killed = run(tmp_path / "killed")
    assert "from step 3 of 5" in capsys.readouterr().out
    assert (killed / "model.safetensors").read_bytes() == (unbroken / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"state\.pt is of a run with .*'seed': 0.*choose another --output_dir"):
        run(tmp_path / "killed", "--seed", 1)


def test_the_stock_folder_is_in_half_precision_and_knows_all_names(run, tmp_path, capsys):
    folder = run(tmp_path / "run", "--epochs", 2, "--max_steps", -1)
    model = CLIPModel.from_pretrained(folder, dtype="auto")
    assert model.dtype == torch.float16
    tokenizer = CLIPProcessor.from_pretrained(folder).tokenizer
    read = {tuple(tokenizer(name)["input_ids"]) for names in NAMES.values() for name in names}
    assert len(read) == 7  # of nine: "pizza" and "dog" stand in two sets
    assert not any(tokenizer.unk_token_id in ids for ids in read)
    assert load_encoder(folder).transform.crop == (64, 64)
    out = capsys.readouterr().out
    assert "45 photos an epoch" in out  # 9 of each set are left to train on, and caltech101's count 3 times
    assert "step 10/10" in out
    assert "test tiny-imagenet 0." in out


def test_names_that_are_read_alike_are_one_class_across_sets_and_an_error_within_one():
    tokenizer = build_tokenizer(recipe.PROMPTS, ["Dog", "cat"])
    row = [{"image": picture(0, 0), "label": 0}]
    one, two, twice = (
        LabelledImages(row, names, recipe.TRANSFORM, name="pets", split="train")
        for names in (["cat", "dog"], ["Dog", "cat"], ["dog", "Dog"])
    )
    names, classes = recipe.merge_classes(tokenizer, [one, two])
    assert names == ["cat", "dog"]
    assert [merged.tolist() for merged in classes] == [[0, 1], [1, 0]]
    with pytest.raises(ValueError, match="two class names of pets are the same"):
        recipe.merge_classes(tokenizer, [twice])
    unknown = LabelledImages(row, ["cat", "emu"], recipe.TRANSFORM, name="pets", split="train")
    with pytest.raises(ValueError, match="can not hold the class name 'emu' of pets"):
        recipe.merge_classes(tokenizer, [unknown])


def test_validation_photos_are_seeded_and_never_trained_on():
    rows = [torch.arange(100), torch.arange(100, 120)]
    train, validation = recipe.hold_out(rows, seed=0)
    assert [len(part) for part in validation] == [3, 1]
    for part, one, other in zip(rows, train, validation):
        assert torch.equal(torch.cat([one, other]).sort().values, part)
    assert torch.equal(recipe.hold_out(rows, seed=0)[1][0], validation[0])
    assert not torch.equal(recipe.hold_out(rows, seed=1)[1][0], validation[0])


def test_augmented_photos_differ_stay_images_and_hang_on_seed_and_step_alone():
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).expand(16, -1, -1, -1)
    first, again, other = (
        recipe.augment_photos(images, recipe.generator_of(0, "augment", step)) for step in (0, 0, 1)
    )
    assert first.shape == images.shape
    assert first.min() >= 0
    assert first.max() <= 1
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert (first[1:] - first[:-1]).abs().mean((1, 2, 3)).min() > 0.01
    left = torch.zeros(200, 3, 64, 64)
    left[..., :32] = 1
    turned = recipe.augment_photos(left, recipe.generator_of(0, "augment", 0))
    brighter_left = (turned[..., :4].mean((1, 2, 3)) > turned[..., -4:].mean((1, 2, 3))).float().mean()
    assert 0.35 < brighter_left < 0.65  # half of them are mirrored


def test_a_caption_without_an_image_is_a_negative_only():
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 1.0], [1.0, 0.0, 1.0]])
    loss = contrastive_loss(logits, torch.tensor([0, 1, 0]), torch.tensor([0, 1, 2]))
    to_text = -np.log([np.exp(row[k]) / np.exp(row).sum() for row, k in zip(logits.numpy(), (0, 1, 0))]).mean()
    columns = logits.T.log_softmax(1)
    to_image = -(columns[0, [0, 2]].mean() + columns[1, 1]) / 2
    assert loss.item() == pytest.approx((to_text + to_image.item()) / 2)
