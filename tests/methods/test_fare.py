from __future__ import annotations

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from hf_robust_vision import FAREArguments, FARETrainer, LabelledImages
from hf_robust_vision.data.collator import collate_images
from hf_robust_vision.data.demo import CLASS_NAMES, demo_checkpoint
from hf_robust_vision.towers.load import load_encoder


@pytest.fixture
def build(tmp_path):
    """A FARE trainer of the demo model on eight noise images."""

    def make(**options):
        encoder = load_encoder(demo_checkpoint())
        noise = torch.randint(0, 256, (8, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        rows = [{"image": Image.fromarray(noise[i].numpy()), "label": i} for i in range(8)]
        data = LabelledImages(rows, CLASS_NAMES, encoder.transform, name="noise", split="train")
        args = FAREArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", attack_steps=2, **options)
        processor = AutoProcessor.from_pretrained(demo_checkpoint())
        return FARETrainer(encoder, args, train_dataset=data, processing_class=processor)

    return make


@pytest.mark.parametrize("feature", ["pooled", "patch_tokens", "both"])
def test_without_an_attack_the_original_has_loss_zero(build, feature):
    trainer = build(feature=feature)
    trainer.attack = lambda objective, batch: batch.images
    loss = trainer.compute_loss(trainer.model, collate_images(list(trainer.train_dataset)))
    assert loss.item() == pytest.approx(0, abs=1e-9)


def test_loss_is_the_squared_distance_summed_over_dimensions(build):
    """A mean over the embedding would train, at a learning rate some hundred times too small under SGD."""
    trainer = build()
    inputs = collate_images(list(trainer.train_dataset))
    adversarial = (inputs["images"] + 0.05).clamp(0, 1)
    trainer.attack = lambda objective, batch: adversarial
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, inputs)
        difference = trainer.model(adversarial).image_embeds - trainer.model(inputs["images"]).image_embeds
    assert loss.item() == pytest.approx(difference.pow(2).sum(1).mean().item(), rel=1e-5)


def test_attack_raises_the_loss_and_labels_do_not_matter(build):
    trainer = build()
    inputs = collate_images(list(trainer.train_dataset))
    loss = trainer.compute_loss(trainer.model, inputs)
    shuffled = trainer.compute_loss(trainer.model, inputs | {"labels": inputs["labels"].roll(1)})
    assert loss.item() > 1
    assert shuffled.item() == loss.item()


def test_only_what_the_loss_reads_trains(build):
    trainer = build(feature="pooled")
    trainable = {name.split(".")[0] for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert trainable == {"vision_model", "visual_projection"}
