from __future__ import annotations

import json

import pytest
import torch
from comparison import (
    command_line,
    paired_interval,
    section,
    spread,
    table,
    write_page,
)


def content(paired=()):
    def row(method, group, values):
        return {
            "method": method,
            "label": method.upper(),
            "group": group,
            "num_samples": 10,
            "clean_accuracy": values,
            "robust_accuracy": {"8/255": [value / 2 for value in values]},
            "cpu_seconds": [60.0] * len(values),
            "source": ["abc"],
        }

    return {
        "command": "python recipes/research/compare.py",
        "mode": "compare",
        "split": "test",
        "budget": {"steps": 5, "batch_size": 4, "learning_rate": 1e-3, "training": {"attack_steps": 2}},
        "seeds": [0, 1],
        "protocol": {"name": "apgd-ce", "steps": 20, "restarts": 1},
        "unseen": ["red circle"],
        "hashes": {"start": "0" * 64, "prompts": "1" * 16},
        "versions": {"torch": "2"},
        "rows": [row(method, group, [0.5, 0.7]) for group in ("seen", "unseen") for method in ("tima", "tecoa")],
        "paired": list(paired),
    }


def test_no_difference_has_no_interval():
    assert paired_interval(torch.zeros(3, 50, dtype=torch.double)) == (0, 0, 0)


def test_interval_of_independent_images_is_that_of_their_mean():
    generator = torch.Generator().manual_seed(0)
    differences = torch.randn(1, 400, generator=generator, dtype=torch.double)
    mean, low, high = paired_interval(differences)
    half = 1.96 * differences.std().item() / 20
    assert mean == pytest.approx(differences.mean().item())
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)


def test_images_are_shared_by_the_seeds():
    """Three copies of one run are no more images: the interval may not shrink with them."""
    one = torch.randn(1, 200, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    (_, low, high), (_, low3, high3) = paired_interval(one), paired_interval(one.expand(3, -1))
    assert high3 - low3 == pytest.approx(high - low, rel=0.1)


def test_seeds_that_disagree_widen_the_interval():
    differences = torch.tensor([[0.5] * 100, [0.0] * 100, [-0.5] * 100], dtype=torch.double)
    _, low, high = paired_interval(differences)
    assert low < -0.3
    assert high > 0.3


def test_table_has_mean_and_deviation():
    assert spread([0.5, 0.7]) == "60.0 ± 14.1"
    assert spread([0.5]) == "50.0"
    assert "| TIMA | 60.0 ± 14.1 | 30.0 ± 7.1 | 60 |" in table(content(), "unseen")


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.01, 0.1, "TIMA leads"), (-0.1, -0.01, "TECOA leads"), (-0.1, 0.1, "not distinguished")],
)
def test_a_lead_is_claimed_only_where_the_interval_excludes_zero(low, high, verdict):
    pair = {"one": "TIMA", "other": "TECOA", "group": "seen", "eps": "8/255", "difference": (low + high) / 2}
    assert verdict in section(content([pair | {"low": low, "high": high}]))


def test_a_section_says_what_it_was_made_on():
    """Files of the demo from before there was another benchmark name neither data nor radius."""
    assert "Data: the demo, test split" in section(content())
    assert "attack\n  of 2 steps at 8/255" in section(content())
    budget = content()["budget"] | {"training": {"attack_steps": 2, "attack_eps": 4 / 255}}
    text = section(content() | {"mode": "emoji", "about": "emoji in two styles", "budget": budget})
    assert "Data: emoji in two styles, test split" in text
    assert "attack\n  of 2 steps at 4/255" in text


def test_emoji_have_a_section_and_a_plot_of_their_own(tmp_path):
    pytest.importorskip("matplotlib")
    write_page(content() | {"mode": "emoji"}, tmp_path)
    write_page(content(), tmp_path)
    page = (tmp_path / "results.md").read_text()
    assert page.index("## Methods side by side") < page.index("## Emoji")
    assert "(results/emoji.png)" in page
    assert (tmp_path / "results" / "emoji.png").stat().st_size > 0


def test_page_holds_the_sections_of_every_command(tmp_path):
    pytest.importorskip("matplotlib")
    write_page(content(), tmp_path)
    write_page(content() | {"mode": "sweep", "command": "python recipes/research/compare.py --sweep"}, tmp_path)
    page = (tmp_path / "results.md").read_text()
    assert page.index("## Methods side by side") < page.index("## TIMA's weights")
    assert (tmp_path / "results" / "compare.png").stat().st_size > 0
    assert json.loads((tmp_path / "results" / "sweep.json").read_text())["mode"] == "sweep"


def test_few_seeds_are_stretched_to_their_own_spread():
    """Of three seeds the lowest alone is drawn once in 27 times, so it is the lower end; stretched by sqrt(3 / 2)."""
    differences = torch.tensor([[0.5] * 10, [0.0] * 10, [-0.5] * 10], dtype=torch.double)
    _, low, high = paired_interval(differences)
    assert (low, high) == pytest.approx((-0.5 * 1.5**0.5, 0.5 * 1.5**0.5))


def test_a_page_names_no_folder_of_its_machine():
    words = ["--steps", "80", "--docs", "/home/me/docs", "--jobs", "2", "--output_dir=/home/me/runs"]
    assert (
        command_line("recipes/research/compare.py", words) == "python recipes/research/compare.py --steps 80 --jobs 2"
    )
