"""The Hugging Face hub: its local cache, and resumable downloads.

The hub's own client resumes a broken connection within one run, but a later run starts each unfinished file from the
beginning (`_download_to_tmp_and_move` in huggingface_hub 2.4), and weights are one to five files of up to 10 GB. So the
client fetches the small files only. Weights are downloaded here, into the client's own cache and under its lock, with a
name that the next run finds, and are verified by the hub's checksum.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from huggingface_hub import (
    HfApi,
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.utils import WeakFileLock, build_hf_headers  # type: ignore[attr-defined]

from blip2.checkpoint.files import QFORMER_TOKENIZER, is_whole, weight_files
from blip2.checkpoint.names import nearest
from blip2.checkpoint.settings import INSTRUCT, MODEL_TYPES, read_json
from blip2.disk import replace
from blip2.errors import CheckpointError, setting
from blip2.published import PUBLISHED

# Not the pickled duplicates, .bin, .pth, .msgpack.
SMALL_FILES = ("*.json", "*.txt", "*.jinja", "tokenizer*", "spiece.model")
CONFIG, TOKENIZER = "config.json", "tokenizer.json"
PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
NEWEST = "main"
TIMEOUT_S = 10
logger = logging.getLogger("blip2")  # without logging set-up, warnings go to standard error


class NoNetworkError(CheckpointError):
    """The hub cannot be reached."""


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) forbids the network."""
    return bool(constants.HF_HUB_OFFLINE)


def whole(name: str, revision: str | None = None) -> Path | None:
    """The folder of a repository in the local cache if it is complete; no network."""
    folder = _snapshot(name, revision or _commit_of(name))
    return folder if folder is not None and not _missing(folder) else None


def another(name: str) -> Path | None:
    """A complete folder at another commit than the pinned one: the newest in the cache."""
    if (folder := whole(name, NEWEST)) is not None:
        return folder
    found = []
    for folder in _all(name):
        with suppress(CheckpointError):  # a damaged one
            found += [] if _missing(folder) else [folder]
    return max(found, key=lambda folder: folder.stat().st_mtime, default=None)


def cached(name: str, revision: str | None = None) -> Path:
    """The same without a network: `CheckpointError` says what is missing and how to get it.

    If no revision is given and the pinned one is missing, another one in the cache is used, with a warning.
    """
    wanted = revision or _commit_of(name)
    if (folder := whole(name, wanted)) is not None:
        return folder
    if revision is None and (folder := another(name)) is not None:
        return _instead(name, folder)
    how = f"{nearest(name)}load it once with a network and without HF_HUB_OFFLINE, or give the folder of a model"
    there = [_snapshot(name, wanted)] if revision else [_snapshot(name, wanted), _snapshot(name, NEWEST), *_all(name)]
    if (folder := next(filter(None, there), None)) is not None:
        raise CheckpointError(f"{name}: {', '.join(_missing(folder))} is not yet in the cache; {how}")
    at = f" in revision {revision}" if revision is not None else ""
    raise CheckpointError(f"{name}: is neither a folder nor in the cache{at}; {how}")


def found(name: str, revision: str | None = None) -> Path:
    """The folder of a repository: from the cache if complete, else downloaded.

    Without a network, another commit in the cache may replace the pinned one, with a warning. Raises as `pull`.
    """
    if (folder := whole(name, revision)) is not None:
        return folder
    try:
        return pull(name, revision)
    except NoNetworkError:
        if revision is None and (folder := another(name)) is not None:
            return _instead(name, folder)
        raise


def _instead(name: str, folder: Path) -> Path:
    """Warn that this commit replaces the wanted one."""
    logger.warning(
        "%s: the hub cannot be reached, and the pinned commit %s is not in the cache; using commit %s instead",
        name, _commit_of(name), folder.name,
    )  # fmt: skip
    return folder


def pull(name: str, revision: str | None = None) -> Path:
    """The folder of a repository in the local cache; missing files are downloaded, with progress on stderr.

    An interrupted download is kept and resumed. The hub is not asked if ``revision`` is a commit (like the pinned one)
    that is complete in the cache.

    Raises `CheckpointError`: no such repository or revision, a gated repository, no safetensors weights, no network, no
    space.
    """
    revision = revision or _commit_of(name)
    folder = _snapshot(name, revision)
    if folder is not None and folder.name == revision and not _missing(folder):
        return folder
    with _explained(name, revision, is_first=True):
        HfApi().model_info(name, revision=revision, timeout=TIMEOUT_S)  # without the client's five retries
    with _explained(name, revision):
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(SMALL_FILES)))
        for file in weight_files(folder):
            if not is_whole(folder / file):
                _fetch(name, file, commit=folder.name)
    return folder


def _commit_of(name: str) -> str:
    return (PUBLISHED[name].revision if name in PUBLISHED else None) or NEWEST


