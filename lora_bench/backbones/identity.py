"""The identity of a tokenizer: digests of its content and of the token ids of fixed probe texts."""

from __future__ import annotations

import json
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import tokenizers
import transformers

from lora_bench.data.special_tokens import SpecialTokens

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lora_bench.errors import UserError

PAIRS = [
    ("How do I cook rice?", "What is the best way to cook rice?"),
    ("Is 3.14 close to pi?", "is 3.14 CLOSE to PI ?"),
    ("first\tcolumn", "second\ncolumn\r\n"),
    ("Grüße aus München", "Gru\u0308ße aus Mu\u0308nchen"),
    ("", "An empty first text"),
    ("An empty second text", ""),
    ("a [SEP] b </s> c", "<s> d [CLS] e <pad> [PAD]"),
    ("日本語の質問ですか", "中文问题吗？"),
]
TEXTS = [
    "",
    " ",
    "The quick brown fox jumps over the lazy dog.",
    "THE QUICK BROWN FOX",
    "  leading,  double  and trailing spaces  ",
    "tab\there, line\nfeed, carriage\rreturn, no\u00a0break",
    "São Paulo, naïve café, Ångström, İstanbul, straße",
    "e\u0301 versus é, ﬁ versus fi, ２ versus 2",
    "Привет, как дела?",
    "Πώς είσαι σήμερα;",
    "هل هذا سؤال؟",
    "क्या यह एक प्रश्न है?",
    "이것은 질문입니까?",
    "😀 👩\u200d👩\u200d👧 🇧🇷 ❤\ufe0f",
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "0 1 23 456 7890 1,234,567.89 -5e10 0x1F 50% $20",
    "it's don't we'll you've I'm he'd 'quoted' \"double\"",
    "user@example.org https://example.org/a_b?c=d&e=f#g @user #tag",
    "def f(x): return x**2  # code {a: [1, 2]} <b>html</b>",
    "[CLS] [SEP] [MASK] [UNK] [PAD]",
    "<s> </s> <mask> <unk> <pad> <extra_id_0> <|endoftext|>",
    "under_score-hyphen/slash\\backslash…—–",
    "zero\u200bwidth \ufeff mark \u0000 null \u00ad soft",
    "a",
]
"""With `PAIRS` the 32 probe texts whose token ids are part of a run's identity: changing one changes every identity."""


def probe(tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """Return (token ids, token types) of each probe text: 8 pairs, then 24 single texts.

    Special tokens in them are read as special. The tokenizer is left without padding and truncation.
    """
    backend = tokenizer.backend_tokenizer
    SpecialTokens(are_split=False).configure(backend)
    return [(encoding.ids, encoding.type_ids) for encoding in backend.encode_batch_fast([*PAIRS, *TEXTS])]


def tokenizer_digests(tokenizer: Any) -> dict[str, str]:
    """Return the two digests by which a run recognises its tokenizer.

    `tokenizer_sha256` covers the whole content. `tokenizer_probe_sha256` covers what decides token ids whatever the
    version of the libraries: the ids of the probe texts, the vocabulary and the merges. The tokenizer is left without
    padding and truncation.
    """
    ids = probe(tokenizer)
    backend = tokenizer.backend_tokenizer
    content = json.loads(backend.to_str())
    content["split_special_tokens"] = False  # older digests cover it; texts are read alike with either value
    model = content["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges") or []]
    scores = model["vocab"] if isinstance(model.get("vocab"), list) else []
    vocabulary = sorted(backend.get_vocab(with_added_tokens=True).items())
    return {
        "tokenizer_sha256": _digest(content),
        "tokenizer_probe_sha256": _digest([ids, vocabulary, merges, [[w, round(s, 6)] for w, s in scores]]),
    }


def _digest(content: Any) -> str:
    return sha256(json.dumps(content, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def refuse_other_tokenizer(
    recorded: Mapping[str, Any], current: Mapping[str, str], refusal: Callable[[str, str], UserError]
) -> list[str]:
    """Refuse a tokenizer that gives other token ids than the one that a run was trained with.

    Args:
        recorded: `environment` of the run's record; a record without digests is accepted.
        current: the result of `tokenizer_digests` for the tokenizer in use.
        refusal: returns the error for a reason and a remedy.

    Returns:
        Notes on differences that leave the token ids unchanged: other files, other versions of the libraries.

    Raises:
        UserError: the digests `tokenizer_probe_sha256` differ.
    """
    probe_sha256 = recorded.get("tokenizer_probe_sha256")
    if probe_sha256 is None:
        return []
    if probe_sha256 != current["tokenizer_probe_sha256"]:
        raise refusal(
            "the tokenizer is not the one that this run was trained with: it gives other token ids",
            "Put its former files back, or give model.tokenizer=DIR, a folder that holds them.",
        )
    notes = []
    if recorded.get("tokenizer_sha256") != current["tokenizer_sha256"]:
        notes.append("the tokenizer's files have changed since the training; the token ids of the probe texts agree.")
    versions = recorded.get("versions")
    for library in (tokenizers, transformers):
        name, version = library.__name__, library.__version__
        before = versions.get(name) if isinstance(versions, dict) else None
        if before is not None and before != version:
            notes.append(f"trained with {name} {before}, read with {version}; the token ids of the probe texts agree.")
    return notes
