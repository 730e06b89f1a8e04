"""The closed sets of values in a configuration; engine/config/run.py and model.py use them."""

from enum import Enum


class Corpus(Enum):
    """Where the text comes from."""

    stdlib = "stdlib"  # the Python standard library's own sources; on every machine
    enwik8 = "enwik8"
    file = "file"


class Tokens(Enum):
    """How text becomes ids."""

    bytes = "bytes"  # 256 symbols, true bits per byte
    txl = "txl"  # without newlines, as all published Transformer-XL enwik8 numbers
    word = "word"  # between white space, as Transformer-XL's WikiText-103
    bpe = "bpe"  # byte-pair encoding, trained on the training split
    file = "file"  # by corpus.tokenizer, a tokenizer.json
    ids = "ids"  # the files hold ids already


class Keys(Enum):
    """The token whose key a hashed router looks up."""

    own = "own"
    shuffled = "shuffled"  # that of another token of the micro-batch: a control


class Builder(Enum):
    """How a hashed router's table is filled."""

    random = "random"  # every ordering equally likely
    balanced = "balanced"  # even load on the training text at every k
    packed = "packed"  # balanced, and a prefix fills one block of experts before it touches the next


class RouteWeights(Enum):
    """Mixing weights of the active experts of a router with tables."""

    table = "table"  # softmax over the active prefix of fixed random logits
    uniform = "uniform"  # 1/k
    sum = "sum"  # 1: the experts' outputs are added up
    live = "live"  # a learned gate over the planned experts, from hidden states (moe.gate)


class Gate(Enum):
    """How a learned gate turns its logits over a token's planned experts into weights."""

    softmax = "softmax"
    sigmoid = "sigmoid"
    sqrt_softplus = "sqrt_softplus"  # DeepSeek-V4's hash layers


class Activation(Enum):
    """Non-linearity of an expert, and of a dense feed-forward: act(W1 x + b1), gated act(W1 x + b1) * (W3 x)."""

    relu = "relu"
    silu = "silu"
    gelu = "gelu"  # with erf
    gelu_tanh = "gelu_tanh"  # the approximation with tanh
    reglu = "reglu"  # gated relu
    swiglu = "swiglu"  # gated silu
    geglu = "geglu"  # gated gelu
    geglu_tanh = "geglu_tanh"  # gated gelu_tanh

    @property
    def gated(self) -> bool:
        """Whether the hidden units are multiplied by W3 x."""
        return self.value in _GATED

    @property
    def function(self) -> str:
        """The name of act in kernels/activations.py."""
        return _GATED.get(self.value, self.value)


_GATED = {"reglu": "relu", "swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh"}


class Growth(Enum):
    """How the number of active experts k changes over training."""

    linear = "linear"
    cosine = "cosine"
    exponential = "exponential"
    multi_step = "multi_step"
    doubling = "doubling"
    constant = "constant"


class Decay(Enum):
    """Learning-rate schedule after warm-up."""

    cosine = "cosine"
    constant = "constant"


class Precision(Enum):
    """Number format of the compute copy of the weights; master weights and moments stay fp32."""

    fp32 = "fp32"
    bf16 = "bf16"


class Backend(Enum):
    """The backend that executes the expert layer."""

    auto = "auto"  # triton on a GPU, cpu elsewhere; decided at the start of a run
    cpu = "cpu"  # PyTorch products, grouped or masked
    triton = "triton"  # Triton kernels; needs a GPU, or TRITON_INTERPRET=1 for tests
    reference = "reference"  # plain loops, the truth for tests; slow


class SavedForBackward(Enum):
    """Tensors that the expert layer keeps for backward."""

    lean = "lean"  # the input and the hidden units
    fast = "fast"  # also the gathered token rows; backend cpu only


class MatmulPrecision(Enum):
    """How fp32 operands are multiplied."""

    ieee = "ieee"  # exactly as fp32
    tf32 = "tf32"  # on tensor cores, with 10 bits of mantissa; backend triton only


class ExchangeKind(Enum):
    """How rows travel between the ranks of an expert group; one rank exchanges nothing."""

    auto = "auto"  # tokens or gather, per k, by modelled time
    tokens = "tokens"  # each token once to each rank that has one of its experts
    gather = "gather"  # all rows to all ranks


class Collectives(Enum):
    """The library through which GPUs exchange tensors; CPUs have gloo, whatever is said."""

    nccl = "nccl"
    gloo = "gloo"  # through host memory: slow, and ranks may share a GPU


class WireFormat(Enum):
    """Number format of rows on their way between ranks."""

    model = "model"  # as they are
    fp32 = "fp32"
    bf16 = "bf16"


class NgramEntry(Enum):
    """How the rows of an n-gram table enter a layer."""

    add = "add"  # to its input
    gate = "gate"  # to its input, by Engram's gate and short convolution
    per_layer = "per_layer"  # the same in the form of Qwen's qwen4_exp, without biases
    values = "values"  # to its attention's values


class NgramKeys(Enum):
    """How n-grams find the rows of a table."""

    hash = "hash"  # by this program's hash
    engram = "engram"  # as DeepSeek's Engram: multiply, XOR, remainder of a prime
    qwen = "qwen"  # as Qwen's qwen4_exp: the same with other multipliers


BalanceOver = Enum("BalanceOver", {"global": "global", "micro": "micro"})
"""Whose tokens a learned router's balance loss counts: those of all ranks in a forward pass, or each rank's own.

A call, because `global` is a word of Python's.
"""


class PeerIds(Enum):
    """Where a rank learns the token ids of the others of its expert group, for its plans."""

    corpus = "corpus"  # reads their streams itself
    exchange = "exchange"  # one exchange between the hosts per micro-batch; each rank reads its own streams only


class WandbMode(Enum):
    """Weights & Biases logging."""

    disabled = "disabled"
    offline = "offline"
    online = "online"


class Split(Enum):
    """Part of the corpus."""

    train = "train"
    valid = "valid"
    test = "test"


class RowOptimizer(Enum):
    """Who trains the rows of n-gram tables, and where they lie."""

    sparse = "sparse"  # ranks share the rows out, and a step changes those that it read
    dense = "dense"  # each rank has all rows, in an ordinary parameter at the model's input, for small tables


class RowUpdates(Enum):
    """The number of updates in the bias correction of a table row's Adam."""

    count = "count"  # the row's own: torch's Adam on the row's own gradients alone
    step = "step"  # the table's: torch's SparseAdam


class RowPlace(Enum):
    """The memory in which the rows of tables lie, with the optimizer's state."""

    device = "device"
    host = "host"  # the rows of a step are fetched ahead of it; training is the same, bit for bit


class RowMoments(Enum):
    """The second moments that Adam keeps of a table's rows."""

    element = "element"  # one of each number
    row = "row"  # one of each row, of the mean of its squared gradients
