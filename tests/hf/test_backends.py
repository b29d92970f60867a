"""Absent packages are named when they are used, and not before."""

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from megatron.errors import CheckpointError
from megatron.hf import backends
from megatron.hf.backends import DummyObject, dummy, requires_backends, tokenizer_class
from megatron.hf.hub import ARCHIVE_FILES, SAFETENSORS_FILES, locate, locate_weights


class Widget(metaclass=DummyObject):
    _backends = ("no_such_package",)


def test_a_dummy_can_be_imported_and_named() -> None:
    assert Widget.__name__ == "Widget" and isinstance(Widget, type)
    assert not isinstance(3, Widget)


@pytest.mark.parametrize("use", [lambda: Widget(), lambda: Widget.from_pretrained("x")])
def test_using_a_dummy_names_package_and_class(use: Any) -> None:
    with pytest.raises(ImportError, match="Widget needs no_such_package.*pip install") as caught:
        use()
    assert len(str(caught.value).splitlines()) == 1


def test_all_absent_packages_are_named_at_once() -> None:
    with pytest.raises(ImportError, match="Thing needs absent_a, absent_b, which"):
        requires_backends("Thing", ["absent_a", "torch", "absent_b"])
    requires_backends("Thing", ["torch"])


@pytest.mark.parametrize("user", [dict, {}, "dict"])
def test_the_user_is_a_class_an_object_or_a_name(user: object) -> None:
    with pytest.raises(ImportError, match="dict needs absent"):
        requires_backends(user, "absent")


def test_tokenizers_are_those_of_transformers() -> None:
    import transformers

    for name in backends.TOKENIZERS:
        assert tokenizer_class(name) is getattr(transformers, name)


def test_tokenizers_without_transformers_are_dummies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "is_available", lambda name: name != "transformers")
    fast = tokenizer_class("BertTokenizerFast")
    with pytest.raises(ImportError, match="BertTokenizerFast needs transformers"):
        fast.from_pretrained("bert-base-uncased")


def test_a_dummy_of_a_package_that_came_later_asks_for_a_restart() -> None:
    with pytest.raises(ImportError, match="after a restart"):
        dummy("Thing", ["torch"])()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[Any]:
    """A hub of one model, which has only an old archive; it remembers what it was asked."""
    module = ModuleType("huggingface_hub")
    module.asked = []  # type: ignore[attr-defined]

    def snapshot_download(name: str, *, allow_patterns: list[str], **options: Any) -> str:
        module.asked.append((name, tuple(allow_patterns), options))
        if name != "someone/model":
            raise OSError("Repository Not Found\nmany more lines")
        if "pytorch_model.bin" in allow_patterns:
            (tmp_path / "pytorch_model.bin").write_bytes(b"")
        return str(tmp_path)

    module.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.setattr(backends, "is_available", lambda name: True)
    return module


def test_only_the_needed_files_are_fetched(hub: Any, tmp_path: Any) -> None:
    options = {"revision": "v1", "token": "t", "local_files_only": True}
    assert locate_weights("someone/model", "Model", **options) == tmp_path
    patterns = [patterns for _, patterns, _ in hub.asked]
    assert patterns == [SAFETENSORS_FILES, ARCHIVE_FILES]
    assert all(asked == options for _, _, asked in hub.asked)


def test_a_folder_within_a_model(hub: Any, tmp_path: Any) -> None:
    found = locate("someone/model", ["config.json"], "Model", subfolder="inner")
    assert found == tmp_path / "inner"
    assert hub.asked[0][1] == ("inner/config.json",)


def test_a_directory_is_taken_before_the_hub(hub: Any, tmp_path: Any) -> None:
    assert locate(tmp_path, ["config.json"], "Model") == tmp_path
    assert not hub.asked


def test_a_model_that_is_not_there_is_named(hub: Any) -> None:
    with pytest.raises(CheckpointError, match="nobody/nothing.*Repository Not Found$"):
        locate("nobody/nothing", ["config.json"], "Model")


def test_without_the_package_the_class_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "is_available", lambda name: False)
    with pytest.raises(ImportError, match="BertModel.from_pretrained.*needs huggingface_hub"):
        locate("someone/model", ["config.json"], "BertModel")
