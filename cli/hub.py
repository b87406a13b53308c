"""Models from Hugging Face: which files make one, whether there is room, and into the cache that its tools share. Knows
the registry's names; imports no torch, and huggingface_hub only when something is fetched or removed.
"""

import logging
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from cli.console import Progress, human_bytes, status
from config import __version__
from config.errors import UserError
from config.hub_cache import HubName, folder_of, gguf_models, hub_cache_dir, match_gguf
from config.registry import ModelNotHere, ResolvedModel, resolve

if TYPE_CHECKING:  # its import takes a fifth of a second, which only a download needs
    from huggingface_hub import HfApi

    from cli.hub_fetch import RemoteFile

AT_ONCE = 4
MARGIN = 50_000_000
"""Bytes of the disk that are left free."""
_PICKLES = (".bin", ".pth", ".pt")
# What a tokenizer, a template and a configuration are written in.
_SMALL = (".json", ".model", ".jinja", ".tiktoken", "merges.txt", "vocab.txt")
_TEMPLATES = r"additional_chat_templates/[^/]+\.jinja"
_NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|rng_state|tokenizer)\b.*|adapter_model\..*")


@dataclass(frozen=True)
class Download:
    """What is to be fetched: the files of one commit."""

    name: HubName
    commit: str
    files: "tuple[RemoteFile, ...]"
    headers: dict[str, str]

    @property
    def folder(self) -> Path:
        return folder_of(self.name.hub_id)

    @property
    def snapshot(self) -> Path:
        return self.folder / "snapshots" / self.commit

    @property
    def path(self) -> Path:
        """Where the model is afterwards: the directory, or its one GGUF file."""
        if all(file.name.endswith(".gguf") for file in self.files):
            return self.snapshot / self.files[0].name
        return self.snapshot

    def blob(self, file: "RemoteFile") -> Path:
        return self.folder / "blobs" / file.digest

    def missing(self) -> int:
        """Bytes that are not here yet."""
        from cli.hub_fetch import partial_path

        total = 0
        for file in {file.digest: file for file in self.files}.values():
            blob = self.blob(file)
            if not blob.exists():
                there = partial_path(blob)
                total += file.size - min(file.size, there.stat().st_size if there.exists() else 0)
        return total


def locate(name: str, *, random_weights: bool = False) -> ResolvedModel:
    """As `resolve`; a model that is not on this machine is offered for download first. Raises UserError."""
    try:
        return resolve(name, random_weights=random_weights)
    except ModelNotHere as error:
        if not offer_download(error):
            raise
    return resolve(name, random_weights=random_weights)


def offer_download(error: ModelNotHere) -> bool:
    """Asks, on a terminal, whether to fetch what is missing, and does; False where nobody wants it or can be asked.
    Raises UserError where it cannot be had.
    """
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    download = plan_download(error.wanted)
    print(
        f"{error.name} is not here: download {human_bytes(download.missing())} from Hugging Face "
        f"({download.name.hub_id})? [Y/n] ",
        end="",
        file=sys.stderr,
        flush=True,
    )
    answer = sys.stdin.readline()
    if not answer or answer.strip().lower() not in ("", "y", "yes"):
        return False
    run_download(download)
    return True


def plan_download(name: HubName, token: str | None = None) -> Download:
    """What fetching a repository, or one file of it, takes, by the list of files on Hugging Face. Raises UserError."""
    from huggingface_hub import HfApi, get_token, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import build_hf_headers

    from cli.hub_errors import told
    from cli.hub_fetch import RemoteFile, wait_as_asked

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # what it warns of is said here, in one line
    api = HfApi(token=token, library_name="torchchat", library_version=__version__)
    with told(name, has_token=bool(token or get_token())):
        failures = 0
        while True:
            try:
                info = api.model_info(name.hub_id, revision=name.revision, files_metadata=True, timeout=30)
                break
            except HfHubHTTPError as error:
                failures += 1
                wait_as_asked(error, failures)
        if info.gated:
            _check_access(api, name)
        commit = str(info.sha)
        if not re.fullmatch(r"[0-9a-f]{40}", commit):
            raise UserError(f"{name}: its commit is {commit[:60]!r}, which is no commit: it is not downloaded")
        siblings = {file.rfilename: file for file in info.siblings or []}
        files = []
        for chosen in choose_files(list(siblings), name):
            sibling = siblings[chosen]
            digest = sibling.lfs.sha256 if sibling.lfs is not None else sibling.blob_id
            size = sibling.lfs.size if sibling.lfs is not None else sibling.size
            if size is None or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", digest or ""):
                raise UserError(f"{name}: Hugging Face does not say what {chosen} is, so that it could not be checked")
            url = hf_hub_url(name.hub_id, chosen, revision=commit)
            files.append(RemoteFile(chosen, url, size, str(digest)))
        headers = build_hf_headers(token=token, library_name="torchchat", library_version=__version__)
    return Download(name, commit, tuple(files), headers)


