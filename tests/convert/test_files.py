"""The weight readers: good files exactly, bad files refused with one message and exit code 4."""

import json
import os
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import pytest

from cnxs_jax.convert import files, state_pickle
from cnxs_jax.errors import CheckpointError
from tests.convert import crafted


def refused(path):
    """The error that reading `path` raises; within a second, naming the file."""
    start = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        files.read_tensors(path)
    assert time.process_time() - start < 1.0
    assert caught.value.code == 4
    assert path.name in str(caught.value)
    assert "Traceback" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("case", crafted.BAD_SAFETENSORS)
def test_bad_safetensors(tmp_path, case):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(crafted.BAD_SAFETENSORS[case])
    refused(path)


@pytest.mark.parametrize("case", crafted.BAD_TORCH)
def test_bad_torch_file_is_refused_and_not_executed(tmp_path, case, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.pth"
    crafted.BAD_TORCH[case](path)
    refused(path)
    assert os.listdir(tmp_path) == ["weights.pth"]


@pytest.mark.parametrize("case", crafted.BAD_INDEX)
def test_bad_index(tmp_path, case):
    home = tmp_path / "home"
    (home / "sub").mkdir(parents=True)
    for place in (home / "good", tmp_path / "weights", home / "sub" / "weights"):
        place.with_suffix(".safetensors").write_bytes(crafted.good_safetensors())
    (home / "link.safetensors").symlink_to(tmp_path / "weights.safetensors")
    path = home / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": crafted.BAD_INDEX[case]}))
    refused(path)


def test_duplicate_key_in_index(tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}')
    assert "twice" in refused(path)


@pytest.mark.parametrize(
    ("case", "words"),
    [("html", "HTML page"), ("lfs_pointer", "git lfs pull"), ("empty", "empty file")],
)
def test_no_weight_file_at_all_is_called_by_name(tmp_path, case, words):
    for suffix, table in ((".safetensors", crafted.BAD_SAFETENSORS), (".pth", None)):
        path = tmp_path / f"weights{suffix}"
        path.write_bytes(table[case]) if table else crafted.BAD_TORCH[case](path)
        assert words in refused(path)


def test_refused_global_is_named_with_a_way_out(tmp_path):
    path = tmp_path / "w.pth"
    crafted.BAD_TORCH["namespace"](path)
    message = refused(path)
    assert "argparse.Namespace" in message
    assert "weights_only=True" in message


def good_zip(path, content, **keywords):
    crafted.write_zip(path, crafted.program(crafted.dict_of(content)), **keywords)
    return path


def test_a_hostile_file_does_not_change_how_the_next_is_read(tmp_path):
    path = good_zip(tmp_path / "good.pth", {"a": crafted.tensor()})
    before = files.read_tensors(path)["a"]
    crafted.BAD_TORCH["function_defaults"](tmp_path / "bad.pth")
    assert "attributes of a function" in refused(tmp_path / "bad.pth")
    np.testing.assert_array_equal(files.read_tensors(path)["a"], before)


def test_attributes_of_ordered_dicts_are_dropped(tmp_path):
    """torch.save sets `_metadata`; `items` would be called by whoever reads the dict."""
    ordered = crafted.call(crafted.name("collections", "OrderedDict"))
    entries = b"(" + crafted.text("a") + crafted.tensor() + b"u"
    state = crafted.dict_of({"_metadata": ordered, "items": b"K\1", "values": b"K\1"})
    path = tmp_path / "w.pth"
    crafted.write_zip(path, crafted.program(ordered + entries + state + b"b"))
    assert files.read_tensors(path)["a"].shape == (2, 3)


def test_the_stride_of_a_single_element_does_not_count(tmp_path):
    tensor = crafted.tensor(size=(1, 6), stride=(2**61, 1))
    path = good_zip(tmp_path / "w.pth", {"a": tensor})
    np.testing.assert_array_equal(files.read_tensors(path)["a"], [[0, 1, 2, 3, 4, 5]])


def test_a_checkpoint_of_a_trainer_is_not_too_deep(tmp_path):
    """Nested thirty times, and filled in a hundred batches, as the pickler does it."""
    config = crafted.integer(1)
    for _ in range(15):
        config = crafted.dict_of({"x": b"]" + config + b"a"})
    batches = b"".join(b"(" + crafted.text(f"t{i}") + crafted.tensor() + b"u" for i in range(100))
    path = good_zip(tmp_path / "w.pth", {"config": config, "state_dict": b"}" + batches})
    assert len(files.read_tensors(path)) == 100


def test_the_number_of_opcodes_is_limited(tmp_path, monkeypatch):
    path = good_zip(tmp_path / "w.pth", {"a": crafted.tensor(), "x": b"N0" * 500 + b"N"})
    assert set(files.read_tensors(path)) == {"a"}
    monkeypatch.setattr(state_pickle, "MAX_OPCODES", 1000)
    assert "more than 1000 opcodes" in refused(path)


def test_names_from_a_file_cannot_steer_the_terminal(tmp_path):
    call = crafted.call(crafted.name("os\x1b[2J", "system"))
    assert "\x1b" not in refused(good_zip(tmp_path / "w.pth", {"a": call}))


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    good = crafted.good_safetensors()
    for n in range(len(good)):
        path.write_bytes(good[:n])
        refused(path)
    zipped = tmp_path / "w.pth"
    crafted.write_zip(zipped, crafted.program(crafted.dict_of({"a": crafted.tensor()})))
    good = zipped.read_bytes()
    for n in range(len(good)):
        zipped.write_bytes(good[:n])
        refused(zipped)


def test_bit_flips_in_zip_storage_fail_the_checksum(tmp_path):
    path = tmp_path / "w.pth"
    crafted.write_zip(path, crafted.program(crafted.dict_of({"a": crafted.tensor()})))
    good = path.read_bytes()
    at = good.index(np.arange(6, dtype="<f4").tobytes())
    for i in range(at, at + 24):
        path.write_bytes(good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :])
        assert "checksum" in refused(path)


