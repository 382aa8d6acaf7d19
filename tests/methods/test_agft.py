from __future__ import annotations

import pytest
import torch

from hf_robust_vision import AGFTTrainer, TeCoATrainer
from hf_robust_vision.data.collator import collate_images
from hf_robust_vision.methods.agft import soft_target
from hf_robust_vision.towers.load import load_encoder
from tests.training.helpers import arguments, make_trainer


@pytest.fixture
def build(clip_folder, tmp_path):
    def make(kind=AGFTTrainer, **options):
        return make_trainer(clip_folder, tmp_path, kind=kind, double=True, **options)

    return make


def inputs_of(trainer, count=6):
    inputs = collate_images([trainer.train_dataset[i] for i in range(count)])
    return inputs | {"images": inputs["images"].double()}


def probabilities(folder, trainer, images, scale):
    """Written out: `exp(scale cos) / sum exp(scale cos)`, of a model that was read anew."""
    encoder = load_encoder(folder, dtype=torch.float64)
    with torch.no_grad():
        embeds = encoder(images).image_embeds
        texts = trainer.bank.embeddings.double()
        cosine = (embeds / embeds.norm(dim=1, keepdim=True)) @ (texts / texts.norm(dim=1, keepdim=True)).T
        powers = (scale * encoder.logit_scale.exp() * cosine).exp()
    return powers / powers.sum(1, keepdim=True)


@pytest.mark.parametrize("options", [{}, {"student_scale": 1.2, "target_ratio": 0.7, "label_weight": 0.5}])
def test_loss_is_the_formula(options, build, clip_folder):
    trainer = build(**options)
    inputs = inputs_of(trainer)
    adversarial = (inputs["images"] + 0.05).clamp(0, 1)
    trainer.attack = lambda objective, batch: adversarial
    settings = {"student_scale": 1.8, "target_ratio": 0.4, "label_weight": 0.0} | options
    s, r, w = settings.values()
    target = probabilities(clip_folder, trainer, inputs["images"], s * r)
    target = (1 - w) * target + w * torch.eye(3, dtype=torch.float64)[inputs["labels"]]
    student = probabilities(clip_folder, trainer, adversarial, s)
    wanted = -(target * student.log()).sum(1).mean()
    with torch.no_grad():
        found = trainer.compute_loss(trainer.model, inputs)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)


def test_soft_target_by_hand():
    logits, labels = torch.tensor([[0.0, 0.0], [torch.tensor(3.0).log(), 0.0]]), torch.tensor([1, 0])
    torch.testing.assert_close(soft_target(logits, labels), torch.tensor([[0.5, 0.5], [0.75, 0.25]]))
    torch.testing.assert_close(soft_target(logits, labels, 0.5), torch.tensor([[0.25, 0.75], [0.875, 0.125]]))
    torch.testing.assert_close(soft_target(logits, labels, 1.0), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))


def test_attacker_and_learner_look_at_the_same_number(build):
    trainer = build(label_weight=0.25)
    seen = {}

    def attack(objective, batch):
        seen["losses"] = objective(batch.images)
        return batch.images

    trainer.attack = attack
    loss = trainer.compute_loss(trainer.model, inputs_of(trainer)).item()
    assert seen["losses"].shape == (6,)
    assert loss == pytest.approx(seen["losses"].mean().item(), rel=1e-9)


@pytest.mark.parametrize(("weight", "matter"), [(0.0, False), (0.5, True)])
def test_labels_matter_only_where_they_have_a_share(weight, matter, build):
    trainer = build(label_weight=weight)
    inputs = inputs_of(trainer)
    other = inputs | {"labels": (inputs["labels"] + 1) % 3}
    losses = [trainer.compute_loss(trainer.model, each).item() for each in (inputs, other)]
    assert (losses[0] != losses[1]) is matter


def test_with_the_label_alone_it_is_tecoa(build):
    ours, tecoa = build(label_weight=1.0, student_scale=1.0), build(TeCoATrainer)
    losses = [trainer.compute_loss(trainer.model, inputs_of(trainer)).item() for trainer in (ours, tecoa)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_the_target_carries_no_gradient_and_moves_with_nobody(build):
    """It is the original's: after training it is what it was before."""
    trainer = build(learning_rate=1e-2, max_steps=2)
    inputs = inputs_of(trainer)
    targets = []
    loss = trainer.robust_loss

    def watched(model, batch, adversarial):
        if bool((batch.ids == 0).any()):
            targets.append(trainer.target(batch)[batch.ids == 0])
        return loss(model, batch, adversarial)

    trainer.robust_loss = watched
    trainer.compute_loss(trainer.model, inputs)
    trainer.train()
    trainer.compute_loss(trainer.model, inputs)
    assert not any(target.requires_grad for target in targets)
    assert len(targets) >= 2
    for target in targets[1:]:
        torch.testing.assert_close(target, targets[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"label_weight": 1.5}, "label_weight is a share, at most 1, got 1.5"),
        ({"label_weight": -0.1}, "label_weight must be at least 0"),
        ({"target_ratio": float("nan")}, "target_ratio must be finite"),
        ({"student_scale": 0.0}, "student_scale=0 makes all classes alike; type --student_scale 1.8"),
        ({"target_ratio": 0.0}, "target_ratio=0 makes all classes alike; type --target_ratio 0.4"),
        ({"label_weight": None}, "label_weight must be a number, got None"),
        ({"student_scale": None}, "student_scale must be a number, got None"),
        ({"target_ratio": None}, "target_ratio must be a number, got None"),
        ({"dual_step_size": None}, "dual_step_size must be a number, got None"),
    ],
)
def test_refuses_what_has_no_meaning(options, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        arguments(tmp_path, AGFTTrainer.args_class, **options)
