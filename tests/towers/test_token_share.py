"""Attack steps on some patches: the tower without the others, and every patch in its turn."""

from __future__ import annotations

import pytest
import torch

from hf_robust_vision.towers.load import load_encoder
from hf_robust_vision.towers.token_share import TokenShare


KEPT = torch.tensor([[3, 0, 9], [15, 2, 7]])


@pytest.fixture(params=["clip", "siglip"])
def tower(request, clip_folder, siglip_folder):
    return load_encoder({"clip": clip_folder, "siglip": siglip_folder}[request.param], dtype=torch.float64).eval()


def test_what_is_kept_is_the_tower_without_the_rest(tower):
    """By hand: embeddings with their positions, the rows cut out, then the blocks."""
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    share, vision, first = TokenShare(tower), tower.vision_model, tower.class_tokens
    assert share.patches == 16
    whole = tower(images).image_embeds
    embedded = vision.embeddings(tower.transform.normalize(images))
    rows = [torch.cat([one[:first], one[first:][kept]]) for one, kept in zip(embedded, KEPT)]
    hidden = torch.stack(rows)
    if first:
        hidden = vision.post_layernorm(vision.encoder(vision.pre_layrnorm(hidden)).last_hidden_state[:, 0])
        by_hand = tower.visual_projection(hidden)
    else:
        by_hand = vision.head(vision.post_layernorm(vision.encoder(hidden).last_hidden_state))
    with share.keep(KEPT):
        part = tower(images).image_embeds
    assert torch.allclose(part, by_hand, rtol=0, atol=1e-12)
    assert not torch.allclose(part, whole, atol=1e-3)
    assert torch.equal(tower(images).image_embeds, whole), "asleep again"
    with share.keep(torch.arange(15, -1, -1).expand(2, 16)):
        assert torch.allclose(tower(images).image_embeds, whole, rtol=0, atol=1e-12), "all of them, in any order"


def test_only_what_is_seen_has_a_gradient(tower):
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    with TokenShare(tower).keep(KEPT):
        (gradient,) = torch.autograd.grad(tower(images).image_embeds.square().sum(), images)
    patches = gradient.abs().unfold(2, 8, 8).unfold(3, 8, 8).sum((1, 4, 5)).flatten(1)
    assert [row.nonzero().flatten().tolist() for row in patches] == [sorted(row) for row in KEPT.tolist()]


def test_tokens_that_were_dropped_are_the_others(tower):
    images, others = torch.rand(2, 3, 32, 32, dtype=torch.float64), torch.rand(2, 16, 32, dtype=torch.float64)
    share = TokenShare(tower)
    with share.keep(KEPT, others):
        tokens = tower(images, token_layer=-2).patch_tokens
    for row in range(2):
        same = [place for place in range(16) if torch.equal(tokens[row, place], others[row, place])]
        assert same == [place for place in range(16) if place not in KEPT[row].tolist()]
    with pytest.raises(ValueError, match="others="), share.keep(KEPT):
        tower(images, token_layer=-2)


def test_every_patch_has_its_turn(tower):
    share = TokenShare(tower)
    seen = []
    objective = share.in_turns(
        lambda images: seen.append(share.kept) or images.flatten(1).sum(1), torch.rand(2, 16), 0.25
    )
    for _ in range(4):
        objective(torch.rand(2, 3, 32, 32))
    assert torch.equal(torch.cat(seen, 1).sort(1).values, torch.arange(16).expand(2, 16))
    assert not torch.equal(seen[0][0], seen[0][1]), "each image has an order of its own"
    assert share.cost(0.25) == (tower.class_tokens + 4) / (tower.class_tokens + 16)


def test_another_tower_is_refused():
    with pytest.raises(ValueError, match=r"CLIP or a SigLIP, got Linear; type --attack_token_share 1"):
        TokenShare(torch.nn.Linear(1, 1))