def _check_access(api: "HfApi", name: HubName) -> None:
    """Raises GatedRepoError for who has no access: the list of files alone may be read by anybody."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

    try:
        api.auth_check(name.hub_id)
    except GatedRepoError:
        raise
    except HfHubHTTPError:  # a mirror that cannot be asked; the files will tell
        return


def choose_files(names: Sequence[str], name: HubName) -> list[str]:
    """Which files of a repository make the model: tokenizer, configuration, and weights in one format, safetensors
    where there are any. Raises UserError.
    """
    for listed in names:
        path = PurePosixPath(listed)
        if path.is_absolute() or ".." in path.parts or not listed.isprintable() or "\\" in listed or not path.name:
            raise UserError(f"{name}: lists a file {listed[:80]!r}, whose name leads elsewhere: it is not downloaded")
    if name.file is not None:
        return [_one_gguf(match_gguf(name.file, names), names, name)]
    top = [listed for listed in names if "/" not in listed]
    small = [listed for listed in top if listed.endswith(_SMALL)]
    small += [listed for listed in names if re.fullmatch(_TEMPLATES, listed)]
    safetensors = [n for n in top if n.endswith(".safetensors") and not _NO_WEIGHTS.fullmatch(n)]
    # Mistral's own layout lies beside the usual one in some repositories, with the same weights.
    usual = [listed for listed in safetensors if not listed.startswith("consolidated")]
    if usual or safetensors:
        return [*(n for n in small if not n.endswith(".bin.index.json")), *(usual or safetensors)]
    pickles = [listed for listed in top if listed.endswith(_PICKLES) and not _NO_WEIGHTS.fullmatch(listed)]
    if pickles:
        return [*small, *pickles]
    if gguf_models(names):
        return [_one_gguf(gguf_models(names), names, name)]
    raise UserError(f"{name}: has no weights that can be read here (safetensors, PyTorch's or GGUF)")


def run_download(download: Download) -> Path:
    """Fetches what is missing, and then shows it as a snapshot; where it is. Raises UserError; OSError for a disk that
    became full.
    """
    from cli.hub_errors import told

    missing, began = download.missing(), time.monotonic()
    check_room(missing)
    title = f"downloading {download.name}"
    if missing and not sys.stderr.isatty():
        status(f"{title}: {human_bytes(missing)} to {download.folder}")
    with Progress(title, missing, in_bytes=True) as progress, told(download.name, has_token=_has_token(download)):
        _fetch_all(download, progress.advance)
    _show(download)
    if missing:
        seconds = time.monotonic() - began
        rate = f"{human_bytes(missing)} in {seconds:.0f} s, {human_bytes(missing / max(seconds, 1e-9))}/s"
        status(f"downloaded {download.name}: {rate}")
    return download.path


def check_room(missing: int) -> None:
    """Raises UserError where the disk with the cache has not so many bytes."""
    place = hub_cache_dir().absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if missing and missing + MARGIN > free:
        raise UserError(
            f"{human_bytes(missing)} are to be downloaded, and {human_bytes(free)} are free at {hub_cache_dir()}: make "
            "room (`torchchat list --here` shows what is there), or name another place with HF_HUB_CACHE"
        )


def _fetch_all(download: Download, advance: Callable[[int], None]) -> None:
    from cli.hub_fetch import Stopped, fetch

    stop, lock = threading.Event(), threading.Lock()
    locks = hub_cache_dir() / ".locks" / download.folder.name

    def one_at_a_time(count: int) -> None:
        with lock:
            advance(count)

    def run(file: "RemoteFile") -> None:
        blob = download.blob(file)
        if not blob.exists():
            fetch(file, blob, locks / f"{file.digest}.lock", download.headers, one_at_a_time, stop)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        # The small ones first: a repository that may not be read is known before gigabytes of it are here.
        by_digest = {file.digest: file for file in download.files}
        jobs = [pool.submit(run, file) for file in sorted(by_digest.values(), key=lambda file: file.size)]
        failed: BaseException | None = None
        try:
            for job in jobs:
                try:
                    job.result()
                except Stopped:
                    continue
                except Exception as error:
                    failed = failed or error
                    stop.set()
        except BaseException:
            stop.set()
            raise
    if failed is not None:
        raise failed


def _show(download: Download) -> None:
    """The snapshot's links, the weights last, and then the branch: whoever looks sees a whole model or none."""
    in_order = sorted(download.files, key=lambda file: (not file.name.endswith(_SMALL), file.name))
    for file in in_order:
        pointer = download.snapshot / file.name
        pointer.parent.mkdir(parents=True, exist_ok=True)
        blob = download.blob(file)
        if pointer.exists() and pointer.samefile(blob):
            continue
        link = _beside(pointer)
        link.symlink_to(os.path.relpath(blob, pointer.parent))
        os.replace(link, pointer)
    revision = download.name.revision or "main"
    if revision != download.commit:
        reference = download.folder / "refs" / revision
        reference.parent.mkdir(parents=True, exist_ok=True)
        written = _beside(reference)
        written.write_text(download.commit, encoding="utf-8")
        os.replace(written, reference)


def _beside(path: Path) -> Path:
    """A name for what is put in the place of `path` at once: another process may do the same."""
    return path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")


def _one_gguf(found: Sequence[str], names: Sequence[str], name: HubName) -> str:
    if len(found) == 1:
        return found[0]
    there = gguf_models(names)
    repository = HubName(name.hub_id, name.revision)
    if not there:
        raise UserError(f"{name}: {repository} has no GGUF files; leave out :{name.file}")
    listed = ", ".join(sorted(found or there)[:12]) + (", …" if len(found or there) > 12 else "")
    if name.file is None:
        raise UserError(f"{name}: has several GGUF files; name one, as {repository}:Q4_K_M; there are {listed}")
    which = "means several files" if found else "is none of its GGUF files"
    raise UserError(f"{name}: {name.file!r} {which}; there are {listed}")


def _has_token(download: Download) -> bool:
    return any(key.lower() == "authorization" for key in download.headers)
