"""Adversarial images published as a data set by the real client, to a hub on this machine."""

from __future__ import annotations

import json
import shutil

import pytest
from huggingface_hub import DatasetCard

from hf_robust_vision.attacks import get_protocol
from hf_robust_vision.cli import main
from hf_robust_vision.evaluation.task import RobustnessProtocol
from hf_robust_vision.hub.adversarial import load_record
from hf_robust_vision.hub.push_images import push_images
from hf_robust_vision.pipeline.attack import attack_images
from hf_robust_vision.pipeline.measure import EvaluationSet
from tests.hub import client as remote


@pytest.fixture(scope="module")
def attacked(clip_folder, image_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("attacked") / "out"
    how = RobustnessProtocol(get_protocol("quick", steps=2), (8 / 255,))
    attack_images(str(clip_folder), EvaluationSet(str(image_folder)), how, folder, device="cpu", progress=False)
    return folder


@pytest.fixture
def folder(attacked, tmp_path):
    return shutil.copytree(attacked, tmp_path / "out")


def test_pushed_and_loaded(hub, client, folder):
    words = ["--license", "cc-by-4.0", "--collection", "Flowers under attack"]
    status, said = client(remote.command, "push", folder, "me/adversarial", *words)
    assert (status, "states no licence" in said) == (0, False), said
    record = load_record(folder)
    arrived = hub.files("datasets/me/adversarial")
    wanted = {"attack.json", "metadata.parquet", "README.md", ".gitattributes", *(one.file for one in record.images)}
    assert set(arrived) == wanted, "floats, samples and results stay at home"
    there = client(remote.load_images, "me/adversarial")
    assert (there["license"], there["names"]) == ("cc-by-4.0", record.class_names)
    assert 'load_dataset("me/adversarial", split="adversarial")' in there["card"]
    assert sorted(row["id"] for row in there["rows"]) == sorted(str(one.id) for one in record.images)
    assert set(there["sizes"]) == {(32, 32)}
    ((title, items),) = client(remote.collections, list(hub.collections))
    assert (title, *items[0][:2]) == ("Flowers under attack", "me/adversarial", "dataset")
    assert "transfer only" in items[0][2]

    # Again with fewer images: those of before are gone.
    gone = record.images[0].file
    values = json.loads((folder / "attack.json").read_text())
    values["images"] = values["images"][1:]
    (folder / "attack.json").write_text(json.dumps(values))
    assert client(remote.command, "push", folder, "me/adversarial", *words)[0] == 0
    assert set(hub.files("datasets/me/adversarial")) == wanted - {gone}


def test_what_is_not_whole_or_lost_its_label_is_refused(folder, capfd):
    assert main(["push", str(folder), "me/adversarial", "--dry_run"]) == 0
    said = capfd.readouterr().out
    assert said.startswith("would push the adversarial images to me/adversarial:\n")
    assert "it states no licence; name one: --license" in said
    with pytest.raises(ValueError, match="have no use for --verify; leave it out"):
        push_images(folder, "me/adversarial", dry_run=True, verify=True)
    image = folder / load_record(folder).images[0].file
    kept = image.read_bytes()
    image.unlink()
    with pytest.raises(ValueError, match=f"{image.name} is missing; attack again"):
        push_images(folder, "me/adversarial", dry_run=True)
    (folder.parent / "secret.png").write_bytes(b"")
    image.symlink_to(folder.parent / "secret.png")
    with pytest.raises(ValueError, match="is a link to .*secret.png, outside of"):
        push_images(folder, "me/adversarial", dry_run=True)
    image.unlink()
    image.write_bytes(kept)
    card = DatasetCard.load(folder / "README.md")
    card.data.tags = ["images"]
    card.save(folder / "README.md")
    with pytest.raises(ValueError, match="has lost its tag 'transfer-only'"):
        push_images(folder, "me/adversarial", dry_run=True)
