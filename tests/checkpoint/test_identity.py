from __future__ import annotations

from halfbyte.checkpoint.identity import digest_all, digest_files, name_folder


def test_digest_depends_on_every_relevant_file(tmp_path):
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


def test_folder_name_is_that_of_the_link(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "model")
    monkeypatch.chdir(tmp_path / "model")
    assert [name_folder(f) for f in ("../link", "../link/", tmp_path / "model", ".")] == [
        "link",
        "link",
        "model",
        "model",
    ]
