"""Our BERT and Hugging Face's: MegatronBert, and the original BERT with LayerNorm behind the sums.

The two differ in where a layer normalises. `bert_entries` is the one map of both, of every class
that stands on them and of their layers with cross attention; the classes of `megatron.hf` use it
as the conversion does.

What Hugging Face keeps twice, the output embedding and its bias, is stored once. Models with
relative positions keep a table of absolute ones that they do not use: it is ignored where it is
read and written as zeros.

Vocabularies are of the true size on both sides; padding exists in memory only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any, ClassVar

from megatron.checkpoint.hugging_face.architecture import (
    Architecture,
    Fields,
    Found,
    Written,
    refuse_quantised,
    renamed,
    require,
    require_usual_scale,
    require_whole_heads,
    their_activation,
)
from megatron.checkpoint.name_map import Entry, Heads, KeyValue
from megatron.config import ModelConfig
from megatron.errors import CheckpointError

PREFIX = "bert."
_BOTH = ("weight", "bias")
_QKV = ("query", "key", "value")

_EMBEDDINGS = {
    "word_embeddings": "word_embeddings",
    "position_embeddings": "position_embeddings",
    "tokentype_embeddings": "token_type_embeddings",
}
_LM_HEAD = {
    "lm_head.dense": "cls.predictions.transform.dense",
    "lm_head.layernorm": "cls.predictions.transform.LayerNorm",
}
# One tensor of each head, ours and theirs: where it is, the head is.
_SIGN_OF_HEAD = {
    "lm": ("lm_head.dense.weight", "cls.predictions.transform.dense.weight"),
    "nsp": ("binary_head.weight", "cls.seq_relationship.weight"),
    "classifier": ("classifier.weight", "classifier.weight"),
    "qa": ("qa_outputs.weight", "qa_outputs.weight"),
}
_POOLER = "pooler.dense.weight"
# Which class has which heads, and whether it pools; the bare network may or may not.
_CLASSES = {
    (frozenset[str](), True): "Model",
    (frozenset[str](), False): "Model",
    (frozenset({"lm"}), False): "ForMaskedLM",
    (frozenset({"lm", "nsp"}), True): "ForPreTraining",
    (frozenset({"nsp"}), True): "ForNextSentencePrediction",
    (frozenset({"classifier"}), True): "ForSequenceClassification",
    (frozenset({"classifier"}), False): "ForTokenClassification",
    (frozenset({"qa"}), False): "ForQuestionAnswering",
}
_POSITIONS = {
    "absolute": "learned_absolute",
    "relative_key": "relative_key",
    "relative_key_query": "relative_key_query",
}
_THEIR_POSITIONS = {ours: theirs for theirs, ours in _POSITIONS.items()}
_DEFAULTS = {
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "position_embedding_type": "absolute",
    "tie_word_embeddings": True,
    "pruned_heads": {},
    "is_decoder": False,
    "add_cross_attention": False,
}


def bert_entries(
    model: ModelConfig,
    *,
    heads: Collection[str],
    decoder: bool = False,
    cross_distances: bool = False,
    pooler: bool = True,
    prefix: str = PREFIX,
) -> list[Entry]:
    """An entry for every tensor of one of their classes, in the model's order.

    Args:
        model: with norm_position pre a MegatronBert, with post a BERT.
        heads: of "lm" (masked or next tokens), "nsp", "classifier" and "qa".
        decoder: whether layers attend to an encoder as well.
        cross_distances: whether they then have learned vectors of distances, too.
        prefix: what stands in front of the network's names; "" where it has no heads.
    """
    found = list(_network_entries(model, decoder, cross_distances, prefix))
    if pooler:
        found += renamed({"language_model.pooler.dense": f"{prefix}pooler.dense"}, _BOTH)
    if "lm" in heads:
        found += renamed(_LM_HEAD, _BOTH)
        found.append(Entry("lm_head.bias", ("cls.predictions.bias",)))
        if model.untie_embeddings_and_output_weights:
            own = "language_model.output_layer.weight"
            found.append(Entry(own, ("cls.predictions.decoder.weight",)))
    if "nsp" in heads:
        found += renamed({"binary_head": "cls.seq_relationship"}, _BOTH)
    for head, module in (("classifier", "classifier"), ("qa", "qa_outputs")):
        if head in heads:
            found += renamed({module: module}, _BOTH)
    return found


def _network_entries(
    model: ModelConfig, decoder: bool, cross_distances: bool, prefix: str
) -> Iterator[Entry]:
    ours, theirs = "language_model.embedding", f"{prefix}embeddings"
    absent = "position_embeddings" if model.has_distances else None
    tables = {o: t for o, t in _EMBEDDINGS.items() if o != absent}
    yield from renamed({f"{ours}.{o}": f"{theirs}.{t}" for o, t in tables.items()}, ["weight"])
    if model.norm_position == "post":
        yield from renamed({f"{ours}.layernorm": f"{theirs}.LayerNorm"}, _BOTH)
    for number in range(model.num_layers):
        names = (f"language_model.encoder.layers.{number}", f"{prefix}encoder.layer.{number}")
        yield from _layer_entries(model, decoder, *names)
        if model.has_distances:
            yield from _distances(f"{names[0]}.self_attention", f"{names[1]}.attention")
        if decoder and cross_distances:
            yield from _distances(f"{names[0]}.inter_attention", f"{names[1]}.crossattention")
    if model.norm_position == "pre":
        last = {"language_model.encoder.final_layernorm": f"{prefix}encoder.ln"}
        yield from renamed(last, _BOTH)


def _layer_entries(model: ModelConfig, decoder: bool, ours: str, theirs: str) -> Iterator[Entry]:
    size = model.head_size
    modules = _norms(model.norm_position, decoder) | {
        "self_attention.dense": "attention.output.dense",
        "mlp.dense_h_to_4h": "intermediate.dense",
        "mlp.dense_4h_to_h": "output.dense",
    }
    if decoder:
        modules["inter_attention.query"] = "crossattention.self.query"
        modules["inter_attention.dense"] = "crossattention.output.dense"
    yield from renamed({f"{ours}.{o}": f"{theirs}.{t}" for o, t in modules.items()}, _BOTH)
    for kind in _BOTH:
        three = tuple(f"{theirs}.attention.self.{name}.{kind}" for name in _QKV)
        yield Entry(f"{ours}.self_attention.query_key_value.{kind}", three, Heads(size))
        if decoder:
            two = tuple(f"{theirs}.crossattention.self.{name}.{kind}" for name in _QKV[1:])
            yield Entry(f"{ours}.inter_attention.key_value.{kind}", two, KeyValue(size))


def _norms(position: str, decoder: bool) -> dict[str, str]:
    """The norms of a layer: of what a block reads, or of the sum behind it."""
    if position == "post":
        cross = {"post_inter_attention_layernorm": "crossattention.output.LayerNorm"}
        return {
            "post_attention_layernorm": "attention.output.LayerNorm",
            **(cross if decoder else {}),
            "output_layernorm": "output.LayerNorm",
        }
    first = {"input_layernorm": "attention.ln"}
    if not decoder:
        return first | {"post_attention_layernorm": "ln"}
    return first | {
        "post_attention_layernorm": "crossattention.ln",
        "post_inter_attention_layernorm": "ln",
    }


def _distances(ours: str, theirs: str) -> Iterator[Entry]:
    table = "distance_embedding"
    yield from renamed({f"{ours}.{table}": f"{theirs}.self.{table}"}, ["weight"])


class _Bert(Architecture):
    """What MegatronBert and BERT have in common.

    `model_config_of` leaves is_decoder and add_cross_attention to its caller: they are options of
    a class, not of our configuration. Conversion refuses them (`found`).
    """

    name: ClassVar[str]
    norm_position: ClassVar[str]
    default_sizes: ClassVar[Mapping[str, int]]
    prefix = PREFIX

    def model_config_of(self, hf: Mapping[str, Any]) -> ModelConfig:
        """See `Architecture`."""
        fields = Fields(hf, _DEFAULTS | dict(self.default_sizes))
        fields.expect({"pruned_heads": {}})
        hidden, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
        if hidden % heads:
            raise fields.refusal("num_attention_heads", f"a divisor of hidden_size {hidden}")
        return ModelConfig(
            model_type="bert",
            num_layers=fields.count("num_hidden_layers"),
            hidden_size=hidden,
            num_attention_heads=heads,
            ffn_hidden_size=fields.count("intermediate_size"),
            vocab_size=fields.count("vocab_size"),
            max_position_embeddings=fields.count("max_position_embeddings"),
            num_tokentypes=fields.count("type_vocab_size"),
            position_embedding_type=fields.choice("position_embedding_type", _POSITIONS),
            norm_position=self.norm_position,
            layernorm_epsilon=fields.number("layer_norm_eps", "(0, inf)"),
            activation=fields.activation("hidden_act"),
            hidden_dropout=fields.number("hidden_dropout_prob", "[0, 1)"),
            attention_dropout=fields.number("attention_probs_dropout_prob", "[0, 1)"),
            init_method_std=fields.number("initializer_range", "(0, inf)"),
            untie_embeddings_and_output_weights=not fields.truth("tie_word_embeddings"),
            bert_no_binary_head=not _pools(hf),
        )

    def settings(self, model: ModelConfig) -> dict[str, Any]:
        """See `Architecture`."""
        require(
            self.name,
            model,
            {
                "norm_position": (self.norm_position,),
                "normalization": ("LayerNorm",),
                "apply_residual_connection_post_layernorm": (False,),
                "position_embedding_type": tuple(_THEIR_POSITIONS),
                "swiglu": (False,),
                "geglu": (False,),
                "disable_bias_linear": (False,),
                "num_query_groups": (None, model.num_attention_heads),
            },
        )
        require_whole_heads(self.name, model)
        require_usual_scale(self.name, model)
        if not model.num_tokentypes:
            raise CheckpointError(f"--num-tokentypes 0: {self.name} has at least one token type")
        return {
            "vocab_size": model.vocab_size,
            "hidden_size": model.hidden_size,
            "num_hidden_layers": model.num_layers,
            "num_attention_heads": model.num_attention_heads,
            "intermediate_size": model.ffn_size,
            "hidden_act": their_activation(model.activation),
            "hidden_dropout_prob": model.hidden_dropout,
            "attention_probs_dropout_prob": model.attention_dropout,
            "max_position_embeddings": model.max_position_embeddings,
            "type_vocab_size": model.num_tokentypes,
            "initializer_range": model.init_method_std,
            "layer_norm_eps": model.layernorm_epsilon,
            "position_embedding_type": _THEIR_POSITIONS[model.position_embedding_type],
            "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
            "pad_token_id": 0,
        }

    def entries(self, model: ModelConfig, prefix: str | None = None) -> list[Entry]:
        """See `Architecture`; the heads are those that the configuration trains."""
        pools = not model.bert_no_binary_head
        heads = ("lm", "nsp") if pools else ("lm",)
        return bert_entries(
            model, heads=heads, pooler=pools, prefix=PREFIX if prefix is None else prefix
        )

    def is_ignorable(self, name: str, model: ModelConfig) -> bool:
        """See `Architecture`."""
        ignorable = {"embeddings.position_ids", "embeddings.token_type_ids"}
        if model.has_distances:
            ignorable.add("embeddings.position_embeddings.weight")
        ignorable.add("cls.predictions.decoder.bias")
        if not model.untie_embeddings_and_output_weights:
            ignorable.add("cls.predictions.decoder.weight")
        return name.removeprefix(PREFIX) in ignorable

    def to_write(self, model: ModelConfig, ours: Collection[str]) -> Written:
        """See `Architecture`; the class is the one that has the heads among `ours`."""
        heads = {head for head, (sign, _) in _SIGN_OF_HEAD.items() if sign in ours}
        pooler = f"language_model.{_POOLER}" in ours
        kind = _CLASSES.get((frozenset(heads), pooler))
        if kind is None:
            found = " and ".join([*sorted(heads), *(["a pooler"] if pooler else ["no pooler"])])
            raise CheckpointError(f"no class of {self.name} has {found}")
        prefix = PREFIX if heads else ""
        untied = "lm" in heads and model.untie_embeddings_and_output_weights
        # An output layer of its own has its bias there, in the releases that tie nothing then.
        copies = {"cls.predictions.decoder.bias": "cls.predictions.bias"} if untied else {}
        table = (model.max_position_embeddings, model.hidden_size)
        unused = f"{prefix}embeddings.position_embeddings.weight"
        return Written(
            class_name=self.stem + kind,
            entries=bert_entries(model, heads=heads, pooler=pooler, prefix=prefix),
            copies=copies,
            zeros={unused: table} if model.has_distances else {},
            notes=tuple(self._notes(model, heads)),
        )

    def _notes(self, model: ModelConfig, heads: Collection[str] = ()) -> Iterator[str]:
        if "lm" in heads and model.lm_head_activation != model.activation:
            yield (
                f"hidden_act {their_activation(model.activation)} is the MLP's; the masked-LM head "
                f"was trained with {their_activation(model.lm_head_activation)}, which config.json "
                "cannot say beside it"
            )
        if model.has_distances:
            yield (
                f"position_embedding_type {_THEIR_POSITIONS[model.position_embedding_type]} is "
                "known to transformers 4; later releases load the model and leave it out"
            )

    def found(self, hf: Mapping[str, Any], theirs: Collection[str]) -> Found:
        """See `Architecture`; the heads are those among `theirs`."""
        refuse_quantised(hf)
        Fields(hf, _DEFAULTS).expect({"is_decoder": False, "add_cross_attention": False})
        model = self.model_config_of(hf)
        renamings = {new: old for old in theirs if (new := _current(old, model)) != old}
        names = set(theirs) - set(renamings.values()) | set(renamings)
        prefix = self._prefix_of(names)
        heads = {head for head, (_, sign) in _SIGN_OF_HEAD.items() if sign in names}
        pooler = prefix + _POOLER in names
        model = dataclasses.replace(model, bert_no_binary_head="nsp" not in heads)
        notes = [] if "lm" in heads else ["there is no masked-LM head in these files"]
        named = self.named_class(hf)
        class_name, pools = self._class_of(named, frozenset(heads), pooler)
        if named not in (None, class_name):
            notes.append(f"config.json names {named}; the files hold a {class_name}")
        if pooler and not pools:
            notes.append(f"the pooler is left out: {class_name} does not use it")
            theirs = [name for name in theirs if not name.startswith(f"{prefix}pooler.")]
        mapped = bert_entries(model, heads=heads, pooler=pools, prefix=prefix)
        return self.checked(Found(model, mapped, class_name, renamings, tuple(notes)), theirs)

    def _class_of(self, named: str | None, heads: frozenset[str], pooler: bool) -> tuple[str, bool]:
        """The class with these heads, the named one where it has them, and whether it pools.

        Files may hold more than their class uses: the published BERTs name BertForMaskedLM and are
        whole, and classes that do not pool once had a pooler.
        """
        of_heads = {
            f"{self.stem}{kind}": pools
            for (known, pools), kind in sorted(_CLASSES.items(), key=lambda item: item[0][1])
            if known == heads and pools <= pooler
        }
        if named in of_heads:
            return named, of_heads[named]
        known = {f"{self.stem}{kind}" for kind in _CLASSES.values()}
        if of_heads and (named is None or named in known):
            return list(of_heads.items())[-1]
        return named or self.class_name, pooler


def _current(name: str, model: ModelConfig) -> str:
    """Today's name of a tensor in files of early or of late releases.

    With an output layer of its own, late releases use the bias beside its weights, and early ones
    hold it under both names.
    """
    if model.untie_embeddings_and_output_weights and name == "cls.predictions.decoder.bias":
        return "cls.predictions.bias"
    for early, late in ((".gamma", ".weight"), (".beta", ".bias")):
        if name.endswith(early):
            return name.removesuffix(early) + late
    return name


def _pools(hf: Mapping[str, Any]) -> bool:
    """Whether the class that config.json names has next-sentence prediction; where none, yes."""
    names = hf.get("architectures") or ["ForPreTraining"]
    return isinstance(names, list) and any(
        str(name).endswith(("ForPreTraining", "ForNextSentencePrediction")) for name in names
    )


class MegatronBertArchitecture(_Bert):
    """MegatronBert: LayerNorm in front of each block (arXiv 1909.08053)."""

    model_type = "megatron-bert"
    name = "MegatronBert"
    stem = "MegatronBert"
    class_name = "MegatronBertForPreTraining"
    norm_position = "pre"
    default_sizes: ClassVar[Mapping[str, int]] = {
        "vocab_size": 29056,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    }


class BertArchitecture(_Bert):
    """BERT: LayerNorm behind each sum (arXiv 1810.04805)."""

    model_type = "bert"
    name = "BERT"
    stem = "Bert"
    class_name = "BertForPreTraining"
    norm_position = "post"
    default_sizes: ClassVar[Mapping[str, int]] = {
        "vocab_size": 30522,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
    }
