"""A bound on clean drift, held by a weight that is found while training."""

from __future__ import annotations

import pytest
import torch

from hf_robust_vision import AGFTTrainer, FARETrainer, SimCLIPTrainer
from hf_robust_vision.data.collator import collate_images
from hf_robust_vision.methods.drift import DualWeight
from hf_robust_vision.towers.load import load_encoder
from hf_robust_vision.training.checkpoints import mark_complete
from hf_robust_vision.training.resume import MORE_STATE
from tests.training.helpers import arguments, largest_gap, make_trainer, weights


STRONG = {"learning_rate": 3e-3, "attack_eps": "8/255", "attack_steps": 1, "lr_scheduler_type": "constant"}


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_dual_ascent_by_hand():
    dual = DualWeight(bound=0.1, weight=0.5, step_size=0.2)
    dual.observe(torch.tensor([0.1, 0.3]), torch.tensor([1.0, 1.0]))
    assert dual.update() == pytest.approx(0.2)
    assert dual.weight == pytest.approx(0.7)  # twice the bound: a whole step
    dual.observe(torch.tensor([0.0]), torch.tensor([1.0]))
    dual.update()
    assert dual.weight == pytest.approx(0.5)  # no drift: a whole step back
    for _ in range(4):
        dual.observe(torch.tensor([0.0]), torch.tensor([1.0]))
        dual.update()
    assert dual.weight == 0
    dual.observe(torch.tensor([torch.nan]), torch.tensor([1.0]))
    with pytest.raises(ValueError, match="drift of clean images is not finite; type a smaller --learning_rate"):
        dual.update()


def test_a_weight_that_is_not_finite_is_no_weight():
    dual = DualWeight(bound=1e-310, weight=0.5, step_size=0.1)
    dual.observe(torch.tensor([0.1]), torch.tensor([1.0]))
    with pytest.raises(ValueError, match=r"weight that holds clean_drift_bound=1e-310 is not finite; type a larger"):
        dual.update()
    assert dual.weight == 0.5


def test_parts_and_processes_do_not_matter():
    """Of sums, not a mean of means: parts of other sizes give the same drift."""
    distances, sizes = torch.rand(7).double(), torch.rand(7).double() + 1
    whole, parts = (DualWeight(0.1, 1.0, 0.1) for _ in range(2))
    whole.observe(distances, sizes)
    parts.observe(distances[:2], sizes[:2])
    parts.observe(distances[2:3], sizes[2:3])
    rest = torch.stack([distances[3:].sum(), sizes[3:].sum()])  # those of the other process
    assert parts.update(lambda sums: sums + rest) == pytest.approx(whole.update(), rel=1e-12)
    assert parts.weight == pytest.approx(whole.weight, rel=1e-12)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (FARETrainer, {}), (SimCLIPTrainer, {}), (SimCLIPTrainer, {"form": "paper"}), (SimCLIPTrainer, {"form": "anchored"}),
        (AGFTTrainer, {"label_weight": 0.5}),
    ],
    ids=["fare", "frozen", "paper", "anchored", "agft"],
)  # fmt: skip
def test_loss_and_drift_are_the_formula(kind, options, clip_folder, tmp_path):
    """With the weight w: the loss without a bound, plus w times the mean distance of the clean images."""
    trainer = make_trainer(clip_folder, tmp_path, kind=kind, double=True, clean_drift_bound=0.05, **options)
    plain = make_trainer(clip_folder, tmp_path, kind=kind, double=True, **options)
    inputs = collate_images([trainer.train_dataset[i] for i in range(6)])
    inputs["images"] = inputs["images"].double()
    adversarial = (inputs["images"] + 0.05).clamp(0, 1)
    with torch.no_grad():
        for each in (trainer, plain):
            each.attack = lambda objective, batch: adversarial
            each.model.visual_projection.weight += 0.1
        clean = trainer.model(inputs["images"]).image_embeds
        original = load_encoder(clip_folder, dtype=torch.float64)(inputs["images"]).image_embeds
        if kind is FARETrainer:
            distance, size = ((clean - original) ** 2).sum(1), (original**2).sum(1)
        else:
            distance = 1 - (clean * original).sum(1) / (clean.norm(dim=1) * original.norm(dim=1))
            size = torch.ones_like(distance)
        fixed = 0.3 if options.get("form") == "anchored" else 0.0
        assert trainer.dual.weight == fixed
        trainer.dual.weight = 0.7
        losses = [each.compute_loss(each.model, inputs).item() for each in (trainer, plain)]
    assert losses[0] - losses[1] == pytest.approx((0.7 - fixed) * distance.mean().item(), rel=1e-6)
    assert trainer.dual.update() == pytest.approx((distance.sum() / size.sum()).item(), rel=1e-6)


