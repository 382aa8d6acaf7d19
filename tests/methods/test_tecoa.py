from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoProcessor, CLIPModel

from hf_robust_vision import LabelledImages, TeCoAArguments, TeCoATrainer
from hf_robust_vision.data.collator import collate_images
from hf_robust_vision.data.demo import CLASS_NAMES, demo_checkpoint
from hf_robust_vision.towers.load import load_encoder
from hf_robust_vision.towers.text_bank import make_text_bank


@pytest.fixture
def build(tmp_path):
    """A TeCoA trainer of the demo model on eight noise images."""

    def make(train=True, **options):
        encoder = load_encoder(demo_checkpoint())
        noise = torch.randint(0, 256, (8, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        rows = [{"image": Image.fromarray(noise[i].numpy()), "label": i} for i in range(8)]
        data = LabelledImages(rows, CLASS_NAMES, encoder.transform, name="noise", split="train") if train else None
        options = {"attack_steps": 2, "templates": "demo", "save_strategy": "no", "disable_tqdm": True} | options
        args = TeCoAArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **options)
        processor = AutoProcessor.from_pretrained(demo_checkpoint())
        return TeCoATrainer(encoder, args, train_dataset=data, processing_class=processor)

    return make


def test_loss_is_the_cross_entropy_of_the_zero_shot_classifier(build):
    trainer = build()
    inputs = collate_images(list(trainer.train_dataset))
    trainer.attack = lambda objective, batch: batch.images
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, inputs)
        bank = make_text_bank(trainer.model, trainer.processing_class.tokenizer, CLASS_NAMES, trainer.bank.templates)
        wanted = F.cross_entropy(bank.logits(trainer.model(inputs["images"]).image_embeds), inputs["labels"])
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_attacker_and_learner_look_at_the_same_number(build):
    trainer = build()
    inputs = collate_images(list(trainer.train_dataset))
    seen = {}

    def attack(objective, batch):
        seen["mean"] = objective(batch.images).mean().item()
        return batch.images

    trainer.attack = attack
    assert trainer.compute_loss(trainer.model, inputs).item() == pytest.approx(seen["mean"], rel=1e-6)


def test_text_tower_and_scale_stay_and_the_folder_is_a_stock_clip(build, tmp_path):
    trainer = build(max_steps=2, per_device_train_batch_size=4, learning_rate=1e-3)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    after = CLIPModel.from_pretrained(tmp_path / "model").state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[0] for name in moved} == {"vision_model", "visual_projection"}


def test_needs_class_names(build):
    with pytest.raises(ValueError, match="class names from train_dataset"):
        build(train=False)
