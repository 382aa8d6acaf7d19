"""Publish a measured model on the Hub: everything is checked first, one commit holds it all, and nothing is lost."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from filecmp import cmp
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

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

from .load import load_robust_encoder
from .release import CARD, REPLACED, Release, prepare_release
from .repeat import Repeat


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
    repeat: Repeat | None = None  # made on what was downloaded; None where none was asked for or possible

    def __str__(self) -> str:
        if self.commit is None:
            return "\n".join([f"would push the {self.kind} to {self.repo_id}:", *(f"  {name}" for name in self.files)])
        lines = [f"pushed the {self.kind} to {self.repo_id}: {len(self.files)} files in one commit, {self.url}"]
        return "\n".join([*lines, f"downloaded again: {self.repeat}"] if self.repeat else lines)


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
    license: str | None = None  # for the card, such as "apache-2.0"
    dry_run: bool = False  # check everything that can be checked offline, and upload nothing
    verify: bool = False  # download what was pushed, compare every byte, load it, and measure it again
    verify_samples: int | None = 32  # how many of the recorded samples; None for all
    dataset: Any = None  # data for that; see `repeat_zero_shot`
    device: Any = None  # where to do it; by default on the CPU

    def __post_init__(self) -> None:
        if self.create_pr and self.revision not in (None, "main"):
            wrong = f"revision={self.revision!r}"
            raise ValueError(f"a pull request goes to the main branch, not to {wrong}; leave one out.")

    def command(self, folder: str | Path, repo_id: str) -> str:
        """The line that does it again."""
        flags = ["what", "revision", "base_model", "license"]
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
        _check_id(repo_id)
    else:
        check_target(repo_id, how.token)
    release = prepare_release(folder, how.what, base_model=how.base_model, license=how.license)
    names = tuple(sorted([*release.files, CARD]))
    if how.dry_run:
        return PushReport(repo_id, release.kind, names)
    try:
        repo, info = _upload(release, repo_id, how)
    except Exception as error:  # the client raises its own, its HTTP library's, OSError, RuntimeError and ValueError
        raise PushError(
            f"the push of {folder} to {repo_id} did not go through: {_reason(error)} Nothing is lost: {folder} is as it "
            f"was, and a commit arrives whole or not at all. To repeat it: {how.command(folder, repo_id)}"
        ) from error
    repeat = _verify(release, repo, info, how) if how.verify else None
    return PushReport(repo, release.kind, names, info.oid, info.pr_url or info.commit_url, repeat)


def check_target(repo_id: str, token: str | None = None) -> None:
    """Refuse what can not be pushed to, without asking the Hub: good to know before a training of hours."""
    _check_id(repo_id)
    if constants.HF_HUB_OFFLINE:
        raise ValueError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it.")
    if token is None and get_token() is None:
        raise ValueError("there is no token to push with: type `hf auth login`, or set HF_TOKEN.")


def _check_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise ValueError(f"{repo_id!r} is no id of a repository, wanted owner/name: {error}") from error


def _upload(release: Release, repo_id: str, how: PushSettings) -> tuple[str, CommitInfo]:
    api = HfApi(token=how.token)
    repo = api.create_repo(repo_id, private=how.private, exist_ok=True).repo_id
    if how.revision not in (None, "main") and not str(how.revision).startswith("refs/"):
        api.create_branch(repo, branch=str(how.revision), exist_ok=True)
    # Not `upload_folder`: it splits an upload into several commits.
    info = api.create_commit(
        repo,
        _operations(release.contents(repo), api.list_repo_files(repo, revision=how.revision)),
        commit_message=how.commit_message
        or f"Robust {'VLM' if release.kind == 'vlm' else f'CLIP {release.kind}'} with its measurements",
        revision=how.revision,
        create_pr=how.create_pr,
    )
    return repo, info


def _operations(contents: Mapping[str, Path | bytes], present: Sequence[str]) -> list[Any]:
    """Additions, and deletions of what an earlier push left: an adapter beside a model would be loaded with it."""
    old = [name for name in present if name not in contents and "/" not in name]
    stale = [name for name in old if any(fnmatch(name, pattern) for pattern in REPLACED)]
    added = [CommitOperationAdd(name, content) for name, content in sorted(contents.items())]
    return [*added, *map(CommitOperationDelete, stale)]


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
