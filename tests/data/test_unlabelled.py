"""Images without labels, as hardening a VLM takes them."""

from __future__ import annotations

import datasets
import pytest
import torch
from PIL import Image

from hf_robust_vision.data.sources import ImageSource, load_labelled_images, stream_images
from hf_robust_vision.pixels import PixelTransform


TRANSFORM = PixelTransform(8, (8, 8))


def picture(value):
    return Image.new("RGB", (10, 12), (value, 0, 0))


def source(folder, **settings):
    return ImageSource(folder, label_column=None, **settings)


def test_all_images_of_a_folder_in_any_folders(tmp_path):
    for number, place in enumerate(["b.png", "a/c.jpg", "a/deep/d.webp", "train/e.png"]):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        picture(number * 40).save(tmp_path / place)
    (tmp_path / "notes.txt").write_text("no image")
    images = load_labelled_images(source(tmp_path), "validation", TRANSFORM)
    assert len(images) == 4
    assert images.labels() == [0] * 4
    assert images[1]["images"].shape == (3, 8, 8)
    assert len(load_labelled_images(source(tmp_path), "train", TRANSFORM)) == 1, "a folder of that name is the split"


def test_an_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="holds no images"):
        load_labelled_images(source(tmp_path), "train", TRANSFORM)


def rows():
    content = {"photo": [picture(value) for value in (0, 80, 160)], "label": ["a text", "is", "no label"]}
    features = datasets.Features({"photo": datasets.Image(), "label": datasets.Value("string")})
    return datasets.Dataset.from_dict(content, features=features)


def test_a_dataset_whose_labels_are_not_looked_at(tmp_path):
    rows().save_to_disk(str(tmp_path / "saved"))
    images = load_labelled_images(source(tmp_path / "saved"), "train", TRANSFORM)
    reds = torch.stack([item["images"][0].mean() for item in images])
    torch.testing.assert_close(reds, torch.tensor([0, 80, 160]) / 255, atol=1e-3, rtol=0)


def test_a_stream(tmp_path):
    rows().to_parquet(str(tmp_path / "train.parquet"))
    stream = stream_images(source(tmp_path), "train", TRANSFORM)
    assert [item["labels"] for item in stream] == [0, 0, 0]
