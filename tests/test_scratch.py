import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from peft_sae import scratch
from peft_sae.errors import ArtifactError
from peft_sae.writing import discard, replace_file, replace_folder, tidy_up, write_text

HOLD = """
import sys
from pathlib import Path
from peft_sae.writing import replace_folder
with replace_folder(sys.argv[1], owned=["mark"]) as folder:
    (folder / "mark").write_text("theirs")
    print("held", flush=True)
    sys.stdin.read()
"""


def write(target, text="new", **options):
    with replace_folder(target, owned=["mark"], **options) as folder:
        (folder / "mark").write_text(text)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def other(tmp_path):
    """Another process that is writing `tmp_path / "out"`."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_two_processes_never_write_one_target(other, tmp_path):
    with pytest.raises(ArtifactError, match=r"Another process is writing .*Wait for it"):
        write(tmp_path / "out")

    other.communicate("")
    assert (tmp_path / "out" / "mark").read_text() == "theirs"
    assert names(tmp_path) == ["out"]


def test_a_waiting_process_comes_afterwards(other, tmp_path):
    other.stdin.close()  # it ends soon, perhaps while this one waits

    write(tmp_path / "out", "mine", wait=True)

    assert (tmp_path / "out" / "mark").read_text() == "mine"
    assert names(tmp_path) == ["out"]


def test_what_a_killed_process_left_goes_with_the_next_write(other, tmp_path):
    other.kill()
    other.wait()
    assert any(name.endswith(".partial") for name in names(tmp_path))

    write(tmp_path / "out")

    assert names(tmp_path) == ["out"]


def test_what_a_killed_process_left_goes_with_what_it_wrote(other, tmp_path):
    (tmp_path / "out").mkdir()
    before = names(tmp_path)
    tidy_up(tmp_path / "out")  # while the other one writes
    assert names(tmp_path) == before
    other.kill()
    other.wait()

    tidy_up(tmp_path / "out")
    assert names(tmp_path) == ["out"]
    (tmp_path / ".out.lock").write_text("")
    discard(tmp_path / "out")
    assert names(tmp_path) == []
    discard(tmp_path / "out")
    discard(tmp_path / "nowhere" / "out")
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path)
    discard(tmp_path / "file")
    discard(tmp_path / "link")
    assert names(tmp_path) == []


def test_other_targets_scratch_stays(tmp_path):
    for name in (".out2.abcdefgh.partial", ".out.txt.abcdefgh.partial", ".outabcdefgh.partial", ".out.partial"):
        (tmp_path / name).mkdir()
    before = names(tmp_path)

    write(tmp_path / "out")

    assert names(tmp_path) == sorted([*before, "out"])


@pytest.mark.parametrize("can", [True, False])
def test_a_swap_leaves_the_new_version_alone(tmp_path, monkeypatch, can):
    if not can:
        monkeypatch.setattr(scratch, "exchange", lambda first, second: False)
    write(tmp_path / "out", "old")

    write(tmp_path / "out", "new")

    assert (tmp_path / "out" / "mark").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_an_earlier_version_between_two_renames_comes_back(tmp_path):
    retired = tmp_path / ".out.abcdefgh.partial.old"
    retired.mkdir()
    (retired / "mark").write_text("old")

    with pytest.raises(RuntimeError), replace_folder(tmp_path / "out", owned=["mark"]):
        raise RuntimeError("the work fails")

    assert (tmp_path / "out" / "mark").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_nothing_is_written_through_a_link_that_lies_in_wait(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in (f".table.csv.{os.getpid()}.partial", ".table.csv.partial"):
        (tmp_path / name).symlink_to(victim)
    (tmp_path / "table.csv").symlink_to(victim)

    write_text(tmp_path / "table.csv", "new")

    assert victim.read_text() == "precious"
    assert (tmp_path / "table.csv").read_text() == "new"
    assert not (tmp_path / "table.csv").is_symlink()


def test_a_locked_link_is_not_followed(tmp_path):
    (tmp_path / ".out.lock").symlink_to(tmp_path / "elsewhere")

    with pytest.raises(ArtifactError, match="Cannot write"):
        write(tmp_path / "out")

    assert names(tmp_path) == [".out.lock"]


def test_a_full_disk_is_told_with_what_is_free(tmp_path):
    with (
        pytest.raises(ArtifactError, match=r"No space left on device.*MB are free.*Make room there"),
        replace_file(tmp_path / "out"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")

    assert names(tmp_path) == []


def test_a_limit_on_the_size_of_files_leaves_nothing_half_written(tmp_path):
    code = (
        "import signal, sys\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from peft_sae.artifact import write_tensors\nfrom peft_sae.writing import replace_folder\nimport torch\n"
        "from peft_sae.errors import ArtifactError\n"
        "try:\n"
        "    with replace_folder(sys.argv[1]) as folder:\n"
        "        write_tensors(folder / 'a.safetensors', {'a': torch.zeros(10000)})\n"
        "except ArtifactError as error:\n    print('told', error)\n"
    )

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))

    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")],
        preexec_fn=limit,
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout.startswith("told")
    assert names(tmp_path) == []


def test_long_names_have_room_for_their_scratch(tmp_path):
    target = tmp_path / ("é" * 120)

    write(target)

    assert names(tmp_path) == [Path(target).name]


def test_what_a_library_has_put_beside_a_file_goes_with_it_when_it_is_killed(tmp_path):
    code = (
        "import os, signal, sys\nfrom peft_sae.writing import replace_file\n"
        "with replace_file(sys.argv[1]) as scratch:\n"
        "    scratch.with_name('.tmpAbCdEf').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "out"], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert names(tmp_path) != []

    write_text(tmp_path / "out", "new")

    assert names(tmp_path) == ["out"]
