"""The demo's searches: what they may look at, and how the line of lambdas is searched."""

from types import SimpleNamespace

import pytest
import torch

from demo import searches
from demo.text import DOMAINS, Split


def test_the_line_is_searched_at_five_places_and_then_around_the_best():
    line = searches.Line()
    asked: list[float] = []
    for _ in range(8):
        points = line.ask()
        asked += [point[0] for point in points]
        line.tell(points, [-abs(point[0] - 0.3) for point in points])
    assert asked[:9] == [0.0, 0.25, 0.5, 0.75, 1.0, 0.125, 0.375, 0.1875, 0.3125]
    assert len(set(asked)) == len(asked) and min(abs(place - 0.3) for place in asked) < 0.01
    at_the_end = searches.Line()
    at_the_end.tell([[0.0], [0.5], [1.0]], [3.0, 2.0, 1.0])
    assert at_the_end.ask() == [[0.25]]


def test_the_development_score_sees_development_text_alone_and_is_higher_for_fewer_bits():
    parts = {domain: domain.encode() * 15 for domain in DOMAINS}
    splits = {domain: Split(train=b"", held_out=b"", development=seen, test=b"") for domain, seen in parts.items()}
    seen: list[bytes] = []

    def model(input_ids: torch.Tensor) -> SimpleNamespace:
        seen.append(bytes(input_ids.flatten().tolist()))
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 256))

    assert searches.development(splits)(model) == pytest.approx(-8.0)
    assert [text[: len(domain)].decode() for text, domain in zip(seen, DOMAINS, strict=True)] == list(DOMAINS)


def test_the_final_score_keeps_those_of_the_domains():
    final = searches.Final(lambda logits: {domain: float(logits(5)) for domain in DOMAINS})
    assert final(lambda input_ids: SimpleNamespace(logits=input_ids - 2)) == -3.0
    assert final.scores == dict.fromkeys(DOMAINS, 3.0)
