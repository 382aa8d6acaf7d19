from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoProcessor, CLIPModel

from hf_robust_vision import LabelledImages, TeCoAArguments, TeCoATrainer, TIMAArguments, TIMATrainer
from hf_robust_vision.data.collator import collate_images
from hf_robust_vision.data.demo import CLASS_NAMES, demo_checkpoint
from hf_robust_vision.encoders import load_encoder
from hf_robust_vision.trainers.base import Batch
from hf_robust_vision.trainers.features import cosines
from hf_robust_vision.trainers.tima import confusable, hyperspherical_energy, required_gap


TECOA = {"margin": 0.0, "mhe_weight": 0.0, "iakd_weight": 0.0, "text_params": "none"}
QUIET = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "templates": "demo"}


@pytest.fixture
def build(tmp_path):
    """A trainer of the demo model on eight noise images."""

    def make(trainer=TIMATrainer, arguments=TIMAArguments, dtype=torch.float32, **options):
        encoder = load_encoder(demo_checkpoint(), dtype=dtype)
        noise = torch.randint(0, 256, (8, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        rows = [{"image": Image.fromarray(noise[i].numpy()), "label": i} for i in range(8)]
        data = LabelledImages(rows, CLASS_NAMES, encoder.transform, name="noise", split="train")
        args = arguments(output_dir=str(tmp_path), **({"attack_steps": 2} | QUIET | options))
        processor = AutoProcessor.from_pretrained(demo_checkpoint())
        return trainer(encoder, args, train_dataset=data, processing_class=processor)

    return make


@pytest.fixture
def texts():
    return unit(7, 5)


def unit(rows, dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, generator=generator, dtype=torch.float64), dim=-1)


def batch_of(trainer, dtype=torch.float32):
    inputs = collate_images(list(trainer.train_dataset))
    images = inputs["images"].to(dtype)
    return Batch(images, inputs["labels"], inputs["ids"], trainer.targets)


def image_gradients(trainer, inputs):
    trainer.compute_loss(trainer.model, inputs).backward()
    named = trainer.model.named_parameters()
    return {name: value.grad for name, value in named if name.startswith("visual_projection") or "vision_m" in name}


# Energy of the class texts


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_energy_of_a_simplex_is_its_closed_form(classes):
    centred = torch.eye(classes, dtype=torch.float64) - 1 / classes
    energy = hyperspherical_energy(F.normalize(centred, dim=-1))
    assert energy.item() == pytest.approx(1 / (3 + 2 / (classes - 1)), rel=1e-12)


def test_energy_is_one_at_a_point_and_a_fifth_at_opposite_poles():
    point = torch.ones(4, 3, dtype=torch.float64)
    poles = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    assert hyperspherical_energy(point).item() == pytest.approx(1)
    assert hyperspherical_energy(poles).item() == pytest.approx(1 / 5)


def test_energy_gradient_matches_finite_differences():
    embeds = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda e: hyperspherical_energy(F.normalize(e, dim=-1)), embeds)


def test_energy_alone_spreads_the_texts(texts):
    raw = texts.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(hyperspherical_energy(F.normalize(raw, dim=-1)), raw)
    assert cosines(raw - gradient, raw - gradient).sum() < cosines(raw, raw).sum()


# Margin and gate


def test_gap_follows_the_formula_and_carries_no_gradient(texts):
    labels = torch.tensor([2, 0])
    texts.requires_grad_()
    similarity = (texts @ texts.T).detach()[labels]
    wanted = {"distance": 1 - similarity, "similarity": similarity.clamp_min(0), "constant": torch.ones(2, 7)}
    for mode, gap in wanted.items():
        found = required_gap(texts, labels, margin=0.1, mode=mode)
        torch.testing.assert_close(found, 0.1 * gap.double())
        assert not found.requires_grad
    assert required_gap(texts, labels, margin=0.1).gather(1, labels[:, None]).abs().max() < 1e-12


def test_gate_opens_for_confusable_classes_only():
    original = torch.tensor([[0.50, 0.48, 0.47, 0.10], [0.90, 0.20, 0.30, 0.10]])
    labels = torch.tensor([0, 0])
    by_class = confusable(original, labels, eta=0.95, scale=10.0, gate="class")
    assert by_class.tolist() == [[False, True, False, False], [False] * 4]
    by_sample = confusable(original, labels, eta=0.95, scale=10.0, gate="sample")
    assert by_sample.tolist() == [[False, True, True, True], [False] * 4]
    assert confusable(original, labels, eta=0.95, scale=10.0, gate="none").sum().item() == 6


