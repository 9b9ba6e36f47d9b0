"""Small files in formats that others publish: WebDataset shards, WordNet."""

import io
import tarfile
from pathlib import Path

NOUNS = {  # synset -> its words, and those above it
    "00000001": ("entity", []),
    "00000002": ("object", ["00000001"]),
    "00000003": ("food", ["00000001"]),
    "00000004": ("location", ["00000002"]),
    "00000005": ("structure", ["00000002"]),
    "00000006": ("truck", ["00000002"]),
    "00000007": ("house", ["00000005"]),
    "00000008": ("cake", ["00000003"]),
    "00000009": ("city", ["00000004"]),
    "00000010": ("idea", ["00000001"]),
    "00000011": ("organism", ["00000002"]),
    "00000012": ("cause", ["00000001"]),
    "00000013": ("person", ["00000011", "00000012"]),  # `cause` comes first by name
    "00000014": ("fire", ["00000001"]),
    **{f"0000002{n}": (word, []) for n, word in enumerate(("photograph", "photo", "picture", "system", "land"))},
}
SENSES = {
    "kite": ["00000010", "00000010", "00000006"],  # the third sense does not count
    "mouse": ["00000010", "00000006"],
}
LICENCE = "  1 This software and database is being provided to you | as it is\n"


def write_wordnet(folder: Path) -> Path:
    """A few words in the format of WordNet's files."""
    folder.mkdir()
    senses = {word: [offset] for offset, (word, _) in NOUNS.items()} | SENSES
    index = "".join(f"{word} n {len(own)} 1 @ {len(own)} 0 {' '.join(own)}  \n" for word, own in senses.items())
    data = "".join(
        f"{offset} 03 n 01 {word} 0 {len(above):03d} {' '.join(f'@ {one} n 0000' for one in above)} | a gloss  \n"
        for offset, (word, above) in NOUNS.items()
    )
    for part in ("noun", "verb", "adj", "adv"):
        (folder / f"index.{part}").write_text(LICENCE + (index if part == "noun" else ""))
        (folder / f"data.{part}").write_text(LICENCE + (data if part == "noun" else ""))
    return folder


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    """A tar file of the given members, in order."""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path
