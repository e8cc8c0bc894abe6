"""--push-to-hub against a hub that is a folder: what is asked first, what is uploaded, how refusals read."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import filter_repo_objects

from megatron_tide.release import Hub


class FolderHub:
    """The part of ``HfApi`` that is used, with a folder as its storage."""

    def __init__(self, folder: Path, fail: Exception | None = None) -> None:
        self.folder, self.fail, self.private = folder, fail, None

    def whoami(self) -> dict[str, str]:
        if isinstance(self.fail, LocalTokenNotFoundError):
            raise self.fail
        return {"name": "me"}

    def repo_exists(self, name: str) -> bool:
        return (self.folder / name).is_dir()

    def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> str:
        assert exist_ok
        if self.fail is not None:
            raise self.fail
        if not self.repo_exists(name):
            self.private = private
        (self.folder / name).mkdir(parents=True, exist_ok=True)
        return f"https://hub.example/{name}"

    def repo_info(self, repo_id: str) -> Any:
        return SimpleNamespace(private=self.private)

    def upload_folder(
        self,
        *,
        repo_id: str,
        folder_path: Path,
        commit_message: str,
        allow_patterns: list[str],
        delete_patterns: list[str],
    ) -> None:
        assert commit_message == f"Release {folder_path.name}"
        for file in (self.folder / repo_id).iterdir():
            if list(filter_repo_objects([file.name], allow_patterns=delete_patterns)):
                file.unlink()
        files = [str(path.relative_to(folder_path)) for path in folder_path.rglob("*") if path.is_file()]
        for name in filter_repo_objects(files, allow_patterns=allow_patterns):
            shutil.copyfile(folder_path / name, self.folder / repo_id / name)


@pytest.fixture
def release(tmp_path: Path) -> Path:
    folder = tmp_path / "student"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def test_uploads_everything_once(tmp_path: Path, release: Path) -> None:
    api = FolderHub(tmp_path / "hub")
    url = Hub("me/student", private=True, overwrite=False, api=api).push(release)
    assert (url, api.private) == ("https://hub.example/me/student", True)
    assert (tmp_path / "hub/me/student/config.json").read_text() == "{}"
    with pytest.raises(ValueError, match=r"me/student: exists on the hub.*--overwrite"):
        Hub("me/student", private=True, overwrite=False, api=api)
    Hub("me/student", private=True, overwrite=True, api=api).push(release)


def test_private_is_refused_where_the_repository_is_public(tmp_path: Path, release: Path) -> None:
    api = FolderHub(tmp_path / "hub")
    Hub("me/student", private=False, overwrite=False, api=api).push(release)
    (release / "config.json").write_text('{"secret": 1}')
    with pytest.raises(ValueError, match="me/student: is public on the hub") as caught:
        Hub("me/student", private=True, overwrite=True, api=api)
    assert "\n" not in str(caught.value)
    Hub("me/student", private=False, overwrite=True, api=api).push(release)


def test_private_is_refused_where_a_public_one_appeared_during_the_conversion(tmp_path: Path, release: Path) -> None:
    api = FolderHub(tmp_path / "hub")
    hub = Hub("me/student", private=True, overwrite=False, api=api)
    api.create_repo("me/student", private=False, exist_ok=True)
    with pytest.raises(ValueError, match="is public on the hub"):
        hub.push(release)
    assert list((tmp_path / "hub/me/student").iterdir()) == []


def test_files_of_the_release_before_do_not_stay(tmp_path: Path, release: Path) -> None:
    place = tmp_path / "hub/me/student"
    place.mkdir(parents=True)
    old = ("model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json")
    old += (
        "tekken.json",
        "tokenizer.model.v3",
        "params.json",
        "pytorch_model.bin",
        "chat_template.jinja",
        "tokenizer.model",
        "modeling_old.py",
        "adapter_config.json",
    )
    for name in (*old, "figure.png", "LICENSE"):
        (place / name).write_text("old")
    (release / "README.md").write_text("new")
    (release / "scores.json").write_text("of this machine")
    (release / "evaluation").mkdir()
    (release / "evaluation/config.json").write_text("of this machine")
    Hub("me/student", private=False, overwrite=True, api=FolderHub(tmp_path / "hub")).push(release)
    assert {file.name for file in place.iterdir()} == {"config.json", "README.md", "figure.png", "LICENSE"}


@pytest.mark.parametrize(
    ("name", "fail", "word"),
    [
        ("me/a b", None, "a b"),
        ("student", None, "no owner; use OWNER/student"),
        ("https://huggingface.co/me/student", None, "namespace/repo_name"),
        ("me/student", LocalTokenNotFoundError("no token"), "hf auth login"),
        ("me/student", HTTPError("403 Forbidden\nno rights"), "403 Forbidden no rights"),
        ("me/student", ConnectionError("no route"), "no route"),
    ],
)
def test_refusals_are_one_line(tmp_path: Path, release: Path, name: str, fail: Any, word: str) -> None:
    with pytest.raises(ValueError, match=word) as caught:
        Hub(name, private=False, overwrite=False, api=FolderHub(tmp_path / "hub", fail)).push(release)
    assert "\n" not in str(caught.value)


class OwnClient(HfApi):
    """The real client but for its requests."""

    def __init__(self) -> None:
        super().__init__(token="none")
        self.commits: list[set[tuple[str, str]]] = []
        self.fail = False

    def whoami(self, **_: Any) -> dict[str, Any]:
        return {"name": "me"}

    def repo_exists(self, *_: Any, **__: Any) -> bool:
        return True

    def create_repo(self, *_: Any, **__: Any) -> Any:
        return "https://hub.example/me/student"

    def list_repo_files(self, *_: Any, **__: Any) -> list[str]:
        return ["config.json", "model-00001-of-00002.safetensors", "custom_generate/generate.py", "LICENSE"]

    def create_commit(self, *_: Any, operations: Any, **__: Any) -> Any:
        if self.fail:
            raise HTTPError("502 Bad Gateway")
        self.commits.append({(type(one).__name__, one.path_in_repo) for one in operations})


def test_the_real_client_makes_one_commit_or_none(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub._upload_pipeline.pipelined_upload", None)  # which commits in parts
    before, api = constants.HF_HUB_DISABLE_XET, OwnClient()
    hub = Hub("me/student", private=False, overwrite=True, api=api)
    (release / "model.safetensors").write_text("new")
    hub.push(release)
    gone = {
        ("CommitOperationDelete", name) for name in ("model-00001-of-00002.safetensors", "custom_generate/generate.py")
    }
    assert api.commits == [gone | {("CommitOperationAdd", name) for name in ("config.json", "model.safetensors")}]
    api.fail = True
    with pytest.raises(ValueError, match=r"--push-to-hub me/student: .*502 Bad Gateway"):
        hub.push(release)
    assert len(api.commits) == 1
    assert constants.HF_HUB_DISABLE_XET is before


def test_the_real_client_has_what_is_called() -> None:
    """So that the stand-in above is not the only thing this works with."""
    import inspect

    for name in ("whoami", "repo_exists", "create_repo", "repo_info", "upload_folder"):
        theirs = inspect.signature(getattr(HfApi, name)).parameters
        wanted = set(inspect.signature(getattr(FolderHub, name)).parameters) - {"self", "name"}
        assert wanted <= set(theirs)
