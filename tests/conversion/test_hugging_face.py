"""What goes along with a model to Hugging Face's format and back: the tokenizer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron.conversion.hugging_face import read_hugging_face, write_hugging_face_model
from megatron.conversion.stored_model import TokenizerFiles
from tests.configs import small
from tests.conversion.support import T5_OF_HF, VOCABULARY, stored

transformers = pytest.importorskip("transformers")

SENTINELS = 5
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS += [f"word{n}" for n in range(VOCABULARY - SENTINELS - len(WORDS))]


def test_the_sentinels_of_a_t5_go_along(tmp_path: Path) -> None:
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(WORDS) + "\n")
    (tmp_path / "hf").mkdir()
    model, _ = stored(**T5_OF_HF)
    model = replace(model, config=small(**T5_OF_HF, vocab_extra_ids=SENTINELS))
    files = TokenizerFiles(type="BertWordPieceCase", vocab_file=vocabulary)
    written = write_hugging_face_model(
        tmp_path / "hf", model.with_tokenizer(files), max_bytes=10**9
    )
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = theirs.convert_tokens_to_ids([f"<extra_id_{n}>" for n in range(SENTINELS)])
    assert ids == list(range(len(WORDS), VOCABULARY))
    assert theirs.model_max_length == T5_OF_HF["max_position_embeddings"]
    assert written.tokenizer.type == "BertWordPieceCase"


def test_a_sentence_piece_model_of_theirs_is_known_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    model, _ = stored(**T5_OF_HF)
    write_hugging_face_model(tmp_path / "hf", model, max_bytes=10**9)
    (tmp_path / "hf" / "spiece.model").write_bytes(b"pieces")
    found = read_hugging_face(tmp_path / "hf")
    assert found.tokenizer.type == "SentencePieceTokenizer"
    assert found.tokenizer.tokenizer_model == tmp_path / "hf" / "spiece.model"
    assert tmp_path / "hf" / "spiece.model" in found.tokenizer.others
    assert any("sentinels" in note for note in found.notes)
