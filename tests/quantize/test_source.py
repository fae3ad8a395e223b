"""Which files of a model on the Hub are downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from halfbyte.quantize.source import HubOptions, find_model

WANTED = {
    *("config.json", "model.safetensors", "tokenizer.model", "LICENSE", "README.md"),
    "additional_chat_templates/tools.jinja",
}
UNWANTED = {"original/model.safetensors", "model.bin", "modeling_own.py", "onnx/model.onnx"}


@pytest.mark.parametrize("subfolder", ["", "part"])
@pytest.mark.parametrize("with_code", [False, True])
def test_only_files_of_the_model_are_downloaded(
    subfolder: str, with_code: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "part").mkdir()
    files = [f"{folder}{name}" for folder in ("", "part/") for name in (*WANTED, *UNWANTED)]
    downloaded: set[str] = set()

    def download(name: str, *, allow_patterns: Any, ignore_patterns: Any, **_: Any) -> str:
        assert name == "me/model"
        downloaded.update(
            filter_repo_objects(
                files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
            )
        )
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    options = HubOptions(subfolder=subfolder)
    assert find_model("me/model", options, with_code=with_code) == tmp_path / subfolder
    prefix = f"{subfolder}/" if subfolder else ""
    wanted = WANTED | ({"modeling_own.py"} if with_code else set())
    assert {prefix + name for name in wanted} <= downloaded
    assert not {prefix + name for name in {*UNWANTED} - wanted} & downloaded
