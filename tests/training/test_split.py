"""The split rule is the one promise that several models share, so it is pinned by literals as well as by properties."""

import random

import pytest

from training.split import MIN_HELD_OUT_DOCUMENTS, document_score, held_out_mask


def synthetic_corpus() -> tuple[list[str], list[str]]:
    domains = ["large"] * 2000 + ["tiny"] * 5 + ["small"] * 40
    return domains, [f"{domain} document {index}" for index, domain in enumerate(domains)]


def test_scores_do_not_move():
    assert document_score("stories", "Once upon a time") == pytest.approx(0.8445810543247383, abs=1e-12)
    assert document_score("wiki-zh", "汉字") == pytest.approx(0.5514048415453985, abs=1e-12)


def test_order_does_not_matter():
    domains, texts = synthetic_corpus()
    expected = dict(zip(texts, held_out_mask(domains, texts), strict=True))
    pairs = list(zip(domains, texts, strict=True))
    random.Random(0).shuffle(pairs)
    mask = held_out_mask([domain for domain, _ in pairs], [text for _, text in pairs])
    assert dict(zip((text for _, text in pairs), mask, strict=True)) == expected


def test_every_domain_stands_on_both_sides():
    domains, texts = synthetic_corpus()
    mask = held_out_mask(domains, texts)
    for domain in set(domains):
        held_out = sum(held for own, held in zip(domains, mask, strict=True) if own == domain)
        assert MIN_HELD_OUT_DOCUMENTS <= held_out < domains.count(domain)
    large = sum(held for own, held in zip(domains, mask, strict=True) if own == "large")
    assert 0.07 < large / 2000 < 0.13


def test_copies_stay_together():
    domains, texts = synthetic_corpus()
    mask = held_out_mask(domains + domains, texts + texts)
    assert mask[: len(texts)] == mask[len(texts) :] == held_out_mask(domains, texts)


def test_a_domain_too_small_to_split_is_refused():
    with pytest.raises(ValueError, match=r"'tiny' must have over 3 distinct documents. Got 2"):
        held_out_mask(["tiny"] * 4, ["a", "b", "a", "b"])
    with pytest.raises(ValueError, match="equal lengths"):
        held_out_mask(["tiny"], [])
