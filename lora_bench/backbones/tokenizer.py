"""Tokenizers read from files: `tokenizer.json` is used unchanged, and checked before anything is trained with it.

transformers rebuilds some tokenizers from their vocabulary and takes normalizer, pre-tokenizer, template and decoder
from the class of the model. Where that differs from the file, the file wins. A tokenizer is untrusted input: its
native code is called with a time limit, and a file on which it panics is refused as damaged.
"""

from __future__ import annotations

import json
import os
import stat
import threading
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import transformers
from tokenizers import Tokenizer
from transformers import AutoTokenizer, TokenizersBackend

from lora_bench.backbones.identity import PAIRS, TEXTS
from lora_bench.errors import Code, UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

T = TypeVar("T")

FILE = "tokenizer.json"
MAX_BYTES = 256 * 2**20
"""The largest file of a tokenizer that is read; the largest that are known have about 35 MB."""
MAX_ID = 2**24
"""The highest token id that is read; the library walks through all ids up to the highest, used or not."""
SECONDS = 20.0
"""The longest time that native code may take for the probe texts, which need milliseconds."""
READING_SECONDS = 120.0
"""The longest time for reading the files: those of Gemma (262,144 tokens) take 8 seconds of a whole core."""

HARD = [
    *(unit * (4000 // len(unit)) for unit in ("a", "A", "1", " ", "\n", "!", "é", "日", "ab ", "a1", "aA1_- ", "a\n")),
    "a" * 4000 + "!",
    " " * 4000 + "x",
    "ab" * 30 + "\u0000",
]
"""Texts on which patterns that backtrack take for ever."""


def read_tokenizer(
    location: str, refusal: Callable[[str, str | None, Code], UserError], options: Callable[[], Mapping[str, Any]]
) -> tuple[Any, list[str]]:
    """Return the tokenizer of a folder or hub id, and notes for the user about how it is read.

    Args:
        location: a local folder or an id on the hub.
        refusal: returns the error for a reason, a remedy and a code.
        options: returns the keywords for `AutoTokenizer.from_pretrained`.

    Raises:
        UserError: there is no fast tokenizer, or its files are damaged, contradict themselves or take too long.
    """
    if os.path.isdir(location):
        reject_special_files(Path(location))
    try:
        keywords = options()
        path = _file(location, keywords.get("revision"))
        added = [] if path is None else _refuse_contradictions(path)
        by_class = call_with_timeout(lambda: _by_class(location, keywords, path), READING_SECONDS)
        tokenizer = (
            by_class if path is None else call_with_timeout(lambda: _as_in_file(by_class, path), READING_SECONDS)
        )
    except UserError:
        raise
    except Exception as error:  # transformers raises many kinds for one cause: the files are not there
        code = Code.UNSUPPORTED if os.path.isdir(location) else Code.NOT_FOUND
        raise refusal(f"no tokenizer could be loaded from there ({first_line(error)})", None, code) from None
    if path is not None:
        _refuse_other_ids(path, tokenizer, added)
    padding_notes = _choose_padding(tokenizer)
    _refuse_unusable(tokenizer, refusal)
    try:
        call_with_timeout(lambda: tokenizer.backend_tokenizer.encode_batch_fast([*PAIRS, *TEXTS, *HARD]), SECONDS)
    except Exception as error:
        reason = f"its tokenizer fails on short texts ({first_line(error)})"
        remedy = (
            "Replace its tokenizer.json: the patterns in normalizer and pre_tokenizer are damaged or do not terminate."
        )
        raise refusal(reason, remedy, Code.DAMAGED) from None
    return tokenizer, [*_notes(tokenizer, by_class), *padding_notes]


def reject_special_files(folder: Path) -> None:
    """Refuse a folder whose text files cannot be read at once: pipes, devices, links to nothing, huge files.

    Only its files that end in .json, .txt or .model are checked, by their status alone; nothing is opened.

    Raises:
        UserError: naming the file.
    """
    for path in sorted(folder.iterdir()):
        if path.suffix not in (".json", ".txt", ".model"):
            continue
        try:
            status = path.stat()
        except OSError as error:
            raise UserError(f"cannot be read ({error.strerror})", file=path, code=Code.UNREADABLE) from None
        if not stat.S_ISREG(status.st_mode):
            raise UserError("is not a regular file", file=path, code=Code.NOT_A_FILE)
        if status.st_size > MAX_BYTES:
            reason = f"has {status.st_size:,} bytes, and no file of a tokenizer or config has more than {MAX_BYTES:,}"
            raise UserError(reason, file=path, code=Code.TOO_LARGE)


def call_with_timeout(call: Callable[[], T], seconds: float) -> T:
    """Return the result of a call within a time limit; for native code, which no signal stops.

    All output to the process's standard error is discarded meanwhile, that of other threads too.

    Raises:
        TimeoutError: it takes longer; it goes on in a thread that does not keep the process alive.
        ValueError: the native code panicked.
        Exception: what `call` raises.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        """Run the call, and keep its result or its error."""
        try:
            results.append(call())
        except BaseException as error:  # a panic is no Exception
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    with _no_panic_messages():
        thread.start()
        thread.join(seconds)
    if results:
        return results[0]
    if not errors:
        raise TimeoutError(f"it took longer than {seconds:.0f} seconds")
    if isinstance(errors[0], Exception) or type(errors[0]).__name__ != "PanicException":
        raise errors[0]
    raise ValueError(first_line(errors[0]))


@contextmanager
def _no_panic_messages() -> Iterator[None]:
    """Discard all output to the process's standard error within the context: native code prints its panics there.

    The error that is raised repeats them.
    """
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _file(location: str, revision: str | None) -> Path | None:
    """Return the path of tokenizer.json; None if the tokenizer has other files.

    From the hub it is downloaded, or taken from the local cache; None also if the hub cannot be reached or refuses
    access.
    """
    if os.path.isdir(location):
        path = Path(location, FILE)
        return path if path.is_file() else None
    path_in_cache = transformers.utils.cached_file(
        location,
        FILE,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return None if path_in_cache is None else Path(path_in_cache)


def _by_class(location: str, keywords: Mapping[str, Any], path: Path | None) -> Any:
    """Return the tokenizer as transformers reads it: it knows the special tokens that the file does not name.

    If its class cannot read the vocabulary of tokenizer.json, it is transformers' generic class. No code of the model
    runs.

    Raises:
        Exception: of any type, if tokenizer.json is damaged, or neither class can read the files.
    """
    if path is not None:
        Tokenizer.from_file(str(path))  # so that the error of a damaged file is its own, and not that of a class
    try:
        return AutoTokenizer.from_pretrained(location, trust_remote_code=False, **keywords)
    except Exception:
        if path is None:
            raise
        try:  # the class cannot read this vocabulary; the file alone may suffice
            generic_keywords = {name: value for name, value in keywords.items() if name != "tokenizer_type"}
            return TokenizersBackend.from_pretrained(location, **generic_keywords)
        except Exception:  # the error of the class is nearer to the cause
            pass
        raise


def _as_in_file(by_class: Any, path: Path) -> Any:
    """Return a tokenizer that reads texts as the file says, with the settings of `by_class`.

    It is `by_class` itself, left without padding and truncation, if that reads texts so already.
    """
    backend = Tokenizer.from_file(str(path))
    backend.no_padding()
    backend.no_truncation()
    by_class.backend_tokenizer.no_padding()
    by_class.backend_tokenizer.no_truncation()
    if json.loads(backend.to_str()) == json.loads(by_class.backend_tokenizer.to_str()):
        return by_class
    names = {name: token for name, token in by_class.special_tokens_map.items() if isinstance(token, str)}
    tokenizer = TokenizersBackend(
        tokenizer_object=backend,
        model_max_length=by_class.model_max_length,
        model_input_names=by_class.model_input_names,
        padding_side=by_class.padding_side,
        truncation_side=by_class.truncation_side,
        split_special_tokens=by_class.split_special_tokens,
        clean_up_tokenization_spaces=by_class.clean_up_tokenization_spaces,
        **{name: token for name, token in names.items() if backend.token_to_id(token) is not None},
    )
    tokenizer._tokenizer = backend  # transformers' has been given a template and tokens that the file lacks
    return tokenizer


def _refuse_contradictions(path: Path) -> list[Any]:
    """Refuse a tokenizer.json in which two tokens share an id, ids are absurd, or texts are split at random.

    Returns:
        The entries of `added_tokens`; those that are no objects are left out.

    Raises:
        UserError: as above, or an object has a key twice.
        ValueError: it is not JSON in UTF-8.
    """

    def refuse_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """Return a JSON object as a dict; a `UserError` if it has a duplicate key."""
        members = dict(pairs)
        if len(members) < len(pairs):
            name = next(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
            raise UserError(f"names {name[:50]!r} twice", file=path, remedy=REMEDY, code=Code.DAMAGED)
        return members

    content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=refuse_repeated)
    model, added = (
        (content.get(key) for key in ("model", "added_tokens")) if isinstance(content, dict) else (None, None)
    )
    model = model if isinstance(model, dict) else {}  # the library refuses anything else
    added = [token for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    vocabulary = model.get("vocab")
    vocabulary = vocabulary if isinstance(vocabulary, dict) else {}
    ids = list(vocabulary.values())
    absurd = [i for i in [*ids, *(token.get("id") for token in added)] if type(i) is int and i > MAX_ID]
    if absurd:
        raise UserError(
            f"has the token id {absurd[0]}, and no id is above {MAX_ID}", file=path, remedy=REMEDY, code=Code.DAMAGED
        )
    repeated = next((i for i, times in Counter(map(str, ids)).items() if times > 1), None)
    if repeated is not None:
        names = [token for token, i in vocabulary.items() if str(i) == repeated]
        raise UserError(
            f"gives the tokens {names[0]!r} and {names[1]!r} the same id, {repeated}",
            file=path,
            remedy=REMEDY,
            code=Code.DAMAGED,
        )
    if model.get("dropout"):
        reason = f"has model.dropout={model['dropout']}: it would split the same text differently each time"
        raise UserError(reason, file=path, remedy="Set it to null.", code=Code.UNSUPPORTED)
    return added


def _refuse_other_ids(path: Path, tokenizer: Any, added: list[Any]) -> None:
    """Refuse a tokenizer.json whose added tokens have other ids in the file than in use.

    Args:
        path: of the file, for the message.
        tokenizer: in use.
        added: the result of `_refuse_contradictions`.
    """
    for token in added:
        actual = tokenizer.backend_tokenizer.token_to_id(token["content"])
        if actual != token["id"]:
            reason = (
                f"gives the added token {token['content']!r} the id {token['id']}, where the vocabulary has {actual}"
            )
            raise UserError(reason, file=path, remedy=REMEDY, code=Code.DAMAGED)


REMEDY = "Take the tokenizer.json that the weights came with."


def _choose_padding(tokenizer: Any) -> list[str]:
    """Set the end token as the padding token of a tokenizer that names none.

    Decoders are trained without padding; examples of transformers and PEFT pad them so.

    Returns:
        A note for the user if the token was set, else nothing.
    """
    if tokenizer.pad_token is not None or tokenizer.eos_token not in tokenizer.get_vocab():
        return []
    tokenizer.pad_token = tokenizer.eos_token
    return [f"the tokenizer names no padding token; its end token {tokenizer.eos_token} is used."]


def _refuse_unusable(tokenizer: Any, refusal: Callable[[str, str | None, Code], UserError]) -> None:
    """Refuse a tokenizer that is not fast, has fewer than 10 tokens besides special ones, or cannot pad."""
    # Where there are no files, transformers makes a tokenizer up that knows its special tokens and nothing else.
    words = tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens)
    pad = tokenizer.pad_token
    names_it = "Name a token of its vocabulary as pad_token in its tokenizer_config.json."
    faults = {
        "is not a fast tokenizer": not tokenizer.is_fast,
        "holds no tokenizer": len(words) < 10,
        "has neither a padding token nor an end token": pad is None or tokenizer.pad_token_id is None,
        f"has a padding token, {pad}, that is not in its vocabulary": pad is not None
        and pad not in tokenizer.get_vocab(),
    }
    for fault, holds in faults.items():
        if holds:
            code = Code.NOT_FOUND if fault == "holds no tokenizer" else Code.UNSUPPORTED
            raise refusal(fault, names_it if "padding" in fault else None, code)


def _notes(tokenizer: Any, by_class: Any) -> list[str]:
    """Return a note if the file and the class of transformers tokenise probe texts differently, else nothing.

    The note is another one if the class fails on them.
    """
    if tokenizer is by_class:
        return []
    texts = [*PAIRS, *TEXTS]
    try:
        theirs = call_with_timeout(lambda: by_class.backend_tokenizer.encode_batch_fast(texts), SECONDS)
    except Exception:
        return ["tokenizer.json is read unchanged; the tokenizer class of transformers fails on short texts."]
    ours = tokenizer.backend_tokenizer.encode_batch_fast(texts)
    differing = sum(one.ids != other.ids for one, other in zip(ours, theirs, strict=True))
    if not differing:
        return []
    return [
        f"tokenizer.json is read unchanged; transformers' {type(by_class).__name__} would read {differing} of "
        f"{len(texts)} probe texts differently."
    ]


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, at most 200 characters of it; the error's type if it has none."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".:")[:200]
