"""Start noise: whose it is, how it is distributed, and that its bits are those of the published hash."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from scipy import stats

from hf_robust_vision.attacks import L2Ball, LinfBall, StartNoise


SHAPE = (3, 64, 64)
PIXELS = math.prod(SHAPE)


def draw(ids, seed=0, step=0, restart=0, shape=SHAPE):
    return StartNoise(seed, ids, step).draw(torch.zeros(len(ids), *shape), restart)


def correlation(one, other):
    """Of two independent samples it is below this bound but once in 15,000 times."""
    assert abs(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]) < 4 / math.sqrt(one.numel())


@pytest.mark.parametrize("field", ["seed", "step", "ids", "restart"])
def test_noise_depends_on_each_of_its_four(field):
    base = {"seed": 1, "step": 2, "ids": [3], "restart": 0}
    changed = draw(**base | {field: [4] if field == "ids" else 9})
    assert torch.equal(draw(**base), draw(**base))
    assert not (draw(**base) == changed).any()


def test_noise_belongs_to_the_sample():
    """Not to its place in the batch, the batch's size or parts, or the global random state."""
    ids = [5, "a", 7, -1, "5", 2**70, *range(100, 160)]
    whole, state = draw(ids, shape=(3, 101, 101)), torch.get_rng_state()
    assert whole.numel() > 2**20, "or it is not hashed in parts"
    assert torch.equal(torch.get_rng_state(), state)
    assert len(whole[:, 0].unique(dim=0)) == len(ids)
    torch.manual_seed(99)
    for row in (0, 1, 4, 5, 65):
        assert torch.equal(draw([ids[row]], shape=(3, 101, 101))[0], whole[row])
    noise = StartNoise(0, ids).take(torch.tensor([2, 0]))
    assert torch.equal(noise.draw(torch.zeros(2, 3, 101, 101)), whole[[2, 0]])


def test_no_ids_and_bad_ids():
    assert draw([]).shape == (0, *SHAPE)
    with pytest.raises(ValueError, match="3 images but 2 ids"):
        StartNoise(0, [1, 2]).draw(torch.zeros(3, 3, 2, 2))
    with pytest.raises(TypeError):
        draw([1.5])  # would be the noise of sample 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("ball", [LinfBall(8 / 255), L2Ball(2.0)], ids=repr)
def test_images_of_every_dtype_start_at_the_same_point(dtype, ball):
    images = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)
    noise = StartNoise(0, [1, 2])
    start = ball.start(images, noise.draw(images))
    assert start.dtype == dtype
    wanted = ball.start(images.float(), noise.draw(images.float()))
    torch.testing.assert_close(start.float(), wanted, atol=2 * torch.finfo(dtype).eps + 1e-6, rtol=0)
    assert start.isfinite().all()


def test_bits_are_those_of_splitmix64():
    """Plain Python integers give the same: neither signs nor overflows of a device's integers take part."""

    def mix(word):
        word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        word = (word ^ (word >> 27)) * 0x94D049BB133111EB % 2**64
        return word ^ (word >> 31)

    def hashed(text):
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")

    # The first outputs of the published generator for the seed 1234567, which counts before it mixes.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [mix((1234567 + place * 0x9E3779B97F4A7C15) % 2**64) for place in (1, 2, 3)] == published
    for sample in (0, 7, -3, 2**63, "cat"):
        key = hashed(sample) if isinstance(sample, str) else sample % 2**64
        key = mix((mix(key) + hashed("11/5/2")) % 2**64)
        words = [mix((key + place * 0x9E3779B97F4A7C15) % 2**64) for place in range(24)]
        halves = [half for word in words for half in (word % 2**32, word >> 32)]
        wanted = [((half >> 8 ^ 2**23) / 2**24) for half in halves][:47]  # with the sign's bit turned: from -1 up
        assert StartNoise(11, [sample], 5).uniform((47,), 2)[0].tolist() == wanted
        assert draw([sample], 11, 5, 2, (47,))[0].tolist() == [2 * value - 1 + 2**-24 for value in wanted]


def test_noise_is_uniform():
    noise = draw(range(20))
    assert -1 < noise.min() < -0.9999
    assert 0.9999 < noise.max() < 1
    assert (noise != 0).all()
    assert noise.mean().abs() < 4 / math.sqrt(3 * noise.numel())
    assert noise.var().item() == pytest.approx(1 / 3, abs=4 * math.sqrt(4 / 45 / noise.numel()))
    assert stats.kstest(noise.flatten().numpy(), stats.uniform(-1, 2).cdf).pvalue > 0.01
    assert all(stats.kstest(one.flatten().numpy(), stats.uniform(-1, 2).cdf).pvalue > 1e-4 for one in noise)
    bits = ((noise.double() + 1) * 2**23).long().flatten()
    for bit in range(24):
        assert abs(((bits >> bit) & 1).double().mean().item() - 0.5) < 2 / math.sqrt(len(bits)), bit


def test_neighbours_have_nothing_in_common():
    """Ids, steps, restarts, seeds and pixels that follow one another."""
    base = draw([10])
    for other in (draw([11]), draw([10], step=1), draw([10], restart=1), draw([10], seed=1), draw([11], seed=1)):
        correlation(base, other)
        correlation(base.square(), other.square())
        for shift in (1, 2, 64):  # one is not the other some pixels further
            correlation(base.flatten()[shift:], other.flatten()[:-shift])
    flat = draw(range(10)).flatten(1)
    for shift in (1, 2, 3, 64, 64 * 64):
        correlation(flat[:, shift:], flat[:, :-shift])
    # What many samples have in common would show at one pixel of all of them.
    first = draw(range(20_000), shape=(3, 1, 1)).flatten(1)
    assert stats.kstest(first[:, 0].numpy(), stats.uniform(-1, 2).cdf).pvalue > 0.01
    correlation(first[1:, 0], first[:-1, 0])
    correlation(first[:, 0], first[:, 1])


def test_l2_starts_point_everywhere_alike():
    images = torch.full((2000, 3, 4, 4), 0.5)
    ball = L2Ball(0.1)
    start = ball.start(images, StartNoise(0, range(2000)).draw(images)) - images
    torch.testing.assert_close(ball.distance(start, torch.zeros_like(start)), torch.full((2000,), 0.1))
    directions = start.flatten(1) / 0.1
    # A coordinate of a uniform direction of 48 dimensions, squared, follows a beta distribution.
    assert stats.kstest(directions[:, 7].square().numpy(), stats.beta(0.5, 47 / 2).cdf).pvalue > 0.01
    # And so does its part along a diagonal, where noise of a cube would stick out.
    diagonal = directions.sum(1) / math.sqrt(48)
    assert stats.kstest(diagonal.square().numpy(), stats.beta(0.5, 47 / 2).cdf).pvalue > 0.01


def test_linf_starts_fill_the_ball():
    images = torch.full((1, 3, 40, 40), 0.5)
    start = LinfBall(0.1).start(images, StartNoise(0, [0]).draw(images)) - images
    assert stats.kstest(start.flatten().numpy(), stats.uniform(-0.1, 0.2).cdf).pvalue > 0.01


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_bits_are_the_same_on_a_gpu():
    ids = [0, "a", 2**40]
    images = torch.zeros(3, *SHAPE)
    ours, theirs = StartNoise(3, ids).draw(images), StartNoise(3, ids).draw(images.cuda())
    assert theirs.is_cuda
    assert torch.equal(ours, theirs.cpu())
    assert torch.equal(LinfBall(0.1).start(images, ours), LinfBall(0.1).start(images.cuda(), theirs).cpu())
