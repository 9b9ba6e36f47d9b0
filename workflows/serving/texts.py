"""Names of requests: vocabularies as clients send and store them, and a bounded cache of embeddings."""

import contextlib
import hashlib
import json
import math
import re
import sys
import threading
import time
import unicodedata
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
from pyarrow import fs
from torch import Tensor

from data_prep import storage
from ovd_models.clip.model import SENTENCES, names_at_a_time
from ovd_models.detectors.region_query import embed_prompts
from ovd_models.errors import InputError
from ovd_models.prompts import prompts_of
from ovd_models.vocabulary import TextEncoder
from workflows.serving.limits import Limits, ProblemError, refusal
from workflows.serving.metrics import Metrics

K = TypeVar("K")
V = TypeVar("V")
VOCABULARY_ID = re.compile(r"[0-9a-f]{32}")


class ByteLru(Generic[K, V]):
    """A thread-safe cache bounded in bytes; the entries unused for longest leave first."""

    def __init__(self, name: str, max_bytes: int, metrics: Metrics) -> None:
        self._name, self._max_bytes, self._metrics = name, max_bytes, metrics
        self._entries: OrderedDict[K, tuple[V, int]] = OrderedDict()
        self._lock, self.bytes = threading.Lock(), 0

    def get(self, key: K) -> V | None:
        """The entry, which is then the newest; None if there is none."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._entries.move_to_end(key)
        self._metrics.cache.labels(self._name, "miss" if entry is None else "hit").inc()
        return None if entry is None else entry[0]

    def put(self, key: K, value: V, size: int) -> None:
        """Add an entry of `size` bytes, unless it is larger than the whole cache."""
        if size > self._max_bytes:
            return
        with self._lock:
            self.bytes += size - self._entries.pop(key, (value, 0))[1]
            self._entries[key] = value, size
            while self.bytes > self._max_bytes:
                _, (_, dropped) = self._entries.popitem(last=False)
                self.bytes -= dropped
            self._metrics.cache_bytes.labels(self._name).set(self.bytes)

    def __len__(self) -> int:
        return len(self._entries)


@dataclass(frozen=True)
class Words:
    """A vocabulary as a client sends it."""

    names: tuple[str, ...]
    synonyms: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Other words by name, for the names that have some."""
    base: tuple[tuple[str, bool], ...] = ()
    """Whether a name counts as base, for the names where the client says so."""

    def to_json(self) -> str:
        """The same words in one spelling, as their digest covers them."""
        return json.dumps([self.names, self.synonyms, self.base], ensure_ascii=False, separators=(",", ":"))

    @property
    def digest(self) -> str:
        """32 hexadecimal digits of the content."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:32]

    @classmethod
    def from_json(cls, text: str) -> "Words":
        """The words of `to_json`."""
        names, synonyms, base = json.loads(text)
        return cls(
            tuple(names),
            tuple((name, tuple(others)) for name, others in synonyms),
            tuple((name, bool(flag)) for name, flag in base),
        )


def parse_words(text: str, limits: Limits) -> Words:
    """Parse a JSON list of names, or of objects with `name`, `synonyms` and `base`; repeated names are dropped.

    Raises:
        ProblemError: 422, naming the fault.
    """
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError):
        raise refusal("vocabulary", 'not JSON, expected a list as ["red umbrella", "anchor"]') from None
    if not isinstance(entries, list):
        raise refusal("vocabulary", f"a JSON {type(entries).__name__}, expected a list of names")
    if not entries:
        raise refusal("vocabulary", "empty, expected at least one name")
    if len(entries) > limits.max_names:
        raise refusal("vocabulary", f"{len(entries):,} names, at most {limits.max_names:,} are accepted")
    names: dict[str, tuple[str, ...]] = {}
    base: dict[str, bool] = {}
    for index, entry in enumerate(entries):
        fields = entry if isinstance(entry, dict) else {"name": entry}
        if not fields.keys() <= {"name", "synonyms", "base"}:
            raise refusal("vocabulary", f"entry {index} has other fields than name, synonyms and base")
        name = _clean(fields.get("name"), f"entry {index}", limits)
        others = fields.get("synonyms", [])
        if not isinstance(others, list) or len(others) > limits.max_synonyms:
            raise refusal("vocabulary", f"synonyms of entry {index}: expected a list of up to {limits.max_synonyms}")
        words = tuple(_clean(word, f"a synonym of entry {index}", limits) for word in others)
        if not isinstance(fields.get("base", True), bool):
            raise refusal("vocabulary", f"base of entry {index}: expected true or false")
        names.setdefault(name, words)
        if "base" in fields:
            base.setdefault(name, fields["base"])
    total = len(names) + sum(map(len, names.values()))
    if total > limits.max_names:
        raise refusal("vocabulary", f"{total:,} names and synonyms, at most {limits.max_names:,} are accepted")
    return Words(tuple(names), tuple((name, words) for name, words in names.items() if words), tuple(base.items()))


def _clean(name: object, place: str, limits: Limits) -> str:
    if not isinstance(name, str) or not name.strip():
        raise refusal("vocabulary", f"{place} is {json.dumps(name)[:40]}, expected a non-empty string")
    if len(name) > limits.max_name_characters:
        most = limits.max_name_characters
        raise refusal("vocabulary", f"{place} has {len(name):,} characters, at most {most} are accepted")
    if not name.isascii() and any("\ud800" <= character <= "\udfff" for character in name):
        raise refusal("vocabulary", f"{place} holds half of a surrogate pair, expected text")
    if "\0" in name or all(unicodedata.category(character)[0] in "CZ" for character in name):
        raise refusal("vocabulary", f"{place} is {ascii(name)[:40]}, expected text that can be seen")
    return name.strip()


class VocabularyStore:
    """Vocabularies stored once and named by their digest: files below `<storage>/vocabularies/`, and recent ones here.

    All replicas share the files; a vocabulary outlives them.
    """

    def __init__(self, storage_uri: str, limits: Limits, metrics: Metrics) -> None:
        self._folder, self._limits = storage.join(storage_uri, "vocabularies"), limits
        self._recent: ByteLru[str, str] = ByteLru("vocabularies", 32_000_000, metrics)

    def put(self, words: Words) -> str:
        """Store a vocabulary; returns its id."""
        digest, text = words.digest, words.to_json()
        uri = storage.join(self._folder, f"{digest}.json")
        if not storage.exists(uri):
            self._make_room()
            storage.write_bytes(uri, text.encode())
        self._recent.put(digest, text, sys.getsizeof(text))
        return digest

    def get(self, digest: str) -> Words:
        """The vocabulary of an id.

        Raises:
            ProblemError: 422, there is none.
        """
        text = self._recent.get(digest)
        if text is not None:
            return Words.from_json(text)
        try:
            text = storage.read_bytes(storage.join(self._folder, f"{digest}.json")).decode()
        except FileNotFoundError:
            raise refusal("vocabulary", f"{digest} is not stored, expected a list or PUT /v1/vocabularies") from None
        except OSError as error:
            raise ProblemError(503, "Busy", "the stored vocabularies cannot be read at the moment") from error
        self._recent.put(digest, text, sys.getsizeof(text))
        return Words.from_json(text)

    def _make_room(self) -> None:
        """Remove the oldest vocabularies beyond the limit."""
        filesystem, path = storage.resolve(self._folder)
        entries = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
        files = sorted((entry for entry in entries if entry.path.endswith(".json")), key=lambda entry: entry.mtime_ns)
        for entry in files[: max(0, len(files) + 1 - self._limits.max_vocabularies)]:
            with contextlib.suppress(FileNotFoundError):  # another replica was faster
                filesystem.delete_file(entry.path)


class TextCache:
    """Embeddings of names by teacher, prompt set and name; a name is computed once, however many requests wait."""

    def __init__(self, max_bytes: int, metrics: Metrics) -> None:
        self._rows: ByteLru[tuple[str, str, str], Tensor] = ByteLru("texts", max_bytes, metrics)
        self._computing = threading.Lock()
        self.computed = 0
        """Names embedded so far."""

    def embed(self, encoder: TextEncoder, prompt_set: str, names: Sequence[str], deadline: float = math.inf) -> Tensor:
        """[K, D] unit rows.

        Args:
            encoder: of the model.
            prompt_set: the templates.
            names: K names.
            deadline: in seconds of `time.monotonic`; what is embedded by then is kept.

        Raises:
            InputError: a name cannot be embedded, or the prompt set is unknown.
            TimeoutError: not all names are embedded at the deadline.
        """
        found = self._find(encoder, prompt_set, names)
        missing = [name for name in dict.fromkeys(names) if name not in found]
        step = _names_at_a_time(prompt_set)
        for part in (missing[start : start + step] for start in range(0, len(missing), step)):
            with self._computing:
                if time.monotonic() > deadline:
                    raise TimeoutError
                found |= self._find(encoder, prompt_set, part)
                new = [name for name in part if name not in found]
                if new:
                    found |= self._compute(encoder, prompt_set, new)
        return torch.stack([found[name] for name in names])

    def _find(self, encoder: TextEncoder, prompt_set: str, names: Sequence[str]) -> dict[str, Tensor]:
        entries = ((name, self._rows.get((encoder.teacher, prompt_set, name))) for name in dict.fromkeys(names))
        return {name: row for name, row in entries if row is not None}

    def _compute(self, encoder: TextEncoder, prompt_set: str, names: Sequence[str]) -> dict[str, Tensor]:
        if prompt_set == encoder.prompt_set:
            rows_KD = encoder.embed_names(names)
        else:
            rows_KD = embed_prompts(encoder, [prompts_of(name, prompt_set) for name in names])
        self.computed += len(names)
        rows = {name: row.clone() for name, row in zip(names, rows_KD, strict=True)}
        for name, row in rows.items():
            self._rows.put((encoder.teacher, prompt_set, name), row, row.nbytes + 2 * len(name) + 200)
        return rows


def _names_at_a_time(prompt_set: str) -> int:
    """Names embedded before the deadline is looked at again."""
    try:
        return names_at_a_time(prompt_set)
    except InputError:  # of a table, whose names are looked up; unknown ones are refused by the encoder
        return SENTENCES


@dataclass(frozen=True)
class CachedEncoder:
    """A model's text encoder with another prompt set, through the cache, until a deadline; see `TextCache.embed`."""

    cache: TextCache
    encoder: TextEncoder
    prompt_set: str
    deadline: float

    @property
    def teacher(self) -> str:
        """Identifies the model and its weights."""
        return self.encoder.teacher

    def embed_names(self, names: Sequence[str]) -> Tensor:
        """[K, D] unit rows."""
        return self.cache.embed(self.encoder, self.prompt_set, names, self.deadline)

    def with_prompts(self, prompt_set: str) -> "CachedEncoder":
        """The same encoder with other prompts."""
        return replace(self, prompt_set=prompt_set)

    def embed_captions(self, captions: Sequence[str]) -> Tensor | None:
        """[B, D] unit rows, not cached; None without a text tower."""
        return self.encoder.embed_captions(captions)


def is_vocabulary_id(text: str) -> bool:
    """Whether a field holds an id of `PUT /v1/vocabularies` and not a list of names."""
    return VOCABULARY_ID.fullmatch(text.strip().strip('"')) is not None
