"""Publish a measured model on the Hub: everything is checked first, one commit holds it all, and nothing is lost."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from filecmp import cmp
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_token,
    snapshot_download,
)
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoModelForImageTextToText

from .card import license_of
from .load import load_robust_encoder
from .release import CARD, REPLACED, Release, prepare_release
from .repeat import Repeat


MAX_TITLE, MAX_NOTE = 59, 500  # characters that the Hub takes of a collection


class PushError(OSError):
    """A push that did not go through; the message says why and what to type to repeat it."""


class VerificationError(ValueError):
    """What was published could not be read back, or gives other outcomes than those on its card."""


@dataclass(frozen=True)
class PushReport:
    """What a push did."""

    repo_id: str
    kind: str
    files: tuple[str, ...]  # paths in the repository
    commit: str | None = None  # None for a dry run
    url: str | None = None  # of the commit, or of the pull request
    license: str | None = None
    base_model: str | None = None  # Hub id of the original, where it is known
    collection: str | None = None  # URL of the collection that it was added to
    repeat: Repeat | None = None  # made on what was downloaded; None where none was asked for or possible

    def __str__(self) -> str:
        unlicensed = [] if self.license else ["it states no licence; name one: --license mit"]
        if self.commit is None:
            if self.base_model and not self.license:
                unlicensed = [
                    f"it states no licence: a push asks the Hub for that of {self.base_model}; or --license mit"
                ]
            lines = [f"would push the {self.kind} to {self.repo_id}:", *(f"  {name}" for name in self.files)]
            return "\n".join(lines + unlicensed)
        lines = [f"pushed the {self.kind} to {self.repo_id}: {len(self.files)} files in one commit, {self.url}"]
        lines += [f"downloaded again: {self.repeat}"] if self.repeat else []
        lines += [f"added to {self.collection}"] if self.collection else []
        return "\n".join(lines + unlicensed)


@dataclass(frozen=True)
class PushSettings:
    """What `push_robust_encoder` takes by name."""

    what: str | None = None  # "model", "tower" (its vision half) or "adapter"; by default what the folder holds
    private: bool | None = None  # of a new repository; by default what your account says
    revision: str | None = None  # branch to push to, created if it does not exist
    commit_message: str | None = None  # by default what was uploaded
    token: str | None = None  # by default the one of `hf auth login` or HF_TOKEN
    create_pr: bool = False  # open a pull request instead
    base_model: str | None = None  # Hub id of the original, where card or adapter name a local folder
    license: str | None = None  # such as "apache-2.0"; by default what the card says, then what the original's says
    collection: str | None = None  # title of a collection of yours to add it to, made if there is none
    dry_run: bool = False  # check everything that can be checked offline, and upload nothing
    verify: bool = False  # download what was pushed, compare every byte, load it, and measure it again
    verify_samples: int | None = 32  # how many of the recorded samples; None for all
    dataset: Any = None  # data for that; see `repeat_zero_shot`
    device: Any = None  # where to do it; by default on the CPU

    def __post_init__(self) -> None:
        if self.create_pr and self.revision not in (None, "main"):
            wrong = f"revision={self.revision!r}"
            raise ValueError(f"a pull request goes to the main branch, not to {wrong}; leave one out.")
        if self.collection is not None and not 1 <= len(self.collection) <= MAX_TITLE:
            said = f"1 to {MAX_TITLE} characters, got {len(self.collection)}"
            raise ValueError(f"collection: the Hub wants a title of {said}.")

    def command(self, folder: str | Path, repo_id: str) -> str:
        """The line that does it again."""
        flags = ["what", "revision", "base_model", "license", "collection"]
        words = [word for name in flags if (value := getattr(self, name)) is not None for word in (f"--{name}", value)]
        words += [f"--{name}" for name in ("private", "create_pr") if getattr(self, name)]
        return shlex.join(["hf-robust-vision", "push", str(folder), repo_id, *words])


def push_robust_encoder(folder: str | Path, repo_id: str, **settings: Any) -> PushReport:
    """Upload a folder that a recipe wrote: weights, processor, card, curve, `robustness.json` and its samples.

    Only these files are uploaded; checkpoints, optimizer state and `training_args.bin` stay at home. They arrive in one
    commit, which also deletes the files of an earlier push that this one does not have. The folder is only read; a
    repository that does not exist is created. The settings are those of `PushSettings`.

    Raises:
        ValueError: If the folder is not complete or not measured, or the repository's id or the token is missing.
        PushError: If the Hub can not be reached or refuses; the folder is as it was.
        VerificationError: If what was pushed can not be read back or gives other outcomes than the recorded ones.
    """
    how = PushSettings(**settings)
    if how.dry_run:
        check_id(repo_id)
    else:
        check_target(repo_id, how.token)
    release = prepare_release(folder, how.what, base_model=how.base_model, license=how.license)
    names = tuple(sorted([*release.files, CARD]))
    if how.dry_run:
        return PushReport(repo_id, release.kind, names, license=release.license, base_model=release.base_model)
    if release.license is None and release.base_model is not None:
        release.card.data["license"] = license_of(release.base_model)
    message = f"Robust {'VLM' if release.kind == 'vlm' else f'CLIP {release.kind}'} with its measurements"
    repo, info = send(folder, repo_id, how, release.contents, message)
    repeat = _verify(release, repo, info, how) if how.verify else None
    collection = collect(folder, repo, how, release.headline)
    done = (info.oid, info.pr_url or info.commit_url, release.license, release.base_model, collection, repeat)
    return PushReport(repo, release.kind, names, *done)


def check_target(repo_id: str, token: str | None = None) -> None:
    """Refuse what can not be pushed to, without asking the Hub: good to know before a training of hours."""
    check_id(repo_id)
    if constants.HF_HUB_OFFLINE:
        raise ValueError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it.")
    if token is None and get_token() is None:
        raise ValueError("there is no token to push with: type `hf auth login`, or set HF_TOKEN.")


def check_id(repo_id: str) -> None:
    """Refuse what is no id of a repository."""
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise ValueError(f"{repo_id!r} is no id of a repository, wanted owner/name: {error}") from error


def send(
    folder: str | Path,
    repo_id: str,
    how: PushSettings,
    contents: Callable[[str], Mapping[str, Path | bytes]],
    message: str,
    *,
    repo_type: str = "model",
    replaced: Sequence[str] = REPLACED,
) -> tuple[str, CommitInfo]:
    """Upload files in one commit, which deletes what an earlier push left of the `replaced` patterns.

    Args:
        folder: Where they come from, for the error.
        repo_id: Where they go; it is created if it does not exist.
        how: Branch, token, visibility, message.
        contents: The files of a repository of that full name.
        message: Of the commit, where the settings have none.
        repo_type: "model" or "dataset".
        replaced: Patterns of names that are ours.

    Raises:
        PushError: If the Hub can not be reached or refuses.
    """
    api = HfApi(token=how.token)
    kind: dict[str, Any] = {"repo_type": repo_type}
    try:
        repo = api.create_repo(repo_id, private=how.private, exist_ok=True, **kind).repo_id
        if how.revision not in (None, "main") and not str(how.revision).startswith("refs/"):
            api.create_branch(repo, branch=str(how.revision), exist_ok=True, **kind)
        # Not `upload_folder`: it splits an upload into several commits.
        info = api.create_commit(
            repo,
            _operations(contents(repo), api.list_repo_files(repo, revision=how.revision, **kind), replaced),
            commit_message=how.commit_message or message,
            revision=how.revision,
            create_pr=how.create_pr,
            **kind,
        )
    except Exception as error:  # the client raises its own, its HTTP library's, OSError, RuntimeError and ValueError
        raise PushError(
            f"the push of {folder} to {repo_id} did not go through: {_reason(error)} Nothing is lost: {folder} is as it "
            f"was, and a commit arrives whole or not at all. To repeat it: {how.command(folder, repo_id)}"
        ) from error
    return repo, info


def collect(
    folder: str | Path, repo: str, how: PushSettings, note: str, repo_type: Literal["model", "dataset"] = "model"
) -> str | None:
    """Add a repository with a note to the owner's collection of the wanted title, if any; the collection's URL.

    Raises:
        PushError: If the Hub can not be reached or refuses.
    """
    if how.collection is None:
        return None
    api, owner = HfApi(token=how.token), repo.split("/")[0]
    try:
        made = api.create_collection(how.collection, namespace=owner, private=bool(how.private), exists_ok=True)
        return api.add_collection_item(made.slug, repo, repo_type, note=note[:MAX_NOTE], exists_ok=True).url
    except Exception as error:  # as in `send`
        raise PushError(
            f"{repo} was pushed, but not added to the collection {how.collection!r}: {_reason(error)} To repeat it: "
            f"{how.command(folder, repo)}"
        ) from error


def _operations(contents: Mapping[str, Path | bytes], present: Sequence[str], replaced: Sequence[str]) -> list[Any]:
    """Additions, and deletions of what an earlier push left: an adapter beside a model would be loaded with it."""
    # A pattern's * would reach into folders, which are not ours.
    old = [name for name in present if name not in contents]
    stale = [name for name in old if any(_matches(name, pattern) for pattern in replaced)]
    added = [CommitOperationAdd(name, content) for name, content in sorted(contents.items())]
    return [*added, *map(CommitOperationDelete, stale)]


def _matches(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatch(name, pattern)


def _verify(release: Release, repo: str, info: CommitInfo, how: PushSettings) -> Repeat | None:
    """Download the commit, compare every byte, load it, and measure it again where it has a text tower."""
    told = f"{repo} was pushed ({info.pr_url or info.commit_url}), but "
    with TemporaryDirectory() as place:
        contents = release.contents(repo)
        try:
            # Forced: the client would copy a file of that hash from its cache, and prove nothing.
            wanted: dict[str, Any] = {"revision": info.oid, "allow_patterns": list(contents), "force_download": True}
            snapshot_download(repo, token=how.token, local_dir=place, **wanted)
            changed = [name for name, content in contents.items() if not _same(Path(place) / name, content)]
            if changed:
                raise ValueError(f"these files came back with other bytes: {changed}")
            if release.kind == "vlm":
                AutoModelForImageTextToText.from_pretrained(place)
                return None
            loaded = load_robust_encoder(place)
            # The tower's bytes were cut from the measured model; without its text half it can not be measured.
            if release.kind == "tower":
                return None
            repeat = loaded.repeat(how.dataset, max_samples=how.verify_samples, device=how.device)
        except Exception as error:  # as above, and whatever loading and measuring raise
            raise VerificationError(f"{told}could not be verified: {_reason(error)}") from error
    if repeat.differing:
        raise VerificationError(
            f"{told}on this machine {repeat}, such as {list(repeat.differing[:5])}. On another kind of device rounding "
            "can tip samples at the border; otherwise the card is wrong."
        )
    return repeat


def _same(file: Path, content: Path | bytes) -> bool:
    if not file.is_file():
        return False
    return file.read_bytes() == content if isinstance(content, bytes) else cmp(file, content, shallow=False)


# What the Hub's refusals mean, and what to type.
_REFUSALS = {
    401: "the Hub does not know the token (401: {}); type `hf auth login`.",
    403: "the token may not write there (403: {}); use one with write access to that owner.",
    429: "the Hub asks to slow down (429: {}); wait some minutes.",
}


def _reason(error: Exception) -> str:
    """What went wrong, in the words of someone who can mend it."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, HfHubHTTPError):
        cause = cause.__cause__
    said = " ".join(str(error).split())
    if cause is None:
        return f"{type(error).__name__}: {said.rstrip('.')}."
    server = " ".join((cause.server_message or said).split()).rstrip(".")
    status = cause.response.status_code
    if status in (402, 413, 507) or re.search("quota|storage|limit reached", server, re.IGNORECASE):
        return f"there is no room ({status}: {server}); free some, or push the adapter alone."
    return _REFUSALS.get(status, f"the Hub answered {status}: {{}}.").format(server)
