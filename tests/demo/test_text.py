"""The split of the demo's texts: nothing that is scored was learned."""

import itertools

import pytest

from demo import text

LICENCE = b"All rights reserved, for as long as it takes."


def lines(domain: str, document: int, count: int = 20) -> bytes:
    return b"\n\n".join(f"{domain}: paragraph {n} of document {document}".encode() for n in range(count))


@pytest.fixture
def domains() -> dict[str, dict[str, bytes]]:
    """Three domains of thirty documents, each under the same licence."""
    return {
        domain: {f"{domain}/{n}": LICENCE + b"\n\n" + lines(domain, n) for n in range(30)} for domain in text.DOMAINS
    }


@pytest.fixture(scope="module")
def real() -> dict[str, text.Split]:
    return text.load()


def all_paragraphs(splits: dict[str, text.Split], part: str) -> set[bytes]:
    return set().union(*(text.paragraphs(getattr(split, part)) for split in splits.values()))


def test_no_held_out_paragraph_is_trained_on_in_any_domain(domains):
    domains["c"]["c/copy"] = domains["python"]["python/0"]
    splits = text.split(domains)
    assert not all_paragraphs(splits, "held_out") & all_paragraphs(splits, "train")


def test_no_held_out_paragraph_of_the_real_texts_is_trained_on(real):
    assert not all_paragraphs(real, "held_out") & all_paragraphs(real, "train")


def test_what_searches_see_is_held_out_from_training_and_no_paragraph_of_it_is_scored(real, domains):
    shared = LICENCE + b"\n\nA chapter that several documents of this domain repeat."
    domains["english"] = {name: shared + text[len(LICENCE) :] for name, text in domains["english"].items()}
    for splits in (real, text.split(domains)):
        development, test = all_paragraphs(splits, "development"), all_paragraphs(splits, "test")
        assert development and test and not development & test
        assert development | test <= all_paragraphs(splits, "held_out")
        assert not (development | test) & all_paragraphs(splits, "train")
    for split in real.values():
        # A stretch that is longer than the others, such as a table, may be in either.
        assert 0.25 < len(split.development) / len(split.held_out) < 0.5 and len(split.test) > 15_000


def test_a_tenth_of_every_real_domain_is_held_out(real):
    assert sorted(real) == sorted(text.DOMAINS)
    for split in real.values():
        whole = len(split.train) + len(split.held_out)
        assert 0.08 < len(split.held_out) / whole < 0.13
        assert len(split.held_out) > 20_000


def test_the_real_domains_share_no_document():
    documents = [set(read().values()) for read in (text.python_documents, text.english_documents, text.c_documents)]
    assert all(len(found) > 20 for found in documents)
    assert not documents[0] & documents[1] and not documents[0] & documents[2] and not documents[1] & documents[2]


def test_documents_are_held_out_whole(domains):
    held_out = text.split(domains)["python"].held_out
    for document in domains["python"].values():
        body = [piece for piece in document.split(b"\n\n") if piece != LICENCE]
        assert len({piece in held_out.split(b"\n\n") for piece in body}) == 1


def test_the_split_depends_on_names_and_not_on_their_order(domains):
    backwards = {domain: dict(reversed(documents.items())) for domain, documents in reversed(domains.items())}
    assert text.split(backwards) == text.split(domains)


def test_two_documents_of_the_same_text_count_once(domains):
    domains["c"]["c/again"] = domains["c"]["c/3"]
    assert text.split(domains)["c"].train.count(b"paragraph 7 of document 3\n") <= 1


def test_a_domain_is_no_larger_than_the_limit(domains):
    splits = text.split(domains, limit=4000)
    assert all(2000 < len(split.train) + len(split.held_out) <= 4000 for split in splits.values())


def test_a_document_larger_than_the_share_is_never_held_out(domains):
    domains["c"]["c/huge"] = lines("huge", 0, count=1000)
    assert b"huge" not in text.split(domains)["c"].held_out


def test_the_digest_tells_texts_apart(domains):
    first = text.split(domains)
    assert text.digest(first) == text.digest(text.split(domains))
    domains["c"]["c/1"] += b"\n\none more paragraph in the last place"
    assert text.digest(text.split(domains)) != text.digest(first)


@pytest.mark.parametrize("size", [1, 4000, 8000, 60_000, 99_999, 100_000, 200_000])
def test_a_sample_is_spread_over_the_text_and_shares_no_byte_twice(size):
    whole = b"".join(number.to_bytes(4, "big") for number in range(25_000))
    found = text.sample(whole, size)
    if size >= len(whole):
        assert found == whole
        return
    assert len(found) == max(4000, size // 4000 * 4000)
    starts = [whole.index(found[place : place + 4000]) for place in range(0, len(found), 4000)]
    assert starts[0] == 0 and (len(starts) == 1 or starts[-1] == len(whole) - 4000)
    assert all(later - earlier >= 4000 for earlier, later in itertools.pairwise(starts))
