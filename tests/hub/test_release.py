"""What is refused before the first byte is sent, and what of a folder is chosen."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from hf_robust_vision import load_robust_encoder, push_robust_encoder
from hf_robust_vision.cli import main
from hf_robust_vision.evaluation.results import load_results
from hf_robust_vision.hub.release import prepare_release
from tests.hub.conftest import describe


@pytest.fixture
def folder(measured, tmp_path):
    return shutil.copytree(measured, tmp_path / "run")


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def scaled(folder):
    weights = load_file(folder / "model.safetensors")
    weights["logit_scale"] = weights["logit_scale"] + 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def other_number(folder):
    def change(content):
        content["results"][-1]["attacks"][0]["seed"] = 99

    edit(folder / "robustness.json", change)


def first_line_only(folder):
    path = folder / load_results(folder)[-1].samples
    path.write_text(path.read_text().splitlines()[0] + "\n")


DAMAGE = {
    "no folder": (shutil.rmtree, "is no folder; save the model first"),
    "no config": (lambda run: (run / "config.json").unlink(), "has no config.json, so there is no model to push"),
    "no weights": (lambda run: (run / "model.safetensors").unlink(), "has no model.safetensors"),
    "cut weights": (
        lambda run: (run / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes()[:9000]),
        r"model\.safetensors is damaged or cut off",
    ),
    "no tokenizer": (
        lambda run: [path.unlink() for path in run.glob("tokenizer*")],
        "has no tokenizer.json; save the model's CLIPProcessor",
    ),
    "no image processor": (lambda run: (run / "processor_config.json").unlink(), "has no image processor"),
    "not measured": (lambda run: (run / "robustness.json").unlink(), "measure the model first"),
    "only the original": (
        lambda run: edit(run / "robustness.json", lambda content: content.update(results=content["results"][:2])),
        "no result of the hardened model",
    ),
    "no number": (
        lambda run: edit(run / "robustness.json", lambda content: content["results"][3].update(robust_accuracy=None)),
        "result 4: robust_accuracy must be float, got None",
    ),
    "number without its records": (
        lambda run: edit(run / "robustness.json", lambda content: content["results"][3].update(robust_accuracy=0.99)),
        r"samples-after.* give a robust_accuracy of .* the result says 0\.99",
    ),
    "no attack": (
        lambda run: edit(run / "robustness.json", lambda content: content["results"][3]["attacks"][0].update(steps=0)),
        "no step of apgd-ce",
    ),
    "samples cut off": (first_line_only, "should hold 12 samples, it holds 1"),
    "samples gone": (lambda run: [path.unlink() for path in run.glob("samples-*")], "is missing; measure again"),
    "other weights": (scaled, "was measured on other weights"),
    "no card": (lambda run: (run / "README.md").unlink(), "has no model card; write it with"),
    "card without metadata": (lambda run: (run / "README.md").write_text("# Mine"), "does not tell what"),
    "broken metadata": (lambda run: (run / "README.md").write_text("---\na: [\n---\n"), "can not be read"),
    "card of other numbers": (other_number, r"does not tell what robustness.json holds: Robust accuracy "),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_refused_before_anything_is_sent(name, folder):
    damage, said = DAMAGE[name]
    damage(folder)
    with pytest.raises(ValueError, match=said):
        prepare_release(folder)


@pytest.mark.parametrize("name", ["LICENSE", "README.md", "robustness.json", "model.safetensors", "samples"])
def test_a_link_that_leads_outside_is_refused(name, folder, tmp_path):
    """findings-reliability 14: `LICENSE -> /etc/hostname` was listed for upload."""
    path = folder / (name if name != "samples" else load_results(folder)[-1].samples)
    inside, outside = folder / "inside", tmp_path / "outside"
    outside.write_bytes(path.read_bytes() if path.is_file() else b"secret")
    shutil.copy(outside, inside)
    path.unlink(missing_ok=True)
    path.symlink_to(inside)
    prepare_release(folder)
    path.unlink()
    path.symlink_to(outside)
    with pytest.raises(ValueError, match=rf"{path.name} is a link to .*outside, outside of"):
        prepare_release(folder)


def test_refused_arguments(folder, monkeypatch):
    with pytest.raises(ValueError, match="'weights' is not one of 'model', 'tower', 'adapter'"):
        prepare_release(folder, "weights")
    with pytest.raises(ValueError, match=r"has no adapter_config.json, so there is no adapter to push"):
        prepare_release(folder, "adapter")
    with pytest.raises(ValueError, match=r"'\./local' is no Hub id"):
        prepare_release(folder, base_model="./local")
    for wrong in ("a/b/c", "me/robust clip", "me/-x"):
        with pytest.raises(ValueError, match="wanted owner/name"):
            push_robust_encoder(folder, wrong, dry_run=True)
    with pytest.raises(TypeError, match="dryrun"):  # not a push for real
        push_robust_encoder(folder, "me/robust-clip", dryrun=True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
        push_robust_encoder(folder, "me/robust-clip")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("hf_robust_vision.hub.push.get_token", lambda: None)
    with pytest.raises(ValueError, match="no token to push with: type `hf auth login`"):
        push_robust_encoder(folder, "me/robust-clip")


def test_a_card_edited_by_hand_keeps_its_words(folder):
    path = folder / "README.md"
    path.write_text(path.read_text() + "\n## My words\n\nTrained on a Sunday.\n")
    release = prepare_release(folder)
    text = release.card_for("me/robust-clip").decode()
    assert "Trained on a Sunday." in text
    assert 'CLIPModel.from_pretrained("me/robust-clip")' in text
    assert 'from_pretrained(".")' not in text
    assert ModelCard(text).data.eval_results == ModelCard.load(path).data.eval_results


def test_dry_run_lists_what_would_go(folder, capsys):
    assert main(["push", str(folder), "me/robust-clip", "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("would push the model to me/robust-clip:\n")
    listed = {line.strip() for line in said.splitlines()[1:]}
    assert {"README.md", "model.safetensors", "robustness.json", "robustness.png", "tokenizer.json"} <= listed
    assert not [name for name in listed if "args" in name or "checkpoint" in name or "optimizer" in name]
    assert main(["push", str(folder / "checkpoint-2"), "me/robust-clip", "--dry_run"]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_a_dry_run_says_whose_licence_is_asked_for(folder, capsys):
    card = ModelCard.load(folder / "README.md")
    card.data.license = None
    card.data.base_model = "openai/clip-vit-base-patch32"
    card.save(folder / "README.md")
    assert main(["push", str(folder), "me/robust-clip", "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert "a push asks the Hub for that of openai/clip-vit-base-patch32; or --license mit" in said


def test_a_card_by_itself(folder, tmp_path, capsys):
    card, curve = folder / "README.md", folder / "robustness.png"
    assert main(["card", str(folder)]) == 1
    assert f"{card} is there; add --overwrite to replace it" in capsys.readouterr().err
    card.unlink(), curve.unlink()
    assert main(["card", str(folder), "--base_model", "me/clip", "--license", "mit", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"card": str(card)}
    written = ModelCard.load(card)
    assert (written.data.base_model, written.data.license) == ("me/clip", "mit")
    assert written.text.lstrip().startswith(f"# {folder.name}")
    assert "robustness.png" in written.text
    assert curve.stat().st_size > 0
    assert prepare_release(folder).kind == "model"
    assert main(["card", str(folder), "--overwrite"]) == 0
    card.unlink()
    (folder / "robustness.json").unlink()
    assert main(["card", str(folder)]) == 1
    assert "--output_dir" in capsys.readouterr().err
    assert not card.exists()


def test_load_from_a_folder(folder, seen_images):
    loaded = load_robust_encoder(folder)
    assert loaded.training["steps"] == 7
    assert [result.model for result in (*loaded.before, *loaded.results)] == ["before"] * 2 + ["after"] * 2
    assert "3 samples measured again, 9 outcomes: all as recorded" in str(loaded.repeat(seen_images, max_samples=3))
    scaled(folder)
    with pytest.raises(ValueError, match="measured on other weights than it holds"):
        load_robust_encoder(folder)
    (folder / "robustness.json").unlink()
    with pytest.raises(ValueError, match="load_encoder reads a CLIP without a record"):
        load_robust_encoder(folder)


def pushed_tower(folder, place):
    """What a push of the tower alone uploads."""
    place.mkdir()
    for name, content in prepare_release(folder, "tower").files.items():
        (place / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    return place


def test_a_tower_alone_is_compared_with_its_record(folder, tmp_path):
    """findings-swap 2: a random tower with a foreign record loaded without a word."""
    tower = pushed_tower(folder, tmp_path / "tower")
    assert load_robust_encoder(tower).results[0].model_sha256 == load_robust_encoder(folder).results[0].model_sha256
    mine = (tower / "robustness.json").read_text()
    foreign = mine.replace(load_robust_encoder(folder).results[0].model_sha256, "0" * 64)
    (tower / "robustness.json").write_text(foreign)
    with pytest.raises(ValueError, match="measured on other weights than it holds"):
        load_robust_encoder(tower)
    (tower / "robustness.json").write_text(mine)
    weights = load_file(tower / "model.safetensors")
    weights["visual_projection.weight"] = weights["visual_projection.weight"] + 1
    save_file(weights, tower / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="measured on other weights than it holds"):
        load_robust_encoder(tower)


def test_a_tower_that_does_not_tell_its_model_is_refused(folder, tmp_path):
    tower = pushed_tower(folder, tmp_path / "tower")
    edit(tower / "config.json", lambda config: config.pop("robust_vision_record"))
    with pytest.raises(ValueError, match="its tower does not tell which: push it again"):
        load_robust_encoder(tower)


def test_results_of_other_tasks_go_along(folder, seen_images):
    """A corruption has several records a sample; it is told on the card, and not measured again."""
    results = load_results(folder)
    other = replace(
        results[-1],
        task="corruption",
        metric="mean corruption accuracy",
        norm="none",
        eps=0.0,
        severity=3,
        attacks=[{"name": "fog"}, {"name": "snow"}],
        samples="samples-c.jsonl",
    )
    rows = [json.loads(line) for line in (folder / results[-1].samples).read_text().splitlines()]
    rows = [row | {"fooled_by": "fog" if row["fooled_by"] == "apgd-ce" else row["fooled_by"]} for row in rows]
    lines = [json.dumps(row | {"id": f"{name}/{row['id']}"}) for name in ("fog", "snow") for row in rows]
    (folder / "samples-c.jsonl").write_text("\n".join(lines))
    describe(folder, [*results, other])
    release = prepare_release(folder)
    assert "samples-c.jsonl" in release.files
    types = [row.metric_type for row in release.card.data.eval_results]
    assert types == [
        "accuracy",
        *["robust_accuracy"] * 2,
        "mean_corruption_accuracy",
        "robust_mean_corruption_accuracy",
    ]
    assert "severity 3 (mean corruption accuracy on tiny-images) |" in release.card.text
    assert load_robust_encoder(folder).repeat(seen_images, max_samples=2).flags == 6
