import json
import os

import pytest
import torch
from safetensors.torch import save_file

from peft_sae.artifact import digest, read_json, read_tensors, write_json, write_tensors
from peft_sae.errors import ArtifactError, PeftSaeError
from peft_sae.writing import replace_folder, write_text

HEADER = {"a": ((2, 3), torch.float32), "n": ((2,), torch.int64)}


def _tensors():
    return {"a": torch.arange(6.0).reshape(2, 3), "n": torch.tensor([4, 5])}


def _write(folder, text="new"):
    with replace_folder(folder, owned=("mark.json", "tensors")) as scratch:
        (scratch / "mark.json").write_text(text)


def _fail_halfway(folder):
    with replace_folder(folder, owned=("mark.json", "tensors")) as scratch:
        (scratch / "mark.json").write_text("half")
        raise RuntimeError("stop")


def test_folder_appears_whole_and_readable_like_any_other(tmp_path):
    _write(tmp_path / "deep" / "out")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    (tmp_path / "other").mkdir()
    assert (tmp_path / "deep" / "out").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_own_kind_is_replaced_without_leftovers(tmp_path):
    _write(tmp_path / "out", "old")
    (tmp_path / "out" / "tensors").write_text("x")
    _write(tmp_path / "out", "new")
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == {"mark.json": "new"}
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_empty_folder_is_taken(tmp_path):
    (tmp_path / "out").mkdir()
    _write(tmp_path / "out")
    assert (tmp_path / "out" / "mark.json").read_text() == "new"


def test_link_to_an_artefact_stays_a_link(tmp_path):
    _write(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    _write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "mark.json").read_text() == "new"


def test_working_folder_can_be_the_target(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    _write(".")
    assert (tmp_path / "here" / "mark.json").read_text() == "new"


@pytest.mark.parametrize("existing", [True, False])
def test_nothing_is_left_after_an_exception(tmp_path, existing):
    if existing:
        _write(tmp_path / "out", "old")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RuntimeError, match="stop"):
        _fail_halfway(tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before
    if existing:
        assert (tmp_path / "out" / "mark.json").read_text() == "old"


def test_old_folder_comes_back_when_the_swap_fails(tmp_path, monkeypatch):
    _write(tmp_path / "out", "old")
    replace = os.replace

    def fail_to_move_in(source, target):
        if str(source).endswith(".partial"):
            raise OSError("disk full")
        replace(source, target)

    monkeypatch.setattr("peft_sae.scratch.exchange", lambda first, second: False)  # not every system can
    monkeypatch.setattr(os, "replace", fail_to_move_in)
    with pytest.raises(ArtifactError, match=r"Cannot write .*disk full"):
        _write(tmp_path / "out", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "mark.json").read_text() == "old"


def test_foreign_folder_is_refused_and_kept(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match=r"holds \['thesis.txt'\]; writing there would destroy it"):
        _write(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_file_as_target_is_refused(tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(ArtifactError, match="is a file; writing there would destroy it"):
        _write(tmp_path / "out")
    with pytest.raises(ArtifactError, match="Cannot write beside"):
        _write(tmp_path / "out" / "below")


def test_a_parent_that_cannot_be_written_is_an_artifact_error(tmp_path, monkeypatch):
    def refuse(*_, **__):  # as for a user without the right; root, whom CI runs as, has every right
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)

    with pytest.raises(ArtifactError, match=r"Permission denied.*Give a writable folder"):
        _write(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_json_round_trip(tmp_path):
    data = {"schema": "kind", "schema_version": 2, "x": [1.5, None, "ü"]}
    write_json(tmp_path / "a.json", data)
    assert read_json(tmp_path / "a.json", schema="kind", newest=2) == data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"schema": "kind", "schema_ver', "cannot be read as JSON.*damaged or truncated"),
        (b"\xff\xfe\x00", "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b'{"schema": "kind", "n": ' + b"9" * 5000 + b"}", "cannot be read as JSON"),
        (b"[1, 2]", "does not describe a kind"),
        (b'{"schema": "other", "schema_version": 1}', "does not describe a kind"),
        (b'{"schema": "kind", "schema_version": 3}', "schema version 3, and this peft_sae reads versions 1 to 2"),
        (b'{"schema": "kind", "schema_version": true}', "schema version True"),
        (b'{"schema": "kind"}', "schema version None"),
    ],
)
def test_bad_json_is_an_artifact_error(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=message):
        read_json(tmp_path / "a.json", schema="kind", newest=2)


def test_missing_json_is_an_artifact_error(tmp_path):
    with pytest.raises(ArtifactError, match="does not exist, so there is no kind in"):
        read_json(tmp_path / "a.json", schema="kind", newest=2)


def test_tensors_round_trip_bit_exact(tmp_path):
    tensors = {**_tensors(), "view": torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).T[1:3]}
    write_tensors(tmp_path / "t", tensors)
    read = read_tensors(tmp_path / "t", {**HEADER, "view": ((2, 4), torch.float32)})
    assert digest(read) == digest(tensors)
    assert torch.equal(read["view"], tensors["view"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("n"), r"lacks the tensors \['n'\]"),
        (lambda t: t.update(extra=torch.zeros(1)), r"unexpected ones \['extra'\]"),
        (lambda t: t.update(a=torch.zeros(3, 2)), r"'a' .* is F32 \[3, 2\], and F32 \[2, 3\] was expected"),
        (lambda t: t.update(a=t["a"].double()), r"is F64 \[2, 3\], and F32"),
        (lambda t: t["a"].fill_(float("nan")), "'a' .* holds NaN or infinity"),
        (lambda t: t["a"][0].fill_(float("-inf")), "holds NaN or infinity"),
    ],
)
def test_tensors_that_do_not_fit_are_an_artifact_error(tmp_path, change, message):
    tensors = _tensors()
    change(tensors)
    save_file(tensors, tmp_path / "t")
    with pytest.raises(ArtifactError, match=message):
        read_tensors(tmp_path / "t", HEADER)


