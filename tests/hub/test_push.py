"""Publishing through the real client, to a hub on this machine; breaking half-way, and doing it again."""

from __future__ import annotations

import json
import shlex
import shutil
import warnings
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import CLIPModel

from hf_robust_vision import load_robust_encoder
from hf_robust_vision.evaluation.results import load_results, save_results
from hf_robust_vision.hub.push import PushError, VerificationError
from hf_robust_vision.pixels import PixelTransform
from hf_robust_vision.towers.base import weights_sha256
from hf_robust_vision.towers.load import as_encoder, load_encoder
from tests.hub import client as remote
from tests.hub.conftest import LEFTOVERS, describe, measure
from tests.hub.server import Fault


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_pushed_downloaded_and_measured_again(hub, client, measured, seen_images):
    kept = contents(measured)
    done = client(remote.push, measured, "me/robust-clip", verify=True, verify_samples=None, dataset=str(seen_images))
    assert contents(measured) == kept
    assert hub.repos["me/robust-clip"].messages == ["initial commit", "Robust CLIP model with its measurements"]
    arrived = hub.files("me/robust-clip")
    assert set(arrived) - {".gitattributes"} == set(done["report"].files)
    assert not set(arrived) & set(LEFTOVERS)
    assert all(arrived[name] == kept[name] for name in arrived if name not in ("README.md", ".gitattributes"))
    assert {"model.safetensors", "config.json", "robustness.json", "robustness.png"} <= set(arrived)
    assert len([name for name in arrived if name.startswith("samples-")]) == 4
    repeat = done["report"].repeat
    assert (repeat.samples, repeat.flags, repeat.differing) == (12, 36, ())
    assert "12 samples measured again, 36 outcomes: all as recorded" in done["text"]

    stock = client(remote.stock_model, "me/robust-clip")
    assert stock["file"] == sha256(kept["model.safetensors"]).hexdigest()
    assert stock["weights"] == weights_sha256(CLIPModel.from_pretrained(measured))
    assert stock["missing"] == []


def test_the_card_is_found_and_read_by_the_client(hub, client, measured):
    client(remote.push, measured, "me/robust-clip", license="apache-2.0")
    info = client(remote.model_info, "me/robust-clip")
    assert info["listed"] == ["me/robust-clip"]
    assert (info["library"], info["task"], info["license"]) == (
        "transformers", "zero-shot-image-classification", "apache-2.0",
    )  # fmt: skip
    assert {"adversarial-robustness", "sim-clip", "base_model:finetune:me/base"} <= set(info["tags"])
    after = [result for result in load_results(measured) if result.model == "after"]
    assert [(row.metric_type, row.metric_value) for row in info["results"]] == [
        ("accuracy", after[0].clean_accuracy),
        *(("robust_accuracy", result.robust_accuracy) for result in after),
    ]
    for row, result in zip(info["results"][1:], after):
        assert (row.metric_args["eps"], row.metric_args["norm"]) == (result.eps, "linf")
        (attack,) = row.metric_args["attacks"]
        assert (attack["name"], attack["steps"], attack["restarts"]) == ("apgd-ce", 3, result.attacks[0]["restarts"])
    metrics = info["index"][0]["results"][0]["metrics"]
    assert [row["value"] for row in metrics] == [row.metric_value for row in info["results"]]


def test_the_example_of_the_card_runs(hub, client, measured):
    client(remote.push, measured, "me/robust-clip")
    card = hub.files("me/robust-clip")["README.md"].decode()
    assert 'from_pretrained("me/robust-clip")' in card
    assert str(measured.parent) not in card
    assert client(remote.run_usage, card).startswith("tensor([[")