def test_the_bound_is_met_and_paid_for(clip_folder, tmp_path):
    """Clean images drift over the bound until the weight has risen; without it they stay over it."""
    settings = STRONG | {"kind": FARETrainer, "max_steps": 45, "logging_steps": 3}
    drifts = {}
    for bound in (None, 0.02):
        trainer = make_trainer(clip_folder, tmp_path, clean_drift_bound=bound, dual_step_size=0.5, **settings)
        trainer.train()
        images = torch.stack([item["images"] for item in trainer.train_dataset])
        with torch.no_grad():
            clean, original = trainer.model(images).image_embeds, trainer.reference(images).image_embeds
        drifts[bound] = float((clean - original).square().sum() / original.square().sum())
    assert drifts[0.02] < 0.02 < 2 * 0.02 < drifts[None], drifts
    assert max(logged(trainer, "clean_drift")) > 2 * 0.02
    price = logged(trainer, "drift_weight")
    assert price[0] < 1 < max(price)


def test_a_loose_bound_costs_nothing(clip_folder, tmp_path):
    settings = STRONG | {"form": "anchored", "max_steps": 5, "anchor_weight": 0.3, "dual_step_size": 0.1}
    trainer = make_trainer(clip_folder, tmp_path, clean_drift_bound=100.0, **settings)
    trainer.train()
    assert logged(trainer, "drift_weight")[:3] == pytest.approx([0.3, 0.2, 0.1], abs=0.01)
    assert trainer.dual.weight == 0


def test_a_resumed_run_is_the_unbroken_one(clip_folder, tmp_path):
    settings = STRONG | {"max_steps": 4, "clean_drift_bound": 0.01, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(clip_folder, tmp_path, **settings)
    whole.train()
    again = make_trainer(clip_folder, tmp_path, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert whole.dual.weight == again.dual.weight > 0
    assert logged(whole, "drift_weight") == logged(again, "drift_weight")
    assert largest_gap(weights(again), weights(whole)) == 0
    other = make_trainer(clip_folder, tmp_path, **settings | {"clean_drift_bound": 0.02})
    with pytest.raises(ValueError, match=r"trained with --clean_drift_bound 0.01, and this run has .* 0.02"):
        other.train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-4" / MORE_STATE).unlink()
    mark_complete(tmp_path / "checkpoint-4", again._settings())
    with pytest.raises(ValueError, match=f"{MORE_STATE} does not hold what this run goes on with .drift_weight."):
        make_trainer(clip_folder, tmp_path, **settings).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("name", "without"), [("clean_drift_bound", "no bound on clean drift"), ("dual_step_size", "the default.$")]
)
def test_what_leaving_it_out_means(name, without, tmp_path):
    with pytest.raises(ValueError, match=f"{name} must be above 0, got 0; leave it out for {without}"):
        arguments(tmp_path, **{name: 0.0})
    usual = arguments(tmp_path)
    assert (usual.clean_drift_bound, usual.dual_step_size) == (None, 0.1)


@pytest.mark.parametrize("name", ["clean_drift_bound", "dual_step_size"])
@pytest.mark.parametrize(("value", "said"), [(0.0, "must be above 0"), (-1.0, "at least 0"), (float("inf"), "finite")])
def test_refuses_what_is_no_bound(name, value, said, tmp_path, clip_folder):
    with pytest.raises(ValueError, match=f"{name} must be {said}|{name} {said}"):
        make_trainer(clip_folder, tmp_path, **{name: value})
