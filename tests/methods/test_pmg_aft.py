from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoProcessor

from hf_robust_vision import LabelledImages, PMGAFTArguments, PMGAFTTrainer
from hf_robust_vision.data.collator import collate_images
from hf_robust_vision.data.demo import CLASS_NAMES, demo_checkpoint
from hf_robust_vision.methods.pmg_aft import pmg_aft_loss
from hf_robust_vision.towers.load import load_encoder


@pytest.fixture
def build(tmp_path):
    """A PMG-AFT trainer of the demo model on eight noise images."""

    def make(**options):
        encoder = load_encoder(demo_checkpoint())
        noise = torch.randint(0, 256, (8, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        rows = [{"image": Image.fromarray(noise[i].numpy()), "label": i} for i in range(8)]
        data = LabelledImages(rows, CLASS_NAMES, encoder.transform, name="noise", split="train")
        args = PMGAFTArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", attack_steps=2, **options)
        processor = AutoProcessor.from_pretrained(demo_checkpoint())
        return PMGAFTTrainer(encoder, args, train_dataset=data, processing_class=processor)

    return make


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 5, generator=generator, dtype=torch.float64) for _ in range(3)]


LABELS = torch.tensor([0, 4, 2, 1])


def kl(first, second):
    """KL(first || second) of each row, written out."""
    p, q = first.softmax(1), second.softmax(1)
    return (p * (p.log() - q.log())).sum(1)


def test_textbook_is_the_formula(logits):
    clean, adversarial, teacher = logits
    wanted = F.cross_entropy(adversarial, LABELS) + kl(teacher, adversarial).mean() + kl(clean, adversarial).mean()
    torch.testing.assert_close(pmg_aft_loss(clean, adversarial, teacher, LABELS), wanted)


def test_code_sums_the_divergences_over_the_batch(logits):
    clean, adversarial, teacher = logits
    wanted = F.cross_entropy(adversarial, LABELS) + kl(teacher, adversarial).sum() + kl(clean, adversarial).sum()
    torch.testing.assert_close(pmg_aft_loss(clean, adversarial, teacher, LABELS, profile="code"), wanted)


@pytest.mark.parametrize(("profile", "flows"), [("textbook", False), ("code", True)])
def test_only_the_code_profile_lets_the_gradient_into_the_clean_target(logits, profile, flows):
    clean, adversarial, teacher = (value.requires_grad_() for value in logits)
    pmg_aft_loss(clean, adversarial, teacher, LABELS, profile=profile).backward()
    assert (clean.grad is not None and bool(clean.grad.abs().sum() > 0)) == flows
    assert teacher.grad is None


def test_code_profile_uses_bare_cosines(build):
    code, textbook = build(profile="code"), build()
    embeds = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    bare = F.normalize(embeds, dim=-1) @ code.bank.embeddings.T
    torch.testing.assert_close(code.logits(embeds), bare)
    torch.testing.assert_close(textbook.logits(embeds), bare * textbook.model.logit_scale.exp().detach())


def test_at_the_original_without_an_attack_only_cross_entropy_is_left(build):
    trainer = build()
    trainer.attack = lambda objective, batch: batch.images
    inputs = collate_images(list(trainer.train_dataset))
    loss = trainer.compute_loss(trainer.model, inputs)
    logits = trainer.logits(trainer.model(inputs["images"]).image_embeds)
    assert loss.item() == pytest.approx(F.cross_entropy(logits, inputs["labels"]).item(), abs=1e-5)


def test_the_teacher_sees_the_adversarial_image(build):
    trainer = build()
    inputs = collate_images(list(trainer.train_dataset))
    asked = []
    original = trainer.reference
    trainer.reference = lambda images: asked.append(images) or original(images)
    found = {}
    trainer.attack = lambda objective, batch: found.setdefault("images", (batch.images + 0.02).clamp(0, 1))
    trainer.compute_loss(trainer.model, inputs)
    assert asked[-1] is found["images"]


def test_refuses_an_unknown_profile(tmp_path):
    with pytest.raises(ValueError, match="textbook"):
        PMGAFTArguments(output_dir=str(tmp_path), profile="paper")
