"""Checkpoints: what goes in comes out bit for bit, on any mesh; nothing is skipped; a broken or foreign one is told in one line."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meetjax.adapters.tree import flatten
from meetjax.errors import MeetjaxError
from meetjax.train.checkpoint import KEEP, Checkpoints
from meetjax.train.optim import make_optimizer
from meetjax.train.sharding import make_mesh, replicated
from meetjax.train.stage import Optim
from meetjax.train.step import init_state, partition
from tests.conftest import TINY, random_bank, random_params

IDENTITY = {"fingerprint": "abc", "recipe": {"train": {"steps": 9}, "stages": [{"optim": {"learning_rate": 1e-3}}]}}
POSITION = {"next_index": 7, "key": "k"}


def make_state(step=0, seed=1):
    """A LoRA's state after `step` steps whose every leaf is a different random number."""
    trainable, _ = partition(random_params(TINY), random_bank(TINY, ("lora",), entries=(0,), seed=seed), kinds=("lora",), base=False)
    state = init_state(trainable, make_optimizer(Optim(), 9))
    draw = np.random.default_rng(seed)
    leaves, tree = jax.tree.flatten(state)
    leaves = [jnp.asarray(draw.normal(size=leaf.shape), leaf.dtype) for leaf in leaves]
    state = jax.tree.unflatten(tree, leaves)
    return type(state)(state.trainable, state.opt_state, jnp.int32(step))


def save(folder, *states, identity=IDENTITY):
    checkpoints = Checkpoints(folder, identity)
    for state in states:
        checkpoints.save(state, POSITION | {"next_index": int(state.step)})
    checkpoints.close()


def restore(folder, like, identity=IDENTITY):
    checkpoints = Checkpoints(folder, identity)
    try:
        return checkpoints.restore(like)
    finally:
        checkpoints.close()


def error_of(call) -> str:
    with pytest.raises(MeetjaxError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_round_trip_is_bit_equal(tmp_path):
    """Adapters, both moments, counts, step and data position, each in its dtype."""
    saved = make_state(step=3)
    save(tmp_path, saved)
    state, position = restore(tmp_path, make_state(seed=2))
    assert position == {"next_index": 3, "key": "k"}
    assert jax.tree.structure(state) == jax.tree.structure(saved)
    for path, leaf in flatten(saved).items():
        found = flatten(state)[path]
        assert found.dtype == leaf.dtype
        np.testing.assert_array_equal(found, leaf, err_msg=path)


def test_restores_onto_another_mesh(tmp_path):
    """Saved from one device, placed as `like` asks: on all eight."""
    saved = make_state(step=3)
    save(tmp_path, saved)
    spread = replicated(make_mesh((2, 2, 2)))
    state, _ = restore(tmp_path, jax.device_put(make_state(seed=2), spread))
    assert all(leaf.sharding == spread for leaf in jax.tree.leaves(state))
    jax.tree.map(np.testing.assert_array_equal, state, saved)


def test_nothing_to_restore_is_none(tmp_path):
    assert restore(tmp_path, make_state()) is None


def test_base_not_in_checkpoint(tmp_path):
    """Trainable leaves, their moments and a few scalars are all there is."""
    saved = make_state(step=1)
    save(tmp_path, saved)
    largest = max(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    trained = sum(leaf.nbytes for leaf in jax.tree.leaves(saved))
    assert 0.1 * trained < largest < 1.1 * trained  # 34 kB; the tiny base is 105 kB
    assert all("embed" not in path and "blocks" not in path for path in flatten(saved))


def test_every_save_is_written(tmp_path):
    """A save asked for while the one before it is being written waits; Orbax's own policy would skip it in silence."""
    checkpoints = Checkpoints(tmp_path, IDENTITY)
    for step in range(1, 6):
        checkpoints.save(make_state(step, seed=step), POSITION)
        if step in (2, 5):
            assert checkpoints.newest == step
    checkpoints.close()
    assert sorted(int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()) == [5 - KEEP + 1, 5]
    state, _ = restore(tmp_path, make_state())
    jax.tree.map(np.testing.assert_array_equal, state, make_state(5, seed=5))


def test_saved_values_are_those_of_the_call(tmp_path):
    """The training step reuses the buffers of the state while the write goes on."""
    state = make_state(step=1)
    expected = jax.tree.map(np.array, state)
    checkpoints = Checkpoints(tmp_path, IDENTITY)
    checkpoints.save(state, POSITION)
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 0, tree), donate_argnums=0)
    overwrite(state)
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, restore(tmp_path, make_state())[0], expected)


