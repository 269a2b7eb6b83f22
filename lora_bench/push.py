"""`lora-bench push RUN REPO`: publish a finished run on the Hugging Face hub, with a model card."""

from __future__ import annotations

import os
import re
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_bench.config.build import check_names
from lora_bench.console.stages import stage
from lora_bench.console.text import sanitise
from lora_bench.errors import Code, UserError, require
from lora_bench.files.paths import check_folder
from lora_bench.publishing.contents import CARD, write_contents
from lora_bench.publishing.source import PublishedRun
from lora_bench.publishing.upload import create_repository, require_access, upload
from lora_bench.records.hub_run import SCHEME, is_on_hub, is_repository
from lora_bench.records.run_names import resolve_run

if TYPE_CHECKING:
    from collections.abc import Iterator

    from omegaconf import DictConfig
    from rich.console import Console

_KEYS = ("run", "repo", "private", "overwrite", "predictions", "license", "dry_run", "output")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,49}")


@dataclass(frozen=True)
class PushRequest:
    """The request of `lora-bench push`, checked without the hub."""

    run: str
    repository: str
    """Its id, with or without its owner."""
    private: bool
    overwrite: bool
    predictions: bool
    license: str | None
    """An identifier of the hub."""
    output: Path | None
    """The new folder that the files are written into, in place of the upload; None: they are uploaded."""

    @classmethod
    def read(cls, cfg: DictConfig) -> PushRequest:
        """Check the command's config.

        Raises:
            UserError: naming the key that is wrong.
        """
        check_names(cfg, _KEYS)
        for key in ("private", "overwrite", "predictions", "dry_run"):
            require(type(cfg[key]) is bool, key, cfg[key], "must be true or false")
        run, repository = str(cfg.run), str(cfg.repo).removeprefix(SCHEME)
        reason = "is on the hub already"
        require(not is_on_hub(run), "run", run, reason, "Give the folder of a run.", code=Code.UNSUPPORTED)
        reason = "is not an id of a repository: letters, digits, '-', '_' and '.', at most 96 in all"
        require(is_repository(repository), "repo", repository, reason, "Give OWNER/NAME.")
        license_name = None if cfg.license is None else str(cfg.license)
        reason = "is not an identifier of a licence on the hub"
        is_license = license_name is None or _LICENSE.fullmatch(license_name) is not None
        require(is_license, "license", license_name, reason, "Give one such as apache-2.0, mit, cc-by-4.0 or other.")
        remedy = "Add dry_run=true, or leave it out."
        has_use = cfg.output is None or cfg.dry_run
        require(has_use, "output", cfg.output, "is the folder of a dry run", remedy, code=Code.CONFLICT)
        output = Path(str(cfg.output or repository.rpartition("/")[2])) if cfg.dry_run else None
        if output is not None:
            if os.path.lexists(output):
                remedy = "Give a new folder, output=DIR."
                raise UserError("already exists", key="output", value=output, remedy=remedy, code=Code.EXISTS)
            check_folder(output, "output")
        return cls(str(resolve_run(cfg)), repository, cfg.private, cfg.overwrite, cfg.predictions, license_name, output)


def run_push(cfg: DictConfig, *, console: Console) -> None:
    """Publish a finished run: create the repository, and upload record, log, weights and model card in one commit.

    With `dry_run` the files are written into a new folder, the card is printed, and nothing is sent.

    Raises:
        UserError: the request is wrong, the run is not finished or damaged, the repository has files, there is no
            token, or the hub refuses.
    """
    request = PushRequest.read(cfg)
    run = PublishedRun.read(request.run, request.repository)
    if request.output is not None:
        _write_folder(run, request, request.output, console)
        return
    require_access()
    repository = create_repository(request.repository, private=request.private, overwrite=request.overwrite)
    with tempfile.TemporaryDirectory(prefix="lora-bench-push-") as folder:
        _write(PublishedRun(run.finished, repository), request, Path(folder))
        uploaded = upload(Path(folder), repository, f"Publish a run of {run.method} on {run.data_name}")
    console.print(sanitise(f"uploaded: {uploaded.address} (commit {uploaded.commit[:8]})"), soft_wrap=True)
    path_argument = " model.path=DIR" if run.needs_path else ""
    command = f"lora-bench predict run={SCHEME}{repository} input=texts.tsv output=labelled.tsv{path_argument}"
    console.print(sanitise(f"read it back: {command}"), soft_wrap=True)
    _print_notes(run, console)


def _write_folder(run: PublishedRun, request: PushRequest, output: Path, console: Console) -> None:
    """Write the files into a new folder, and print the card and the files with their sizes."""
    with _new_folder(output) as folder:
        paths = [path.relative_to(folder) for path in _write(run, request, folder)]
    console.print((output / CARD).read_text(encoding="utf-8"), markup=False, soft_wrap=True)
    console.print(sanitise(f"written: {output} ({', '.join(map(str, paths))}); nothing was uploaded"), soft_wrap=True)
    _print_notes(run, console)


def _write(run: PublishedRun, request: PushRequest, folder: Path) -> list[Path]:
    """Write the files of the repository, and return their paths."""
    with stage("writing the model card"):
        copy, license_name = request.output is not None, request.license
        return write_contents(run, folder, predictions=request.predictions, license_name=license_name, copy=copy)


def _print_notes(run: PublishedRun, console: Console) -> None:
    """Print what whoever loads the run needs in addition."""
    notes = []
    if run.needs_path:
        notes.append(
            f"the base model is a local folder, {run.base_name}, and is not published: whoever loads the run gives its "
            "path, model.path=DIR. The hash of its weights is checked."
        )
    notes += [f"whoever loads the run needs {package}" for package in run.finished.other_packages]
    for note in notes:
        console.print(sanitise(f"note: {note}"), soft_wrap=True)


@contextmanager
def _new_folder(output: Path) -> Iterator[Path]:
    """Yield a new folder that is renamed to `output` at the end, or removed after an error.

    Raises:
        UserError: it cannot be written.
    """
    parent = Path(os.path.abspath(output)).parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent, prefix=f".{output.name}.") as temporary:
            folder = Path(temporary, "new")
            folder.mkdir()
            yield folder
            os.rename(folder, output)
    except OSError as error:
        reason, remedy = f"cannot be written: {error.strerror or error}", "Give a folder where you may write."
        raise UserError(reason, key="output", value=output, remedy=remedy, code=Code.UNWRITABLE) from None
