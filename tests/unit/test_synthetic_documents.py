"""Shared documents: their popularity, their lengths, and how far prompts share their blocks."""

from collections import Counter
from statistics import median

import pytest

from mlpstorage.kvcache.synthetic import PROFILES
from mlpstorage.kvcache.synthetic.block_ids import shared_block_ids
from mlpstorage.kvcache.synthetic.documents import Corpus, Retrieval
from mlpstorage.kvcache.synthetic.draws import source


def retrieval() -> Retrieval:
    """How requests of the profile `rag` get their documents."""
    found = PROFILES["rag"].documents
    assert found is not None
    return found


def test_the_skew_is_what_was_measured_on_a_large_corpus() -> None:
    """RAGCache: 3 % of the documents are in 60 % of the requests; summed for 100,000 documents."""
    weights = [1 / rank ** retrieval().zipf for rank in range(1, 100_001)]
    assert sum(weights[:3_000]) / sum(weights) == pytest.approx(0.60, abs=0.005)


def test_documents_are_drawn_by_their_popularity() -> None:
    """The first document of 20,000 requests is that of Zipf's law, within four standard errors."""
    corpus, draw = Corpus(retrieval(), 10), source("a test")
    first = Counter(corpus.retrieve(draw)[0] for _ in range(20_000))
    weights = [1 / rank**0.916 for rank in range(1, 11)]
    for document in range(10):
        share = weights[document] / sum(weights)
        error = (share * (1 - share) / 20_000) ** 0.5
        assert first[document] / 20_000 == pytest.approx(share, abs=4 * error)


@pytest.mark.parametrize(("documents", "number"), [(1, 1), (3, 3), (4, 4), (10, 4), (5_000, 4)])
def test_a_request_has_documents_that_are_all_different(documents: int, number: int) -> None:
    """Four of them, or the whole corpus where that has fewer."""
    corpus, draw = Corpus(retrieval(), documents), source("a test")
    for _ in range(200):
        chosen = corpus.retrieve(draw)
        assert len(chosen) == len(set(chosen)) == number
        assert all(0 <= document < documents for document in chosen)


def test_a_larger_corpus_has_the_same_documents_and_more() -> None:
    """A document's length hangs on its number alone; the median is that of the profile."""
    small, large = Corpus(retrieval(), 10), Corpus(retrieval(), 1_000)
    lengths = [large.tokens(document) for document in range(1_000)]
    assert [small.tokens(document) for document in range(10)] == lengths[:10]
    assert median(lengths) == pytest.approx(1_024, rel=0.05)
    assert all(1 <= tokens <= 4_096 for tokens in lengths)


@pytest.mark.parametrize("block_tokens", [1, 16, 100, 256, 1_024])
def test_prompts_share_blocks_as_far_as_their_leading_documents_are_the_same(block_tokens: int) -> None:
    """Two equal leading documents: the blocks that end within them are shared, and no other."""
    corpus = Corpus(retrieval(), 10)
    one, tokens = corpus.prefix("rag", 512, (3, 1, 4, 0), block_tokens)
    other, _ = corpus.prefix("rag", 512, (3, 1, 0, 4), block_tokens)
    assert tokens == 512 + sum(map(corpus.tokens, (3, 1, 4, 0)))
    assert len(one) == len(other) == len(set(one)) == tokens // block_tokens
    shared = (512 + corpus.tokens(3) + corpus.tokens(1)) // block_tokens
    assert one[:shared] == other[:shared]
    assert not set(one[shared:]) & set(other[shared:])
    system = 512 // block_tokens
    assert one[:system] == shared_block_ids("rag", 512, block_tokens)


def test_a_document_is_another_prefix_behind_another_one() -> None:
    """Only leading documents are found: in the second place the same document has other ids."""
    corpus = Corpus(retrieval(), 10)
    one, _ = corpus.prefix("rag", 512, (0, 1), 16)
    other, _ = corpus.prefix("rag", 512, (1, 0), 16)
    assert set(one) & set(other) == set(one[:32])
