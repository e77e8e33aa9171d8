"""Runs on the Hugging Face Hub: a folder goes up in one commit, and a run comes down without anything that runs code.

The token is that of the hub's own library: ``hf auth login``, or ``HF_TOKEN``. ``HF_ENDPOINT`` names another server.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from genkit.core.files import atomic_directory
from genkit.core.hub import HUB_NAME, call_hub
from genkit.core.tensors import cache_folder
from genkit.training.directory import USED_WITH

PREFIX = "hf://"
PATTERNS = (  # what a run consists of; nothing else is downloaded
    "config.yaml", "finetune.yaml", "base.json", *USED_WITH, "README.md", "samples.png", "eval/*.json",
    "checkpoints/*/*.safetensors", "checkpoints/*/state.json", "codec/*.safetensors", "codec/*.json",
)  # fmt: skip
logger = logging.getLogger("genkit")


def parse_name(text: str) -> tuple[str, str | None]:
    """OWNER/NAME and revision of ``[hf://]OWNER/NAME[@REVISION]``. ``ValueError`` if it is no such name."""
    name, at, revision = text.removeprefix(PREFIX).partition("@")
    if not HUB_NAME.fullmatch(name) or "/." in name or (at and not revision):
        raise ValueError(f"name: given {text}; allowed OWNER/NAME, or OWNER/NAME@REVISION, of the hub")
    return name, revision or None


def upload_run(folder: Path, name: str, message: str, private: bool = False) -> str:
    """Upload ``folder`` as one commit of the model OWNER/NAME, which is made if it is new, and return its address.

    Files of an earlier upload that ``folder`` does not have are deleted in the same commit. ``ValueError`` if the hub
    cannot be reached, or does not let this user write.
    """
    repo, revision = parse_name(name)
    if revision:
        raise ValueError(f"name: given {name}; a run is pushed to the main branch: leave @{revision} out")

    def upload(hub: Any) -> str:
        api = hub.HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message=message, delete_patterns=list(PATTERNS)
        )
        return str(commit.repo_url.url) if commit.repo_url else f"{hub.constants.ENDPOINT}/{repo}"

    return call_hub("push", repo, upload)


def download_run(name: str, out: Path) -> Path:
    """Download the run ``[hf://]OWNER/NAME[@REVISION]`` into the new directory ``out``, completely or not at all.

    ``ValueError`` if the hub cannot be reached, has no such model, or if it is no run of genkit.
    """
    repo, revision = parse_name(name)
    with atomic_directory(out) as part:
        call_hub(
            "pull",
            repo,
            lambda hub: hub.snapshot_download(repo, revision=revision, local_dir=part, allow_patterns=list(PATTERNS)),
        )
        shutil.rmtree(part / ".cache", ignore_errors=True)  # the library's own records
        if not (part / "config.yaml").is_file() or not (part / "checkpoints").is_dir():
            raise ValueError(f"pull: {repo} is no run of genkit: it has no config.yaml or no checkpoints")
    return out


def find_hub_run(name: str) -> Path:
    """The local copy of ``hf://OWNER/NAME[@REVISION]``, in the cache by its commit; downloaded if it is not there.

    Without a network, the copy that was downloaded last, with a warning.
    """
    repo, revision = parse_name(name)
    folder = cache_folder() / "hub" / repo.replace("/", "--")
    try:
        commit = call_hub("run", repo, lambda hub: str(hub.HfApi().model_info(repo, revision=revision).sha))
    except ValueError as e:
        copies = [p for p in folder.glob("[!.]*") if (p / "config.yaml").is_file()] if folder.is_dir() else []
        if revision:
            copies = [p for p in copies if p.name == revision]
        if not copies:
            raise
        newest = max(copies, key=lambda p: (p / "config.yaml").stat().st_mtime)
        logger.warning("%s; taking the copy of commit %s", e, newest.name[:10])
        return newest
    copy = folder / commit
    return copy if (copy / "config.yaml").is_file() else download_run(f"{repo}@{commit}", copy)
