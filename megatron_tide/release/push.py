"""A release folder -> the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id

from megatron_tide.hub import hub_errors


class Hub:
    """One repository of the hub, checked before the work is done that is to end up there.

    Raises:
        ValueError: a name the hub does not take, no login, or a repository that exists (unless ``overwrite``).
    """

    def __init__(self, repository: str, *, private: bool, overwrite: bool, api: Any = None) -> None:
        self._repository, self._private = repository, private
        self._api = api or HfApi()
        self._what = f"--push-to-hub {repository}: the hub refuses, or cannot be reached"
        with hub_errors(self._what):
            validate_repo_id(repository)
            self._api.whoami()
            exists = not overwrite and self._api.repo_exists(repository)
        if exists:
            raise ValueError(f"{repository}: exists on the hub; choose another name, or pass --overwrite")

    def push(self, folder: Path) -> str:
        """Upload every file of ``folder`` as one commit; -> the address of the repository's page.

        Raises:
            ValueError: the hub cannot be reached or refuses.
        """
        with hub_errors(self._what):
            url = self._api.create_repo(self._repository, private=self._private, exist_ok=True)
            self._api.upload_folder(
                repo_id=self._repository, folder_path=folder, commit_message=f"Release {folder.name}"
            )
        return str(url)
