"""The profiles: kinds of sessions with published shapes, every number with its source, or with why it was chosen.

A mean is that of a distribution before its cap.
"""

from collections.abc import Mapping
from types import MappingProxyType

from mlpstorage.kvcache.synthetic.documents import Retrieval
from mlpstorage.kvcache.synthetic.draws import Always, Either, Exponential, Lognormal
from mlpstorage.kvcache.synthetic.profile import Profile, Targets

_PERSON_THINKS_S = Exponential(10.0)
"""Chosen: enough to skim an answer and type a line; short enough that a run of a minute sees several turns."""

CHAT = Profile(
    name="chat",
    description="people who talk to an assistant",
    # Chosen: published system prompts of chat services are some hundred to a few thousand tokens long.
    system_prompt_tokens=1024,
    # ShareGPT, as measured in the PagedAttention paper (Kwon et al., SOSP 2023, figure 11): prompts of about 160 tokens
    # in the mean. LMSYS-Chat-1M (Zheng et al., ICLR 2024) has shorter ones, about 70. Sigma and cap are chosen: the
    # median is 78 tokens, and one message in twenty, a pasted text, is longer than 560.
    message_tokens=Lognormal.of_mean(160.0, sigma=1.2, most=4096),
    # ShareGPT, same source: about 340 tokens in the mean; LMSYS-Chat-1M about 215. Sigma is chosen: answers vary less
    # than messages; the median is 227 tokens. The cap is chosen: a usual `max_tokens` of chat services.
    answer_tokens=Lognormal.of_mean(340.0, sigma=0.9, most=4096),
    # CachedAttention (Gao et al., USENIX ATC 2024) finds 73 % of ShareGPT's conversations to have more than one turn,
    # and a geometric distribution with that share has mean 1 / 0.27.
    mean_turns=1 / 0.27,
    think_s=_PERSON_THINKS_S,
    # Chosen: the context of Mistral 7B v0.2 and Qwen3 as published; few sessions get there.
    max_context_tokens=32768,
    targets=Targets(
        source="the means and the share of sessions with one turn that are measured on ShareGPT (see the parameters); "
        "hit ratio and reads for each write are this generator's own",
        sessions=30,
        block_tokens=256,
        turns_mean=(3.4, 4.0),
        prompt_tokens_median=(1_700, 2_150),
        output_tokens_mean=(310, 370),
        cached_tokens_median=(1_024, 1_536),
        new_tokens_median=(340, 450),
        hit_ratio_tokens=(0.78, 0.83),
        reads_per_write=(4.5, 6.2),
    ),
)
"""The default. Conversation-like, as Mooncake's conversation trace, but all its users share one system prompt."""

CODING_AGENT = Profile(
    name="coding-agent",
    description="agents that read and change a repository, called by a person now and then",
    # Of the ten conversations of the kv-cache-tester collection: 12,482 tokens of tools and 2,969 of system prompt, the
    # medians of `tool_tokens` and `system_tokens`. Its description gives about 15,000 for all 739.
    system_prompt_tokens=12_482 + 2_969,
    # The first prompts of the 739 have a median of 24,775 tokens, of the ten 32,150: repository instructions, files, or
    # what an earlier session left. So about 9,500 come after system prompt and tools. The sigma is chosen: first
    # prompts vary more (739: upper quartile 105,061), and the cap keeps them below the context.
    opening_tokens=Lognormal(median=9_500.0, sigma=1.5, most=100_000),
    # What a turn of the ten adds besides the answer before it, mostly a tool's result: median 240 tokens, upper
    # quartile 1,827, mean 3,580, most 57,816, standard deviation of the logarithm 2.1. The sigma is chosen a little
    # larger, for the mean.
    message_tokens=Lognormal(median=240.0, sigma=2.5, most=60_000),
    # The 739: median 218 tokens, mean 446, of which the sigma follows; nine in ten are below 937.
    answer_tokens=Lognormal(median=218.0, sigma=1.2, most=8_192),
    # The 739: 80 requests in the mean, 48 in the median. Contexts that are full end some sessions before.
    mean_turns=80.0,
    # The ten: of 104 pauses 89 are a tool's (median 9 s, mean 18 s, of which the sigma follows) and 15 a person's
    # (median 182 s, mean 435 s, most 2,893 s). The 739: quartiles 6, 10 and 30 s.
    think_s=Either(
        usual=Lognormal(median=9.0, sigma=1.18, most=600),
        rare=Lognormal(median=182.0, sigma=1.32, most=3_600),
        rare_share=0.144,
    ),
    # Chosen: the next session is begun by a person.
    between_s=Lognormal(median=182.0, sigma=1.32, most=3_600),
    # Chosen: the context of the models that the ten used, most of whose requests are below it.
    max_context_tokens=200_000,
    targets=Targets(
        source="the kv-cache-tester collection, in its blocks of 64 tokens: 26 bytes read for each one written, "
        "a median request finds about 100,000 tokens and adds 727; its 59,204 requests hit 96.6 %, "
        "their prompts have a median of 109,903 tokens and their answers a mean of 446",
        sessions=5,
        block_tokens=64,
        turns_mean=(30.0, 48.0),
        prompt_tokens_median=(88_000, 121_000),
        output_tokens_mean=(400, 490),
        cached_tokens_median=(85_000, 115_000),
        new_tokens_median=(580, 870),
        hit_ratio_tokens=(0.955, 0.975),
        reads_per_write=(21.0, 31.0),
    ),
)
"""The other pole: long contexts that are read again with every turn, and little that is new."""