def test_margin_is_added_on_the_scale_of_the_cosine(build):
    """On the scale of the logits m = 0.1 would do nothing."""
    trainer = build(margin=0.2, margin_mode="constant", gate="none", mhe_weight=0.0, iakd_weight=0.0)
    batch = batch_of(trainer)
    with torch.no_grad():
        loss = trainer.robust_loss(trainer.model, batch, batch.images)
        logits = trainer.logits(batch.original.image_embeds)
        gap = 0.2 * trainer.bank.logit_scale * (1 - F.one_hot(batch.labels, len(CLASS_NAMES)))
    assert loss.item() == pytest.approx(F.cross_entropy(logits + gap, batch.labels).item(), rel=1e-5)


def test_a_closed_gate_makes_the_margin_irrelevant(build):
    losses = []
    for margin in (0.0, 0.5):
        trainer = build(margin=margin, gate="sample", eta=0.0)
        batch = batch_of(trainer)
        losses.append(trainer.robust_loss(trainer.model, batch, batch.images).item())
    assert losses[0] == losses[1]


# The whole loss


def test_without_margin_weights_and_text_its_gradients_are_tecoas(build):
    tima = build(dtype=torch.float64, **TECOA)
    tecoa = build(TeCoATrainer, TeCoAArguments, dtype=torch.float64)
    inputs = collate_images(list(tima.train_dataset))
    inputs["images"] = inputs["images"].double()
    found, wanted = image_gradients(tima, inputs), image_gradients(tecoa, inputs)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        difference = (found[name] - gradient).norm()
        assert difference <= 1e-10 * gradient.norm(), name


def test_distillation_of_an_untouched_text_tower_is_zero_and_so_is_its_gradient(build):
    trainer = build(**(TECOA | {"iakd_weight": 1.0, "text_params": "encoder"}))
    batch = batch_of(trainer)
    trainer.robust_loss(trainer.model, batch, batch.images)
    assert torch.stack(trainer._measured["loss_iakd"]).abs().max() < 1e-6
    output = trainer.model(prompts=trainer.prompts)
    texts = trainer._classes(output.text_embeds)
    original = batch.original.image_embeds
    divergence = F.kl_div(
        trainer.logits(original, texts).log_softmax(1), trainer.logits(original).softmax(1), reduction="batchmean"
    )
    gradients = torch.autograd.grad(divergence, list(trainer.model.text_model.parameters()), allow_unused=True)
    assert max(g.abs().max().item() for g in gradients if g is not None) < 1e-6


@pytest.mark.parametrize("student", ["adversarial", "clean"])
def test_image_distillation_reaches_the_image_tower_only(build, student):
    trainer = build(variant="v1", takd_student=student)
    batch = batch_of(trainer)
    adversarial = (batch.images + 0.05).clamp(0, 1)
    trainer.robust_loss(trainer.model, batch, adversarial)
    seen = trainer.logits(trainer.model(adversarial if student == "adversarial" else batch.images).image_embeds)
    p, q = trainer.logits(batch.original.image_embeds).log_softmax(1), seen.log_softmax(1)
    wanted = (p.exp() * (p - q)).sum(1).mean().item()
    assert trainer._measured["loss_takd"][0].item() == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_variants_differ_in_gate_and_image_distillation(tmp_path):
    aaai, v1 = (TIMAArguments(output_dir=str(tmp_path), variant=name) for name in ("aaai", "v1"))
    assert (aaai.gate, aaai.takd_weight) == ("class", 0.0)
    assert (v1.gate, v1.takd_weight) == ("none", 1.0)
    assert TIMAArguments(output_dir=str(tmp_path), variant="v1", gate="sample").gate == "sample"


@pytest.mark.parametrize(
    ("params", "trains"),
    [("encoder", {"text_model", "text_projection"}), ("projection", {"text_projection"}), ("none", set())],
)
def test_what_of_the_text_tower_trains(build, params, trains):
    trainer = build(text_params=params)
    trainable = {name.split(".")[0] for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert trainable == {"vision_model", "visual_projection"} | trains


def test_attack_holds_the_text_fixed_and_leaves_no_trace(build):
    trainer = build()
    trainer.compute_loss(trainer.model, collate_images(list(trainer.train_dataset)))
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert trainer.model.text_projection.weight.requires_grad


def test_the_saved_folder_is_a_stock_clip_with_the_tuned_text_tower(build, tmp_path):
    trainer = build(max_steps=2, per_device_train_batch_size=4, learning_rate=1e-3)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    after = CLIPModel.from_pretrained(tmp_path / "model").state_dict()
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"vision_model", "visual_projection", "text_model", "text_projection"}
    assert torch.equal(before["logit_scale"], after["logit_scale"])


@pytest.mark.parametrize(
    "wrong", [{"gate": "maybe"}, {"variant": "v2"}, {"margin": -0.1}, {"mhe_weight": -1.0}, {"text_params": "all"}]
)
def test_refuses_what_makes_no_sense(tmp_path, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TIMAArguments(output_dir=str(tmp_path), **wrong)
