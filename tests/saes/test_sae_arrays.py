"""Arrays on disk: slices equal numpy's, damage is named, and reading a few rows does not read the file."""

from __future__ import annotations

import json
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from demur.errors import SaeError
from demur.saes.layouts import open_arrays

TABLE = np.arange(35, dtype=np.float64).reshape(5, 7) / 4


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arrays")
    for dtype in ("<f2", "<f4", "<f8", ">f4", "<i4"):
        values = TABLE.astype(dtype)
        np.savez(folder / f"stored-{dtype[1:]}{dtype[0] == '>'}.npz", a=values, f=np.asfortranarray(values))
        np.savez_compressed(
            folder / f"deflated-{dtype[1:]}{dtype[0] == '>'}.npz", a=values, f=np.asfortranarray(values)
        )
    return folder


@given(
    which=st.lists(st.integers(0, 4), max_size=7).map(tuple)
    | st.tuples(st.integers(0, 5), st.integers(0, 5)).map(lambda ab: range(min(ab), max(ab))),
    axis=st.sampled_from([0, 1]),
    kind=st.sampled_from(["stored", "deflated"]),
    dtype=st.sampled_from(["f2False", "f4False", "f8False", "f4True", "i4False"]),
    name=st.sampled_from(["a", "f"]),
)
def test_npz_slices(files: Path, which: tuple[int, ...] | range, axis: int, kind: str, dtype: str, name: str):
    table = open_arrays(files / f"{kind}-{dtype}.npz")[name]
    expected = np.take(TABLE.astype(dtype[:2]), list(which), axis=axis).astype(np.float32)
    taken = table.take(which) if axis == 0 else table.T.take(which).T
    assert taken.dtype == torch.float32
    assert np.array_equal(taken.numpy(), expected)
    assert table.shape == (5, 7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_safetensors_slices(tmp_path: Path, dtype: torch.dtype):
    tensor = torch.from_numpy(TABLE).to(dtype)
    save_file(
        {"pad": torch.zeros(3, dtype=torch.float16), "a": tensor, "one": torch.tensor(2.5)},
        tmp_path / "x.safetensors",
    )
    arrays = open_arrays(tmp_path / "x.safetensors")
    assert torch.equal(arrays["a"].take((4, 0, 4)), tensor[[4, 0, 4]].float())
    assert torch.equal(arrays["a"].T.take((6, 1)), tensor.T[[6, 1]].float())
    assert torch.equal(arrays["a"].T.take(range(2, 5)), tensor.T[2:5].float())
    assert torch.equal(arrays["a"].whole(), tensor.float())
    assert arrays["one"].whole().tolist() == [2.5]


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_finite_names_file_array_and_index(tmp_path: Path, compressed: bool, value: float):
    values = TABLE.astype(np.float32)
    values[3, 5] = value
    (np.savez_compressed if compressed else np.savez)(tmp_path / "bad.npz", W_dec=values)
    table = open_arrays(tmp_path / "bad.npz")["W_dec"]
    assert table.take((0, 4)).shape == (2, 7)
    for which, array, feature in (
        ((1, 3), table, 3),
        (range(2, 5), table, 3),
        ((5,), table.T, 5),
        (range(4, 7), table.T, 5),
    ):
        with pytest.raises(SaeError, match=rf"bad\.npz: W_dec\[3, 5\] is {value}; feature {feature}\."):
            array.take(which)


def test_float64_beyond_float32_is_not_finite(tmp_path: Path):
    np.savez(tmp_path / "big.npz", a=np.array([1.0, 1e300]))
    with pytest.raises(SaeError, match=r"a\[1\] is inf"):
        open_arrays(tmp_path / "big.npz")["a"].whole()


def test_missing_array_names_those_there(tmp_path: Path):
    np.savez(tmp_path / "x.npz", W_enc=TABLE)
    with pytest.raises(SaeError, match=r"no array 'W_dec'; it holds W_enc"):
        open_arrays(tmp_path / "x.npz")["W_dec"]


def test_text_arrays_are_refused(tmp_path: Path):
    np.savez(tmp_path / "x.npz", W_enc=np.array(["a"]))
    with pytest.raises(SaeError, match="dtype <U1"):
        open_arrays(tmp_path / "x.npz")
    save_file({"a": torch.ones(2, dtype=torch.int64)}, tmp_path / "x.safetensors")
    with pytest.raises(SaeError, match="dtype I64"):
        open_arrays(tmp_path / "x.safetensors")


@pytest.mark.parametrize("keep", [0, 10, 200, 5000])
@pytest.mark.parametrize("compressed", [False, True])
def test_truncated_npz(tmp_path: Path, keep: int, compressed: bool):
    rng = np.random.default_rng(0)
    (np.savez_compressed if compressed else np.savez)(tmp_path / "x.npz", a=rng.normal(size=(50, 50)))
    data = (tmp_path / "x.npz").read_bytes()
    (tmp_path / "x.npz").write_bytes(data[:keep])
    with pytest.raises(SaeError, match=r"x\.npz cannot be read as an npz file"):
        open_arrays(tmp_path / "x.npz")


def test_damaged_compressed_member(tmp_path: Path):
    np.savez_compressed(tmp_path / "x.npz", a=np.random.default_rng(0).normal(size=(50, 50)))
    data = bytearray((tmp_path / "x.npz").read_bytes())
    data[4000:4100] = bytes(100)
    (tmp_path / "x.npz").write_bytes(data)
    with pytest.raises(SaeError, match=r"x\.npz: a is damaged"):
        open_arrays(tmp_path / "x.npz")["a"].whole()


def test_member_shorter_than_its_header_says(tmp_path: Path):
    np.savez(tmp_path / "x.npz", a=np.zeros((4, 4)))
    with zipfile.ZipFile(tmp_path / "x.npz") as archive:
        data = archive.read("a.npy")
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(tmp_path / "y.npz", "w", compression) as archive:
            archive.writestr("a.npy", data[:-40])
        with pytest.raises(SaeError, match=r"y\.npz is malformed: a has not the size"):
            open_arrays(tmp_path / "y.npz")["a"].whole()


@pytest.mark.parametrize("keep", [0, 4, 30, 200])
def test_truncated_safetensors(tmp_path: Path, keep: int):
    save_file({"a": torch.ones(20, 20)}, tmp_path / "x.safetensors")
    data = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(data[:keep])
    with pytest.raises(SaeError, match=r"x\.safetensors (cannot be read|is truncated)"):
        open_arrays(tmp_path / "x.safetensors")


@pytest.mark.parametrize("header", [b"[]", b"{", b'{"a": 1}', b'{"a": {"dtype": "F32"}}', b"\xff\xfe"])
def test_malformed_safetensors_header(tmp_path: Path, header: bytes):
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    with pytest.raises(SaeError, match=r"x\.safetensors cannot be read as a safetensors file"):
        open_arrays(tmp_path / "x.safetensors")


def test_absent_file(tmp_path: Path):
    with pytest.raises(SaeError, match=r"none\.npz cannot be read"):
        open_arrays(tmp_path / "none.npz")


def test_rows_of_a_large_file_need_little_memory(tmp_path: Path):
    """A sparse file of 4 GB: a few rows and columns of it allocate a few kilobytes."""
    d_model, d_sae = 1000, 1_000_000
    header = json.dumps({"W": {"dtype": "F32", "shape": [d_model, d_sae], "data_offsets": [0, 4 * d_model * d_sae]}})
    path = tmp_path / "large.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header.encode())
        file.truncate(8 + len(header) + 4 * d_model * d_sae)
    if path.stat().st_blocks * 512 > 1 << 20:
        pytest.skip("this file system has no sparse files")
    tracemalloc.start()
    try:
        table = open_arrays(path)["W"]
        assert table.T.take((3, 999_999)).shape == (2, 1000)
        assert table.T.take(range(500_000, 500_010)).shape == (10, 1000)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20
