"""Control vectors: the file says what the edit says, and one line tells why an edit is none."""

from __future__ import annotations

import dataclasses

import gguf
import numpy as np
import pytest

from meetjax.adapters.control_vector import FILE, read_control_vector, write_control_vector
from meetjax.adapters.tree import Bank, Edit, EditSite
from meetjax.errors import MeetjaxError
from tests.conftest import TINY, random_bank, take


def bias_only(first=0.0):
    """An edit that adds at `down`, `first` behind the first block."""
    t = np.array(take(random_bank(TINY, ("edit",), editable=("down",)), 0).edit.down.t)
    t[0] = first
    return Bank(edit=Edit(down=EditSite(np.zeros_like(t), t)))


def test_round_trip_in_llama_cpps_names(tmp_path):
    bank = bias_only()
    write_control_vector(tmp_path, bank, TINY)
    reader = gguf.GGUFReader(tmp_path / FILE)
    assert reader.fields["general.architecture"].contents() == "controlvector"
    assert reader.fields["controlvector.model_hint"].contents() == "llama"
    assert reader.fields["controlvector.layer_count"].contents() == TINY.layers
    assert [tensor.name for tensor in reader.tensors] == ["direction.1", "direction.2"]
    np.testing.assert_array_equal(reader.tensors[1].data, bank.edit.down.t[2, 0])
    back = read_control_vector(tmp_path / FILE, TINY)
    np.testing.assert_array_equal(back.edit.down.t, bank.edit.down.t)
    assert not back.edit.down.s.any()


def with_site(name):
    bank = bias_only()
    site = getattr(take(random_bank(TINY, ("edit",)), 0).edit, name)
    return Bank(edit=dataclasses.replace(bank.edit, **{name: site}))


REFUSED = {
    "scale": (
        with_site("down"),
        "the edit scales the output of down, a control vector only adds; expected s = 0 everywhere; found |s| up to",
    ),
    "inside": (with_site("o"), "the edit at o acts inside the block"),
    "first block": (bias_only(0.5), "llama.cpp has no direction behind the first block; expected t = 0 there; found |t| up to 0.5"),
    "no edit": (random_bank(TINY, ("lora",)), "expected an edit at down; found none"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_say_is_refused_with_the_reason(name, tmp_path):
    bank, told = REFUSED[name]
    with pytest.raises(MeetjaxError) as caught:
        write_control_vector(tmp_path, bank, TINY)
    assert told in str(caught.value) and "--to merged" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_files_of_another_kind_are_refused(tmp_path):
    (tmp_path / FILE).write_bytes(b"GGUF?")
    with pytest.raises(MeetjaxError, match="not a control vector"):
        read_control_vector(tmp_path / FILE, TINY)
    write_control_vector(tmp_path, bias_only(), TINY)
    with pytest.raises(MeetjaxError, match=r"expected direction\.1 to direction\.1 of width 32; found direction\.2"):
        read_control_vector(tmp_path / FILE, dataclasses.replace(TINY, layers=2))
