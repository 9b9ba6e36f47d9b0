"""Precision, recall and speed of finding concepts in human captions.

python benchmarks/concepts.py [captions.txt]

Precision and recall are over the 100 captions of `concept_labels.tsv`, labelled before the extractor was written.
They are optimistic: the same person wrote labels and word lists, had read the other 600 captions of the set, and
corrected the lists after the first run (precision 0.989, recall 0.985). For the 100 further captions of
`concept_labels_2.tsv` no list was changed, but the rules for clothing, for a verb's noun with its object and for
adverbs behind nouns were written with their mistakes in view (before: precision 0.966, recall 0.981). The argument
is a text file with one caption a line, whose most common concepts are listed. The default is the 700 captions of
the reference data, or the labelled ones if that is absent.
"""

import argparse
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from reference import REFERENCE

from data_prep.concepts.nouns import NOUN_TAGS, TOKEN, NounExtractor, load_hanta

LABELS = Path(__file__).parent / "concept_labels.tsv"
UNSEEN = Path(__file__).parent / "concept_labels_2.tsv"
"""Labelled before the rule for compounds of sports was written; no list was changed for it."""
CAPTIONS = REFERENCE / "data/captions_700.txt"


def labelled(path: Path = LABELS) -> list[tuple[str, set[str]]]:
    rows = [line.split("\t") for line in path.read_text().splitlines() if not line.startswith("#")]
    return [(caption, {name for name in names.split("; ") if name}) for _, caption, names in rows]


def untreated(caption: str) -> list[str]:
    """Nouns by HanTa alone, with its own lemmas: the baseline of the word lists."""
    words = [token.lower() for token in TOKEN.findall(caption)]
    return [lemma for _, lemma, tag in load_hanta().tag_sent(words) if tag in NOUN_TAGS]


def compare(title: str, match: Callable[[str], list[str]], labels: Path = LABELS) -> tuple[Counter[str], Counter[str]]:
    """Print precision, recall and F1 over all labels; returns the false positives and the misses."""
    right, wrong, missed = Counter[str](), Counter[str](), Counter[str]()
    for caption, names in labelled(labels):
        found = set(match(caption))
        right.update(found & names)
        wrong.update(found - names)
        missed.update(names - found)
    precision = right.total() / (right.total() + wrong.total())
    recall = right.total() / (right.total() + missed.total())
    f1 = 2 * precision * recall / (precision + recall)
    print(f"{title:<22} precision {precision:.3f}  recall {recall:.3f}  F1 {f1:.3f}")
    return wrong, missed


def commonest(nouns: NounExtractor, captions: list[str]) -> None:
    started = time.perf_counter()
    counts = Counter(name for caption in captions for name in nouns.match(caption))
    seconds = time.perf_counter() - started
    print(f"\n{len(captions)} captions: {counts.total() / len(captions):.2f} concepts each, {len(counts)} different")
    print(", ".join(f"{name} {count}" for name, count in counts.most_common(40)))
    print(f"{len(captions) / seconds:.0f} captions/s on one core, {1000 * seconds / len(captions):.2f} ms each")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("captions", nargs="?", type=Path, default=CAPTIONS, help="one caption a line")
    arguments = parser.parse_args()
    print(f"{len(labelled())} labelled captions, {sum(len(names) for _, names in labelled())} concepts")
    compare("HanTa alone", untreated)
    wrong, missed = compare("NounExtractor", NounExtractor().match)
    for title, names in (("found, not labelled", wrong), ("labelled, not found", missed)):
        print(f"{title}: {', '.join(f'{name} {count}' for name, count in names.most_common()) or 'none'}")
    compare("on unseen labels", NounExtractor().match, UNSEEN)
    path: Path = arguments.captions
    commonest(
        NounExtractor(), path.read_text().splitlines() if path.exists() else [caption for caption, _ in labelled()]
    )


if __name__ == "__main__":
    main()
