"""Read a sample's captions: from members of text and from keys of its json. What one lacks does not spoil another."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

from data.config import SampleConfig
from data.shards import BadSampleError, RawSample, caption_place
from ldm.files.messages import some

LONGEST_CAPTION = 64 << 10  # bytes of UTF-8
CONTROLS = dict.fromkeys((*range(0x20), *range(0x7F, 0xA0)), " ")  # Unicode's category Cc
USUAL = SampleConfig()


class Captions(NamedTuple):
    """The captions of a sample, best first and each once; what of the sample cannot be used, and why; and the names of
    config.caption_keys under which there is something."""

    texts: list[str]
    unused: list[str]
    names: set[str]


class _Unusable(Exception):
    """A text, or a part of a json, is no caption, for the reason in the message."""


def read_captions(raw: RawSample, config: SampleConfig = USUAL) -> list[str]:
    """Read all captions, best first and each once. Raises BadSampleError if there is none: see find_captions."""
    return find_captions(raw, config).texts


def find_captions(raw: RawSample, config: SampleConfig = USUAL) -> Captions:
    """Read all captions, and describe what cannot be used. One usable caption is enough.

    Captions are normalised to NFC, and control characters become spaces. Unusable is what does not parse, is not
    UTF-8, not text, or above 64 KiB. Raises BadSampleError if there is no caption: an empty one would teach that the
    prompt means nothing, so it is used only if config.missing_caption asks for it, and if nothing was unusable.
    """
    documents: dict[str, Any] = {}  # the parsed json members
    texts: dict[str, None] = {}
    unused: dict[str, None] = {}
    names: set[str] = set()
    for name in config.caption_keys:
        for caption in _captions_under(name, raw, documents, config):
            if caption not in (None, ""):
                names.add(name)
            try:
                if isinstance(caption, _Unusable):
                    raise caption
                if text := _clean(caption, name):
                    texts[text] = None
            except _Unusable as error:
                unused[str(error)] = None
    if texts:
        return Captions(list(texts), list(unused), names)
    if unused:
        raise BadSampleError(next(iter(unused)))
    reason = f"no caption ({_what_there_is(raw, documents, config)})"
    if config.missing_caption == "reject":
        raise BadSampleError(reason)
    return Captions([""], [f"{reason}: it gets an empty one"], names)


def _captions_under(name: str, raw: RawSample, documents: dict[str, Any], config: SampleConfig) -> Iterator[Any]:
    """Yield what is found under one of config.caption_keys; _Unusable for what cannot be read."""
    ending, path = caption_place(name, raw.endings)
    try:
        if not _is_json(ending):
            text = _decoded(raw, ending)
            yield from text.splitlines() if config.caption_lines == "separate" else [text]
            return
        if ending not in documents:
            documents[ending] = None
            documents[ending] = _parsed(raw, ending)
        value = _under(documents[ending], path)
    except _Unusable as error:
        yield error
        return
    if isinstance(value, dict):
        keys, key = list(cast(dict[str, Any], value)), ".".join((ending, *path))
        example = f"{key}.{keys[0] if keys else 'en'}"
        yield _Unusable(f"its {key} is an object ({some(keys)}: name one in data.caption_keys, as {example})")
    else:
        yield from cast(list[Any], value) if isinstance(value, list) else [value]


def _is_json(ending: str) -> bool:
    return ending.rpartition(".")[2] == "json"


def _decoded(raw: RawSample, ending: str) -> str:
    """Decode a member as UTF-8, without a byte-order mark; "" if there is none."""
    if ending in raw.faults:
        raise _Unusable(raw.faults[ending])
    try:
        return raw.members.get(ending, b"").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _Unusable(f"its {ending} does not parse ({error})") from error


def _parsed(raw: RawSample, ending: str) -> Any:
    text = _decoded(raw, ending)
    if ending not in raw.members:
        return None
    try:
        found: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _Unusable(f"its {ending} does not parse ({error})") from error
    if type(found) is not dict:
        raise _Unusable(f"its {ending} does not parse (expected an object, found a {type(found).__name__})")
    return cast(dict[str, Any], found)


def _under(value: Any, path: Sequence[str]) -> Any:
    """Follow a path of keys. Lists are followed in each of their items; None if nothing is there."""
    if not path or value is None:
        return value
    if isinstance(value, list):
        found = [_under(item, path) for item in cast(list[Any], value)]
        return [one for item in found for one in (cast(list[Any], item) if isinstance(item, list) else [item])]
    if not isinstance(value, dict):
        return None
    record = cast(dict[str, Any], value)
    if (key := ".".join(path)) in record:  # a key may have dots itself
        return record[key]
    return _under(record.get(path[0]), path[1:])


def _what_there_is(raw: RawSample, documents: dict[str, Any], config: SampleConfig) -> str:
    keys = [key for document in documents.values() if document for key in document]
    record = f" with the keys {some(map(str, keys))} in its json" if keys else ""
    names = ", ".join(config.caption_keys)
    return f"under {names}; its members are {raw.listed}{record}: data.caption_keys names others"


def _clean(caption: Any, name: str) -> str:
    if caption is None:
        return ""
    if not isinstance(caption, str):
        raise _Unusable(f"a caption is not text ({name} holds a {type(caption).__name__})")
    if caption.isascii() and caption.isprintable() and len(caption) <= LONGEST_CAPTION:  # nearly all: nothing to clean
        return caption.strip()
    if unpaired := next((character for character in caption if "\ud800" <= character <= "\udfff"), None):
        raise _Unusable(f"a caption contains an unpaired surrogate ({unpaired!r}), which no tokenizer can read")
    if len(caption.encode()) > LONGEST_CAPTION:
        raise _Unusable(f"a caption has {len(caption.encode()):,} bytes, more than {LONGEST_CAPTION:,}")
    return unicodedata.normalize("NFC", caption.translate(CONTROLS)).strip()