@pytest.mark.parametrize(
    ("identity", "told"),
    [
        (IDENTITY | {"fingerprint": "xyz"}, "checkpoint of another run: fingerprint; expected abc; found xyz"),
        (IDENTITY | {"recipe": IDENTITY["recipe"] | {"train": {"steps": 10}}}, "recipe.train.steps; expected 9; found 10"),
        (
            IDENTITY | {"recipe": IDENTITY["recipe"] | {"stages": [{"optim": {"learning_rate": 2e-3}}]}},
            "recipe.stages.0.optim.learning_rate; expected 0.001; found 0.002",
        ),
    ],
    ids=["base", "steps", "rate"],
)
def test_checkpoint_of_another_run_is_refused(tmp_path, identity, told):
    save(tmp_path, make_state(step=1))
    message = error_of(lambda: restore(tmp_path, make_state(), identity))
    assert str(tmp_path) in message
    assert told in message


def test_what_a_killed_run_left_is_ignored_and_removed(tmp_path):
    save(tmp_path, make_state(step=1), make_state(step=2, seed=2))
    whole = next(path for path in tmp_path.iterdir() if path.name == "2")
    whole.rename(tmp_path / "2.orbax-checkpoint-tmp")
    state, _ = restore(tmp_path, make_state())
    assert int(state.step) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1"]


def test_broken_checkpoint_is_told_in_one_line(tmp_path):
    save(tmp_path, make_state(step=1))
    for file in (tmp_path / "1" / "state").rglob("*"):
        if file.is_file() and file.stat().st_size > 100:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert f"{tmp_path}: checkpoint could not be read" in error_of(lambda: restore(tmp_path, make_state()))


@pytest.mark.parametrize("damage", ["shortened", "changed", "gone"])
def test_a_newest_checkpoint_that_is_broken_gives_way_to_the_one_before(tmp_path, damage):
    """It says so, keeps the broken one beside, and writes that step again when it comes."""
    save(tmp_path, make_state(step=1), make_state(step=2, seed=2))
    for file in (tmp_path / "2" / "state").rglob("*"):
        if file.is_file() and (size := file.stat().st_size) > 100:
            content = bytearray(file.read_bytes())
            content[size // 2 : size // 2 + 8] = b"\x55" * 8
            file.write_bytes(content[: size // 2] if damage == "shortened" else content)
            if damage == "gone":
                file.unlink()
    said, checkpoints = [], Checkpoints(tmp_path, IDENTITY)
    state, position = checkpoints.restore(make_state(seed=3), said.append)
    assert position["next_index"] == 1
    jax.tree.map(np.testing.assert_array_equal, state, make_state(step=1))
    (line,) = said
    assert line.startswith("checkpoint of step 2 cannot be read, going on from step 1: ")
    checkpoints.save(make_state(step=2, seed=4), POSITION)
    assert checkpoints.newest == 2
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, restore(tmp_path, make_state())[0], make_state(step=2, seed=4))
    assert {path.name for path in tmp_path.iterdir()} >= {"1", "2", "2.unreadable"}


def test_folder_that_cannot_be_made_is_told_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    assert "checkpoint could not be opened" in error_of(lambda: Checkpoints(tmp_path / "file" / "checkpoints", IDENTITY))
