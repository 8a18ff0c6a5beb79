"""Documents that requests share: a corpus whose documents are not equally popular, and prompts that begin with some.

The corpus is the same for all users, ranks and seeds, as that of a service is: document 0 is the most popular one.
"""

from bisect import bisect
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from mlpstorage.kvcache.synthetic.block_ids import Chain, shared_block_ids
from mlpstorage.kvcache.synthetic.draws import Draw, Lognormal, source


@dataclass(frozen=True, slots=True, kw_only=True)
class Retrieval:
    """How a request gets its documents.

    Attributes:
        per_request: Documents of a request, all different; fewer where the corpus has fewer.
        document_tokens: Length of a document.
        zipf: Exponent of the popularity: document `n`, counted from 0, is `(n + 1) ** zipf` times less likely than
            document 0.
    """

    per_request: int
    document_tokens: Lognormal
    zipf: float


@dataclass(frozen=True, slots=True)
class Corpus:
    """The documents of a service.

    Attributes:
        retrieval: How a request gets its documents.
        documents: Number of documents.
    """

    retrieval: Retrieval
    documents: int

    def retrieve(self, draw: Draw) -> tuple[int, ...]:
        """Numbers of the documents of one request, in the order in which they stand in its prompt.

        The order is that of the draws, as a retriever gives the most relevant first; so the same documents in another
        order are another prefix.
        """
        weights = _summed_weights(self.documents, self.retrieval.zipf)
        chosen: list[int] = []
        while len(chosen) < min(self.retrieval.per_request, self.documents):
            # The product may be rounded up to the sum, which no document has.
            document = min(bisect(weights, draw() * weights[-1]), self.documents - 1)
            if document not in chosen:
                chosen.append(document)
        return tuple(chosen)

    def tokens(self, document: int) -> int:
        """Length of a document: it hangs on its number alone, so a larger corpus has the same documents and more."""
        return _document_tokens(self.retrieval.document_tokens, document)

    def prefix(
        self, profile_name: str, system_prompt_tokens: int, chosen: tuple[int, ...], block_tokens: int
    ) -> tuple[tuple[int, ...], int]:
        """A prompt's beginning: the system prompt of a profile, and the documents.

        A block's id depends on the documents up to the one that its last token is of. So prompts share blocks as far
        as their leading documents are the same.

        Returns:
            The ids of the blocks that lie wholly inside the beginning, and its length in tokens.
        """
        tokens = system_prompt_tokens
        ids = shared_block_ids(profile_name, tokens, block_tokens)
        for place, document in enumerate(chosen, start=1):
            names = " ".join(map(str, chosen[:place]))
            tokens += self.tokens(document)
            ids = Chain(ids, f"documents {names} of {profile_name} {block_tokens}").first(tokens // block_tokens)
        return ids, tokens


@lru_cache(maxsize=16)
def _summed_weights(documents: int, zipf: float) -> tuple[float, ...]:
    return tuple(accumulate((number + 1) ** -zipf for number in range(documents)))


@lru_cache(maxsize=100_000)
def _document_tokens(tokens: Lognormal, document: int) -> int:
    return tokens.tokens(source(f"document {document}"))