def test_every_truncation_is_an_artifact_error(tmp_path):
    write_tensors(tmp_path / "t", _tensors())
    whole = (tmp_path / "t").read_bytes()
    for length in range(0, len(whole), 7):
        (tmp_path / "t").write_bytes(whole[:length])
        with pytest.raises(ArtifactError, match="damaged or truncated"):
            read_tensors(tmp_path / "t", HEADER)


def test_missing_tensor_file_and_folder_in_its_place_are_artifact_errors(tmp_path):
    with pytest.raises(ArtifactError, match="does not exist, so the folder is incomplete"):
        read_tensors(tmp_path / "t", HEADER)
    with pytest.raises(ArtifactError, match="cannot be read as safetensors"):
        read_tensors(tmp_path, HEADER)


def test_failed_write_is_an_artifact_error(tmp_path):
    with pytest.raises(ArtifactError, match=r"Cannot write .*Check the space"):
        write_tensors(tmp_path / "missing" / "t", _tensors())


def test_errors_are_caught_as_documented():
    for kind in (PeftSaeError, OSError, ValueError):
        assert issubclass(ArtifactError, kind)


def test_digest_depends_on_every_part():
    tensors = _tensors()
    base = digest(tensors, {"x": 1})
    changed = [
        digest(tensors, {"x": 2}),
        digest({"b": tensors["a"], "n": tensors["n"]}, {"x": 1}),
        digest({**tensors, "a": tensors["a"].reshape(3, 2)}, {"x": 1}),
        digest({**tensors, "a": tensors["a"].view(torch.int32)}, {"x": 1}),
        digest({**tensors, "a": tensors["a"].nextafter(torch.tensor(9.0))}, {"x": 1}),
    ]
    assert len({base, *changed}) == 6
    assert base == digest(dict(reversed(tensors.items())), json.loads('{"x": 1}'))
    assert len(digest({"h": tensors["a"].bfloat16(), "s": torch.tensor(1.0)})) == 64


def test_work_that_appears_in_the_meantime_is_kept(tmp_path):
    def write_slowly():
        with replace_folder(tmp_path / "out") as scratch:
            (scratch / "mark.json").write_text("new")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "thesis.txt").write_text("years of work")

    with pytest.raises(ArtifactError, match=r"holds \['thesis.txt'\]"):
        write_slowly()
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_files_are_as_readable_as_any_other(tmp_path):
    with replace_folder(tmp_path / "out") as scratch:
        write_tensors(scratch / "tensors", _tensors())
    (tmp_path / "other").write_text("x")

    assert (tmp_path / "out" / "tensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_text_file_replaces_an_earlier_one_whole(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "page.md"
    write_text(path, "one\n")
    write_text(str(path), "zwei é \ud800\n")
    assert path.read_bytes() == "zwei é \\ud800\n".encode()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(ArtifactError, match=r"Cannot write .*page\.md' \(disk full\)"):
        write_text(path, "three\n")
    assert path.read_text().startswith("zwei")
    assert [entry.name for entry in path.parent.iterdir()] == ["page.md"]
