"""The text that is trained on and how samples are made from it."""

from dataclasses import dataclass

from megatron.config.flags import flag


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text that is trained on and how samples are made from it."""

    data_path: tuple[str, ...] = flag(
        "prefix of the indexed dataset, the path without .idx and .bin; or several, each with its "
        "weight in front",
        default=(),
        topic="Data",
        metavar="[WEIGHT] PREFIX ...",
    )
    split: str = flag(
        "weights by which documents go to training, validation and test",
        default="969, 30, 1",
        metavar="A,B,C",
    )
    seq_length: int = flag("tokens of one sample", bounds="[1, inf)")
    decoder_seq_length: int | None = flag(
        "tokens of a sample's target in an encoder-decoder; seq-length where not given",
        default=None,
        bounds="[1, inf)",
    )
    mask_prob: float = flag("fraction of the tokens that are masked", default=0.15, bounds="(0, 1)")
    mean_span_length: float = flag(
        "mean number of tokens in a masked span of T5", default=3.0, bounds="[1, inf)"
    )
    short_seq_prob: float = flag(
        "probability of a sample shorter than seq-length", default=0.1, bounds="[0, 1]"
    )
    reset_position_ids: bool = flag(
        "GPT: count positions anew behind each end of a document", default=False
    )
    reset_attention_mask: bool = flag(
        "GPT: let no token look beyond the start of its document", default=False
    )
    pack_sequences: bool = flag(
        "BERT: lay a micro-batch's real tokens one behind the other and do no work on padding",
        default=False,
    )
    eod_mask_loss: bool = flag(
        "GPT: leave the prediction behind an end of a document out of the loss", default=False
    )
    dataloader_type: str = flag(
        "single: the samples once, in order; cyclic: over and over, shuffled",
        default="single",
        choices=("single", "cyclic"),
    )
    num_workers: int = flag(
        "processes that prepare batches, for each rank; 0: the rank itself",
        default=2,
        bounds="[0, inf)",
    )
    data_cache_dir: str | None = flag(
        "directory of the samples' index files; beside the data where not given",
        default=None,
        metavar="DIR",
    )
    mmap_warmup: bool = flag("read the dataset once at the start to warm the cache", default=False)

    tokenizer_type: str | None = flag(
        "tokenizer that made the dataset",
        default=None,
        choices=(
            "BertWordPieceLowerCase",
            "BertWordPieceCase",
            "GPT2BPETokenizer",
            "SentencePieceTokenizer",
        ),
        topic="Tokenizer",
    )
    vocab_file: str | None = flag(
        "vocabulary: vocab.txt or vocab.json", default=None, metavar="FILE"
    )
    merge_file: str | None = flag("merge rules of byte-pair encoding", default=None, metavar="FILE")
    tokenizer_model: str | None = flag(
        "model of the SentencePiece tokenizer", default=None, metavar="FILE"
    )
    vocab_extra_ids: int = flag(
        "sentinel tokens added behind the vocabulary; T5 marks masked spans with them",
        default=0,
        bounds="[0, inf)",
    )

    @property
    def decoder_length(self) -> int:
        """Tokens of a sample's target in an encoder-decoder."""
        return self.decoder_seq_length or self.seq_length
