"""The encode cache: a hit equals a miss bit for bit; limits, order of deletion and damage."""

import errno
import fcntl
import multiprocessing
import os
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

import secateur.cache as cache_module
from secateur.cache import EncodeCache, image_key


def entry(seed: int, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """1000 numbers, 4000 bytes in float32."""
    return {
        "features": torch.randn(10, 100, generator=torch.Generator().manual_seed(seed)).to(dtype)
    }


def never() -> dict[str, torch.Tensor]:
    raise AssertionError("encoded again")


def key(seed: int) -> str:
    return image_key(torch.tensor([seed]), "model")


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


@pytest.mark.parametrize("tier", ["memory", "disk"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool]
)
def test_a_hit_is_a_miss_bit_for_bit(tmp_path, tier, dtype):
    odd = torch.tensor([float("nan"), -0.0, float("inf"), 1e-45])
    made = {
        "plain": entry(0)["features"].to(dtype),
        "turned": entry(1)["features"].to(dtype).T,
        "strided": entry(2)["features"].to(dtype)[:, ::3],
        "scalar": torch.tensor(1).to(dtype),
        "empty": torch.empty(0, 4, dtype=dtype),
        "odd": odd,
    }
    caches = (
        [EncodeCache(10**6)] * 2
        if tier == "memory"
        else [EncodeCache(0, tmp_path, 10**6) for _ in range(2)]
    )
    miss = caches[0].fetch(key(0), lambda: made)
    hit = caches[1].fetch(key(0), never)
    assert set(miss) == set(hit) == set(made)
    for name, tensor in made.items():
        for given in (miss[name], hit[name]):
            assert given.dtype == tensor.dtype
            assert given.shape == tensor.shape
            assert given.stride() == tensor.contiguous().stride()
            assert torch.equal(
                given.reshape(-1).view(torch.uint8),
                tensor.contiguous().reshape(-1).view(torch.uint8),
            )


def test_what_the_encoder_does_to_its_tensor_later_does_not_reach_the_cache():
    cache, made = EncodeCache(10**6), entry(0)
    cache.fetch(key(0), lambda: made)
    before = made["features"].clone()
    made["features"].zero_()
    assert torch.equal(cache.fetch(key(0), never)["features"], before)


class TestGrowingEntries:
    """An entry may lack names that are asked for: what is encoded for them joins it."""

    one = frozenset({"features"})
    both = one | {"saliency"}

    def later(self) -> dict[str, torch.Tensor]:
        """Encoded for both: the features, were they taken, are others."""
        return {"features": torch.zeros(10, 100), "saliency": entry(7)["features"]}

    @pytest.mark.parametrize("tier", ["memory", "disk"])
    def test_what_is_there_stays_bit_for_bit(self, tmp_path, tier):
        made = (
            [EncodeCache(10**6)] * 4
            if tier == "memory"
            else [EncodeCache(0, tmp_path, 10**6) for _ in range(4)]
        )
        made[0].fetch(key(0), lambda: entry(0), self.one)
        grown = made[1].fetch(key(0), self.later, self.both)
        for names in (self.both, self.one):
            again = made[2].fetch(key(0), never, names)
            for found in (grown, again):
                assert found.keys() == self.both
                assert torch.equal(found["features"], entry(0)["features"])
                assert torch.equal(found["saliency"], entry(7)["features"])
        if tier == "memory":
            assert made[0].bytes == 8000
            assert (made[0].counts.misses, made[0].counts.memory_hits) == (2, 2)
        else:
            assert len(files(tmp_path)) == 1

    def test_what_another_process_added_is_read_from_disk(self, tmp_path):
        cache, other = (EncodeCache(10**6, tmp_path, 10**6) for _ in range(2))
        cache.fetch(key(0), lambda: entry(0), self.one)
        other.fetch(key(0), self.later, self.both)
        assert cache.fetch(key(0), never, self.both).keys() == self.both
        assert (cache.counts.misses, cache.counts.disk_hits, cache.bytes) == (1, 1, 8000)

    def test_limits_hold_while_it_grows(self):
        cache = EncodeCache(9_000)
        cache.fetch(key(0), lambda: entry(0), self.one)
        cache.fetch(key(1), lambda: entry(1), self.one)
        cache.fetch(key(0), self.later, self.both)  # 4,000 bytes more than there are
        assert (cache.bytes, cache.counts.memory_evictions) == (8000, 1)
        cache.fetch(key(0), never, self.both)
        small = EncodeCache(5_000)
        small.fetch(key(0), lambda: entry(0), self.one)
        assert small.fetch(key(0), self.later, self.both).keys() == self.both
        assert small.bytes == 4000
        assert small.fetch(key(0), never, self.one).keys() == self.one, "what fits is still there"


def test_without_a_folder_any_text_is_a_key():
    cache, text = EncodeCache(10**6), "0 pope/val 17?"
    cache.fetch(text, lambda: entry(0))
    assert torch.equal(cache.fetch(text, never)["features"], entry(0)["features"])


def test_memory_stays_within_its_limit_and_the_least_recently_used_leaves():
    cache = EncodeCache(12_000)  # three entries
    for seed in (0, 1, 2):
        cache.fetch(key(seed), lambda seed=seed: entry(seed))
    cache.fetch(key(0), never)
    cache.fetch(key(3), lambda: entry(3))
    assert cache.bytes == 12_000
    assert cache.counts.memory_evictions == 1
    for seed in (0, 2, 3):
        cache.fetch(key(seed), never)
    with pytest.raises(AssertionError, match="encoded again"):
        cache.fetch(key(1), never)
    assert (cache.counts.memory_hits, cache.counts.misses) == (4, 5)


def test_a_view_does_not_keep_its_whole_storage():
    cache = EncodeCache(10_000)
    kept = cache.fetch(key(0), lambda: {"row": torch.zeros(1000, 100)[0]})["row"]
    assert kept.untyped_storage().nbytes() == cache.bytes == 400


def test_disk_stays_within_its_limit_and_the_least_recently_used_leaves(tmp_path):
    size = _file_size(tmp_path / "probe")
    cache = EncodeCache(0, tmp_path / "cache", 3 * size)
    for seed in (0, 1, 2):
        cache.fetch(key(seed), lambda seed=seed: entry(seed))
    cache.fetch(key(0), never)
    cache.fetch(key(3), lambda: entry(3))
    assert sum(file.stat().st_size for file in files(tmp_path / "cache")) <= 3 * size
    assert {file.stem for file in files(tmp_path / "cache")} == {key(0), key(2), key(3)}
    assert (cache.counts.disk_hits, cache.counts.disk_evictions) == (1, 1)


def _file_size(folder: Path) -> int:
    EncodeCache(0, folder, 10**6).fetch(key(0), lambda: entry(0))
    return files(folder)[0].stat().st_size


def test_an_entry_larger_than_a_limit_is_given_but_not_kept(tmp_path):
    cache = EncodeCache(5_000, tmp_path, 6_000)
    cache.fetch(key(0), lambda: entry(0))
    big = {"features": torch.ones(10_000)}
    assert torch.equal(cache.fetch(key(1), lambda: big)["features"], big["features"])
    assert cache.bytes == 4_000
    assert [file.stem for file in files(tmp_path)] == [key(0)], "the others stay"
    assert not list(tmp_path.glob("*.writing"))


@pytest.mark.parametrize("change", ["deleted", "replaced"])
def test_a_file_that_another_process_takes_away_while_it_is_read(tmp_path, monkeypatch, change):
    """What was read counts, and is no damage."""
    EncodeCache(0, tmp_path, 10**6).fetch(key(0), lambda: entry(0))
    plain = cache_module.load

    def meanwhile(content):
        (file,) = files(tmp_path)
        if change == "deleted":
            file.unlink()
        else:
            file.write_bytes(save(entry(1)))
        return plain(content)

    monkeypatch.setattr(cache_module, "load", meanwhile)
    cache = EncodeCache(0, tmp_path, 10**6)
    got = cache.fetch(key(0), never)
    assert torch.equal(got["features"], entry(0)["features"])
    assert (cache.counts.disk_hits, cache.counts.damaged) == (1, 0)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "foreign"])