def test_the_record_comes_back_with_the_encoder(hub, client, measured):
    client(remote.push, measured, "me/robust-clip", private=True)
    assert hub.repos["me/robust-clip"].private
    loaded = client(remote.load, "me/robust-clip")
    results = load_results(measured)
    assert loaded["before"] + loaded["results"] == results
    assert loaded["training"]["method"] == "Sim-CLIP"
    assert loaded["weights"] == results[-1].model_sha256
    with pytest.raises(ValueError, match="me/nothing is neither a folder nor a model of the Hub"):
        client(remote.load, "me/nothing")


def test_tower_alone(hub, client, measured):
    status, said = client(remote.command, "push", measured, "me/tower", "--what", "tower", "--verify")
    assert status == 0, said
    loaded = client(remote.load, "me/tower")
    encoder = load_encoder(measured)
    assert (loaded["kind"], loaded["weights"]) == ("CLIPVisionEncoder", weights_sha256(encoder.vision_half()))
    arrived = hub.files("me/tower")
    assert "tokenizer.json" not in arrived
    assert len(arrived["model.safetensors"]) < len((measured / "model.safetensors").read_bytes())
    assert client(remote.run_usage, arrived["README.md"].decode()).strip() == "torch.Size([1, 16])"
    assert client(remote.model_info, "me/tower")["task"] == "image-feature-extraction"


@pytest.fixture(scope="module")
def adapter(clip_folder, processor, seen_images, tmp_path_factory):
    """An adapter folder as peft writes it, measured merged."""
    folder = tmp_path_factory.mktemp("adapter") / "lora"
    vision = r"vision_model\..*\.(q_proj|v_proj)"
    torch.manual_seed(2)
    model = get_peft_model(
        CLIPModel.from_pretrained(clip_folder), LoraConfig(target_modules=vision, r=2, init_lora_weights=False)
    )
    model.save_pretrained(folder)
    merged = as_encoder(
        model.merge_and_unload().eval(), PixelTransform.from_image_processor(processor.image_processor)
    )
    describe(folder, measure(merged, processor, seen_images, folder, "after"))
    return folder


def test_adapter_alone(hub, client, adapter, clip_folder, measured, seen_images, tmp_path):
    base = shutil.copytree(measured, tmp_path / "base")  # only to have the original on the hub
    for name in ("model.safetensors", "config.json"):
        shutil.copy(clip_folder / name, base / name)
    results = [result for result in load_results(measured) if result.model == "before"]
    for result in results:
        result.model = "after"
    describe(base, results)
    client(remote.push, base, "me/base")
    with pytest.raises(ValueError, match="which nobody else has.*--base_model owner/model"):
        client(remote.push, adapter, "me/lora")
    settings = {"base_model": "me/base", "verify": True, "dataset": str(seen_images)}
    done = client(remote.push, adapter, "me/lora", **settings)
    assert (done["report"].kind, done["report"].repeat.differing) == ("adapter", ())
    arrived = hub.files("me/lora")
    assert json.loads(arrived["adapter_config.json"])["base_model_name_or_path"] == "me/base"
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(clip_folder)
    assert len(arrived["adapter_model.safetensors"]) < 0.05 * len(hub.files("me/base")["model.safetensors"])
    assert "model.safetensors" not in arrived
    info = client(remote.model_info, "me/lora")
    assert (info["library"], info["base_model"]) == ("peft", "me/base")
    assert "base_model:adapter:me/base" in info["tags"]
    assert client(remote.run_usage, arrived["README.md"].decode()).startswith("tensor([[")

    # A model pushed to the same repository takes the adapter's place: beside it, it would be loaded with it.
    hub.repos["me/lora"].commits[hub.repos["me/lora"].refs["main"]]["my-notes.md"] = (b"mine", False)
    client(remote.push, measured, "me/lora")
    arrived = hub.files("me/lora")
    assert not {"adapter_config.json", "adapter_model.safetensors"} & set(arrived)
    assert arrived["my-notes.md"] == b"mine"
    assert client(remote.load, "me/lora")["weights"] == load_results(measured)[-1].model_sha256


