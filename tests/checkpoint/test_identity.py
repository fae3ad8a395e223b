from __future__ import annotations

from halfbyte.checkpoint.identity import digest_all, digest_files


def test_every_file_that_answers_depend_on_counts(tmp_path):
    names = {
        "model.safetensors",
        "config.json",
        "spiece.model",
        "chat_template.jinja",
        "additional_chat_templates/tool_use.jinja",
    }
    (tmp_path / "additional_chat_templates").mkdir()
    for name in (*names, "README.md", "report.json"):
        (tmp_path / name).write_text("one")
    before = digest_files(tmp_path)
    assert set(before) == names
    for name in sorted(names):
        (tmp_path / name).write_text("other")
        assert digest_all(digest_files(tmp_path)) != digest_all(before)
        (tmp_path / name).write_text("one")
