"""FLOPs of a forward pass: full attention over a whole text against a Recurrent Memory Transformer in segments.

A multiplication and an addition are two FLOPs, so a product (a, b) x (b, c) is 2abc. Of a transformer of L layers of
width d with h heads, an MLP of width 4d and V tokens in its vocabulary, over n positions (Hoffmann et al.,
arXiv 2203.15556, appendix F, with d = key size x heads and a feed-forward width of 4d):

    projections   8nd^2 L     queries, keys and values 6nd^2, the output of attention 2nd^2
    mlp           16nd^2 L    d to 4d and back
    attention     4n^2 d L    queries by keys 2n^2 d, the weighted sum of the values 2n^2 d
    softmax       3hn^2 L     exponential, sum and division of each score
    logits        2ndV        the product with the vocabulary, for positions that have logits
    embedding     2ndV        the look-up as if it were a product with one-hot rows; nobody computes it so

Norms, biases, activations and residual sums grow with nd and are left out, there and here. With an embedding of width
e < d (OPT-350M) the logits are 2n(de + eV), the projection of the embedding 2ned.

An RMT computes the same over each segment alone: s text tokens and what stands beside them. So its cost is linear in
the text: ceil(n / s) passes, the last one shorter. Plain Python: whole numbers, exact at any length.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

from rmt_trt.contract import MAX_SEGMENT_LENGTH, MAX_VOCABULARY
from rmt_trt.errors import ContractError

FORMS = ("decoder", "encoder")
MAX_LAYERS = 100_000
MAX_WIDTH = 1 << 20
MAX_TOKENS = 10**12
MLP_RATIO = 4
ENCODER_SPECIALS = 2  # [CLS] text [SEP]
MEMORY_SPECIALS = 1  # a second [SEP] behind the memory


def within(value: object, name: str, low: int, high: int) -> int:
    """A whole number between bounds. Errors: ContractError, naming it."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ContractError(f"{name} is {value!r:.60}; expected a whole number from {low} to {high}")
    return value


@dataclass(frozen=True)
class Sizes:
    """A transformer by its published sizes.

    embedding    width of the word embedding where it is not that of the layers, else None
    """

    name: str
    layers: int
    width: int
    heads: int
    vocab: int
    embedding: int | None = None

    def __post_init__(self) -> None:
        within(self.layers, "layers", 1, MAX_LAYERS)
        within(self.width, "width", 1, MAX_WIDTH)
        within(self.heads, "heads", 1, self.width)
        within(self.vocab, "vocab", 1, MAX_VOCABULARY)
        if self.width % self.heads:
            raise ContractError(f"heads is {self.heads}, which does not divide a width of {self.width}")

    @property
    def parameters(self) -> int:
        """Weights of the layers' matrices and of the word embedding; no biases, norms or positions."""
        matrices = (4 + 2 * MLP_RATIO) * self.width**2 * self.layers
        return matrices + self.vocab * (self.embedding or self.width) + 2 * self.width * (self.embedding or 0)


OPT_VOCAB = 50272  # of the released checkpoints: 50,265 tokens of GPT-2's and RoBERTa's kind, filled up to a multiple
# Zhang et al., arXiv 2205.01068, table 1: layers, width, heads. The embedding of 350M is 512 wide in its checkpoint.
OPT: dict[str, Sizes] = {
    sizes.name: sizes
    for sizes in (
        Sizes("opt-125m", 12, 768, 12, OPT_VOCAB),
        Sizes("opt-350m", 24, 1024, 16, OPT_VOCAB, embedding=512),
        Sizes("opt-1.3b", 24, 2048, 32, OPT_VOCAB),
        Sizes("opt-2.7b", 32, 2560, 32, OPT_VOCAB),
        Sizes("opt-6.7b", 32, 4096, 32, OPT_VOCAB),
        Sizes("opt-13b", 40, 5120, 40, OPT_VOCAB),
        Sizes("opt-30b", 48, 7168, 56, OPT_VOCAB),
        Sizes("opt-66b", 64, 9216, 72, OPT_VOCAB),
        Sizes("opt-175b", 96, 12288, 96, OPT_VOCAB),
    )
}
# BERT: Devlin et al., arXiv 1810.04805, section 3; the cased vocabulary.
MODELS: dict[str, Sizes] = {**OPT, "bert-base": Sizes("bert-base", 12, 768, 12, 28996)}