def test_merged_weights_are_compared_with_those_measured(adapter, tmp_path):
    """On one machine a merge is bit for bit the same; numbers of another model are told from it."""
    folder = shutil.copytree(adapter, tmp_path / "lora")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_robust_encoder(folder)
    results = load_results(folder)
    for result in results:
        result.model_sha256 = "0" * 64
    save_results(results, folder)
    with pytest.warns(UserWarning, match="is not bit for bit what its numbers were measured on"):
        load_robust_encoder(folder)


def test_broken_half_way_and_repeated(hub, client, measured):
    kept = contents(measured)
    hub.faults.append(Fault("POST", "/commit/"))
    status, said = client(remote.command, "push", measured, "me/robust-clip", "--license", "mit")
    assert status == 1
    assert said.startswith(f"error: the push of {measured} to me/robust-clip did not go through: ")
    assert contents(measured) == kept
    assert set(hub.files("me/robust-clip")) == {".gitattributes"}
    uploads = hub.count("PUT", "/lfs/")
    again = shlex.split(said.rsplit("To repeat it: ", 1)[1])
    assert again == ["hf-robust-vision", "push", str(measured), "me/robust-clip", "--license", "mit"]
    status, said = client(remote.command, *again[1:])
    assert status == 0, said
    assert "in one commit" in said
    assert hub.count("PUT", "/lfs/") == uploads == 2, "the large files had arrived, and are not sent twice"
    assert client(remote.load, "me/robust-clip")["weights"] == load_results(measured)[-1].model_sha256
    assert client(remote.command, *again[1:])[0] == 0
    assert len(hub.repos["me/robust-clip"].messages) == 2, "nothing changed, so nothing is committed"


def test_line_dead_during_the_upload_of_the_weights(hub, client, measured):
    hub.faults.append(Fault("PUT", "/lfs/"))
    client(remote.push, measured, "me/robust-clip")  # the client tries again by itself
    assert hub.count("PUT", "/lfs/") == 3
    assert hub.files("me/robust-clip")["model.safetensors"] == (measured / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("fault", "token", "said"),
    [
        (
            None,
            "hf_reader",
            r"may not write there \(403: You don't have the rights to write to me\); use one with write",
        ),
        (None, "hf_expired", r"does not know the token \(401: .*\); type `hf auth login`"),
        (Fault("PUT", "/lfs/", 9, 413, "file is too large"), None, r"there is no room \(413: file is too large\)"),
        (
            Fault("POST", "/preupload/", 9, 403, "Private repository storage limit reached"),
            None,
            r"there is no room \(403: Private repository storage limit reached\)",
        ),
        (Fault("POST", "/commit/", 9, 429, "Too many commits"), None, r"slow down \(429: .*\); wait some minutes"),
    ],
    ids=["permission", "token", "size", "quota", "rate"],
)
def test_refused_by_the_hub(hub, client, measured, fault, token, said):
    kept = contents(measured)
    hub.faults += [fault] if fault else []
    with pytest.raises(PushError, match=said) as caught:
        client(remote.push, measured, "me/robust-clip", token=token)
    message = str(caught.value)
    assert f"Nothing is lost: {measured} is as it was" in message
    assert message.endswith(f"To repeat it: hf-robust-vision push {measured} me/robust-clip")
    assert contents(measured) == kept