def test_random_damage_gives_weights_or_one_clean_error(tmp_path):
    rng = np.random.default_rng(0)
    zipped = tmp_path / "w.pth"
    crafted.write_zip(zipped, crafted.program(crafted.dict_of({"a": crafted.tensor()})))
    path = tmp_path / "w.safetensors"
    path.write_bytes(crafted.good_safetensors())
    for file in (zipped, path):
        good = np.frombuffer(file.read_bytes(), np.uint8)
        errors = 0
        for _ in range(500):
            bad = good.copy()
            bad[rng.integers(len(bad), size=2)] ^= rng.integers(1, 256, 2, dtype=np.uint8)
            file.write_bytes(bad.tobytes())
            try:
                files.read_tensors(file)
            except CheckpointError:
                errors += 1
        assert errors > 100


def test_good_torch_file(tmp_path):
    path = tmp_path / "w.pth"
    state = crafted.dict_of(
        {
            "a": crafted.tensor(),
            "t": crafted.tensor(size=(3, 2), stride=(1, 3)),
            "s": crafted.tensor(size=(), stride=(), offset=4),
        }
    )
    content = {"state_dict": state, "state_dict_ema": crafted.dict_of({"e": crafted.tensor()})}
    crafted.write_zip(path, crafted.program(crafted.dict_of({**content, "n": crafted.integer(3)})))
    read = files.read_tensors(path)
    a = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert set(read) == {"a", "t", "s"}
    np.testing.assert_array_equal(read["a"], a)
    np.testing.assert_array_equal(read["t"], a.T)
    assert read["s"].shape == ()
    assert read["s"] == 4
    assert set(files.read_tensors(path, "state_dict_ema")) == {"e"}
    with pytest.raises(CheckpointError, match=r"\['state_dict', 'state_dict_ema'\]"):
        files.read_tensors(path, "ema")


