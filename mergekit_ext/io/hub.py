"""The Hugging Face Hub: folders that are downloaded, and outputs that are uploaded."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import huggingface_hub
from huggingface_hub import errors
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from mergekit_ext.errors import ConfigError, Problem, UploadError, one_line, require
from mergekit_ext.io.model_files import may_be_hub_name
from mergekit_ext.io.staging import KINDS

_ACCESS = "Check the name, the revision and your access (`hf auth login`)."
_LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN."
# What a task's folder has links to: once the Hub has a shard, a link is not sent.
_SHARDS = "shards"
# What gives way of what was in the repository: weights, and what makes it one of another kind.
_REPLACED = ["*model*.safetensors", "*model*.bin", "*.index.json", f"{_SHARDS}/*", *KINDS]


def folder_of(source: str | os.PathLike[str], revision: str | None, wanted: Sequence[str]) -> Path:
    """Return the folder of an adapter or a model; from the Hub the files `wanted` are downloaded.

    The first of `wanted` is in every such folder; others may be patterns. A folder that exists wins
    over a name on the Hub. With ``HF_HUB_OFFLINE`` the cache is used.
    """
    text = os.fspath(source)
    folder = os.path.expanduser(text)
    if os.path.isdir(folder):
        return Path(folder)
    exists = os.path.exists(folder)
    if not isinstance(source, str) or exists or not may_be_hub_name(text):
        found = "a file" if exists else "no such folder"
        expected = f"a folder with {wanted[0]}, or a name on the Hub"
        raise ConfigError([Problem(text or "an empty name", found, expected)])
    try:
        kept = huggingface_hub.snapshot_download(text, revision=revision, allow_patterns=[*wanted])
        return Path(kept)
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        found = f"no such folder, and no download from the Hub ({one_line(error)})"
        expected = "a folder, or a name on the Hub that is cached or can be downloaded"
        raise ConfigError([Problem(text, found, expected, remedy_for(error))]) from None


def remedy_for(error: Exception, answered: str = _ACCESS) -> str:
    """Return what helps after an error of the client; `answered` where it is the Hub's answer."""
    if huggingface_hub.is_offline_mode():
        return "Unset HF_HUB_OFFLINE, or do without the Hub."
    known = (errors.HfHubHTTPError, errors.HFValidationError, errors.LocalTokenNotFoundError)
    return answered if isinstance(error, known) else "Check the name and the network."


def upload_problems(name: str | None, private: bool) -> Iterator[Problem]:
    """Yield what keeps an output from being uploaded to the repository `name`; None: no upload."""
    if name is None:
        if not private:
            yield Problem("--public", "no repository", "`--push-to-hub NAME` beside it")
        return
    where = f"repository {name}"
    try:
        validate_repo_id(name)
        user = huggingface_hub.whoami()
        role = user.get("auth", {}).get("accessToken", {}).get("role")
        writable = [o["name"] for o in user.get("orgs", ()) if o.get("roleInOrg") != "read"]
        owner, _, own = name.rpartition("/")
        if role == "read":
            yield Problem(where, "a token that only reads", "one that writes", _LOG_IN)
        elif owner not in ("", user["name"], *writable) and role != "fineGrained":
            expected = f"one of {', '.join([user['name'], *writable])}, where this token writes"
            yield Problem(where, f"the owner {owner}", expected, "Change the name, or log in.")
        info = huggingface_hub.model_info(f"{owner or user['name']}/{own}")
        if info.private != private:
            found, wanted = ("private", "public") if info.private else ("public", "private")
            remedy = "Give or leave out --public (in Python `private`), or take another name."
            yield Problem(where, f"a {found} one", f"a {wanted} one, or none yet", remedy)
    except errors.HFValidationError as error:
        yield Problem(where, f"no name for one ({error})", "a name such as `someone/merged`")
    except errors.RepositoryNotFoundError:
        return  # it is made
    except Exception as error:  # network and access: the client's message is kept
        expected, remedy = "a network, and a token that writes", remedy_for(error, _LOG_IN)
        yield Problem(where, f"no access ({one_line(error)})", expected, remedy)


class Pushable:
    """A result in the folder `path` that can be uploaded."""

    path: Path
    url: str | None = None

    def push_to_hub(self, name: str, *, private: bool = True) -> str:
        """Upload to a repository of the Hugging Face Hub, which is made if there is none.

        What the Hub has is not sent again: a stopped upload goes on when it is repeated. Weights of
        an earlier upload are replaced; other files of the repository stay.

        Args:
            name: such as ``someone/merged``; without an owner it is the user's own.
            private: whether only its owner reads it; a repository that exists must be so already.

        Returns:
            The address of the repository, which is in `url` then.

        Raises:
            ConfigError: with all that is wrong with name, token and repository; nothing was sent.
            UploadError: the upload stopped; what was merged is complete.

        Example:
            >>> result.push_to_hub("someone/merged")
        """
        require(upload_problems(name, private), "this upload")
        try:
            made = huggingface_hub.create_repo(name, private=private, exist_ok=True)
            with self._named(made.repo_id) as folder:
                _upload(folder, made.repo_id)
        except Exception as error:  # as above
            raise UploadError(name, one_line(error)) from error
        vars(self)["url"] = str(made)  # a result may be frozen
        return str(made)

    def _named(self, name: str) -> AbstractContextManager[Path]:
        """Return the folder that is uploaded to the repository `name`."""
        return nullcontext(self.path)


@contextmanager
def in_folder(save: Callable[[Path], None]) -> Iterator[Path]:
    """Yield a temporary folder that `save` has written."""
    with TemporaryDirectory() as scratch:
        save(Path(scratch, "output"))
        yield Path(scratch, "output")


def _upload(folder: Path, name: str) -> None:
    given = {"repo_id": name, "folder_path": folder, "commit_message": "Upload with mergekit-ext"}
    upload: Any = partial(huggingface_hub.upload_folder, ignore_patterns=[".*"], **given)
    if (folder / _SHARDS).is_dir():
        upload(allow_patterns=[f"{_SHARDS}/*"])
    upload(delete_patterns=_REPLACED)