def test_verification_sees_what_was_changed(hub, client, measured, seen_images, tmp_path):
    hub.corrupt = "robustness.json"
    with pytest.raises(VerificationError, match=r"was pushed .*came back with other bytes: \['robustness.json'\]"):
        client(remote.push, measured, "me/robust-clip", verify=True)
    hub.corrupt = None
    folder = shutil.copytree(measured, tmp_path / "claims")
    small, large = (
        [json.loads(line) for line in (folder / result.samples).read_text().splitlines()]
        for result in load_results(folder)
        if result.model == "after"
    )
    # Two samples change places, so that every sum and the order of the radii stay as they were.
    stood = next(row for row in large if row["fooled_by"] is None)
    fell = next(
        row for row, below in zip(large, small) if row["fooled_by"] == "apgd-ce" and below["fooled_by"] is None
    )
    stood["fooled_by"], fell["fooled_by"] = "apgd-ce", None
    path = folder / load_results(folder)[-1].samples
    path.write_text("".join(json.dumps(line) + "\n" for line in large))
    with pytest.raises(VerificationError, match=r"12 samples measured again, 36 outcomes: 2 samples differ"):
        client(remote.push, folder, "me/claims", verify=True, dataset=str(seen_images))


def test_branch_and_pull_request(hub, client, measured):
    client(remote.push, measured, "me/robust-clip", revision="eps4")
    assert set(hub.files("me/robust-clip")) == {".gitattributes"}
    assert "model.safetensors" in hub.files("me/robust-clip", "eps4")
    done = client(remote.push, measured, "me/robust-clip", create_pr=True, commit_message="Robust weights")
    assert done["report"].url.endswith("/discussions/2")
    assert set(hub.files("me/robust-clip")) == {".gitattributes"}
    assert hub.repos["me/robust-clip"].messages[-1] == "Robust weights"
    with pytest.raises(ValueError, match="leave one out"):
        client(remote.push, measured, "me/robust-clip", create_pr=True, revision="eps4")


def test_a_name_without_owner_is_mine(hub, client, measured):
    assert client(remote.push, measured, "robust-clip")["report"].repo_id == "me/robust-clip"
    assert 'from_pretrained("me/robust-clip")' in hub.files("me/robust-clip")["README.md"].decode()


def test_models_of_one_comparison_in_one_collection(hub, client, measured):
    """Made once, and each model stands in it once, with its numbers."""
    words = ["--collection", "Flowers, hardened"]
    for name in ("me/one", "me/two", "me/two"):
        status, said = client(remote.command, "push", measured, name, *words)
        assert status == 0, said
        assert "added to http" in said
    ((title, items),) = client(remote.collections, list(hub.collections))
    assert title == "Flowers, hardened"
    assert [item[:2] for item in items] == [("me/one", "model"), ("me/two", "model")]
    last = load_results(measured)[-1]
    assert items[0][2] == (
        f"On tiny-images (test, 12 samples), accuracy: {last.clean_accuracy:.1%} clean, {last.robust_accuracy:.1%} at "
        "linf 1/255."
    ).replace("%", " %")


def test_a_collection_that_fails_says_that_the_model_is_there(hub, client, measured):
    hub.faults.append(Fault("POST", "/api/collections", 9, 403, "no more collections"))
    with pytest.raises(
        PushError, match="me/one was pushed, but not added to the collection 'Mine': .*To repeat it: "
    ) as caught:
        client(remote.push, measured, "me/one", collection="Mine")
    assert str(caught.value).endswith("me/one --collection Mine")
    assert "model.safetensors" in hub.files("me/one")
    with pytest.raises(ValueError, match="a title of 1 to 59 characters, got 60"):
        client(remote.push, measured, "me/one", collection="x" * 60)


def test_the_licence_is_inherited_from_the_original(hub, client, measured, tmp_path):
    folder = shutil.copytree(measured, tmp_path / "run")
    describe(folder, load_results(folder), license=None)
    done = client(remote.push, folder, "me/unlicensed", base_model="me/nothing")
    assert "it states no licence; name one: --license" in done["text"]
    client(remote.push, measured, "me/base", license="bigscience-openrail-m")
    done = client(remote.push, folder, "me/heir")
    assert "no licence" not in done["text"]
    assert client(remote.model_info, "me/heir")["license"] == "bigscience-openrail-m"
    client(remote.push, folder, "me/heir", license="mit")
    assert client(remote.model_info, "me/heir")["license"] == "mit"