def test_hub_cache_links_are_followed(tmp_path):
    repo = tmp_path / "models--a--b"
    (repo / "blobs").mkdir(parents=True)
    (repo / "snapshots" / "1f" / "text_encoder").mkdir(parents=True)
    (repo / "blobs" / "77").write_bytes(crafted.good_safetensors())
    home = repo / "snapshots" / "1f" / "text_encoder"
    (home / "x.safetensors").symlink_to("../../../blobs/77")
    index = home / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "x.safetensors", "b": "x.safetensors"}}))
    assert set(files.read_tensors(index)) == {"a", "b"}


def test_written_files_are_exact(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 3, 2, 4)).astype(np.float32)
    tensors = {
        "transposed": x.transpose(3, 2, 0, 1),
        "strided": x[::2, ::-1],
        "scalar": np.float32(3.5),
        "big_endian": x.astype(">f4"),
        "half": x.astype(np.float16),
        "bfloat": x.astype(ml_dtypes.bfloat16),
        "empty": np.zeros((0, 3), np.float32),
        "int": np.arange(3),
    }
    path = tmp_path / "w.safetensors"
    files.write_safetensors(path, tensors)
    back = files.read_tensors(path)
    assert set(back) == set(tensors)
    for key, array in tensors.items():
        assert back[key].shape == np.shape(array)
        np.testing.assert_array_equal(np.asarray(back[key]), array)
    assert os.listdir(tmp_path) == ["w.safetensors"]


def test_safetensors_library_reads_what_is_written(tmp_path):
    from safetensors.numpy import load_file

    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    files.write_safetensors(tmp_path / "w.safetensors", {"a": x.T, "b": x}, dtype="bfloat16")
    back = load_file(tmp_path / "w.safetensors")
    np.testing.assert_array_equal(back["a"].astype(np.float32), x.T)
    assert back["a"].dtype == ml_dtypes.bfloat16


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    files.write_safetensors(path, {"a": np.ones(3, np.float32)})
    before = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        files.write_safetensors(path, {"a": np.zeros(3, np.float32)})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["w.safetensors"]


def test_read_back_catches_a_disk_that_lies(tmp_path, monkeypatch):
    real = os.fsync

    def lying(descriptor):
        real(descriptor)
        os.pwrite(descriptor, b"\x01", os.fstat(descriptor).st_size - 1)

    monkeypatch.setattr(os, "fsync", lying)
    with pytest.raises(CheckpointError, match="reads back differently"):
        files.write_safetensors(tmp_path / "w.safetensors", {"a": np.zeros(3, np.float32)})
    assert os.listdir(tmp_path) == []


def test_reading_maps_the_file_instead_of_loading_it(tmp_path):
    path = tmp_path / "w.safetensors"
    n = 2**26
    header = {
        "a": crafted.entry("F32", [n], 0, 4 * n),
        "b": crafted.entry("F32", [1], 4 * n, 4 * n + 4),
    }
    with open(path, "wb") as file:
        file.write(crafted.safetensors(header))
        file.truncate(file.tell() + 4 * n + 4)
    code = (
        "import resource, sys; from cnxs_jax.convert import files\n"
        "used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = used(); t = files.read_tensors(sys.argv[1]); t['b'].sum(); print(used() - before)"
    )
    out = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert int(out.stdout) < 32 * 1024, out  # kB, of a file of 256 MB


def test_command_line_prints_one_message_and_exits_with_4(tmp_path):
    path = tmp_path / "w.pth"
    crafted.BAD_TORCH["os_system"](path)
    command = [sys.executable, "-m", "cnxs_jax.convert", str(path), "--list"]
    out = subprocess.run(command, capture_output=True, text=True)
    assert out.returncode == 4
    assert "os.system" in out.stderr
    assert "Traceback" not in out.stderr