def test_a_damaged_entry_is_noticed_and_encoded_again(tmp_path, damage, caplog):
    EncodeCache(0, tmp_path, 10**6).fetch(key(0), lambda: entry(0))
    (file,) = files(tmp_path)
    content = bytearray(file.read_bytes())
    if damage == "flipped":
        content[-5] ^= 1
    elif damage == "foreign":  # intact, but another entry's header without our checksum
        content = bytearray(save(entry(1)))
    file.write_bytes({"truncated": content[:-100], "empty": b""}.get(damage, content))
    cache = EncodeCache(0, tmp_path, 10**6)
    assert torch.equal(cache.fetch(key(0), lambda: entry(0))["features"], entry(0)["features"])
    assert (cache.counts.damaged, cache.counts.misses) == (1, 1)
    assert "is damaged" in caplog.text
    assert file.name in caplog.text
    EncodeCache(0, tmp_path, 10**6).fetch(key(0), never)


def test_what_a_killed_process_left_half_written_goes(tmp_path):
    (tmp_path / f"{key(9)}.writing").write_bytes(b"half")
    EncodeCache(0, tmp_path, 10**6).fetch(key(0), lambda: entry(0))
    assert [file.name for file in tmp_path.glob("*.writing")] == []


def _use(folder: Path, seed: int) -> None:
    draw, cache = random.Random(seed), EncodeCache(0, folder, 43_000)
    for _ in range(200):
        number = draw.randrange(40)
        got = cache.fetch(key(number), lambda number=number: entry(number))
        assert torch.equal(got["features"], entry(number)["features"])
    assert cache.counts.damaged == 0
    assert cache.counts.disk_hits > 0