def fetch_files(name: str, files: tuple[str, ...]) -> Path:
    """The folder of a repository with only these files, from the cache if they are there. Raises as `pull`."""
    if all(isinstance(try_to_load_from_cache(name, file), str) for file in files):
        return Path(str(try_to_load_from_cache(name, files[0]))).parent
    if is_offline():
        raise CheckpointError(f"{name}: is neither a folder nor in the cache; load it once with a network")
    with _explained(name, NEWEST):
        return Path(snapshot_download(name, allow_patterns=list(files)))


def _snapshot(name: str, revision: str) -> Path | None:
    """The folder of this revision in the cache, complete or not."""
    try:
        config = try_to_load_from_cache(name, CONFIG, revision=revision)
    except HFValidationError as error:
        raise CheckpointError(f"{name}: is not a valid repository name ({_first_line(error)}); check it") from None
    return Path(config).parent if isinstance(config, str) else None


def _all(name: str) -> list[Path]:
    """Every commit in the cache, complete or not."""
    snapshots = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model") / "snapshots"
    return [folder for folder in sorted(snapshots.glob("*")) if (folder / CONFIG).exists()]


def _missing(folder: Path) -> list[str]:
    """Missing or incomplete files: another program may have downloaded them in any order, or only some."""
    missing = [file for file in weight_files(folder) if not is_whole(folder / file)]
    kind = read_json(folder / CONFIG).get("model_type")
    if kind in MODEL_TYPES:  # a language model alone needs no other files
        newer = folder / PROCESSOR
        has_settings = newer.exists() and "image_processor" in read_json(newer)
        small = [TOKENIZER] if has_settings else [TOKENIZER, PREPROCESSOR]
        small += [f"{QFORMER_TOKENIZER}/{TOKENIZER}"] if kind == INSTRUCT else []
        missing += [file for file in small if not (folder / file).exists()]
    return missing


def _fetch(name: str, file: str, *, commit: str) -> None:
    """Download a file into the cache, resuming an earlier attempt."""
    url = hf_hub_url(name, file, revision=commit)
    metadata = get_hf_file_metadata(url)
    if metadata.etag is None or metadata.size is None:
        raise OSError(f"the hub does not say how large {file} is")
    cache = Path(constants.HF_HUB_CACHE)
    repository = repo_folder_name(repo_id=name, repo_type="model")
    blob = cache / repository / "blobs" / metadata.etag
    lock = cache / ".locks" / repository / f"{metadata.etag}.lock"
    for path in (blob, lock):
        path.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if not is_whole(blob):
            part = blob.with_name(f"{metadata.etag}.part")
            with part.open("ab") as stream:
                remaining = metadata.size - stream.tell()
                if remaining > shutil.disk_usage(blob.parent).free:
                    raise OSError(errno.ENOSPC, f"{remaining / 1e9:.1f} GB of {file} remain")
                http_get(
                    url,
                    stream,
                    resume_size=stream.tell(),
                    headers=build_hf_headers(),
                    expected_size=metadata.size,
                    displayed_filename=file,
                )
            _check(part, file, metadata.etag)
            replace([(part, blob)])
    placed = cache / repository / "snapshots" / commit / file
    if not is_whole(placed):  # an incomplete copy, on systems without links
        placed.unlink(missing_ok=True)
    hf_hub_download(name, file, revision=commit)  # finds the blob and links it into the snapshot


def _check(path: Path, file: str, etag: str) -> None:
    """Verify the SHA-256 of a large file; a wrong file is deleted."""
    if len(etag) != hashlib.sha256().digest_size * 2:
        return
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != etag:
        path.unlink()
        raise OSError(f"{file} was damaged in the download")


@contextmanager
def _explained(name: str, revision: str, *, is_first: bool = False) -> Iterator[None]:
    """Turns errors of the hub's client into one line that says what to do."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        # For the first request, anything but an HTTP answer means that the hub cannot be reached.
        is_answer = isinstance(error, HfHubHTTPError) and error.response.status_code < 500
        kind = NoNetworkError if is_first and not is_answer else CheckpointError
        raise kind(f"{name}: {_reason(error, name, revision)}") from None


def _reason(error: Exception, name: str, revision: str) -> str:
    if isinstance(error, GatedRepoError):
        return f"is gated; accept its conditions at https://huggingface.co/{name} and run: hf auth login"
    if isinstance(error, RepositoryNotFoundError):
        private = "or, if it is private, run: hf auth login"
        return f"is neither a folder nor on the hub; {nearest(name)}check the name, {private}"
    if isinstance(error, RevisionNotFoundError):
        return f"the hub has no revision {revision}; {setting('revision', NEWEST)}, or another that exists"
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return f"has no safetensors weights in revision {revision}, and pickled weights are not read; convert them"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = constants.HF_HUB_CACHE
        return f"no space is left in {where} ({error.strerror}); free some, or set HF_HOME to a folder on a larger disk"
    # The client wraps errors other than HTTP answers in long advice; the cause is shorter.
    cause = error if isinstance(error, HfHubHTTPError) else error.__cause__ or error
    if isinstance(cause, HfHubHTTPError) and cause.response.status_code in (401, 403):
        return f"the hub denied access ({cause.response.status_code}); run: hf auth login"
    return f"the download failed ({_first_line(cause)}); check the network and try again; finished parts are kept"


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".:")
