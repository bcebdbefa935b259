"""Adapters on disk: exact round trips, nothing of the base in the file, and every broken folder told in one line."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from meetjax.adapters.io import FILE, MANIFEST, load_adapters, read_manifest, save_adapters
from meetjax.adapters.tree import KINDS, Bank, EditSite, count_parameters, flatten, unflatten
from meetjax.errors import MeetjaxError
from meetjax.models.fingerprint import fingerprint
from tests.conftest import TINY, apart, random_bank, random_params


def error_of(function) -> str:
    with pytest.raises(MeetjaxError) as caught:
        function()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_same(left, right):
    """The same structure (static fields too), and the same bits and dtypes."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for (path, a), b in zip(flatten(left).items(), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype, path
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=path)


@pytest.fixture
def saved(tmp_path):
    bank = apart(random_bank(TINY, KINDS))
    return save_adapters(tmp_path / "adapter", bank, base="tiny", fingerprint="f" * 64, recipe={"steps": 3}), bank


@pytest.mark.parametrize("kinds", [*((kind,) for kind in KINDS), KINDS], ids="+".join)
def test_save_load_round_trip(tmp_path, kinds):
    bank = random_bank(TINY, kinds, linear=("q", "down"), editable=("o",))
    assert_same(load_adapters(save_adapters(tmp_path, bank, base="tiny", fingerprint="f")), bank)


def test_save_load_round_trip_of_apart_columns_and_scale(saved):
    folder, bank = saved
    loaded = load_adapters(folder, "f" * 64)
    assert_same(loaded, bank)
    assert loaded.identity.entries == (6, 7) and loaded.lora.scale == 1.5


def test_save_load_round_trip_of_views(tmp_path):
    """Transposed and strided numpy leaves, which safetensors would otherwise write in memory order."""
    bank = random_bank(TINY, ("edit",), editable=("down",))
    s, t = (np.asarray(leaf) for leaf in (bank.edit.down.s, bank.edit.down.t))
    views = EditSite(np.ascontiguousarray(s.T).T, np.repeat(t, 2, axis=2)[:, :, ::2])
    assert not views.s.flags.c_contiguous and not views.t.flags.c_contiguous
    viewed = Bank(edit=type(bank.edit)(down=views, entries=bank.edit.entries))
    assert_same(load_adapters(save_adapters(tmp_path, viewed, base="tiny", fingerprint="f")), bank)


def test_save_load_round_trip_in_bfloat16(tmp_path):
    bank = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), random_bank(TINY))
    assert_same(load_adapters(save_adapters(tmp_path, bank, base="tiny", fingerprint="f")), bank)


def test_saving_again_replaces(saved):
    folder, _ = saved
    other = random_bank(TINY, ("edit",), seed=9)
    save_adapters(folder, other, base="tiny", fingerprint="f")
    assert_same(load_adapters(folder), other)
    assert sorted(path.name for path in folder.iterdir()) == [FILE, MANIFEST]


def test_base_not_in_adapter_file(saved):
    folder, bank = saved
    with safe_open(folder / FILE, "numpy") as file:
        names = set(file.keys())
        assert sum(file.get_tensor(name).size for name in names) == count_parameters(bank)
    assert names == set(flatten(bank)) and {name.split("/")[0] for name in names} == set(KINDS)
    for leaf in jax.tree.leaves(random_params(TINY)):
        assert np.asarray(leaf).ravel()[:16].tobytes() not in (folder / FILE).read_bytes()


def test_manifest_tells_what_is_inside(saved):
    folder, _ = saved
    manifest = read_manifest(folder)
    assert (manifest["base"], manifest["fingerprint"], manifest["recipe"]) == ("tiny", "f" * 64, {"steps": 3})
    assert manifest["kinds"]["lora"] == {"entries": [2, 3], "sites": ["down", "gate", "k", "o", "q", "up", "v"], "scale": 1.5}
    assert list(manifest["kinds"]) == list(KINDS)


def test_adapter_for_other_base_raises(tmp_path):
    params = random_params(TINY)
    own = fingerprint(TINY, params)
    folder = save_adapters(tmp_path, random_bank(TINY, ("edit",)), base="mine", fingerprint=own)
    load_adapters(folder, own)
    other = fingerprint(TINY, random_params(TINY, seed=1))
    message = error_of(lambda: load_adapters(folder, other))
    assert "mine" in message and own[:12] in message and other[:12] in message


def test_unknown_site_raises_on_loading(saved):
    """A file with a site or a kind that this version does not know is refused, not read in part."""
    folder, _ = saved
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"kinds": manifest["kinds"] | {"vera": {}}}))
    assert "manifest" in error_of(lambda: load_adapters(folder))
    data = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(data.replace(b"lora/gate/", b"lora/gaga/"))
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert "lora" in error_of(lambda: load_adapters(folder))


def test_file_and_manifest_must_agree(saved):
    folder, _ = saved
    manifest = json.loads((folder / MANIFEST).read_text())
    for kind in KINDS:
        fewer = {name: facts for name, facts in manifest["kinds"].items() if name != kind}
        (folder / MANIFEST).write_text(json.dumps(manifest | {"kinds": fewer}))
        assert kind in error_of(lambda: load_adapters(folder))
    broken = manifest["kinds"] | {"edit": {"sites": []}}
    (folder / MANIFEST).write_text(json.dumps(manifest | {"kinds": broken}))
    assert "edit" in error_of(lambda: load_adapters(folder))
    broken = manifest["kinds"] | {"edit": {"entries": [0, 1, 2], "sites": []}}
    (folder / MANIFEST).write_text(json.dumps(manifest | {"kinds": broken}))
    assert "edit" in error_of(lambda: load_adapters(folder))


def test_truncated_file_raises(saved):
    folder, _ = saved
    data = (folder / FILE).read_bytes()
    for keep in (0, 4, 100, len(data) - 1):
        (folder / FILE).write_bytes(data[:keep])
        assert FILE in error_of(lambda: load_adapters(folder))
    (folder / FILE).unlink()
    assert FILE in error_of(lambda: load_adapters(folder))


@pytest.mark.parametrize("text", ["", "[]", "{}", "3", '{"format": 1}', '{"format": 99, "base": "", "fingerprint": "", "kinds": {}}'])
def test_foreign_manifest_raises(saved, text):
    folder, _ = saved
    (folder / MANIFEST).write_text(text)
    assert MANIFEST in error_of(lambda: load_adapters(folder))


def test_missing_folder_raises(tmp_path):
    assert str(tmp_path / "none") in error_of(lambda: load_adapters(tmp_path / "none"))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_finite_is_not_saved(tmp_path, value):
    bank = random_bank(TINY, ("edit",), editable=("down",))
    bank.edit.down.s[0, 0, 0] = value
    assert "edit/down/s" in error_of(lambda: save_adapters(tmp_path / "new", bank, base="tiny", fingerprint="f"))
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_made_raises(tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in error_of(lambda: save_adapters(tmp_path / "file" / "x", random_bank(TINY, ("edit",)), base="t", fingerprint="f"))


def test_flatten_and_unflatten():
    bank = random_bank(TINY)
    leaves = flatten(bank)
    assert "lora/q/a" in leaves and "prompt/vectors" in leaves and "identity/block/o" in leaves
    assert_same(unflatten(bank, leaves), bank)
    assert "lora/q/a" in error_of(lambda: unflatten(bank, {path: leaf for path, leaf in leaves.items() if path != "lora/q/a"}))
    assert "spare" in error_of(lambda: unflatten(bank, leaves | {"spare": jnp.zeros(1)}))
