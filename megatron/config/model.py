"""The network: its size, its kind of layer, its initial values and its number format."""

import math
from dataclasses import dataclass

from megatron.config.flags import flag
from megatron.errors import ConfigError

# The names of `megatron.ops.activation`, which imports torch.
ACTIVATIONS = (
    "gelu",
    "gelu_tanh",
    "gelu_10",
    "laplace",
    "linear",
    "mish",
    "quick_gelu",
    "relu",
    "relu2",
    "relu6",
    "sigmoid",
    "silu",
    "tanh",
)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network: its size, its regularisation, its initial values and its number format."""

    model_type: str = flag(
        "network that is trained; each of the pretrain programs trains its own",
        default="bert",
        choices=("bert", "gpt", "t5"),
        topic="Network size",
    )
    num_layers: int = flag(
        "number of transformer layers; of an encoder-decoder, those of the encoder",
        bounds="[1, inf)",
    )
    decoder_num_layers: int | None = flag(
        "layers of an encoder-decoder's decoder; num-layers where not given",
        default=None,
        bounds="[1, inf)",
    )
    hidden_size: int = flag("width of the residual stream", bounds="[1, inf)")
    num_attention_heads: int = flag("attention heads of each layer", bounds="[1, inf)")
    max_position_embeddings: int = flag(
        "positions that the model can tell apart; the longest possible sequence", bounds="[1, inf)"
    )
    ffn_hidden_size: int | None = flag(
        "width of the MLP; where not given, 4 x hidden-size, and of a gated one the multiple of 64 "
        "below two thirds of that, which has as many weights",
        default=None,
        bounds="[1, inf)",
    )
    kv_channels: int | None = flag(
        "width of one attention head; hidden-size / heads where not given",
        default=None,
        bounds="[1, inf)",
    )
    num_query_groups: int | None = flag(
        "heads of keys and values, each shared by a group of query heads; "
        "as many as query heads where not given",
        default=None,
        bounds="[1, inf)",
    )
    vocab_size: int | None = flag(
        "number of tokens before padding; the tokenizer's where not given",
        default=None,
        bounds="[1, inf)",
    )
    make_vocab_size_divisible_by: int = flag(
        "pad the vocabulary to a multiple of this times the tensor-parallel size",
        default=128,
        bounds="[1, inf)",
    )
    untie_embeddings_and_output_weights: bool = flag(
        "give the model an output layer of its own in place of the word embeddings", default=False
    )
    num_tokentypes: int = flag(
        "kinds of segments that BERT tells apart; 0 for no such embedding",
        default=2,
        bounds="[0, inf)",
    )

    position_embedding_type: str = flag(
        "how positions are told apart: a learned vector each; rotated queries and keys; T5's "
        "learned bias by distance; or a learned vector for each distance, which queries (and with "
        "relative_key_query also keys) are compared with",
        default="learned_absolute",
        choices=("learned_absolute", "rope", "relative", "relative_key", "relative_key_query"),
        topic="Kind of layer",
    )
    rotary_base: float = flag(
        "base of the wavelengths of rotary positions", default=10000.0, bounds="(1, inf)"
    )
    rotary_percent: float = flag(
        "share of each head's channels that rotary positions turn", default=1.0, bounds="(0, 1]"
    )
    relative_attention_num_buckets: int = flag(
        "distances that the relative bias tells apart", default=32, bounds="[4, inf)"
    )
    relative_attention_max_distance: int = flag(
        "distance from which on the relative bias is constant", default=128, bounds="[2, inf)"
    )
    normalization: str = flag(
        "how the residual stream is normalised",
        default="LayerNorm",
        choices=("LayerNorm", "RMSNorm"),
    )
    layernorm_epsilon: float = flag(
        "constant under the square root of the normalisation", default=1e-5, bounds="(0, inf)"
    )
    norm_position: str = flag(
        "pre: normalise what a block reads, and once more behind the last layer; post: normalise "
        "the embedding and the sum that each block makes, as the original BERT",
        default="pre",
        choices=("pre", "post"),
    )
    apply_residual_connection_post_layernorm: bool = flag(
        "take residuals behind the normalisation of a block's input, not before it", default=False
    )
    activation: str = flag("activation of the MLP", default="gelu", choices=ACTIVATIONS)
    head_activation: str | None = flag(
        "activation of BERT's masked-LM head; that of the MLP where not given",
        default=None,
        choices=ACTIVATIONS,
    )
    swiglu: bool = flag("gate the MLP by x sigmoid(x)", default=False)
    geglu: bool = flag("gate the MLP by the activation, GELU or another", default=False)
    disable_bias_linear: bool = flag(
        "linear layers, and T5's scores of tokens, without biases", default=False
    )
    attention_scale: float | None = flag(
        "factor of attention scores; 1 / sqrt(width of a head) where not given",
        default=None,
        bounds="(0, inf)",
    )
    logit_scale: float = flag(
        "factor of the hidden states from which GPT and T5 score tokens",
        default=1.0,
        bounds="(0, inf)",
    )
    bert_no_binary_head: bool = flag(
        "BERT without next-sentence prediction: no pooler, no binary head", default=False
    )

    attention_dropout: float = flag(
        "dropout probability of attention weights",
        default=0.1,
        bounds="[0, 1)",
        topic="Regularisation",
    )
    hidden_dropout: float = flag(
        "dropout probability of hidden states", default=0.1, bounds="[0, 1)"
    )

    init_method_std: float = flag(
        "standard deviation of the initial weights",
        default=0.02,
        bounds="(0, inf)",
        topic="Initialisation",
    )
    init_method_xavier_uniform: bool = flag(
        "draw initial weights by Xavier's uniform rule", default=False
    )

    fp16: bool = flag(
        "train in float16 with float32 master weights and loss scaling",
        default=False,
        topic="Precision",
    )
    bf16: bool = flag("train in bfloat16 with float32 master weights", default=False)
    fp64: bool = flag("train in float64, to compare layouts without rounding", default=False)
    fp32_residual_connection: bool = flag(
        "keep the residual stream of a half-precision model in float32", default=False
    )
    fp8_format: str | None = flag(
        "compute the products of the layers in 8 bits where the GPU can: e4m3 for all factors, or "
        "hybrid with e5m2 for gradients",
        default=None,
        choices=("e4m3", "hybrid"),
    )
    fp8_recipe: str = flag(
        "how 8-bit factors are scaled: by the largest value of the tensor at hand, or by that of "
        "earlier steps",
        default="tensorwise",
        choices=("tensorwise", "delayed"),
    )
    fp8_amax_history_len: int = flag(
        "steps whose largest values the delayed recipe looks back on",
        default=16,
        bounds="[1, inf)",
    )
    attention_backend: str = flag(
        "auto: the fastest of PyTorch's fused attentions that can be used; flash, cudnn, "
        "efficient: on a GPU that one alone; unfused: one operation after another, holding all "
        "attention weights",
        default="auto",
        choices=("auto", "flash", "cudnn", "efficient", "unfused"),
    )
    attention_softmax_in_fp32: bool = flag(
        "unfused attention of a half-precision model takes its softmax in float32, as the fused "
        "one always does",
        default=False,
    )

    @property
    def ffn_size(self) -> int:
        """Width of the MLP, of a gated one that of each of its two projections."""
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        if self.is_gated:
            return max(64, 8 * self.hidden_size // 3 // 64 * 64)
        return 4 * self.hidden_size

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def key_value_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def rotary_channels(self) -> int:
        """Channels of a head that rotary positions turn, in pairs."""
        return int(self.head_size * self.rotary_percent)

    @property
    def decoder_layers(self) -> int:
        """Layers of an encoder-decoder's decoder."""
        return self.decoder_num_layers or self.num_layers

    @property
    def has_distances(self) -> bool:
        """Whether every attention layer has a learned vector for each distance."""
        return self.position_embedding_type.startswith("relative_key")

    @property
    def lm_head_activation(self) -> str:
        """Activation of BERT's masked-LM head."""
        return self.head_activation or self.activation

    @property
    def is_gated(self) -> bool:
        """Whether the MLP multiplies two projections of its input."""
        return self.swiglu or self.geglu

    @property
    def dtype(self) -> str:
        """Name of the parameters' number format, as in `torch`."""
        if self.fp16:
            return "float16"
        if self.bf16:
            return "bfloat16"
        return "float64" if self.fp64 else "float32"

    def padded_vocab_size(self, tensor_size: int) -> int:
        """Rows of the word embeddings over all `tensor_size` ranks; needs `vocab_size`."""
        if self.vocab_size is None:
            raise ConfigError("--vocab-size is not known: state it or give a tokenizer")
        multiple = self.make_vocab_size_divisible_by * tensor_size
        return math.ceil(self.vocab_size / multiple) * multiple