def test_two_processes_share_a_folder(tmp_path):
    """Both fetch the same 40 entries over and over in a folder that holds 10."""
    fork = multiprocessing.get_context("fork")  # torch is imported already
    processes = [fork.Process(target=_use, args=(tmp_path, seed)) for seed in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert sum(file.stat().st_size for file in files(tmp_path)) <= 43_000


def test_a_key_tells_content_shape_dtype_and_model_apart():
    pixels = torch.arange(12.0).reshape(3, 4)
    keys = [
        image_key(pixels, "a"),
        image_key(pixels, "b"),
        image_key(pixels.reshape(4, 3), "a"),
        image_key(pixels.to(torch.bfloat16), "a"),
        image_key(pixels + 1, "a"),
        image_key([pixels, pixels], "a"),
        image_key(pixels.view(torch.int32), "a"),
    ]
    assert len(set(keys)) == len(keys)
    assert image_key(pixels.T.contiguous().T, "a") == image_key([pixels], "a") == keys[0]


def test_negative_limits_are_refused():
    with pytest.raises(ValueError, match="at least 0"):
        EncodeCache(-1)


def test_a_cleared_cache_holds_nothing_and_encodes_again():
    cache = EncodeCache(1000)
    first = cache.fetch("a", lambda: {"x": torch.arange(4.0)})
    cache.clear()
    assert (cache.bytes, cache.counts.memory_evictions) == (0, 1)
    again = cache.fetch("a", lambda: {"x": torch.arange(4.0)})
    assert again["x"] is not first["x"]
    assert cache.counts.misses == 2


def test_entries_under_each_others_names_are_noticed(tmp_path, caplog):
    cache = EncodeCache(0, tmp_path, 10**9)
    for number in (0, 1):
        cache.fetch(key(number), lambda number=number: entry(number))
    first, second = files(tmp_path)
    first.rename(tmp_path / "aside"), second.rename(first), (tmp_path / "aside").rename(second)
    for number in (0, 1):
        got = cache.fetch(key(number), lambda number=number: entry(number))
        assert torch.equal(got["features"], entry(number)["features"])
    assert cache.counts.damaged == 2
    assert "not what was written under this name" in caplog.text


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE, errno.ENOSPC])
@pytest.mark.parametrize("call", ["read_bytes", "write_bytes"])
def test_a_folder_that_fails_is_given_up_with_a_warning(
    tmp_path, monkeypatch, caplog, number, call
):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    cache = EncodeCache(10**6, tmp_path, 10**9)
    monkeypatch.setattr(Path, call, fail)
    for _ in range(2):
        assert cache.fetch("a", lambda: {"features": torch.ones(2)})["features"].sum() == 2
    assert f"the cache folder {tmp_path} cannot be used" in caplog.text
    assert len(caplog.records) == 1
    assert cache.counts.memory_hits == 1


def test_something_else_in_the_place_of_the_folder_or_of_an_entry(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path):
        (tmp_path / "a.safetensors").mkdir(exist_ok=True)
        cache = EncodeCache(0, folder, 10**9)
        assert cache.fetch("a", lambda: {"features": torch.ones(2)})["features"].sum() == 2
    assert caplog.text.count("cannot be used") == 2


def test_a_lock_that_is_never_released_is_not_waited_for(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("secateur.cache._PATIENCE", 0.1)
    cache = EncodeCache(0, tmp_path, 10**9)
    with (tmp_path / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        cache.fetch("a", lambda: {"features": torch.ones(2)})
    assert "cannot be used" in caplog.text