DOCUMENT_QA = Profile(
    name="document-qa",
    description="people who ask several questions about a long document of their own",
    # Chosen: a short instruction.
    system_prompt_tokens=512,
    # LongBench (Bai et al., ACL 2024): the documents of its three English tasks on single documents have 18,409
    # (NarrativeQA), 3,619 (Qasper) and 4,559 words (MultiFieldQA) in the mean, 9,253 weighted by their 200, 200 and 150
    # questions; at 1.3 tokens a word about 12,000 tokens. The sigma is chosen so that two thirds lie between 3,300 and
    # 20,000 tokens; L-Eval (An et al., ACL 2024) has 3,000 to 200,000. The cap is chosen for the context.
    opening_tokens=Lognormal.of_mean(12_000.0, sigma=0.9, most=100_000),
    # Chosen: a question of one or two sentences.
    message_tokens=Lognormal.of_mean(50.0, sigma=0.8, most=1_024),
    # Chosen: a paragraph. The reference answers of LongBench are of a few words, which assistants are not.
    answer_tokens=Lognormal.of_mean(150.0, sigma=0.8, most=2_048),
    # L-Eval: 508 documents with more than 2,000 questions.
    mean_turns=4.0,
    think_s=_PERSON_THINKS_S,
    # Chosen: the context of Llama 3.1.
    max_context_tokens=131_072,
    targets=Targets(
        source="lengths and questions of a document from LongBench and L-Eval (see the parameters); with four "
        "questions a document is read three times for each time that it is written",
        sessions=15,
        block_tokens=256,
        turns_mean=(3.4, 4.6),
        prompt_tokens_median=(7_500, 11_500),
        output_tokens_mean=(135, 165),
        cached_tokens_median=(5_000, 8_000),
        new_tokens_median=(310, 420),
        hit_ratio_tokens=(0.69, 0.80),
        reads_per_write=(2.4, 3.8),
    ),
)
"""Private documents: nothing but the instruction is shared between sessions."""

RAG = Profile(
    name="rag",
    description="questions with documents that were retrieved for them, popular ones again and again",
    # Chosen: an instruction on how to use and cite the documents.
    system_prompt_tokens=512,
    documents=Retrieval(
        # Chosen: what LangChain's retrievers return unless told otherwise.
        per_request=4,
        # Chosen: chunks as LlamaIndex cuts them unless told otherwise, 1,024 tokens, some shorter, some longer.
        document_tokens=Lognormal(median=1_024.0, sigma=0.3, most=4_096),
        # RAGCache (Jin et al., 2024) finds the most popular 3 % of documents in 60 % of the requests: a Zipf
        # distribution over 100,000 documents does with this exponent.
        zipf=0.916,
    ),
    # RAGCache's example of a question: about 100 tokens. The sigma and the cap are chosen.
    message_tokens=Lognormal.of_mean(100.0, sigma=0.8, most=1_024),
    # Chosen: one or two paragraphs.
    answer_tokens=Lognormal.of_mean(200.0, sigma=0.8, most=2_048),
    # Chosen: each question retrieves documents of its own.
    mean_turns=1.0,
    think_s=_PERSON_THINKS_S,
    # Chosen as for chat.
    max_context_tokens=32768,
    targets=Targets(
        source="this generator's own, with a corpus of 10 documents. The hit ratio rises with the number of requests "
        "and falls with that of documents: there are 5,040 ways to choose and order four of ten",
        sessions=100,
        block_tokens=256,
        turns_mean=(1.0, 1.0),
        prompt_tokens_median=(4_500, 5_100),
        output_tokens_mean=(185, 215),
        cached_tokens_median=(3_072, 4_096),
        new_tokens_median=(1_000, 1_350),
        hit_ratio_tokens=(0.71, 0.78),
        reads_per_write=(2.8, 3.7),
    ),
)
"""Shared documents: the prefix of a prompt is as popular as its leading documents."""

BATCH = Profile(
    name="batch",
    description="offline inference: one long instruction with examples, over many short items",
    # Chosen: an instruction and some five to ten worked examples of 200 to 400 tokens. That requests of offline jobs
    # share such a prefix is what BatchLLM (Zheng et al., 2024) reports of industry and is built on.
    system_prompt_tokens=2_560,
    # Chosen: a record, a review, a search result.
    message_tokens=Lognormal.of_mean(250.0, sigma=0.8, most=4_096),
    # Chosen: a label with a reason, or a few fields.
    answer_tokens=Lognormal.of_mean(80.0, sigma=0.8, most=1_024),
    # An item is one request.
    mean_turns=1.0,
    # The next item is sent when the last one is done.
    think_s=Always(0.0),
    # Chosen as for chat.
    max_context_tokens=32768,
    targets=Targets(
        source="this generator's own: 2,560 of 2,810 tokens are shared, and most items fill no block or one",
        sessions=100,
        block_tokens=256,
        turns_mean=(1.0, 1.0),
        prompt_tokens_median=(2_725, 2_760),
        output_tokens_mean=(75, 85),
        cached_tokens_median=(2_560, 2_560),
        new_tokens_median=(165, 200),
        hit_ratio_tokens=(0.90, 0.92),
        reads_per_write=(18.0, 22.0),
    ),
)
"""Almost everything is one shared prefix."""

PROFILES: Mapping[str, Profile] = MappingProxyType(
    {profile.name: profile for profile in (CHAT, CODING_AGENT, DOCUMENT_QA, RAG, BATCH)}
)
"""All profiles by name; `mlpstorage.config.WORKLOADS` has the names."""
