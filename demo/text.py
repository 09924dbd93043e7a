"""Three domains of text that every machine with Python holds, each split into training, development and test text.

Python source is the standard library's, English is the language reference in ``pydoc_data.topics``, C is the headers
of CPython and numpy. Whole documents (a file, a topic) are held out, and whatever else repeats a paragraph of a
held-out document (licence headers, the chapters that the topics share) loses that paragraph: no held-out paragraph is
trained on. Of what is held out some stretches, drawn from all over it, are for searches, which choose by their scores
on them; they lose what the others repeat: no paragraph that is scored in the end was trained on or chosen by.
"""

import hashlib
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

DOMAINS = ("python", "english", "c")
DOMAIN_BYTES = 1_200_000  # the largest share of one domain: more than the training sees, and quick to score
HELD_OUT = 0.1
DEVELOPMENT = 0.4  # of what is held out
STRETCH = 2000  # bytes, at least: whole paragraphs that are searched on or scored together
SHORTEST_PARAGRAPH = 24  # bytes; shorter ones ("#endif", "return self") recur by nature and teach nothing about a file


@dataclass(frozen=True)
class Split:
    """One domain's text as UTF-8 bytes: ``train`` to learn from, and ``held_out`` not to.

    Of the latter, ``development`` is what searches score what they try on, and ``test`` what the table's scores are of.
    """

    train: bytes
    held_out: bytes
    development: bytes
    test: bytes


def python_documents() -> dict[str, bytes]:
    """The modules at the top of the standard library, by file name."""
    return _files(Path(sysconfig.get_path("stdlib")), "*.py")


def english_documents() -> dict[str, bytes]:
    """The topics of ``help()``: prose about the language, by topic."""
    from pydoc_data.topics import topics

    return {name: text.encode() for name, text in topics.items()}


def c_documents() -> dict[str, bytes]:
    """The headers of CPython and numpy, by path."""
    import numpy

    folders = {"cpython": Path(sysconfig.get_path("include")), "numpy": Path(numpy.get_include())}
    return {
        f"{owner}/{name}": text for owner, folder in folders.items() for name, text in _files(folder, "**/*.h").items()
    }


def load() -> dict[str, Split]:
    """The split of each domain on this machine."""
    return split({"python": python_documents(), "english": english_documents(), "c": c_documents()})


def split(
    domains: Mapping[str, Mapping[str, bytes]], *, share: float = HELD_OUT, limit: int = DOMAIN_BYTES
) -> dict[str, Split]:
    """Hold out about ``share`` of each domain's bytes, by whole documents.

    Documents come in the order of a hash of their names, so the choice depends on no file system and favours no letter
    of the alphabet. At most ``limit`` bytes of a domain are used.
    """
    held_out: dict[str, list[bytes]] = {}
    train: dict[str, list[bytes]] = {}
    for domain, documents in domains.items():
        chosen = _choose(documents, limit)
        budget = share * sum(map(len, chosen))
        held_out[domain], train[domain] = [], []
        for text in chosen:
            # A document that would overshoot goes to training: one huge file must not become the whole test.
            if len(text) <= budget:
                held_out[domain].append(text)
                budget -= len(text)
            else:
                train[domain].append(text)

    secret = {paragraph for texts in held_out.values() for text in texts for paragraph in paragraphs(text)}
    development, test = {}, {}
    for domain, texts in held_out.items():
        development[domain], test[domain] = _divide(b"\n\n".join(texts), domain)
    final = {paragraph for text in test.values() for paragraph in paragraphs(text)}
    return {
        domain: Split(
            train=b"\n\n".join(_without(text, secret) for text in train[domain]),
            held_out=b"\n\n".join(held_out[domain]),
            development=_without(development[domain], final),
            test=test[domain],
        )
        for domain in domains
    }


def paragraphs(text: bytes) -> set[bytes]:
    """The paragraphs of ``text`` that are long enough to give it away, with white space at their ends removed."""
    return {piece.strip() for piece in text.split(b"\n\n") if len(piece.strip()) >= SHORTEST_PARAGRAPH}


def digest(splits: Mapping[str, Split]) -> str:
    """What identifies the texts: models trained on other text are other models."""
    whole = hashlib.sha256()
    for domain in sorted(splits):
        for part in (splits[domain].train, splits[domain].held_out):
            whole.update(f"{domain} {len(part)}\n".encode() + part)
    return whole.hexdigest()


def sample(text: bytes, size: int, *, piece: int = 4000) -> bytes:
    """About ``size`` bytes of a text, in pieces spread evenly over it; the text itself if it is no longer than that."""
    if len(text) <= size:
        return text
    count = max(1, size // piece)
    starts = (index * (len(text) - piece) // max(1, count - 1) for index in range(count))
    return b"".join(text[start : start + piece] for start in starts)


def _choose(documents: Mapping[str, bytes], limit: int) -> list[bytes]:
    chosen, seen, room = [], set[bytes](), limit
    for name in sorted(documents, key=lambda name: hashlib.sha256(name.encode()).digest()):
        text = documents[name]
        if text not in seen and len(text) <= room:
            chosen.append(text)
            seen.add(text)
            room -= len(text)
    return chosen


def _divide(text: bytes, domain: str) -> tuple[bytes, bytes]:
    """What of a text is for development and what for the test: stretches of it, drawn by a hash of their numbers."""
    stretches: list[list[bytes]] = [[]]
    for piece in text.split(b"\n\n"):
        if sum(map(len, stretches[-1])) >= STRETCH:
            stretches.append([])
        stretches[-1].append(piece)
    numbers = sorted(range(len(stretches)), key=lambda n: hashlib.sha256(f"{domain} {n}".encode()).digest())
    chosen = set(numbers[: round(DEVELOPMENT * len(numbers))])
    development, test = (
        [b"\n\n".join(stretch) for number, stretch in enumerate(stretches) if (number in chosen) is wanted]
        for wanted in (True, False)
    )
    return b"\n\n".join(development), b"\n\n".join(test)


def _without(text: bytes, secret: set[bytes]) -> bytes:
    return b"\n\n".join(piece for piece in text.split(b"\n\n") if piece.strip() not in secret)


def _files(folder: Path, pattern: str) -> dict[str, bytes]:
    found = {}
    for path in folder.glob(pattern):
        if path.is_file():
            # One kind of line end, so that paragraphs are found alike.
            found[path.relative_to(folder).as_posix()] = path.read_bytes().replace(b"\r\n", b"\n")
    return found