@dataclass(frozen=True)
class Counting:
    """Which terms are counted. softmax: FLOPs of each score; causal: only scores of a token with itself and before."""

    name: str
    says: str
    softmax: int = 3
    logits: bool = True
    embedding: bool = False
    causal: bool = False


COUNTINGS: dict[str, Counting] = {
    counting.name: counting
    for counting in (
        Counting("paper", "Hoffmann et al., appendix F, the embedding being a look-up without FLOPs"),
        Counting("hoffmann", "Hoffmann et al., appendix F, the embedding counted as a product", embedding=True),
        Counting(
            "causal", "as 'paper', with the lower half of the scores alone, as causal kernels compute", causal=True
        ),
        Counting("layers", "the layers' matrix products alone: no softmax, no vocabulary", softmax=0, logits=False),
    )
}


@dataclass(frozen=True)
class Cut:
    """How a text is cut.

    segment   text tokens in a segment
    memory    memory vectors. A decoder reads and writes them, [memory | text | memory], so 2M positions; an encoder
              has them once, [CLS] memory [SEP] text [SEP], so M + 3
    form      "decoder": every text position has logits; "encoder": none (a classifier's head reads one position;
              that is left out)
    """

    segment: int = 512
    memory: int = 0
    form: str = "decoder"

    def __post_init__(self) -> None:
        within(self.segment, "segment", 1, MAX_SEGMENT_LENGTH)
        within(self.memory, "memory", 0, MAX_SEGMENT_LENGTH)
        if self.form not in FORMS:
            raise ContractError(f"form is {self.form!r}; expected one of {', '.join(FORMS)}")

    @property
    def beside_text(self) -> int:
        """Positions of a segment that hold no text."""
        return 2 * self.memory if self.form == "decoder" else self.memory + ENCODER_SPECIALS + MEMORY_SPECIALS

    def segments(self, tokens: int) -> int:
        """Segments of a text."""
        return -(-tokens // self.segment)


@dataclass(frozen=True)
class Terms:
    """FLOPs by what computes them; the module's docstring has the formula of each."""

    projections: int = 0
    mlp: int = 0
    attention: int = 0
    softmax: int = 0
    logits: int = 0
    embedding: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return sum(asdict(self).values())

    def __add__(self, other: Terms) -> Terms:
        return Terms(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))

    def times(self, count: int) -> Terms:
        """The same pass `count` times."""
        return Terms(*(getattr(self, part.name) * count for part in fields(self)))


def one_pass(sizes: Sizes, positions: int, rows: int, counting: Counting) -> Terms:
    """FLOPs of one forward pass over `positions`, `rows` of which have logits."""
    n, d, layers = positions, sizes.width, sizes.layers
    pairs = n * (n + 1) // 2 if counting.causal else n * n
    e = sizes.embedding or d
    inner = d * e if sizes.embedding else 0  # between the embedding's width and that of the layers
    return Terms(
        projections=8 * n * d * d * layers,
        mlp=4 * MLP_RATIO * n * d * d * layers,
        attention=4 * pairs * d * layers,
        softmax=counting.softmax * sizes.heads * pairs * layers,
        logits=2 * rows * (inner + e * sizes.vocab) if counting.logits else 0,
        embedding=2 * n * ((inner if counting.logits else 0) + (e * sizes.vocab if counting.embedding else 0)),
    )


def full_attention(sizes: Sizes, tokens: int, counting: Counting, form: str = "decoder") -> Terms:
    """FLOPs of one pass over a whole text of `tokens` tokens."""
    within(tokens, "tokens", 1, MAX_TOKENS)
    if form == "decoder":
        return one_pass(sizes, tokens, tokens, counting)
    return one_pass(sizes, tokens + ENCODER_SPECIALS, 0, counting)


def recurrent(sizes: Sizes, tokens: int, cut: Cut, counting: Counting) -> Terms:
    """FLOPs of the same text in segments, the last of which may be short."""
    within(tokens, "tokens", 1, MAX_TOKENS)

    def segment(text: int) -> Terms:
        return one_pass(sizes, text + cut.beside_text, text if cut.form == "decoder" else 0, counting)

    whole, rest = divmod(tokens, cut.segment)
    passes = segment(cut.segment).times(whole)
    return passes + segment(rest) if rest else passes


def times_fewer(sizes: Sizes, tokens: int, cut: Cut, counting: Counting) -> float:
    """FLOPs of full attention by those of the RMT."""
    return full_attention(sizes, tokens, counting, cut.form).total / recurrent(sizes, tokens, cut, counting).total
